"""Predictions of several runs on the same test images, joined at voxels and at parcels.

At voxel level a model of parcels gives every voxel the value of its parcel, and a voxel without
a parcel its train mean. At parcel level a model of voxels gives every parcel the mean of its
voxels. The linear baselines of each level are those that were fitted to its own units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from chasm.errors import DataError
from chasm.evaluation.prediction_parts import FloatArray, PredictionRow, RunInfo
from chasm.evaluation.predictions import PredictionFile

PARCEL = "parcel"

ORDER = ("MLP", "GRU", "LSTM", "one-stream Mamba", "Transformer", "stage 1", "stage 2")
"""How the names of trained rows begin, in the order of the table; others come last."""

_TOLERANCE = 1e-3
"""Largest difference between two readings of the same z-scored responses."""


@dataclass(frozen=True)
class JoinedRun:
    """The predictions of one run, and what its row is called among the others.

    Attributes
    ----------
    label
        Name of its row in the comparison.
    path
        The predictions file.
    file
        Its content.
    """

    label: str
    path: Path
    file: PredictionFile

    @property
    def of_parcels(self) -> bool:
        """Whether its units are parcels."""
        return self.file.info.unit == PARCEL


def read_runs(paths: Sequence[Path]) -> list[JoinedRun]:
    """Read predictions files and check that they are about the same test images.

    A run is called as its own row is; where several are called the same, the name of the recipe
    is added.

    Parameters
    ----------
    paths
        Predictions files, at least one.

    Returns
    -------
    list of JoinedRun
        In the order of the table, see `ORDER`.

    Raises
    ------
    DataError
        A file cannot be read, has no model, or is of another subject, data set, split, test set,
        tokens or normalisation than the first; the file and the field are named.
    """
    if not paths:
        raise DataError("comparison", "there are no predictions", "Run `chasm test` on some runs.")
    files = [PredictionFile.read(path) for path in paths]
    for file in files[1:]:
        _check_same(file, files[0])
    names = [_own_row(file) for file in files]
    labels = [
        f"{name} ({file.info.model})" if names.count(name) > 1 else name
        for name, file in zip(names, files, strict=True)
    ]
    for index, (label, file) in enumerate(zip(labels, files, strict=True)):
        if label in labels[:index]:
            raise DataError(
                file.where, f"another run is called {label!r}, too", "Give each recipe a name."
            )
    runs = [JoinedRun(*parts) for parts in zip(labels, map(Path, paths), files, strict=True)]
    _check_targets(runs)
    return sorted(runs, key=lambda run: _rank(run.label))


def _rank(label: str) -> int:
    return next((i for i, start in enumerate(ORDER) if label.startswith(start)), len(ORDER))


def _own_row(file: PredictionFile) -> str:
    for name, row in file.rows.items():
        if row.kind == "model":
            return name
    raise DataError(f"{file.where}:/predictions", "holds no model", "Give a trained run's file.")


def _check_same(file: PredictionFile, first: PredictionFile) -> None:
    remedy = f"Compare runs of the same subject, store, tokens and split as {first.where}."
    for name in ("subject", "dataset", "simulated", "split"):
        found, expected = getattr(file.info, name), getattr(first.info, name)
        if found != expected:
            raise DataError(
                f"{file.where}:{name}", f"found {found!r}, expected {expected!r}", remedy
            )
    for name in ("image_id", "repeats"):
        if not np.array_equal(getattr(file, name), getattr(first, name)):
            raise DataError(f"{file.where}:/{name}", f"differs from that of {first.where}", remedy)
    for name in ("store", "tokens"):
        there, expected = (f.info.fingerprints.get(name) for f in (file, first))
        if there != expected:
            raise DataError(
                f"{file.where}:fingerprints", f"{name} {there}, expected {expected}", remedy
            )


def _check_targets(runs: Sequence[JoinedRun]) -> None:
    """Refuse files that read the same trials otherwise, e.g. with other session statistics."""
    voxels = next((run.file for run in runs if not run.of_parcels), None)
    for run in runs:
        file = run.file
        if run.of_parcels:
            labels = _labels(file)
            if voxels is not None and len(labels) != voxels.n_units:
                raise DataError(
                    f"{file.where}:/parcel_labels",
                    f"{len(labels)} voxels, but {voxels.n_units} in {voxels.where}",
                    "Compare runs of the same subject and mask.",
                )
            expected = None if voxels is None else parcel_means(voxels.target, labels)
            same = [
                r.file for r in runs if r.of_parcels and np.array_equal(_labels(r.file), labels)
            ]
            other = same[0].target if expected is None else expected
        else:
            assert voxels is not None
            other = voxels.target
        if np.shape(other) != np.shape(file.target) or (
            np.abs(file.target - other).max() > _TOLERANCE
        ):
            raise DataError(
                f"{file.where}:/target",
                "its responses to the same images differ from those of the other files",
                "Compare runs with the same data.statistics.",
            )


def _labels(file: PredictionFile) -> NDArray[np.int64]:
    if file.parcel_labels is None:
        raise DataError(
            f"{file.where}:/parcel_labels",
            "is missing: it is not known which voxels the parcels are made of",
            "Write the file again with `chasm test --fresh`.",
        )
    return np.asarray(file.parcel_labels)


def parcel_means(voxels: FloatArray, labels: NDArray[np.int64]) -> FloatArray:
    """Mean of each parcel's voxels, voxels that are NaN left out.

    Parameters
    ----------
    voxels
        (images, voxels).
    labels
        (voxels,), parcel of each voxel, -1 for none.

    Returns
    -------
    ndarray
        (images, parcels); NaN where every voxel of a parcel is NaN.
    """
    inside = np.flatnonzero(labels >= 0)
    order = inside[np.argsort(labels[inside], kind="stable")]
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    values = np.asarray(voxels, dtype=np.float64)[:, order]
    known = np.isfinite(values)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts, axis=1)
    counts = np.add.reduceat(known.astype(np.float64), starts, axis=1)
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def join_voxels(runs: Sequence[JoinedRun]) -> PredictionFile | None:
    """Join all runs at the voxels; None where no run predicts voxels.

    Parameters
    ----------
    runs
        From `read_runs`.

    Returns
    -------
    PredictionFile or None
        Targets, ceilings and linear rows of the first run of voxels, and a row per run.
    """
    base = next((run.file for run in runs if not run.of_parcels), None)
    if base is None:
        return None
    rows: dict[str, PredictionRow] = {}
    for run in runs:
        for name, row in _trained_rows(run).items():
            values = row.values
            if run.of_parcels:
                values = _expand(values, _labels(run.file), base.train_mean)
            rows[name] = replace(row, values=np.asarray(values, np.float32))
    return _joined(base, rows, runs)


def join_parcels(runs: Sequence[JoinedRun]) -> PredictionFile | None:
    """Join all runs at the parcels of the first run of parcels; None where there is no such run.

    Parameters
    ----------
    runs
        From `read_runs`.

    Returns
    -------
    PredictionFile or None
        Targets, ceilings and linear rows of that run, and a row per run.
    """
    base = next((run.file for run in runs if run.of_parcels), None)
    if base is None:
        return None
    labels = _labels(base)
    nothing = np.full(len(labels), np.nan)
    rows: dict[str, PredictionRow] = {}
    for run in runs:
        for name, row in _trained_rows(run).items():
            values = row.values
            if not run.of_parcels:
                values = parcel_means(values, labels)
            elif not np.array_equal(_labels(run.file), labels):
                values = parcel_means(_expand(values, _labels(run.file), nothing), labels)
                values = np.where(np.isfinite(values), values, base.train_mean)
            rows[name] = replace(row, values=np.asarray(values, np.float32))
    return _joined(base, rows, runs)


def _expand(parcels: FloatArray, labels: NDArray[np.int64], otherwise: FloatArray) -> FloatArray:
    """Give every voxel its parcel's value, (images, voxels), or its value of `otherwise`."""
    return np.where(labels >= 0, parcels[:, np.maximum(labels, 0)], otherwise)


