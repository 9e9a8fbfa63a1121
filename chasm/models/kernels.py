"""Linear kernels of a feature space, computed in blocks of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chasm.errors import DataError
from chasm.progress import track

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class FeatureKernels:
    """Linear kernels of one feature space, scaled to a mean train diagonal of 1.

    Attributes
    ----------
    train
        (train images, train images), symmetric.
    test
        (test images, train images), None when no test rows were asked for.
    n_features
        Number of features that vary over the train images.
    """

    train: FloatArray
    test: FloatArray | None
    n_features: int


def linear_kernels(
    tokens: NDArray[Any],
    train_rows: NDArray[np.int64],
    test_rows: NDArray[np.int64] | None = None,
    *,
    block_bytes: int = 128 * 2**20,
    description: str = "kernel",
) -> FeatureKernels:
    """Compute the linear kernels of one feature space, reading it in blocks of features.

    Each feature is standardised by its mean and standard deviation over the train rows;
    features that are constant there are left out.

    Parameters
    ----------
    tokens
        (images, ...), e.g. CLS tokens (images, layers, width) or patch tokens
        (images, patches, width); any float dtype; may be a memory map, of which only the rows
        asked for are read.
    train_rows, test_rows
        Rows of `tokens`.
    block_bytes
        Upper bound on the memory of one block of standardised features.
    description
        Name shown with the progress.

    Raises
    ------
    DataError
        If a token is not finite or no feature varies.
    """
    if tokens.ndim == 2:
        tokens = tokens[:, :, None]
    train_rows = np.asarray(train_rows, dtype=np.int64)
    rows = train_rows if test_rows is None else np.concatenate([train_rows, test_rows])
    n_train = len(train_rows)
    inner = int(np.prod(tokens.shape[2:]))
    step = max(1, block_bytes // (4 * len(rows) * inner))
    starts = range(0, tokens.shape[1], step)
    train = np.zeros((n_train, n_train), dtype=np.float32)
    test = None
    if test_rows is not None:
        test = np.zeros((len(test_rows), n_train), dtype=np.float32)
    n_features = 0
    for start in track(starts, description, len(starts)) if len(starts) > 8 else starts:
        block = np.asarray(tokens[rows, start : start + step], dtype=np.float32)
        block = block.reshape(len(rows), -1)
        if not np.isfinite(block).all():
            raise DataError(
                f"tokens:{description}",
                "NaN or infinite values among the features",
                "Check the token cache (extract again with --fresh).",
            )
        mean = block[:n_train].mean(axis=0, dtype=np.float64).astype(np.float32)
        block -= mean
        scale = np.sqrt(np.mean(np.square(block[:n_train]), axis=0, dtype=np.float64))
        # A constant float32 column leaves rounding dust, not exactly 0.
        varies = scale > 1e-6 * np.maximum(1.0, np.abs(mean))
        block = block[:, varies] / scale[varies].astype(np.float32)
        n_features += int(varies.sum())
        train += block[:n_train] @ block[:n_train].T
        if test is not None:
            test += block[n_train:] @ block[:n_train].T
    if n_features == 0:
        raise DataError(
            f"tokens:{description}",
            "no feature varies over the train images",
            "Use another backbone or more train images.",
        )
    factor = np.float32(1.0 / np.mean(np.diagonal(train), dtype=np.float64))
    train *= factor
    if test is not None:
        test *= factor
    return FeatureKernels(train, test, n_features)
