"""Parcels: groups of voxels that Stage 1 predicts.

A parcellation gives every voxel the number of its parcel, or -1 where it has none. It can
aggregate voxels into parcels (plain mean, or mean of each parcel's strongest voxels in that
trial) and expand parcels back to voxels, for a whole batch on the batch's device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from chasm.errors import ConfigError, DataError

Aggregation = Literal["mean", "top_p"]
ParcellationKind = Literal["sequential", "spatial", "atlas"]


class Parcellation(nn.Module):
    """Assignment of voxels to parcels, as a module so that it follows the model's device.

    Parameters
    ----------
    labels
        (voxels,), integers; parcel of each voxel, 0..K-1 without gaps, -1 for none.

    Raises
    ------
    DataError
        If `labels` is not one-dimensional, not integer, below -1, leaves a parcel empty or has
        no parcel at all.
    """

    labels: Tensor
    _index: Tensor
    _sizes: Tensor

    def __init__(self, labels: npt.ArrayLike | Tensor) -> None:
        super().__init__()
        checked = _checked_labels(labels)
        self.register_buffer("labels", checked)
        index, sizes = _members(checked)
        self.register_buffer("_index", index, persistent=False)
        self.register_buffer("_sizes", sizes, persistent=False)
        self.register_load_state_dict_post_hook(_rebuild)

    @property
    def n_parcels(self) -> int:
        """Number of parcels K."""
        return int(self._sizes.numel())

    @property
    def n_voxels(self) -> int:
        """Number of voxels V, with or without a parcel."""
        return int(self.labels.numel())

    @property
    def sizes(self) -> Tensor:
        """(parcels,), int64: voxels in each parcel."""
        return self._sizes

    def aggregate(self, values: Tensor, how: Aggregation = "mean", p: float = 0.7) -> Tensor:
        """Summarise each parcel by one number per trial.

        Parameters
        ----------
        values
            (..., voxels); NaN in a parcel's voxel makes the parcel NaN, NaN elsewhere does not
            matter.
        how
            "mean" of all voxels, or "top_p": mean of the largest `p` fraction of the parcel's
            voxels in that trial (CHASMBrain, Stage-1 targets).
        p
            Fraction in (0, 1]; floor(p * size) voxels, at least one.

        Returns
        -------
        Tensor
            (..., parcels), dtype of `values`.

        Raises
        ------
        ConfigError
            If `how` is unknown or `p` is outside (0, 1].
        DataError
            If the last axis is not the number of voxels.
        """
        self._check_axis(values, self.n_voxels, "voxels")
        if how == "mean":
            members, valid = self._gather(values)
            return members.masked_fill(~valid, 0).sum(-1) / self._sizes
        if how != "top_p":
            raise ConfigError("aggregate:how", f"found {how!r}", 'Use "mean" or "top_p".')
        counts = top_counts(self._sizes, p)
        members, valid = self._gather(values)
        members = members.masked_fill(~valid, -math.inf)
        largest = max(1, math.floor(self._index.shape[1] * p + 1e-9))  # no need to ask `counts`
        top = members.topk(largest, dim=-1).values
        beyond = torch.arange(largest, device=values.device) >= counts[:, None]
        return top.masked_fill(beyond, 0).sum(-1) / counts

    def expand(self, parcels: Tensor, fill: float = 0.0) -> Tensor:
        """Give every voxel its parcel's value.

        Parameters
        ----------
        parcels
            (..., parcels).
        fill
            Value of voxels without a parcel.

        Returns
        -------
        Tensor
            (..., voxels).

        Raises
        ------
        DataError
            If the last axis is not the number of parcels.
        """
        self._check_axis(parcels, self.n_parcels, "parcels")
        voxels = parcels[..., self.labels.clamp(min=0)]
        return voxels.masked_fill(self.labels < 0, fill)

    def roi_weights(self, roi_labels: npt.ArrayLike | Tensor, names: Mapping[int, str]) -> Tensor:
        """Count the voxels that each parcel shares with each ROI.

        Parameters
        ----------
        roi_labels
            (voxels,), integer label of the atlas at each voxel; values not in `names` (-1, 0)
            belong to no ROI.
        names
            ROI name of each label; the columns follow its order.

        Returns
        -------
        Tensor
            (parcels, ROIs), float32 voxel counts.

        Raises
        ------
        DataError
            If `roi_labels` does not have one entry per voxel.
        """
        rois = torch.as_tensor(np.asarray(roi_labels).astype(np.int64), device=self.labels.device)
        self._check_axis(rois, self.n_voxels, "voxels")
        member = rois == torch.tensor(list(names), device=rois.device).reshape(-1, 1)
        return (self.aggregate(member.double()) * self._sizes).round().float().T.contiguous()

    def fingerprint(self) -> str:
        """Hexadecimal digest (16 characters) of the assignment."""
        data = self.labels.cpu().numpy().astype("<i8").tobytes()
        return hashlib.sha256(data).hexdigest()[:16]

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return f"n_voxels={self.n_voxels}, n_parcels={self.n_parcels}"

    def _gather(self, values: Tensor) -> tuple[Tensor, Tensor]:
        valid = self._index >= 0
        return values[..., self._index.clamp(min=0)], valid

    def _check_axis(self, values: Tensor, expected: int, axis: str) -> None:
        found = values.shape[-1] if values.ndim else 0
        if found != expected:
            raise DataError(
                "parcellation",
                f"last axis has length {found}, expected {expected} {axis}",
                "Use the parcellation that was built for this subject's store.",
            )


def top_counts(sizes: Tensor, p: float) -> Tensor:
    """Voxels kept per parcel by the top-p mean: floor(p * size), at least one.

    Raises
    ------
    ConfigError
        If `p` is outside (0, 1].
    """
    if not 0 < p <= 1:
        raise ConfigError("aggregate:p", f"found {p}, expected 0 < p <= 1", "Give a fraction.")
    return (sizes.double() * p + 1e-9).floor().long().clamp(min=1)


def sequential(n_voxels: int, size: int) -> Parcellation:
    """Cut voxels in mask order into runs of `size` (CHASMBrain); the remainder has no parcel.

    Raises
    ------
    ConfigError
        If `size` is below 1 or above `n_voxels`.
    """
    _check_size(n_voxels, size)
    labels = torch.arange(n_voxels) // size
    labels[(n_voxels // size) * size :] = -1
    return Parcellation(labels)


def spatial(coordinates: npt.ArrayLike, size: int, seed: int = 0) -> Parcellation:
    """Cut voxels into compact parcels of about `size` voxels by their coordinates.

    scikit-learn's bisecting k-means, always splitting the largest parcel, which keeps sizes
    within a factor of about two of each other. Every voxel gets a parcel.

    Parameters
    ----------
    coordinates
        (voxels, 3), voxel indices or millimetres; finite, one place per voxel.
    size
        Voxels per parcel, on average.
    seed
        Of the k-means initialisation.

    Raises
    ------
    ConfigError
        If `size` is below 1 or above the number of voxels.
    DataError
        If coordinates are missing, not finite or the same for all voxels.
    """
    points = _checked_coordinates(coordinates)
    _check_size(len(points), size)
    return Parcellation(_cluster(points, size, seed))


def atlas_bounded(
    atlas_labels: npt.ArrayLike, coordinates: npt.ArrayLike, size: int, seed: int = 0
) -> Parcellation:
    """Cut every ROI of an atlas into compact parcels that never cross its border.

    Voxels outside every ROI (labels of 0 or below) are treated as one more region, so that every
    voxel is predicted. A region with fewer than 1.5 `size` voxels is one parcel.

    Parameters
    ----------
    atlas_labels
        (voxels,), integer label per voxel.
    coordinates, size, seed
        As for `spatial`.

    Raises
    ------
    ConfigError
        If `size` is below 1 or above the number of voxels.
    DataError
        If the two arrays do not have the same number of voxels, or coordinates are unusable.
    """
    points = _checked_coordinates(coordinates)
    regions = np.maximum(np.asarray(atlas_labels).astype(np.int64), 0)
    if regions.shape != (len(points),):
        raise DataError(
            "parcellation:atlas_labels",
            f"shape {regions.shape}, expected ({len(points)},)",
            "Give one label per voxel.",
        )
    _check_size(len(points), size)
    labels = np.empty(len(points), dtype=np.int64)
    first = 0
    for region in np.unique(regions):
        inside = regions == region
        part = _cluster(points[inside], size, seed)
        labels[inside] = part + first
        first += int(part.max()) + 1
    return Parcellation(labels)


def make_parcellation(
    kind: ParcellationKind,
    n_voxels: int,
    size: int,
    coordinates: npt.ArrayLike | None = None,
    atlas_labels: npt.ArrayLike | None = None,
) -> Parcellation:
    """Build the parcellation that a recipe names.

    Parameters
    ----------
    kind
        "sequential", "spatial" or "atlas".
    n_voxels
        Voxels of the subject.
    size
        Voxels per parcel.
    coordinates
        (voxels, 3); needed by "spatial" and "atlas".
    atlas_labels
        (voxels,); needed by "atlas".

    Raises
    ------
    ConfigError
        If `kind` is unknown or what it needs is not there.
    """
    if kind == "sequential":
        return sequential(n_voxels, size)
    if kind not in ("spatial", "atlas"):
        raise ConfigError(
            "parcellation:kind", f"found {kind!r}", 'Use "sequential", "spatial" or "atlas".'
        )
    if coordinates is None:
        raise ConfigError(
            "parcellation:kind",
            f"{kind!r} needs voxel coordinates and this subject has none",
            'Use "sequential", or prepare the subject with coordinates.',
        )
    if np.shape(coordinates) != (n_voxels, 3):
        raise DataError(
            "parcellation:coordinates",
            f"shape {np.shape(coordinates)}, expected ({n_voxels}, 3)",
            "Give one coordinate per voxel.",
        )
    if kind == "spatial":
        return spatial(coordinates, size)
    if atlas_labels is None:
        raise ConfigError(
            "parcellation:atlas", "no atlas labels given", "Name an atlas of the subject's store."
        )
    return atlas_bounded(atlas_labels, coordinates, size)


def _checked_labels(labels: npt.ArrayLike | Tensor) -> Tensor:
    tensor = torch.as_tensor(labels if isinstance(labels, Tensor) else np.array(labels))
    where, remedy = "parcellation:labels", "Number parcels 0..K-1 and use -1 for none."
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex():
        found = f"{tuple(tensor.shape)} of {tensor.dtype}"
        raise DataError(where, f"found {found}, expected integers (voxels,)", remedy)
    tensor = tensor.long().clone()
    if tensor.numel() == 0 or int(tensor.max()) < 0:
        raise DataError(where, "no voxel has a parcel", remedy)
    if int(tensor.min()) < -1:
        raise DataError(where, f"found {int(tensor.min())}, expected -1 or above", remedy)
    empty = (torch.bincount(tensor[tensor >= 0]) == 0).nonzero().flatten()
    if empty.numel():
        raise DataError(where, f"parcel {int(empty[0])} has no voxels", remedy)
    return tensor


def _members(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Index the voxels of each parcel: (parcels, largest size) padded with -1, and sizes."""
    inside = (labels >= 0).nonzero().flatten()
    sizes = torch.bincount(labels[inside])
    order = inside[torch.argsort(labels[inside], stable=True)]
    rows = labels[order]
    starts = sizes.cumsum(0) - sizes
    columns = torch.arange(len(order), device=labels.device) - starts[rows]
    index = labels.new_full((len(sizes), int(sizes.max())), -1)
    index[rows, columns] = order
    return index, sizes