def _trained_rows(run: JoinedRun) -> dict[str, PredictionRow]:
    """Rows of a run under their names in the comparison: the model, and its network alone."""
    own = _own_row(run.file)
    unit = run.file.info.unit
    rows = {}
    for name, row in run.file.rows.items():
        if name != own and not (row.kind == "component" and name.startswith(f"{own},")):
            continue
        details = {"recipe": run.file.info.model, "predicts": f"{unit}s", **row.details}
        rows[run.label + name.removeprefix(own)] = replace(row, kind="model", details=details)
    return rows


def _joined(
    base: PredictionFile, rows: Mapping[str, PredictionRow], runs: Sequence[JoinedRun]
) -> PredictionFile:
    linear = {name: row for name, row in base.rows.items() if row.kind == "baseline"}
    info = base.info
    prints = {
        key: info.fingerprints[key] for key in ("store", "tokens") if key in info.fingerprints
    }
    for run in runs:
        prints[f"predictions of {run.label}"] = run.file.info.fingerprints.get("checkpoint", "")
    return replace(
        base,
        rows={**linear, **rows},
        targets={},
        gate=None,
        draws=None,
        info=RunInfo(
            subject=info.subject,
            dataset=info.dataset,
            simulated=info.simulated,
            unit=info.unit,
            split=info.split,
            weights_label=info.weights_label,
            model="baselines",
            backbone=info.backbone,
            fingerprints=prints,
        ),
        where=f"comparison ({info.unit}s)",
    )
