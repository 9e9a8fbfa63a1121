"""Linear baselines on the frozen features: ridge, banded ridge and linear probe.

Every baseline is one estimator, `LinearEncoder`, with another set of feature spaces and kernel
weights. It works on linear kernels (images, images), because the flattened patch tokens of a
ViT have two orders of magnitude more features (256 x 768) than there are images.

The memory is that of the kernels, not of the features: with n train images and S spaces the
peak is about ``4 bytes * (2 S + 4) n^2`` plus three copies of the targets, e.g. 2.6 GB for
n = 9000 and S = 2, plus 1.7 GB for 16,000 units, and .3 GB for each CLS layer that has a probe
of its own. The solver is himalaya's (Dupre la Tour et al., 2022), which the penalties per unit
and the banded form come from.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from himalaya.kernel_ridge import (
    predict_weighted_kernel_ridge,
    solve_multiple_kernel_ridge_random_search,
)
from numpy.typing import NDArray

from chasm.errors import ConfigError, DataError
from chasm.models.kernels import FeatureKernels, FloatArray, linear_kernels
from chasm.progress import track

logger = logging.getLogger(__name__)

ALPHAS: FloatArray = np.logspace(-1, 5, 13, dtype=np.float32)
"""Ridge penalties searched, for kernels scaled to a mean diagonal of 1."""

BANDS: FloatArray = np.array(
    [[0.5, 0.5], [1, 0], [0.9, 0.1], [0.7, 0.3], [0.3, 0.7], [0.1, 0.9], [0, 1]], dtype=np.float32
)
"""Shares of the (CLS, patches) kernels searched by banded ridge."""

_LAYER = "cls, layer "
"""How the feature space of a single layer's CLS token is named, before its number."""