def _rebuild(module: nn.Module, _: Any) -> None:
    """Recompute what is derived from `labels` after a state dict was loaded."""
    if isinstance(module, Parcellation):
        module._index, module._sizes = _members(module.labels)


def _check_size(n_voxels: int, size: int) -> None:
    if not 1 <= size <= n_voxels:
        raise ConfigError(
            "parcellation:size",
            f"found {size}, expected 1 to {n_voxels} (the number of voxels)",
            "Choose another parcel size.",
        )


def _checked_coordinates(coordinates: npt.ArrayLike) -> npt.NDArray[np.float64]:
    points = np.asarray(coordinates, dtype=np.float64)
    where, remedy = "parcellation:coordinates", 'Use "sequential", or give coordinates.'
    if points.ndim != 2 or points.shape[1] != 3:
        raise DataError(where, f"shape {points.shape}, expected (voxels, 3)", remedy)
    if not np.isfinite(points).all():
        missing = int((~np.isfinite(points).all(axis=1)).sum())
        raise DataError(where, f"{missing} voxels have no finite coordinates", remedy)
    if len(points) > 1 and np.ptp(points, axis=0).max() == 0:
        raise DataError(where, "all voxels are at the same place", remedy)
    return points


def _cluster(points: npt.NDArray[np.float64], size: int, seed: int) -> npt.NDArray[np.int64]:
    """Label compact groups of about `size` points, numbered by their first member."""
    from sklearn.cluster import BisectingKMeans

    n_groups = max(1, round(len(points) / size))
    n_groups = min(n_groups, len(np.unique(points, axis=0)))
    if n_groups == 1:
        return np.zeros(len(points), dtype=np.int64)
    model = BisectingKMeans(n_groups, random_state=seed, bisecting_strategy="largest_cluster")
    found = model.fit_predict(points)
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)
