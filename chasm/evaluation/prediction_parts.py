"""The parts of a predictions file: rows, targets, units, areas, draws, where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

MAIN_TARGET = "target"
"""Name of the target that every row is scored against first."""

RESERVED_ROWS = ("mean pattern", "noise ceiling")
"""Rows that are computed from the file itself, for each of its targets."""

FloatArray = NDArray[np.floating[Any]]
RowKind = Literal["model", "component", "baseline"]
UnitName = Literal["parcel", "voxel", "unit"]


@dataclass(frozen=True)
class PredictionRow:
    """The predictions of one model or baseline.

    Attributes
    ----------
    values
        (images, units), in the units of the target.
    kind
        ``model``; ``component``: an earlier stage of the model, scored alone; or ``baseline``.
    n_parameters
        Parameters, frozen and closed-form ones among them; None when unknown.
    details
        JSON-serialisable facts (spaces, penalties, checkpoint).
    trained_on
        Target that it was fitted to: `MAIN_TARGET`, or the name of another one.
    """

    values: FloatArray
    kind: RowKind
    n_parameters: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    trained_on: str = MAIN_TARGET


@dataclass(frozen=True)
class AlternativeTarget:
    """Another reading of the same test trials, e.g. the top-p parcel mean.

    Attributes
    ----------
    values
        (images, units).
    train_mean
        (units,), mean of this target over the train images.
    ncsnr
        (units,), None when it is not known for this target; then nothing is divided by it.
    rows
        Rows that were fitted to this target; here they replace the file's rows of the same
        name. The other rows are scored as they are.
    """

    values: FloatArray
    train_mean: FloatArray
    ncsnr: FloatArray | None = None
    rows: Mapping[str, PredictionRow] = field(default_factory=dict)


@dataclass(frozen=True)
class Units:
    """What is predicted: voxels, parcels of voxels, or the units of a recording.

    Attributes
    ----------
    size
        (units,), voxels per unit (1 for voxels).
    ncsnr
        (units,), noise-ceiling signal-to-noise ratio of a single trial; NaN where unknown.
    position
        (units, 3), centre in mm; NaN where unknown.
    """

    size: NDArray[np.int64]
    ncsnr: FloatArray
    position: FloatArray


@dataclass(frozen=True)
class Membership:
    """How many voxels of each unit lie in each ROI of an atlas.

    Attributes
    ----------
    counts
        (units, ROIs), voxels.
    names
        ROI names, in the order of the columns.
    """

    counts: NDArray[np.int64]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Draws:
    """Several predictions per image from a model that can draw them, summarised.

    Attributes
    ----------
    n
        Draws per image, at least 2.
    seed
        Of the draws.
    mean, variance
        (images, units), mean and unbiased variance over the draws of an image.
    """

    n: int
    seed: int
    mean: FloatArray
    variance: FloatArray


@dataclass(frozen=True)
class RunInfo:
    """Where the predictions come from.

    Attributes
    ----------
    subject, dataset
        E.g. ``subj01`` of ``nsd``.
    simulated
        True for simulated data; every table and page then says so.
    unit
        ``parcel``, ``voxel``, or ``unit`` for the units of recordings brought as arrays, which
        may be neurons.
    split
        Name of the split whose test images these are.
    weights_label
        Of the backbone: ``hub``, ``file:<sha>``, ``UNTRAINED`` or ``weight-free``.
    model
        Name of the trained model.
    backbone
        Name of the frozen backbone.
    config
        The resolved recipe, YAML.
    fingerprints
        Of the store, the token cache, the checkpoint.
    """

    subject: str
    dataset: str
    simulated: bool
    unit: UnitName
    split: str
    weights_label: str = ""
    model: str = ""
    backbone: str = ""
    config: str = ""
    fingerprints: Mapping[str, str] = field(default_factory=dict)


def voxel_membership(labels: NDArray[Any], names: Mapping[int, str]) -> Membership:
    """Membership of single voxels in the ROIs of an atlas.

    Parameters
    ----------
    labels
        (voxels,), NSD's convention: -1 outside cortex, 0 in no ROI, k in ROI k.
    names
        Name of each label k >= 1.
    """
    keys = [key for key in sorted(names) if key >= 1]
    counts = np.asarray(labels)[:, None] == np.asarray(keys, dtype=np.int64)[None, :]
    return Membership(counts.astype(np.int64), tuple(names[key] for key in keys))