def image_folds(
    groups: NDArray[np.int64], n_folds: int, seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Split rows into folds so that all rows of an image stay together.

    Parameters
    ----------
    groups
        (rows,), the image of each row.
    n_folds
        Number of folds; lowered to the number of images when that is smaller.
    seed
        Seed of the shuffle of the images.

    Returns
    -------
    list of (train rows, held-out rows)
    """
    images, group_index = np.unique(groups, return_inverse=True)
    if len(images) < 2:
        raise DataError("groups", f"{len(images)} train image(s)", "Give at least 2 train images.")
    n_folds = min(n_folds, len(images))
    fold_of_image = np.random.default_rng(seed).permutation(np.arange(len(images)) % n_folds)
    fold = fold_of_image[group_index]
    return [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in range(n_folds)]


class LinearEncoder:
    """Kernel ridge with the penalty, and the shares of the feature spaces, chosen per unit.

    The choice is made by K-fold cross-validation (squared error) over the rows given to `fit`,
    that is over train images only.

    Parameters
    ----------
    spaces
        Names of the feature spaces, e.g. ``("cls", "patches")``.
    shares
        (candidates, spaces), non-negative rows that sum to 1: how the kernels are mixed. One
        row is ordinary ridge, several rows are banded ridge. Default: equal shares.
    alphas
        Penalties to choose from, relative to a kernel with a mean diagonal of 1.
    n_folds, seed
        Cross-validation over images.

    Attributes
    ----------
    alpha_ : (units,) the penalty chosen.
    shares_ : (units, spaces) the shares chosen.
    intercept_ : (units,) the prediction where every feature has its train mean.
    cv_scores_ : (candidates, units) minus the squared error on held-out folds, at the best penalty.
    """

    def __init__(
        self,
        spaces: Sequence[str],
        *,
        shares: FloatArray | None = None,
        alphas: FloatArray = ALPHAS,
        n_folds: int = 5,
        seed: int = 0,
    ) -> None:
        self.spaces = tuple(spaces)
        equal = np.full((1, len(self.spaces)), 1 / len(self.spaces), dtype=np.float32)
        self.shares = equal if shares is None else np.asarray(shares, dtype=np.float32)
        if self.shares.shape[1] != len(self.spaces):
            raise ConfigError(
                "shares",
                f"{self.shares.shape[1]} columns for {len(self.spaces)} feature spaces",
                "Give one column per feature space.",
            )
        self.alphas = np.asarray(alphas, dtype=np.float32)
        self.n_folds = n_folds
        self.seed = seed

    def fit(
        self,
        kernels: Mapping[str, FeatureKernels],
        targets: NDArray[Any],
        groups: NDArray[np.int64] | None = None,
    ) -> LinearEncoder:
        """Choose the penalties and fit the dual weights.

        Parameters
        ----------
        kernels
            Kernels by feature space.
        targets
            (train rows, units), e.g. z-scored betas averaged over the trials of an image.
        groups
            (train rows,), the image of each row when an image has several rows.

        Raises
        ------
        DataError
            If a target is not finite or the rows do not match.
        """
        stack = np.stack([kernels[name].train for name in self.spaces])
        targets = np.asarray(targets, dtype=np.float32)
        n_rows, n_units = targets.shape
        if stack.shape[1] != n_rows:
            raise DataError(
                "targets",
                f"{n_rows} rows, but kernels of {stack.shape[1]} rows",
                "Give one row of targets per train row of the features.",
            )
        if not np.isfinite(targets).all():
            raise DataError(
                "targets",
                "NaN or infinite train responses",
                "Fit on train images only and check the store.",
            )
        groups = np.arange(n_rows) if groups is None else np.asarray(groups)
        # A share of 0 has the log-weight -inf, which is meant.
        with np.errstate(divide="ignore"):
            deltas, dual, scores, alpha, intercept = solve_multiple_kernel_ridge_random_search(
                stack,
                targets,
                n_iter=self.shares,
                alphas=self.alphas,
                cv=image_folds(groups, self.n_folds, self.seed),
                fit_intercept=True,
                return_weights="dual",
                return_alphas=True,
                # Bounds of the solver's (alphas, rows, rows) and (alphas, rows, units) arrays.
                n_targets_batch=min(n_units, 2048),
                n_alphas_batch=int(np.clip(10**8 // n_rows**2, 1, len(self.alphas))),
                progress_bar=False,
            )
        self.alpha_: FloatArray = np.asarray(alpha)
        self.shares_: FloatArray = np.exp(np.asarray(deltas)).T * self.alpha_[:, None]
        self._dual: FloatArray = np.asarray(dual)
        self._deltas: FloatArray = np.asarray(deltas)
        self.intercept_: FloatArray = np.asarray(intercept)
        self.cv_scores_: FloatArray = np.asarray(scores)
        self.n_parameters_ = n_units * (1 + sum(kernels[s].n_features for s in self.spaces))
        return self

    def dual_of(self, space: str) -> FloatArray:
        """Dual weights of one space, (train rows, units): its part is kernel @ dual."""
        weights: FloatArray = np.exp(self._deltas[self.spaces.index(space)]) * self._dual
        return weights

    def predict(self, kernels: Mapping[str, FeatureKernels]) -> FloatArray:
        """Predict (test images, units) from the test kernels.

        Raises
        ------
        DataError
            If the kernels were computed without test rows.
        """
        blocks = []
        for name in self.spaces:
            test = kernels[name].test
            if test is None:
                raise DataError(
                    f"kernels:{name}",
                    "no test kernel",
                    "Give test_rows to linear_kernels.",
                )
            blocks.append(test)
        predicted = predict_weighted_kernel_ridge(
            np.stack(blocks), self._dual, self._deltas, n_targets_batch=2048
        )
        return np.asarray(predicted + self.intercept_, dtype=np.float32)


def fit_mixture(
    kernels: Mapping[str, FeatureKernels], targets: NDArray[Any], shares: FloatArray, seed: int = 0
) -> LinearEncoder:
    """Fit ridge with one mixture of the feature spaces for all units, a penalty for each unit.

    Both are chosen by cross-validation over train images. Where these are few, a mixture for
    each unit, as banded ridge has it, is chosen by chance.

    Parameters
    ----------
    kernels
        Of every space.
    targets
        (train images, units).
    shares
        (candidates, spaces), see `LinearEncoder`; columns in the order of `kernels`.
    seed
        Of the folds.

    Raises
    ------
    DataError
        A target is not finite.
    """
    spaces = tuple(kernels)
    searched = LinearEncoder(spaces, shares=shares, seed=seed).fit(kernels, targets)
    best = int(searched.cv_scores_.mean(axis=1).argmax())
    logger.debug("shares of %s: %s", spaces, shares[best])
    return LinearEncoder(spaces, shares=shares[[best]], seed=seed).fit(kernels, targets)


@dataclass(frozen=True)
class BaselinePrediction:
    """What a baseline predicts for the test images.

    Attributes
    ----------
    values
        (test images, units) float32.
    n_parameters
        Primal weights plus intercepts.
    details
        Plain values that describe the fit: spaces, folds, penalties, shares.
    """

    values: FloatArray
    n_parameters: int
    details: dict[str, Any]


def linear_baselines(
    n_folds: int = 5, seed: int = 0, cls_layers: Sequence[int] = ()
) -> dict[str, LinearEncoder]:
    """Make the linear rows that every score table carries.

    Parameters
    ----------
    n_folds, seed
        See `LinearEncoder`.
    cls_layers
        Backbone layers whose CLS tokens are probed one by one; without any there is one probe,
        of all CLS tokens together.
    """
    options: dict[str, Any] = {"n_folds": n_folds, "seed": seed}
    probes = {f"linear probe (CLS, layer {n})": f"{_LAYER}{n}" for n in cls_layers}
    probes = probes or {"linear probe (CLS)": "cls"}
    return {
        "ridge": LinearEncoder(("cls", "patches"), **options),
        "ridge (patches)": LinearEncoder(("patches",), **options),
        "banded ridge": LinearEncoder(("cls", "patches"), shares=BANDS, **options),
        **{name: LinearEncoder((space,), **options) for name, space in probes.items()},
    }


def baseline_kernels(
    tokens: Mapping[str, NDArray[Any]],
    train_rows: NDArray[np.int64],
    test_rows: NDArray[np.int64],
    cls_layers: Sequence[int] = (),
) -> dict[str, FeatureKernels]:
    """Compute the kernels that all linear baselines share, whatever they are fitted to.

    Parameters
    ----------
    tokens
        ``{"cls": (images, layers, width), "patches": (images, patches, width)}``; memory maps
        of the token cache are welcome.
    train_rows, test_rows
        Rows of the tokens. A row may be repeated when an image has several rows of targets.
    cls_layers
        Numbers of the backbone layers of the CLS tokens, in their order. Where there are
        several, each gets a kernel, and with it a linear probe, of its own.

    Raises
    ------
    DataError
        If a token is not finite, no feature varies, or there are more or fewer CLS tokens than
        `cls_layers`.
    """
    spaces = dict(tokens)
    if cls_layers and len(cls_layers) != tokens["cls"].shape[1]:
        raise DataError(
            "tokens:cls",
            f"{tokens['cls'].shape[1]} CLS tokens per image, but {len(cls_layers)} layers named",
            "Name the layer of every CLS token.",
        )
    if len(cls_layers) > 1:
        cls = tokens["cls"]
        spaces |= {f"{_LAYER}{n}": cls[:, i : i + 1] for i, n in enumerate(cls_layers)}
    return {
        space: linear_kernels(values, train_rows, test_rows, description=f"kernel of {space}")
        for space, values in spaces.items()
    }


def fit_to_kernels(
    kernels: Mapping[str, FeatureKernels],
    targets: NDArray[Any],
    groups: NDArray[np.int64],
    *,
    n_folds: int = 5,
    seed: int = 0,
) -> dict[str, BaselinePrediction]:
    """Fit every linear baseline to one kind of target and predict the test images.

    Parameters
    ----------
    kernels
        See `baseline_kernels`; the same ones serve any number of targets. Those of single CLS
        layers get a linear probe each.
    targets
        (train rows, units), responses of the train rows. Test responses are never needed.
    groups
        (train rows,), image of each train row.
    n_folds, seed
        Cross-validation over train images that chooses the penalties.

    Returns
    -------
    dict
        Row name to prediction, in the order of the table.

    Raises
    ------
    DataError
        If a target is not finite or the rows do not match.
    """
    predictions = {}
    layers = [int(space.removeprefix(_LAYER)) for space in kernels if space.startswith(_LAYER)]
    encoders = linear_baselines(n_folds, seed, layers)
    for name, encoder in track(encoders.items(), "linear baselines", len(encoders)):
        encoder.fit(kernels, targets, groups)
        predictions[name] = BaselinePrediction(
            encoder.predict(kernels),
            encoder.n_parameters_,
            {
                "spaces": list(encoder.spaces),
                "folds": n_folds,
                "seed": seed,
                "alpha_median": float(np.median(encoder.alpha_)),
                "alpha_at_edge": float(np.isin(encoder.alpha_, encoder.alphas[[0, -1]]).mean()),
                "mean_share": [float(s) for s in encoder.shares_.mean(axis=0)],
            },
        )
        logger.debug("%s: %s", name, predictions[name].details)
    return predictions
