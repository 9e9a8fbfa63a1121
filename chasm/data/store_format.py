"""The subject store's format: fields, validation, and what says of which inputs a store is made.

docs/data-format.md describes the same fields in words.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from chasm.errors import DataError, StoreError
from chasm.io import digest, sha256_of_file

FORMAT = "chasm-subject-store"
FORMAT_VERSION = 1
TRIAL_FIELDS = ("session", "run", "image_id", "repeat")
VOXEL_FIELDS = ("i", "j", "k", "x", "y", "z", "ncsnr", "ncsnr_published")
NORMALISATIONS = ("train", "all")
ROOT_FIELDS = ("subject", "dataset", "source", "beta_version", "affine", "volume_shape")
AGAIN = "Prepare the store again with `chasm prepare`"
ELSEWHERE = "Give another --out or dataset folder, or replace it with `chasm prepare --overwrite`"


def open_hdf5(path: Path, remedy: str, kind: type[DataError] = DataError) -> h5py.File:
    """Open an HDF5 file for reading, without a lock: read-only and network disks may have none.

    Parameters
    ----------
    path
        The file.
    remedy
        What to do when its content is damaged.
    kind
        The error to raise.

    Raises
    ------
    DataError
        If the file may not be read, is being written, or is damaged; of class `kind`.
    """
    try:
        return h5py.File(path, "r", locking=False)
    except PermissionError as error:
        raise kind(path, "may not be read by you (permission denied)", "Allow reading") from error
    except BlockingIOError as error:
        raise kind(
            path, "is locked by another program", "Wait until nothing writes to this file"
        ) from error
    except FileNotFoundError as error:
        raise kind(path, "no such file", remedy) from error
    except OSError as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise kind(path, f"is damaged or truncated, or no HDF5 file ({line})", remedy) from error


def is_current(path: Path, made_from: str, identity: Mapping[str, str]) -> bool:
    """Say whether a store was made from these inputs, and guard it against those of another.

    Parameters
    ----------
    path
        The store, there or not.
    made_from
        `signature` of the inputs.
    identity
        What the store is of: root attributes, and ``images/path`` where that belongs to it.

    Returns
    -------
    bool
        False if there is no store, or one of the same identity whose inputs have changed.

    Raises
    ------
    StoreError
        If something else stands there: no subject store, or one of another identity.
    """
    if not path.exists():
        return False
    try:
        with open_hdf5(path, ELSEWHERE, StoreError) as file:
            is_store = file.attrs.get("format") == FORMAT
            if is_store and file.attrs.get("source_signature") == made_from:
                return True
            held = {name: _identity_field(file, name) for name in identity}
    except StoreError as error:
        if isinstance(error.__cause__, PermissionError | BlockingIOError):
            raise
        is_store = False
    if not is_store:
        raise StoreError(path, "exists and is not a subject store", ELSEWHERE)
    different = [name for name, value in identity.items() if held[name] != value]
    if different:
        found = ", ".join(f"{name} {held[name] or 'none'}" for name in held)
        wanted = ", ".join(f"{name} {identity[name]}" for name in different)
        raise StoreError(path, f"holds another store ({found}), not {wanted}", ELSEWHERE)
    return False


def _identity_field(file: h5py.File, name: str) -> str:
    group, _, field = name.rpartition("/")
    holder = file.get(group) if group else file
    return "" if holder is None else str(holder.attrs.get(field, ""))


def content_hash(path: Path) -> str:
    """SHA-256 of a file; a file of the same size and time is not read twice in this process."""
    stat = path.stat()
    if time.time() - stat.st_mtime < 2:  # it may change again without another time
        return sha256_of_file(path)
    return _content_hash(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1 << 17)
def _content_hash(path: str, size: int, changed_ns: int) -> str:
    return sha256_of_file(path)


def file_facts(path: Path, content_below: int = 16 << 20) -> list[Any]:
    """Describe a file for a signature: content if it is small, else size and time of change."""
    stat = path.stat()
    if stat.st_size < content_below:
        return [path.name, content_hash(path)]
    return [path.name, stat.st_size, stat.st_mtime_ns]


def signature(facts: dict[str, Any]) -> str:
    """Digest of everything that decides the content of a store, the format version included."""
    return digest(facts | {"format_version": FORMAT_VERSION}, length=32)


def validate(path: Path, file: h5py.File) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check every field of an open store against the format.

    Returns
    -------
    attributes, layout
        Root attributes; shape, dtype, offset and scale of the betas.

    Raises
    ------
    StoreError
        Naming the file, the field and the remedy.
    """
    if file.attrs.get("format") != FORMAT:
        raise StoreError(path, "not a subject store", "Make one with `chasm prepare`")
    version = int(file.attrs.get("format_version", 0))
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{path}:format_version",
            f"{version} found, this chasm reads up to {FORMAT_VERSION}",
            "Update chasm, or prepare the store again",
        )
    for name in (*ROOT_FIELDS, "fingerprint", "source_signature"):
        if name not in file.attrs:
            raise StoreError(f"{path}:{name}", "attribute is missing", AGAIN)
    betas = _dataset(path, file, "betas", None)
    if betas.ndim != 2 or betas.dtype not in (np.int16, np.float32) or not betas.size:
        raise StoreError(
            f"{path}:/betas",
            f"{betas.dtype} {betas.shape} found, int16 or float32 (trials, voxels) expected",
            AGAIN,
        )
    offset = betas.id.get_offset()
    if offset is None or "scale" not in betas.attrs:
        raise StoreError(f"{path}:/betas", "not contiguous, or without its scale", AGAIN)
    n_trials, n_voxels = betas.shape
    for name in TRIAL_FIELDS:
        _dataset(path, file, f"trials/{name}", (n_trials,))
    for name in VOXEL_FIELDS:
        _dataset(path, file, f"voxels/{name}", (n_voxels,))
    sessions = len(np.unique(file["trials/session"][:]))
    for which in NORMALISATIONS:
        for name in ("mean", "std"):
            _dataset(path, file, f"normalisation/{which}/{name}", (sessions, n_voxels))
    _dataset(path, file, "normalisation/train/image_ids", None)
    if not isinstance(file.get("rois"), h5py.Group):
        raise StoreError(f"{path}:/rois", "is missing, or not a group", AGAIN)
    for atlas in file["rois"]:
        labels = _dataset(path, file, f"rois/{atlas}/labels", (n_voxels,))
        if "names" not in labels.parent.attrs:
            raise StoreError(f"{path}:/rois/{atlas}", "has no label names", AGAIN)
    _validate_images(path, file)
    layout = {
        "shape": (int(n_trials), int(n_voxels)),
        "dtype": betas.dtype,
        "offset": int(offset),
        "scale": float(betas.attrs["scale"]),
    }
    return {key: file.attrs[key] for key in file.attrs}, layout


def _validate_images(path: Path, file: h5py.File) -> None:
    ids = _dataset(path, file, "images/ids", None)[:]
    for name in ("shared", "special"):
        _dataset(path, file, f"images/{name}", ids.shape)
    for name in ("kind", "path", "key", "fingerprint", "fingerprint_ids"):
        if name not in file["images"].attrs:
            raise StoreError(f"{path}:/images/{name}", "attribute is missing", AGAIN)
    shown = np.unique(file["trials/image_id"][:])
    if not np.array_equal(shown, ids):
        raise StoreError(
            f"{path}:/images/ids", "are not the sorted ids of the images in /trials", AGAIN
        )


def _dataset(path: Path, file: h5py.File, name: str, shape: tuple[int, ...] | None) -> Any:
    found = file.get(name)
    if found is None:
        raise StoreError(f"{path}:/{name}", "is missing", AGAIN)
    if not isinstance(found, h5py.Dataset):
        raise StoreError(f"{path}:/{name}", "is a group where a dataset is expected", AGAIN)
    if shape is not None and tuple(found.shape) != tuple(shape):
        raise StoreError(f"{path}:/{name}", f"shape {found.shape} found, {shape} expected", AGAIN)
    return found
