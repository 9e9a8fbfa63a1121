"""The subject store's format: fields, validation, and the signature of what a store is made of.

docs/data-format.md describes the same fields in words.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from chasm.errors import StoreError
from chasm.io import digest

FORMAT = "chasm-subject-store"
FORMAT_VERSION = 1
TRIAL_FIELDS = ("session", "run", "image_id", "repeat")
VOXEL_FIELDS = ("i", "j", "k", "x", "y", "z", "ncsnr", "ncsnr_published")
NORMALISATIONS = ("train", "all")
ROOT_FIELDS = ("subject", "dataset", "source", "beta_version", "affine", "volume_shape")
AGAIN = "Prepare the store again with `chasm prepare`"


def store_signature(path: Path) -> str | None:
    """Return the signature of the inputs that made the store, None when there is no file.

    Raises
    ------
    StoreError
        If something else than a subject store stands there.
    """
    if not path.exists():
        return None
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") == FORMAT:
                return str(file.attrs.get("source_signature", ""))
    except OSError:
        pass
    raise StoreError(
        path, "exists and is not a subject store", "Give another output file, or --overwrite"
    )


def file_facts(path: Path, content_below: int = 16 << 20) -> list[Any]:
    """Describe a file for a signature: content if it is small, else size and time of change."""
    stat = path.stat()
    if stat.st_size < content_below:
        return [path.name, hashlib.sha256(path.read_bytes()).hexdigest()]
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
    for atlas in _dataset(path, file, "rois", None):
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
    if name not in file:
        raise StoreError(f"{path}:/{name}", "is missing", AGAIN)
    found = file[name]
    if shape is not None and tuple(found.shape) != tuple(shape):
        raise StoreError(f"{path}:/{name}", f"shape {found.shape} found, {shape} expected", AGAIN)
    return found
