"""The predictions file: everything that scores, tables, maps and reports are made from.

One HDF5 file per test run, whole or absent::

    /image_id (images,)  /repeats (images,)          0-based stimulus rows, trials averaged
    /target (images, units)                          mean over repeats of the z-scored betas
    /train_mean (units,)                             mean of the target over the train images
    /repeat_targets (images, repeats, units)         optional, NaN where a repeat is missing
    /predictions/<row> (images, units)               attrs kind, n_parameters, trained_on, details
    /targets/<name>/{values, train_mean[, ncsnr]}    optional, other targets of the same trials
    /targets/<name>/predictions/<row>                optional, the row as fitted to that target
    /units/{size, ncsnr, position}                   voxels per unit, ncsnr, mm (NaN: unknown)
    /membership/<atlas> (units, labels)              voxels of each unit in each ROI, attr names
    /parcel_labels (voxels,)                         optional, parcel of each voxel, -1 for none
    /gate (images, 1 | parcels, 2)                   optional, shares of global and local stream
    /draws/{mean, variance} (images, units)          optional, over n draws; attrs n, seed

Units are parcels, or the voxels (units) of the subject store in its order. Version 1 of the
format has no parcel labels, no draws and no rows of kind ``component``; it can still be read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from chasm.errors import DataError
from chasm.evaluation.prediction_parts import (
    MAIN_TARGET,
    RESERVED_ROWS,
    AlternativeTarget,
    Draws,
    FloatArray,
    Membership,
    PredictionRow,
    RunInfo,
    Units,
    voxel_membership,
)
from chasm.io import atomic_path

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MAIN_TARGET",
    "RESERVED_ROWS",
    "AlternativeTarget",
    "Draws",
    "FloatArray",
    "Membership",
    "PredictionFile",
    "PredictionRow",
    "RunInfo",
    "Units",
    "voxel_membership",
]

FORMAT = "chasm-predictions"
FORMAT_VERSION = 2

AGAIN = "Write the file again with `chasm test`."


@dataclass(frozen=True)
class PredictionFile:
    """Targets, predictions and units of one test run; see the module for the file's layout.

    Shapes are checked when the object is made.

    Raises
    ------
    DataError
        If a shape does not fit, a target or a prediction is not finite, an image occurs twice,
        a row has a reserved name, a target's own row replaces none, or parcels, gate or draws
        do not belong to these units.
    """

    image_id: NDArray[np.int64]
    repeats: NDArray[np.int64]
    target: FloatArray
    train_mean: FloatArray
    rows: Mapping[str, PredictionRow]
    units: Units
    info: RunInfo
    membership: Mapping[str, Membership] = field(default_factory=dict)
    repeat_targets: FloatArray | None = None
    targets: Mapping[str, AlternativeTarget] = field(default_factory=dict)
    parcel_labels: NDArray[np.int64] | None = None
    gate: FloatArray | None = None
    draws: Draws | None = None
    where: str = "predictions"

    def __post_init__(self) -> None:
        n_images, n_units = np.shape(self.target)
        self._check_shape("repeats", self.repeats, (n_images,))
        self._check_shape("image_id", self.image_id, (n_images,))
        if len(np.unique(self.image_id)) != n_images:
            raise self._error("image_id", "an image occurs twice", "Average its trials first.")
        if np.min(self.repeats, initial=1) < 1:
            raise self._error("repeats", "an image without a trial", "Leave such images out.")
        self._check_values("target", self.target, (n_images, n_units))
        self._check_values("train_mean", self.train_mean, (n_units,))
        self._check_rows(n_images, n_units)
        self._check_shape("units/size", self.units.size, (n_units,))
        self._check_shape("units/ncsnr", self.units.ncsnr, (n_units,))
        self._check_shape("units/position", self.units.position, (n_units, 3))
        for name, atlas in self.membership.items():
            self._check_shape(f"membership/{name}", atlas.counts, (n_units, len(atlas.names)))
        if self.repeat_targets is not None:
            shape = (n_images, np.shape(self.repeat_targets)[1], n_units)
            self._check_shape("repeat_targets", self.repeat_targets, shape)
        self._check_parcels(n_units)
        self._check_gate(n_images, n_units)
        if self.draws is not None:
            for name in ("mean", "variance"):
                values = getattr(self.draws, name)
                self._check_values(f"draws/{name}", values, (n_images, n_units))
            if self.draws.n < 2:
                raise self._error("draws", f"{self.draws.n} per image", "Draw at least 2.")

    def _check_rows(self, n_images: int, n_units: int) -> None:
        for name, row in self.rows.items():
            if name in RESERVED_ROWS or "/" in name:
                raise self._error(
                    f"predictions/{name}",
                    "this name cannot be used for a row",
                    "It is computed from the file; leave it out or choose another name.",
                )
            self._check_values(f"predictions/{name}", row.values, (n_images, n_units))
        for name, other in self.targets.items():
            self._check_values(f"targets/{name}/values", other.values, (n_images, n_units))
            self._check_values(f"targets/{name}/train_mean", other.train_mean, (n_units,))
            for row_name, row in other.rows.items():
                where = f"targets/{name}/predictions/{row_name}"
                if row_name not in self.rows:
                    raise self._error(
                        where,
                        "there is no row of this name to replace",
                        f"Use one of: {', '.join(self.rows)}.",
                    )
                self._check_values(where, row.values, (n_images, n_units))

    def _check_parcels(self, n_units: int) -> None:
        if self.parcel_labels is None:
            return
        labels = np.asarray(self.parcel_labels)
        if self.info.unit == "parcel":
            members = np.bincount(labels[labels >= 0], minlength=n_units)
            if not np.array_equal(members, self.units.size):
                raise self._error(
                    "parcel_labels",
                    f"voxels per parcel are not those of /units/size (max {labels.max()} found)",
                    AGAIN,
                )
        else:
            self._check_shape("parcel_labels", labels, (n_units,))

    def _check_gate(self, n_images: int, n_units: int) -> None:
        if self.gate is None:
            return
        widths = {1, n_units}
        if self.parcel_labels is not None:
            widths.add(int(np.max(self.parcel_labels)) + 1)
        found = np.shape(self.gate)
        if len(found) != 3 or found[1] not in widths:
            listed = " or ".join(str(width) for width in sorted(widths))
            raise self._error("gate", f"shape {found}, expected ({n_images}, {listed}, 2)", AGAIN)
        self._check_values("gate", self.gate, (n_images, found[1], 2))

    @property
    def n_images(self) -> int:
        """Number of test images."""
        return len(self.image_id)

    @property
    def n_units(self) -> int:
        """Number of voxels or parcels."""
        return self.target.shape[1]

    def _error(self, name: str, problem: str, remedy: str) -> DataError:
        return DataError(f"{self.where}:/{name}", problem, remedy)

    def _check_shape(self, name: str, value: Any, expected: tuple[int, ...]) -> None:
        if np.shape(value) != expected:
            raise self._error(
                name,
                f"shape {np.shape(value)}, expected {expected}",
                AGAIN,
            )

    def _check_values(self, name: str, value: Any, expected: tuple[int, ...]) -> None:
        self._check_shape(name, value, expected)
        bad = int(np.size(value) - np.isfinite(value).sum())
        if bad:
            raise self._error(
                name, f"{bad} NaN or infinite values", "Check the model and the store."
            )

    def write(self, path: Path) -> Path:
        """Write the file atomically and return its path."""
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            info = asdict(self.info)
            info["fingerprints"] = json.dumps(dict(self.info.fingerprints))
            file.attrs.update(info)
            file.attrs["format"] = FORMAT
            file.attrs["format_version"] = FORMAT_VERSION
            for name in ("image_id", "repeats", "parcel_labels"):
                if getattr(self, name) is not None:
                    file[name] = np.asarray(getattr(self, name), dtype=np.int64)
            for name in ("target", "train_mean", "repeat_targets", "gate"):
                if getattr(self, name) is not None:
                    file[name] = np.asarray(getattr(self, name), dtype=np.float32)
            _write_rows(file, self.rows)
            for name, other in self.targets.items():
                group = file.create_group(f"targets/{name}")
                for key in ("values", "train_mean", "ncsnr"):
                    if getattr(other, key) is not None:
                        group[key] = np.asarray(getattr(other, key), dtype=np.float32)
                _write_rows(group, other.rows)
            file["units/size"] = np.asarray(self.units.size, dtype=np.int64)
            file["units/ncsnr"] = np.asarray(self.units.ncsnr, dtype=np.float32)
            file["units/position"] = np.asarray(self.units.position, dtype=np.float32)
            for name, atlas in self.membership.items():
                dataset = file.create_dataset(
                    f"membership/{name}", data=np.asarray(atlas.counts, dtype=np.int64)
                )
                dataset.attrs["names"] = json.dumps(list(atlas.names))
            if self.draws is not None:
                group = file.create_group("draws")
                group.attrs.update(n=self.draws.n, seed=self.draws.seed)
                for name in ("mean", "variance"):
                    group[name] = np.asarray(getattr(self.draws, name), dtype=np.float32)
        return Path(path)

    @classmethod
    def read(cls, path: Path) -> PredictionFile:
        """Read and validate a predictions file.

        Raises
        ------
        DataError
            If the file is missing, damaged, of another format or of a newer version.
        """
        if not Path(path).is_file():
            raise DataError(path, "no such file", "Run `chasm test` first.")
        try:
            with h5py.File(path, "r") as file:
                if file.attrs.get("format") != FORMAT:
                    raise DataError(f"{path}:format", f"not a {FORMAT} file", AGAIN)
                version = int(file.attrs.get("format_version", 0))
                if version > FORMAT_VERSION:
                    raise DataError(
                        f"{path}:format_version",
                        f"{version}, but this chasm reads up to {FORMAT_VERSION}",
                        "Update chasm.",
                    )
                return cls(**_read_fields(file), where=str(path))
        except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise DataError(path, f"damaged or incomplete ({error})", AGAIN) from error


def _write_rows(group: h5py.Group, rows: Mapping[str, PredictionRow]) -> None:
    folder = group.create_group("predictions")
    for index, (name, row) in enumerate(rows.items()):
        dataset = folder.create_dataset(name, data=np.asarray(row.values, dtype=np.float32))
        dataset.attrs["order"] = index
        dataset.attrs["kind"] = row.kind
        dataset.attrs["n_parameters"] = -1 if row.n_parameters is None else row.n_parameters
        dataset.attrs["trained_on"] = row.trained_on
        dataset.attrs["details"] = json.dumps(dict(row.details))


def _read_rows(group: h5py.Group) -> dict[str, PredictionRow]:
    datasets = sorted(group["predictions"].items(), key=lambda item: item[1].attrs["order"])
    rows = {}
    for name, data in datasets:
        count = int(data.attrs["n_parameters"])
        rows[name] = PredictionRow(
            data[:],
            data.attrs["kind"],
            None if count < 0 else count,
            json.loads(data.attrs["details"]),
            data.attrs["trained_on"],
        )
    return rows


def _read_target(group: h5py.Group) -> AlternativeTarget:
    ncsnr = group["ncsnr"][:] if "ncsnr" in group else None
    return AlternativeTarget(group["values"][:], group["train_mean"][:], ncsnr, _read_rows(group))


def _read_fields(file: h5py.File) -> dict[str, Any]:
    attributes = {name: file.attrs[name] for name in RunInfo.__dataclass_fields__}
    attributes["simulated"] = bool(attributes["simulated"])
    attributes["fingerprints"] = json.loads(attributes["fingerprints"])
    targets = {name: _read_target(group) for name, group in file.get("targets", {}).items()}
    membership = {
        name: Membership(data[:], tuple(json.loads(data.attrs["names"])))
        for name, data in file.get("membership", {}).items()
    }
    fields = {name: file[name][:] for name in ("image_id", "repeats", "target", "train_mean")}
    optional = ("repeat_targets", "parcel_labels", "gate")
    fields |= {name: file[name][:] for name in optional if name in file}
    if "draws" in file:
        group = file["draws"]
        n, seed = int(group.attrs["n"]), int(group.attrs["seed"])
        fields["draws"] = Draws(n, seed, group["mean"][:], group["variance"][:])
    units = Units(**{name: file[f"units/{name}"][:] for name in Units.__dataclass_fields__})
    return {
        **fields,
        "rows": _read_rows(file),
        "targets": targets,
        "membership": membership,
        "units": units,
        "info": RunInfo(**attributes),
    }
