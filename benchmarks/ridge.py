"""Kernel ridge and banded ridge against scikit-learn, with the same penalties and folds.

    python benchmarks/ridge.py

Every unit has its own penalty (and, in banded ridge, its own shares of the two kernels), chosen
by squared error in the same five folds. scikit-learn's `RidgeCV` and `GridSearchCV` choose one
penalty for all units where folds are given, so its way is what they do inside: `KernelRidge` on
a centred kernel for every candidate and fold, errors kept by unit, then one fit for the units of
each candidate chosen. Predictions must agree. "kernel" is that of the patch tokens, standardised
by `StandardScaler` and multiplied at once in the one way, in blocks in ours. Operations are those
of ours: an eigendecomposition (9 n^3, Golub and Van Loan) for each mixture of kernels and fold,
and products of matrices; bytes are the data read once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from measure import Row, finish, in_turns, options
from sklearn.kernel_ridge import KernelRidge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import KernelCenterer, StandardScaler
from threadpoolctl import threadpool_limits

from chasm.models.baselines import ALPHAS, BANDS, LinearEncoder, image_folds
from chasm.models.kernels import FeatureKernels, FloatArray, linear_kernels
from chasm.progress import track

SIZES = {"demo": (900, 1400, 64, 36), "1/8 of NSD": (1107, 1965, 256, 768)}
"""Train images, units, patches and their width; NSD's subject 1 has 9000 images of its own."""
N_TEST, CLS_WIDTH = 200, 768
Steps, Results = dict[str, Callable[[], FloatArray]], dict[str, FloatArray]
SHARES = {"ridge": np.array([[0.5, 0.5]], np.float32), "banded ridge": BANDS}


def make_data(
    images: int, units: int, patches: int, width: int
) -> tuple[np.ndarray, dict[str, FeatureKernels], FloatArray]:
    """Draw patch tokens, the kernels of CLS and patches, and noisy linear responses."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((images + N_TEST, patches, width), np.float32).astype(np.float16)
    tokens += (2 * rng.standard_normal((images + N_TEST, 1, width), np.float32)).astype(np.float16)
    cls = rng.standard_normal((images + N_TEST, 1, CLS_WIDTH), np.float32)
    rows, test = np.arange(images), np.arange(images, images + N_TEST)
    kernels = {
        "cls": linear_kernels(cls, rows, test), "patches": linear_kernels(tokens, rows, test)
    }  # fmt: skip
    signal = cls[:images, 0] @ rng.standard_normal((CLS_WIDTH, units), np.float32)
    mean = tokens[:images].mean(1, dtype=np.float32) @ rng.standard_normal((width, units), "f")
    signal = signal / signal.std(0) * rng.random(units, "f") + mean / mean.std(0)
    return tokens[:images], kernels, signal + rng.standard_normal((images, units), np.float32)


def ours(kernels: dict[str, FeatureKernels], targets: FloatArray, shares: FloatArray) -> FloatArray:
    """Fit and predict by `LinearEncoder`."""
    return LinearEncoder(("cls", "patches"), shares=shares).fit(kernels, targets).predict(kernels)


def scikit_learn(
    kernels: dict[str, FeatureKernels], targets: FloatArray, shares: FloatArray
) -> FloatArray:
    """Fit and predict by scikit-learn's `KernelRidge`."""
    folds = image_folds(np.arange(len(targets)), 5, 0)
    candidates = [(share, float(alpha)) for share in shares for alpha in ALPHAS]
    errors = np.zeros((len(candidates), targets.shape[1]))
    for number, (share, alpha) in enumerate(candidates):
        kernel = _mix(share, kernels["cls"].train, kernels["patches"].train)
        for train, held_out in folds:
            model, mean = _ridge(alpha), targets[train].mean(0)
            model.fit(kernel[np.ix_(train, train)], targets[train] - mean)
            predicted = model.predict(kernel[np.ix_(held_out, train)]) + mean
            errors[number] += np.square(predicted - targets[held_out]).mean(0) / len(folds)
    chosen = errors.argmin(0)
    result = np.empty((N_TEST, targets.shape[1]), np.float32)
    for number in np.unique(chosen):
        share, alpha = candidates[number]
        units = chosen == number
        model, mean = _ridge(alpha), targets[:, units].mean(0)
        model.fit(
            _mix(share, kernels["cls"].train, kernels["patches"].train), targets[:, units] - mean
        )
        test = _mix(share, kernels["cls"].test, kernels["patches"].test)
        result[:, units] = model.predict(test) + mean
    return result


