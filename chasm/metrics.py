"""Metrics: pure functions in float64, and their streaming form for training.

Rows and columns that are constant have no correlation: they give NaN, which the caller counts
and leaves out, never 0. All functions take (images, units).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import MeanSquaredError, Metric, MetricCollection
from torchmetrics.regression import PearsonCorrCoef


def pattern_correlation(prediction: Tensor, target: Tensor) -> Tensor:
    """Pearson r across units, for every image.

    Parameters
    ----------
    prediction, target
        (images, units), z-scored.

    Returns
    -------
    Tensor
        (images,), float64 in [-1, 1]; NaN where either pattern is constant.
    """
    return _pearson(_pair(prediction, target), dim=1)


def centred_pattern_correlation(prediction: Tensor, target: Tensor, train_mean: Tensor) -> Tensor:
    """Pattern correlation after the train mean pattern is subtracted from both.

    Parameters
    ----------
    prediction, target
        (images, units), z-scored.
    train_mean
        (units,), mean over the train images.

    Returns
    -------
    Tensor
        (images,), float64; NaN where either pattern is constant, hence for a prediction that
        equals the mean pattern.
    """
    mean = train_mean.double()
    return pattern_correlation(prediction.double() - mean, target.double() - mean)


def voxelwise_correlation(prediction: Tensor, target: Tensor) -> Tensor:
    """Pearson r across images, for every unit (voxel or parcel).

    Parameters
    ----------
    prediction, target
        (images, units), z-scored.

    Returns
    -------
    Tensor
        (units,), float64 in [-1, 1]; NaN where either column is constant.
    """
    return _pearson(_pair(prediction, target), dim=0)


def r2(prediction: Tensor, target: Tensor, train_mean: Tensor | float = 0.0) -> Tensor:
    """Explained variance 1 - SSE / SST of every unit, with the train mean as reference.

    Parameters
    ----------
    prediction, target
        (images, units), z-scored.
    train_mean
        (units,) or scalar, the prediction that scores 0.

    Returns
    -------
    Tensor
        (units,), float64, at most 1; NaN where the target never differs from the reference.
    """
    predicted, true = _pair(prediction, target)
    reference = torch.as_tensor(train_mean, dtype=torch.float64, device=true.device)
    total = (true - reference).square().sum(0)
    error = (true - predicted).square().sum(0)
    return 1 - error / torch.where(total > 0, total, math.nan)


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over images and units, scalar float64."""
    predicted, true = _pair(prediction, target)
    return (predicted - true).square().mean()


def image_identification(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Score for every image how surely its measured pattern is traced to it.

    Each measured pattern is correlated with the predictions for all images, which are ranked.
    Ties share their ranks, so that a prediction which ignores the image is at chance.

    Parameters
    ----------
    prediction, target
        (images, units); n images with a defined correlation are used.

    Returns
    -------
    dict
        Each (images,) float64 in [0, 1]. "top1" and "top5": probability that the own image is
        among the first 1 or 5 (chance 1/n, 5/n); "two_way": probability that it beats another
        image (chance 1/2). NaN where a pattern is constant or not finite, and everywhere if
        fewer than two images remain.
    """
    predicted, true = _pair(prediction, target)
    keep = pattern_correlation(predicted, true).isfinite()
    n = int(keep.sum())
    scores = {
        name: predicted.new_full((len(keep),), math.nan) for name in ("top1", "top5", "two_way")
    }
    if n < 2:
        return scores
    similarity = _unit_rows(true[keep]) @ _unit_rows(predicted[keep]).T
    own = similarity.diagonal()[:, None]
    margin = 1e-10
    better = (similarity > own + margin).sum(1).double()
    tied = ((similarity - own).abs() <= margin).sum(1).double() - 1
    for k in (1, 5):
        scores[f"top{k}"][keep] = ((k - better) / (tied + 1)).clamp(0, 1)
    scores["two_way"][keep] = 1 - (better + tied / 2) / (n - 1)
    return scores


def identification(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Average `image_identification` over images.

    Returns
    -------
    dict
        "top1", "top5" and "two_way", NaN if fewer than two images have a defined correlation,
        and "excluded": the number of images without one.
    """
    scores = image_identification(prediction, target)
    excluded = ~pattern_correlation(prediction, target).isfinite()
    means = {name: float(values.nanmean()) for name, values in scores.items()}
    return {**means, "excluded": float(excluded.sum())}


class PatternCorrelation(Metric):
    """Running mean over images of the pattern correlation; constant images are left out."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch of (images, units)."""
        r = pattern_correlation(prediction, target)
        self.total += r.nansum()
        self.count += r.isfinite().sum()

    def compute(self) -> Tensor:
        """Mean over the images so far, float64 scalar; NaN without any."""
        return self.total / self.count


class VoxelwiseCorrelation(Metric):
    """Running Pearson r per unit; mean and median over units, constant units left out.

    Parameters
    ----------
    n_units
        Voxels or parcels.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, n_units: int) -> None:
        super().__init__()
        self.n_units = n_units
        self.correlation = PearsonCorrCoef(num_outputs=n_units).set_dtype(torch.float64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch of (images, units)."""
        shape = (-1,) if self.n_units == 1 else (-1, self.n_units)
        predicted, true = _pair(prediction, target)
        self.correlation.update(predicted.reshape(shape), true.reshape(shape))

    def compute(self) -> dict[str, Tensor]:
        """Mean and median over units with a defined correlation, named scalars."""
        r = self.correlation.compute()
        return {
            "voxelwise_correlation_mean": r.nanmean(),
            "voxelwise_correlation_median": r.nanquantile(0.5),
        }

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self.correlation.reset()


class EncodingMetrics(MetricCollection):
    """Streaming metrics of an encoding model, for validation during training.

    ``compute`` returns pattern_correlation, voxelwise_correlation_mean,
    voxelwise_correlation_median and mse, each a scalar, with `prefix` in front.

    Parameters
    ----------
    n_units
        Voxels or parcels.
    prefix
        Put before every name, e.g. "val/".
    """

    def __init__(self, n_units: int, prefix: str | None = None) -> None:
        metrics: dict[str, Metric | MetricCollection] = {
            "pattern_correlation": PatternCorrelation(),
            "voxelwise_correlation": VoxelwiseCorrelation(n_units),
            "mse": MeanSquaredError().set_dtype(torch.float64),
        }
        super().__init__(metrics, prefix=prefix, compute_groups=False)


def _pair(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if prediction.shape != target.shape or prediction.ndim != 2:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} "
            "must both be (images, units)"
        )
    return prediction.detach().double(), target.detach().double()


def _pearson(pair: tuple[Tensor, Tensor], dim: int) -> Tensor:
    x, y = (values - values.mean(dim, keepdim=True) for values in pair)
    constant = torch.zeros((), dtype=torch.bool, device=x.device)
    for values in pair:
        constant = constant | (values.amax(dim) == values.amin(dim))
    r = (x * y).sum(dim) / (x.square().sum(dim) * y.square().sum(dim)).sqrt()
    return r.clamp(-1, 1).masked_fill(constant, math.nan)


def _unit_rows(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values - values.mean(1, keepdim=True), dim=1, eps=0.0)
