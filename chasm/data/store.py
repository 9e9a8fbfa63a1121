"""SubjectStore: the one file that everything downstream reads (docs/data-format.md).

A store holds one subject's trials as rows and valid voxels as columns, with the statistics to
z-score them, the regions of interest, and where the pixels of the images are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chasm.data.store_format import (
    AGAIN,
    NORMALISATIONS,
    TRIAL_FIELDS,
    VOXEL_FIELDS,
    open_hdf5,
    validate,
)
from chasm.errors import DataError, StoreError
from chasm.noise_ceiling import RunningMoments

if TYPE_CHECKING:
    import pandas as pd

    from chasm.data.images import StoredImages


@dataclass(frozen=True)
class RoiAtlas:
    """One atlas on the voxels of a store.

    Attributes
    ----------
    labels
        (voxels,) int16: −1 not cortex, 0 cortex without label, k the label.
    names
        Label → name.
    """

    labels: np.ndarray
    names: dict[int, str]


@dataclass(frozen=True)
class ImageTable:
    """The images that have trials in a store.

    Attributes
    ----------
    ids
        (images,) int64, sorted, 0-based rows of the stimulus file.
    shared
        (images,) bool, shown to all subjects of the data set.
    special
        (images,) bool, shared and shown three times to every subject (NSD's 515).
    """

    ids: np.ndarray
    shared: np.ndarray
    special: np.ndarray


class SubjectStore:
    """One subject's betas and everything needed to use them; made by `SubjectStore.open`.

    Attributes
    ----------
    path
        The file.
    subject, dataset, source, beta_version
        E.g. ``subj01``, ``nsd``, ``nsd`` | ``simulated`` | ``arrays``, NSD's folder name.
    n_trials, n_voxels
        Shape of `betas`.
    scale
        Stored value / scale = percent signal change (NSD: 300), or the unit of the arrays (1).
    affine, volume_shape
        (4, 4) voxel indices → mm, and (X, Y, Z); None when the voxels have no volume.
    fingerprint
        Digest of the content of betas, trials and voxels.
    attributes
        Every root attribute of the file.
    """

    def __init__(self, path: Path, attributes: dict[str, Any], layout: dict[str, Any]) -> None:
        self.path = path
        self.attributes = attributes
        self._layout = layout
        self.subject: str = attributes["subject"]
        self.dataset: str = attributes["dataset"]
        self.source: str = attributes["source"]
        self.beta_version: str = attributes["beta_version"]
        self.fingerprint: str = attributes["fingerprint"]
        self.n_trials, self.n_voxels = layout["shape"]
        self.scale: float = layout["scale"]
        shape = tuple(int(n) for n in attributes["volume_shape"])
        self.volume_shape: tuple[int, ...] | None = shape if all(shape) else None
        affine = np.asarray(attributes["affine"], dtype=np.float64)
        self.affine: np.ndarray | None = affine if self.volume_shape else None

    @classmethod
    def open(cls, path: str | Path) -> SubjectStore:
        """Open and validate a store.

        Raises
        ------
        StoreError
            If the file is missing, damaged, of a newer format, or a field is not as documented.
        """
        path = Path(path).resolve()
        if not path.is_file():
            raise StoreError(path, "no such file", "Make it with `chasm prepare`")
        with open_hdf5(path, AGAIN, StoreError) as file:
            try:
                attributes, layout = validate(path, file)
            except OSError as error:
                line = str(error).splitlines()[0]
                raise StoreError(path, f"is damaged or truncated ({line})", AGAIN) from error
        return cls(path, attributes, layout)

    def __repr__(self) -> str:
        return f"SubjectStore({self.path}: {self.n_trials} trials × {self.n_voxels} voxels)"

    def __enter__(self) -> SubjectStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.__dict__.pop("betas", None)

    def __getstate__(self) -> dict[str, Any]:
        lazy = ("betas", "trials", "voxels", "rois", "images", "session_index")
        return {k: v for k, v in self.__dict__.items() if k not in lazy}

    @property
    def simulated(self) -> bool:
        """Whether the responses come from the simulated NSD."""
        return self.source == "simulated"

    @cached_property
    def betas(self) -> np.memmap:
        """Stored values, (trials, voxels), read-only memory map; divide by `scale`."""
        return np.memmap(
            self.path,
            dtype=self._layout["dtype"],
            mode="r",
            offset=self._layout["offset"],
            shape=(self.n_trials, self.n_voxels),
        )

    @cached_property
    def trials(self) -> pd.DataFrame:
        """One row per trial: session (1-based), run, image_id (0-based), repeat (0-based)."""
        return self._frame("trials", TRIAL_FIELDS)

    @cached_property
    def voxels(self) -> pd.DataFrame:
        """One row per voxel: i, j, k (−1 unknown), x, y, z in mm, ncsnr, ncsnr_published."""
        return self._frame("voxels", VOXEL_FIELDS)

    @cached_property
    def rois(self) -> dict[str, RoiAtlas]:
        """Atlas name → labels on the voxels and their names."""
        with open_hdf5(self.path, AGAIN, StoreError) as file:
            return {
                atlas: RoiAtlas(
                    group["labels"][:],
                    {int(k): str(v) for k, v in json.loads(group.attrs["names"]).items()},
                )
                for atlas, group in file["rois"].items()
            }

    @cached_property
    def images(self) -> ImageTable:
        """The images that have trials here."""
        with open_hdf5(self.path, AGAIN, StoreError) as file:
            group = file["images"]
            return ImageTable(group["ids"][:], group["shared"][:], group["special"][:])

    @cached_property
    def session_index(self) -> np.ndarray:
        """Row of the statistics that belongs to each trial: (trials,) int64."""
        sessions = self.trials["session"].to_numpy()
        return np.unique(sessions, return_inverse=True)[1].astype(np.int64)

    def rois_of(self, name: str) -> RoiAtlas:
        """Return one atlas.

        Raises
        ------
        DataError
            If the store has no such atlas; the message lists those it has.
        """
        if name not in self.rois:
            raise DataError(
                f"{self.path}:/rois/{name}",
                f"no such ROI atlas; the store has {', '.join(self.rois) or 'none'}",
                "Name one of them, or prepare from a tree that has this atlas",
            )
        return self.rois[name]

    def roi_mask(self, atlas: str, name: str | Sequence[str]) -> np.ndarray:
        """Mark the voxels of one or several named regions: (voxels,) bool.

        Raises
        ------
        DataError
            If the atlas, or a label in it, does not exist.
        """
        found = self.rois_of(atlas)
        numbers = {label: k for k, label in found.names.items()}
        wanted = [name] if isinstance(name, str) else list(name)
        for label in wanted:
            if label not in numbers:
                raise DataError(
                    f"{self.path}:/rois/{atlas}",
                    f"no label '{label}'; there are {', '.join(numbers)}",
                    "Name one of them",
                )
        return np.isin(found.labels, [numbers[label] for label in wanted])

    def normalisation(self, which: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation per session and voxel, in units of value / scale.

        Parameters
        ----------
        which
            ``train`` (trials of train images only) or ``all``.

        Returns
        -------
        mean, std
            Each (sessions, voxels) float32; `session_index` gives the row of a trial.
        """
        if which not in NORMALISATIONS:
            raise DataError(
                f"{self.path}:/normalisation/{which}", "no such statistics", "Use train or all"
            )
        with open_hdf5(self.path, AGAIN, StoreError) as file:
            group = file[f"normalisation/{which}"]
            return group["mean"][:], group["std"][:]

    @property
    def normalisation_image_ids(self) -> np.ndarray:
        """Ids of the images behind ``normalisation("train")``: (images,) int64."""
        with open_hdf5(self.path, AGAIN, StoreError) as file:
            return file["normalisation/train/image_ids"][:]

    def zscore(self, trials: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
        """Z-score trials within their session.

        Parameters
        ----------
        trials
            (n,) trial indices.
        mean, std
            (sessions, voxels), from `normalisation` or `chasm.data.splits.training_statistics`.

        Returns
        -------
        np.ndarray
            (n, voxels) float32.
        """
        trials = np.atleast_1d(trials)
        scale = np.float32(self.scale)
        values = np.empty((len(trials), self.n_voxels), np.float32)
        # Row by row, so that each stays in the processor's cache.
        for own, trial, row in zip(values, trials, self.session_index[trials], strict=True):
            np.divide(self.betas[trial], scale, out=own)
            own -= mean[row]
            own /= std[row]
        return values

    def open_images(self, path: str | Path | None = None) -> StoredImages:
        """Open the pixels of this subject's images.

        Parameters
        ----------
        path
            Where the images are now, if they have moved since the store was made.

        Raises
        ------
        StoreError
            If nothing is there, or other images than those the store was made with.
        """
        from chasm.data.images import open_images

        with open_hdf5(self.path, AGAIN, StoreError) as file:
            info = {key: file["images"].attrs[key] for key in file["images"].attrs}
        place = Path(path or info["path"])
        where = f"{self.path}:/images"
        if not place.exists():
            raise StoreError(where, f"the images are no longer at {place}", AGAIN)
        source = open_images(info["kind"], place, info["key"], info["fingerprint_ids"].tolist())
        if source.fingerprint != info["fingerprint"]:
            raise StoreError(where, f"the images at {place} have changed since", AGAIN)
        return source

    @property
    def image_fingerprint(self) -> str:
        """Fingerprint of the image source, as recorded when the store was made."""
        with open_hdf5(self.path, AGAIN, StoreError) as file:
            return str(file["images"].attrs["fingerprint"])

    def coordinates(self) -> np.ndarray | None:
        """Place of every voxel in mm, (voxels, 3) float32, or None when it is not known."""
        places = self.voxels[["x", "y", "z"]].to_numpy(np.float32)
        return places if np.isfinite(places).all() else None

    def mask_volume(self) -> np.ndarray:
        """Mark the voxels of the store in the subject's volume: (X, Y, Z) bool."""
        return np.nan_to_num(self.to_volume(np.ones(self.n_voxels))).astype(bool)

    def to_volume(self, values: np.ndarray, fill: float = np.nan) -> np.ndarray:
        """Put one value per voxel into the subject's volume.

        Parameters
        ----------
        values
            (voxels,).
        fill
            Value outside the store's voxels.

        Returns
        -------
        np.ndarray
            (X, Y, Z) float32.

        Raises
        ------
        DataError
            If the voxels of this store have no place in a volume.
        """
        if self.volume_shape is None:
            raise DataError(
                f"{self.path}:volume_shape",
                "these units have no place in a volume",
                "Draw maps only for stores made from volumes",
            )
        volume = np.full(self.volume_shape, fill, dtype=np.float32)
        volume[tuple(self.voxels[axis].to_numpy() for axis in "ijk")] = values
        return volume

    def _frame(self, group: str, fields: Sequence[str]) -> pd.DataFrame:
        import pandas as pd

        with open_hdf5(self.path, AGAIN, StoreError) as file:
            return pd.DataFrame({name: file[group][name][:] for name in fields})


def session_statistics(
    betas: np.ndarray,
    session_index: np.ndarray,
    use: np.ndarray,
    scale: float,
    block: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (ddof 1) per session and voxel over the trials in use.

    Reads `block` trials at a time and accumulates in float64.

    Parameters
    ----------
    betas
        (trials, voxels), stored values; a memory map will do.
    session_index
        (trials,) row of the result for each trial, 0-based.
    use
        (trials,) bool.
    scale
        Stored value / scale is the unit of the result.

    Returns
    -------
    mean, std
        Each (sessions, voxels) float32. NaN where a session has no (mean) or fewer than two
        (std) trials in use.
    """
    n_sessions = int(session_index.max()) + 1
    mean = np.full((n_sessions, betas.shape[1]), np.nan, dtype=np.float32)
    std = np.full_like(mean, np.nan)
    for session in range(n_sessions):
        trials = np.flatnonzero((session_index == session) & use)
        moments = RunningMoments(betas.shape[1])
        for start in range(0, len(trials), block):
            moments.update(betas[trials[start : start + block]].astype(np.float64))
        if len(trials):
            mean[session] = moments.mean / scale
        if len(trials) > 1:
            std[session] = np.sqrt(moments.variance) / scale
    return mean, std