def _mix(share: FloatArray, cls: FloatArray | None, patches: FloatArray | None) -> FloatArray:
    assert cls is not None
    assert patches is not None
    return share[0] * cls + share[1] * patches


def _ridge(alpha: float) -> Pipeline:
    return make_pipeline(KernelCenterer(), KernelRidge(alpha=alpha, kernel="precomputed"))


def kernel_at_once(tokens: np.ndarray) -> FloatArray:
    """Standardise all features and multiply them, scaled to a mean diagonal of 1."""
    features = StandardScaler().fit_transform(tokens.reshape(len(tokens), -1).astype(np.float32))
    kernel = features @ features.T
    return kernel / np.diagonal(kernel).mean()


def kernel_work(tokens: np.ndarray) -> tuple[float, float]:
    """Count bytes and operations of a kernel, which is symmetric."""
    n, features = len(tokens), tokens[0].size
    return float(tokens.nbytes + 4 * n * n), float(n * n * features)


def ridge_work(images: int, units: int, n_shares: int) -> tuple[float, float]:
    """Count bytes and operations of choosing penalties in five folds, the fit and predictions."""
    train, held_out = images * 4 // 5, images // 5
    by_alpha = 2 * held_out * train * (train + units)
    fold = 9 * train**3 + 2 * train**2 * units + len(ALPHAS) * by_alpha
    refit = n_shares * (9 * images**3 + 4 * images**2 * units) + 2 * N_TEST * images * units
    moved = 4 * (2 * images * (images + N_TEST) + (images + N_TEST) * units)
    return float(moved), float(5 * n_shares * fold + refit)


def check(one: FloatArray, other: FloatArray) -> str:
    """Compare two predictions, or kernels; units at a tie may take neighbouring penalties.

    Raises
    ------
    RuntimeError
        If more than one unit in a hundred differs.
    """
    close = (np.abs(one - other) < 1e-2 * other.std(0)).all(0).mean()
    if close < 0.99:
        raise RuntimeError(f"predictions agree in {close:.1%} of the columns only")
    return f"agree in {close:.2%} of the columns"


def measure(quick: bool, repeats: int) -> list[Row]:
    """Time kernels, ridge and banded ridge, the ways taking turns."""
    rows = []
    sizes = {"toy": (120, 60, 9, 24)} if quick else SIZES
    for name, size in sizes.items():
        tokens, kernels, targets = make_data(*size)
        text = f"{name}: {size[0]} images"
        ways: dict[str, Steps] = {
            f"{text}, kernel of {size[2]} x {size[3]}": {
                "scikit-learn": partial(kernel_at_once, tokens),
                "ours": lambda t=tokens: linear_kernels(t, np.arange(len(t))).train,
            }
        }
        counts = dict.fromkeys(ways, kernel_work(tokens))
        for model, shares in SHARES.items():
            case = f"{text} x {size[1]} units, {model}"
            counts[case] = ridge_work(size[0], size[1], len(shares))
            ways[case] = {
                "scikit-learn": partial(scikit_learn, kernels, targets, shares),
                "ours": partial(ours, kernels, targets, shares),
            }
        for case, steps in track(ways.items(), name, len(ways)):
            results: dict[str, FloatArray] = {}

            def keep(way: str, steps: Steps = steps, results: Results = results) -> None:
                results[way] = steps[way]()

            found = in_turns({way: partial(keep, way) for way in steps}, repeats, warm=0)
            agree, other = check(*results.values()), "scikit-learn"
            rows += [
                Row(
                    "ridge", case, way, float(np.median(found[way])), None, than, *counts[case],
                    note,
                )
                for way, than, note in ((other, None, ""), ("ours", other, agree))
            ]  # fmt: skip
    return rows


def main() -> None:
    """Run the benchmark and show the table."""
    given = options(__doc__, repeats=2).parse_args()
    torch.set_num_threads(given.threads)
    with threadpool_limits(given.threads):
        rows = measure(given.quick, given.repeats)
    finish(rows, given)


if __name__ == "__main__":
    main()
