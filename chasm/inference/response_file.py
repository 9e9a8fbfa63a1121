"""Predicted responses on disk: one HDF5 file, whole or absent, whatever the number of images.

Its content::

    /images/name (images,)             names, in the order of the rows below
    /voxels (images, voxels)           float32, session-z-scored percent signal change
    /parcels (images, parcels)         float32, where asked for
    /draws (draws, images, voxels)     float32, where asked for
    /voxel_table/{i, j, k, x, y, z, ncsnr, ncsnr_published} (voxels,)   where known
    /voxel_table/rois/<atlas> (voxels,)    labels, attribute names: JSON, label -> name
    /refused/{name, reason} (refused,)     images that could not be used, and why

Attributes of the root: ``format``, ``format_version``, ``written_by``, ``model`` (title),
``subject``, ``dataset``, ``simulated``, ``unit`` (what the model predicts: parcel or voxel),
``weights`` (of the backbone), ``fingerprints`` (JSON: checkpoint, store, tokens), ``seed`` (of
the draws). Attributes of /voxel_table: ``n_voxels``, ``affine`` (4, 4), ``volume_shape``.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from chasm.data.store_format import open_hdf5
from chasm.errors import ConfigError, DataError
from chasm.inference.encoder import Encoder, Prediction
from chasm.inference.pictures import Picture
from chasm.inference.space import VoxelSpace
from chasm.inference.trained import TrainedModel
from chasm.io import atomic_path
from chasm.progress import track

FORMAT = "chasm-predicted-responses"
FORMAT_VERSION = 1
CHUNK_BYTES = 2**20
AGAIN = "Write it again with `chasm predict`"
_LISTED = 20
"""How many refused images an error lists; the file lists all."""


class SomeRefusedError(DataError):
    """Some images were refused, and the predictions of the others were written."""

    exit_status = 3


def write_responses(
    encoder: Encoder,
    pictures: Sequence[Picture],
    out: str | Path,
    *,
    batch_size: int = 32,
    draws: int = 0,
    parcels: bool = False,
    seed: int = 0,
) -> Path:
    """Predict images into a file; images that cannot be used are left out and listed in it.

    Parameters
    ----------
    encoder
        The model.
    pictures
        The images; read once, batch by batch.
    out
        The file. Another file of this kind is replaced, anything else is left alone.
    batch_size, draws, parcels, seed
        As in `Encoder.predict`.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    SomeRefusedError
        After the file was written: some images are not in it.
    DataError
        No image can be used; there is no file then.
    ConfigError
        Something else stands at `out`, or draws of a model without a latent.
    """
    out = Path(out)
    _require_replaceable(out)
    refused: dict[str, str] = {}
    blocks = encoder.stream(pictures, batch_size, draws, parcels, seed, refused)
    with atomic_path(out) as temporary, h5py.File(temporary, "w") as file:
        _describe(file, encoder.trained, seed)
        writer = _Writer(file, encoder.trained, len(pictures), draws, parcels)
        for block in track(blocks, "predict", -(-len(pictures) // batch_size)):
            writer.append(block)
        _write_texts(file, "images", {"name": writer.names})
        _write_texts(file, "refused", {"name": list(refused), "reason": list(refused.values())})
        if not writer.names:
            raise DataError("images", f"none can be used: {_listed(refused)}", "Replace them")
    if refused:
        raise SomeRefusedError(
            "images",
            f"{len(refused)} of {len(pictures)} were refused: {_listed(refused)}",
            f"The other {len(writer.names)} are in {out}; put these right and run again.",
        )
    return out


def _listed(refused: dict[str, str]) -> str:
    shown = [f"{name} ({reason})" for name, reason in list(refused.items())[:_LISTED]]
    more = len(refused) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")


def _require_replaceable(out: Path) -> None:
    if not out.exists():
        return
    try:
        with open_hdf5(out, AGAIN) as file:
            if file.attrs.get("format") == FORMAT:
                return
    except DataError:
        pass
    raise ConfigError(out, "something else stands here", "Give another --out.")


def _describe(file: h5py.File, trained: TrainedModel, seed: int) -> None:
    facts = trained.facts
    file.attrs.update(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "written_by": f"chasm-fmri {version('chasm-fmri')}",
            "model": trained.title,
            "subject": trained.subject,
            "dataset": str(facts["dataset"]),
            "simulated": bool(facts.get("simulated")),
            "unit": trained.module.unit,
            "weights": str(facts.get("weights")),
            "fingerprints": json.dumps(facts.get("fingerprints")),
            "seed": seed,
        }
    )
    trained.space.write_hdf5(file.create_group("voxel_table"))


def _write_texts(file: h5py.File, group: str, columns: dict[str, list[str]]) -> None:
    kind = h5py.string_dtype()
    for name, texts in columns.items():
        data = np.array(texts, dtype=object)
        file.create_dataset(f"{group}/{name}", (len(texts),), kind, data=data if texts else None)


class _Writer:
    """Datasets that grow along their image axis."""

    def __init__(
        self, file: h5py.File, trained: TrainedModel, n_images: int, draws: int, parcels: bool
    ) -> None:
        sizes = trained.module.sizes
        assert sizes is not None
        self.names: list[str] = []
        self.datasets = {"voxels": _growing(file, "voxels", (n_images, sizes.n_voxels))}
        if parcels:
            self.datasets["parcels"] = _growing(file, "parcels", (n_images, sizes.n_parcels))
        if draws:
            self.datasets["draws"] = _growing(file, "draws", (draws, n_images, sizes.n_voxels))

    def append(self, block: Prediction) -> None:
        start = len(self.names)
        self.names += block.names
        for name, dataset in self.datasets.items():
            dataset.resize(len(self.names), axis=dataset.ndim - 2)
            dataset[..., start:, :] = getattr(block, name)


def _growing(file: h5py.File, name: str, most: tuple[int, ...]) -> h5py.Dataset:
    """Empty along the image axis, the last but one."""
    rows = min(most[-2], max(1, CHUNK_BYTES // (4 * most[-1])))
    start = (*most[:-2], 0, most[-1])
    chunks = (*(1 for _ in most[:-2]), rows, most[-1])
    data = file.create_dataset(name, start, np.float32, maxshape=most, chunks=chunks)
    data.attrs["units"] = "session-z-scored percent signal change"
    return data


@dataclass(frozen=True)
class ResponseFile:
    """A file of predicted responses, opened by `ResponseFile.open`; rows are read when asked for.

    Attributes
    ----------
    path
        The file.
    names
        Of the images, in the order of the rows.
    space
        The voxels.
    attributes
        Those of the root.
    """

    path: Path
    names: tuple[str, ...]
    space: VoxelSpace
    attributes: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> ResponseFile:
        """Open and check a file.

        Raises
        ------
        DataError
            It is missing, damaged, of another kind or of a newer format.
        """
        path = Path(path)
        try:
            with open_hdf5(path, AGAIN) as file:
                if file.attrs.get("format") != FORMAT:
                    raise DataError(path, "holds no predicted responses", AGAIN)
                found = int(file.attrs["format_version"])
                if found > FORMAT_VERSION:
                    raise DataError(
                        f"{path}:format_version",
                        f"{found}, this chasm reads up to {FORMAT_VERSION}", "Update chasm",
                    )  # fmt: skip
                names = tuple(file["images/name"].asstr()[:])
                space = VoxelSpace.read_hdf5(file["voxel_table"])
                if file["voxels"].shape != (len(names), space.n_voxels):
                    raise DataError(f"{path}:/voxels", f"shape {file['voxels'].shape}", AGAIN)
                return cls(path, names, space, {key: file.attrs[key] for key in file.attrs})
        except (KeyError, ValueError, TypeError, OSError) as error:
            raise DataError(path, f"is damaged or incomplete ({error})", AGAIN) from error

    def voxels_of(self, name: str) -> np.ndarray:
        """Predicted responses to one image, (voxels,) float32.

        Raises
        ------
        DataError
            There is no image of this name, or several.
        """
        count = self.names.count(name)
        if count != 1:
            near = ", ".join(difflib.get_close_matches(name, self.names, n=3) or self.names[:3])
            raise DataError(
                f"{self.path}:/images/name", f"{count} images are called {name!r}", f"Near: {near}."
            )
        with open_hdf5(self.path, AGAIN) as file:
            return file["voxels"][self.names.index(name)]
