"""Solve a `RidgeHead` on train images: banded ridge by himalaya, written as weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import nn

from chasm.data.batches import EncodingDataset
from chasm.data.datamodule import NSDDataModule
from chasm.models.baselines import BANDS, LinearEncoder
from chasm.models.kernels import FeatureKernels, FloatArray, linear_kernels
from chasm.models.linear_path import LinearPath, RidgeHead, SpacePath
from chasm.progress import track

log = logging.getLogger(__name__)

SPACES = ("cls", "patches")
BLOCK_BYTES = 128 * 2**20

Fit = Callable[[Mapping[str, FeatureKernels], FloatArray], LinearEncoder]
"""(kernels by space, (train images, units) targets) -> fitted ridge."""


def fit_linear_path(
    path: LinearPath,
    data: NSDDataModule,
    targets_of: Callable[[torch.Tensor], torch.Tensor],
    seed: int,
) -> None:
    """Fit banded ridge to the train images and put its weights into `path`.

    Penalty and shares of the spaces are chosen per unit by cross-validation over train images.

    Parameters
    ----------
    path
        Changed in place.
    data
        Of which the train images' tokens and betas are read.
    targets_of
        (images, voxels) z-scored betas -> (images, units).
    seed
        Of the folds.

    Raises
    ------
    DataError
        A token or response is not finite, or no feature varies.
    """
    train = data.dataset("train")
    tokens = {space: getattr(data.tokens, space) for space in SPACES}
    banded = LinearEncoder(SPACES, shares=BANDS, seed=seed)
    solve(path, tokens, train.image_ids, responses(train, targets_of), banded.fit)


def responses(
    images: EncodingDataset, targets_of: Callable[[torch.Tensor], torch.Tensor]
) -> FloatArray:
    """Read the responses to a dataset's images, (images, units), a few images at a time."""
    blocks = [range(s, min(s + 256, len(images))) for s in range(0, len(images), 256)]
    return np.concatenate(
        [targets_of(torch.from_numpy(images.betas(block))).numpy() for block in blocks]
    )


def solve(
    head: RidgeHead,
    features: Mapping[str, NDArray[Any]],
    rows: NDArray[np.int64],
    targets: FloatArray,
    fit: Fit,
) -> None:
    """Fit ridge and put its weights into a head.

    Parameters
    ----------
    head
        Changed in place.
    features
        (images, ...) of every space of the head; memory maps are welcome.
    rows
        (train images,), rows of the features.
    targets
        (train images, units).
    fit
        Gives the fitted ridge from the kernels of the spaces and the targets.

    Raises
    ------
    DataError
        A feature or response is not finite, or no feature varies.
    """
    kernels = {
        space: linear_kernels(values, rows, description=f"kernel of {space}")
        for space, values in features.items()
    }
    log.info("closed form: banded ridge of %d units on %d images", targets.shape[1], len(rows))
    ridge = fit(kernels, targets)
    for space, values in features.items():
        path = head.get_submodule(space)
        assert isinstance(path, SpacePath)
        _put(path, values, rows, kernels[space], ridge.dual_of(space))
    with torch.no_grad():
        head.bias.copy_(torch.from_numpy(ridge.intercept_))
        head.fitted.fill_(True)


def _put(
    path: SpacePath,
    tokens: NDArray[Any],
    rows: NDArray[np.int64],
    kernel: FeatureKernels,
    dual: FloatArray,
) -> None:
    """Write the weights of one space: of the features, or of their principal components."""
    matrix = dual
    if path.readout is not None:
        # K = U S U'; the r-th component's score of an image z is z Z' u_r / sqrt(S_r).
        rank = path.readout.in_features
        span = [max(0, len(rows) - rank), len(rows) - 1]
        power, vectors = scipy.linalg.eigh(kernel.train, subset_by_index=span)
        keep = power > 1e-6 * power.max()
        power, vectors = power[keep], vectors[:, keep]
        matrix = np.zeros((len(rows), rank), np.float32)
        matrix[:, : len(power)] = vectors / np.sqrt(power)
        readout = np.zeros((path.readout.out_features, rank), np.float32)
        readout[:, : len(power)] = (np.sqrt(power)[:, None] * (vectors.T @ dual)).T
        with torch.no_grad():
            path.readout.weight.copy_(torch.from_numpy(readout))
    _write_projection(path.projection, tokens, rows, matrix / np.float32(kernel.n_features))


def _write_projection(
    layer: nn.Linear, tokens: NDArray[Any], rows: NDArray[np.int64], matrix: FloatArray
) -> None:
    """Set ``layer(x) = standardised(x) @ Z' @ matrix``, over blocks of features."""
    width = int(np.prod(tokens.shape[2:]))
    step = max(1, BLOCK_BYTES // (4 * len(rows) * width))
    starts = range(0, tokens.shape[1], step)
    bias = np.zeros(matrix.shape[1])
    for start in track(starts, "closed-form weights", len(starts)) if len(starts) > 8 else starts:
        block = np.asarray(tokens[rows, start : start + step], np.float32).reshape(len(rows), -1)
        mean = block.mean(axis=0, dtype=np.float64)
        block -= mean.astype(np.float32)
        scale = np.sqrt(np.mean(np.square(block), axis=0, dtype=np.float64))
        varies = scale > 1e-6 * np.maximum(1.0, np.abs(mean))  # as in linear_kernels
        inverse = np.where(varies, 1 / np.where(varies, scale, 1), 0)
        # Standardised twice: once for Z', once for the image to be predicted.
        weights = (block.T @ matrix) * np.square(inverse)[:, None]
        bias -= mean @ weights
        first = start * width
        with torch.no_grad():
            layer.weight[:, first : first + len(mean)] = torch.from_numpy(
                weights.T.astype(np.float32)
            )
    with torch.no_grad():
        layer.bias.copy_(torch.from_numpy(bias))
