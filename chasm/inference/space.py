"""Where the voxels of a model are: the table that travels with its predictions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from chasm.data.store import RoiAtlas, SubjectStore
from chasm.data.store_format import VOXEL_FIELDS
from chasm.errors import DataError

PLACES = ("i", "j", "k")
ROI = "roi:"
"""Prefix of the table's columns that hold an atlas."""
NUMBERED = frozenset(PLACES)
"""Columns of integers; the others are float32."""


@dataclass(frozen=True)
class VoxelSpace:
    """Voxels in the order of a model's outputs.

    Attributes
    ----------
    n_voxels
        How many there are.
    facts
        Column -> (voxels,): i, j, k (0-based, −1 unknown), x, y, z in mm, ncsnr,
        ncsnr_published; empty when nothing is known of the voxels.
    rois
        Atlas -> labels on the voxels and their names.
    affine, volume_shape
        (4, 4) voxel indices -> mm, and (X, Y, Z); None when the voxels have no volume.
    """

    n_voxels: int
    facts: Mapping[str, np.ndarray] = field(default_factory=dict)
    rois: Mapping[str, RoiAtlas] = field(default_factory=dict)
    affine: np.ndarray | None = None
    volume_shape: tuple[int, ...] | None = None

    @classmethod
    def of_store(cls, store: SubjectStore) -> VoxelSpace:
        """Take everything from a subject store."""
        facts = {name: store.voxels[name].to_numpy() for name in VOXEL_FIELDS}
        return cls(store.n_voxels, facts, store.rois, store.affine, store.volume_shape)

    @property
    def known(self) -> bool:
        """Whether anything is known of the voxels."""
        return bool(self.facts)

    def table(self) -> pd.DataFrame:
        """One row per voxel: the facts, and ``roi:<atlas>`` with names, "" outside all labels."""
        names = {ROI + atlas: _names(roi) for atlas, roi in self.rois.items()}
        return pd.DataFrame({**self.facts, **names}, index=pd.RangeIndex(self.n_voxels))

    def to_volume(self, values: np.ndarray, fill: float = np.nan) -> np.ndarray:
        """Put one value per voxel into the subject's volume.

        Parameters
        ----------
        values
            (voxels,).
        fill
            Value outside these voxels.

        Returns
        -------
        np.ndarray
            (X, Y, Z) float32.

        Raises
        ------
        DataError
            If the voxels have no place in a volume, or there is not one value for each.
        """
        if self.volume_shape is None:
            raise DataError(
                "map", "these voxels have no place in a volume",
                "Draw maps of models whose subject store was made from volumes",
            )  # fmt: skip
        if np.shape(values) != (self.n_voxels,):
            raise DataError(
                "map", f"shape {np.shape(values)} for {self.n_voxels} voxels", "Give one value each"
            )
        volume = np.full(self.volume_shape, fill, dtype=np.float32)
        volume[tuple(self.facts[axis] for axis in PLACES)] = values
        return volume

    # Files.

    def write_csv(self, path: Path) -> None:
        """Write the facts and ``roi:<atlas>`` columns with label numbers; floats are exact."""
        labels = {ROI + atlas: roi.labels for atlas, roi in self.rois.items()}
        columns = {**self.facts, **labels}
        frame = pd.DataFrame(columns, index=pd.RangeIndex(self.n_voxels, name="voxel"))
        frame.to_csv(path, float_format="%.9g", na_rep="NaN", lineterminator="\n")

    def described(self) -> dict[str, Any]:
        """Everything that is not in the CSV, as JSON types."""
        return {
            "n_voxels": self.n_voxels,
            "affine": None if self.affine is None else self.affine.tolist(),
            "volume_shape": None if self.volume_shape is None else list(self.volume_shape),
            "rois": {atlas: _with_text_keys(roi) for atlas, roi in self.rois.items()},
        }

    @classmethod
    def read_csv(cls, path: Path, described: Mapping[str, Any]) -> VoxelSpace:
        """Read what `write_csv` and `described` gave.

        Raises
        ------
        DataError
            If the table does not go with the description.
        """
        try:
            frame = pd.read_csv(path, index_col="voxel")
            names = [str(name) for name in frame if not str(name).startswith(ROI)]
            facts = {
                name: frame[name].to_numpy(np.int32 if name in NUMBERED else np.float32)
                for name in names
            }
            rois = {
                atlas: RoiAtlas(frame[ROI + atlas].to_numpy(np.int16), _with_number_keys(names))
                for atlas, names in described["rois"].items()
            }
            space = cls(described["n_voxels"], facts, rois, *_volume_of(described))
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            line = (str(error).splitlines() or [""])[0]
            raise DataError(path, f"is no table of voxels ({line})", "Export again") from error
        if len(frame) != space.n_voxels:
            raise DataError(path, f"{len(frame)} rows for {space.n_voxels} voxels", "Export again")
        return space

    def write_hdf5(self, group: h5py.Group) -> None:
        """Write to a group: one dataset per column, ``rois/<atlas>`` with names as attribute."""
        group.attrs["n_voxels"] = self.n_voxels
        if self.affine is not None and self.volume_shape is not None:
            group.attrs["affine"] = self.affine
            group.attrs["volume_shape"] = self.volume_shape
        for name, values in self.facts.items():
            group[name] = values
        for atlas, roi in self.rois.items():
            dataset = group.create_dataset(f"rois/{atlas}", data=roi.labels)
            dataset.attrs["names"] = json.dumps(_with_text_keys(roi))

    @classmethod
    def read_hdf5(cls, group: h5py.Group) -> VoxelSpace:
        """Read what `write_hdf5` wrote."""
        facts = {name: group[name][:] for name in VOXEL_FIELDS if name in group}
        rois = {
            atlas: RoiAtlas(data[:], _with_number_keys(json.loads(data.attrs["names"])))
            for atlas, data in group.get("rois", {}).items()
        }
        return cls(int(group.attrs["n_voxels"]), facts, rois, *_volume_of(group.attrs))


def _names(roi: RoiAtlas) -> np.ndarray:
    return np.array([roi.names.get(int(label), "") for label in roi.labels], dtype=object)


def _with_text_keys(roi: RoiAtlas) -> dict[str, str]:
    return {str(label): name for label, name in roi.names.items()}


def _with_number_keys(names: Mapping[str, str]) -> dict[int, str]:
    return {int(label): str(name) for label, name in names.items()}


def _volume_of(facts: Any) -> tuple[np.ndarray | None, tuple[int, ...] | None]:
    affine, shape = facts.get("affine"), facts.get("volume_shape")
    if affine is None or shape is None:
        return None, None
    return np.asarray(affine, dtype=np.float64).reshape(4, 4), tuple(int(n) for n in shape)
