"""Where the pixels are: images read by id from an HDF5 brick, a folder, a zip or a .npy array.

Ids are 0-based positions: rows of a brick or array, places in the sorted list of file names.
A fingerprint covers every byte of a folder, zip or .npy; of an HDF5 brick, which may be NSD's
39 GB, it covers the shape and a few images, and the brick is never read as a whole. Every source
can be pickled and used after a fork.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
from PIL import Image, UnidentifiedImageError

from chasm.data.store_format import content_hash, open_hdf5
from chasm.errors import DataError
from chasm.io import digest

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"})
FINGERPRINT_IMAGES = 8
"""How many images of an HDF5 brick, evenly spread, are hashed for a fingerprint."""
_FETCH = "Fetch the file again"

_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
    UnidentifiedImageError,
    Image.DecompressionBombError,
)


class ImageSource(Protocol):
    """Images that can be read by id.

    Attributes
    ----------
    ids
        (images,) int64, every id that can be read.
    fingerprint
        Short digest of the content; of an HDF5 brick, of its shape and a few images.
    """

    @property
    def ids(self) -> np.ndarray:
        """Every id that can be read: (images,) int64."""
        ...

    @property
    def fingerprint(self) -> str:
        """Short digest of the content; of an HDF5 brick, of its shape and a few images."""
        ...

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def read(self, image_ids: np.ndarray) -> list[np.ndarray]:
        """Read images, in the order asked for: uint8 (height, width, 3), RGB."""
        ...

    def describe(self) -> str:
        """Say in a few words what is read and where."""
        ...


def open_images(
    kind: str, path: str | Path, key: str = "", sample_ids: Sequence[int] | None = None
) -> StoredImages:
    """Open an image source.

    Parameters
    ----------
    kind
        ``hdf5``, ``folder``, ``zip`` or ``npy``; ``auto`` chooses by what `path` is.
    path
        The file or folder.
    key
        For ``hdf5``: the dataset of shape (images, height, width, 3), default ``imgBrick``.
    sample_ids
        For ``hdf5``: which images the fingerprint looks at; default: evenly spread. Of the other
        kinds it covers everything.

    Raises
    ------
    DataError
        If nothing is there, the kind is unknown, or the content is no set of images.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(path, "no such file or folder", "Give the place where the images are now")
    if kind == "auto":
        kind = _kind_of(path)
    if kind == "hdf5":
        return Hdf5Images(path, key or "imgBrick", sample_ids)
    if kind == "folder":
        return FolderImages(path)
    if kind == "zip":
        return ZipImages(path)
    if kind == "npy":
        return NpyImages(path)
    raise DataError(path, f"unknown kind of images '{kind}'", "Use hdf5, folder, zip or npy")


def _kind_of(path: Path) -> str:
    if path.is_dir():
        return "folder"
    kinds = {".zip": "zip", ".npy": "npy", ".hdf5": "hdf5", ".h5": "hdf5"}
    try:
        return kinds[path.suffix.lower()]
    except KeyError:
        raise DataError(
            path,
            f"cannot tell what '{path.suffix or path.name}' is",
            "Images come as a folder, a .zip, a .npy or an .hdf5 file",
        ) from None


class StoredImages:
    """What all stored sources share: ids, bounds, fingerprint.

    Attributes
    ----------
    kind, path, key, sample_ids
        What `open_images` needs to open the same source again.
    """

    kind = ""
    key = ""
    sample_ids: tuple[int, ...] = ()

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, image_ids: np.ndarray) -> list[np.ndarray]:
        """Read images, in the order asked for: uint8 (height, width, 3), RGB."""
        raise NotImplementedError

    def _identity(self) -> list[Any]:
        raise NotImplementedError

    @property
    def ids(self) -> np.ndarray:
        """Every id that can be read: (images,) int64."""
        return np.arange(len(self), dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """Short digest of the content; of an HDF5 brick, of its shape and a few images."""
        if self._fingerprint is None:
            self._fingerprint = digest([self.kind, *self._identity()])
        return self._fingerprint

    def describe(self) -> str:
        """Say in a few words what is read and where."""
        return f"{len(self)} images, {self.kind} {self.path}"

    def _checked(self, image_ids: np.ndarray) -> np.ndarray:
        ids = np.atleast_1d(np.asarray(image_ids, dtype=np.int64))
        wrong = ids[(ids < 0) | (ids >= len(self))]
        if wrong.size:
            raise DataError(
                self.path,
                f"image id {wrong[0]} asked for, but there are {len(self)} images "
                f"(ids 0 to {len(self) - 1})",
                "Use the stimulus file that belongs to these data",
            )
        return ids


class Hdf5Images(StoredImages):
    """Rows of an HDF5 dataset, uint8 (images, height, width, 3), as NSD's ``imgBrick``.

    The file is opened for each call to `read`, so nothing is shared between processes.
    `sample_ids` are the images that the fingerprint looks at.
    """

    kind = "hdf5"

    def __init__(self, path: Path, key: str, sample_ids: Sequence[int] | None = None) -> None:
        super().__init__(path)
        self.key = key
        with open_hdf5(self.path, _FETCH) as file:
            if not isinstance(file.get(key), h5py.Dataset):
                raise DataError(
                    f"{path}:{key}",
                    f"no such dataset; the file holds {sorted(file)}",
                    "Give NSD's nsd_stimuli.hdf5 or a file of that form",
                )
            self._shape = tuple(int(n) for n in file[key].shape)
            dtype = file[key].dtype
        if len(self._shape) != 4 or self._shape[3] != 3 or dtype != np.uint8:
            raise DataError(
                f"{path}:{key}",
                f"{dtype} {self._shape} found, uint8 (images, height, width, 3) expected",
                "Give NSD's nsd_stimuli.hdf5 or a file of that form",
            )

        if sample_ids is None:
            sample_ids = np.linspace(0, len(self) - 1, FINGERPRINT_IMAGES).round().tolist()
        self.sample_ids = tuple(int(i) for i in sample_ids)

    def __len__(self) -> int:
        return self._shape[0]

    def _identity(self) -> list[Any]:
        pixels = hashlib.sha256()
        for image in self.read(np.asarray(self.sample_ids)):
            pixels.update(image.tobytes())
        return [self.key, list(self._shape), pixels.hexdigest()]

    def read(self, image_ids: np.ndarray) -> list[np.ndarray]:
        """Read images, in the order asked for: uint8 (height, width, 3), RGB."""
        ids = self._checked(image_ids)
        with open_hdf5(self.path, _FETCH) as file:
            brick = file[self.key]
            try:
                found = {int(i): brick[int(i)] for i in np.unique(ids)}
            except OSError as error:
                raise DataError(
                    f"{self.path}:{self.key}",
                    f"cannot be read ({_line(error)})",
                    _FETCH,
                ) from error
        return [found[int(i)] for i in ids]


class FolderImages(StoredImages):
    """Image files of one folder; id = place in the list of names, digits sorted as numbers."""

    kind = "folder"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.names = _image_names(p.name for p in self.path.iterdir() if p.is_file())
        if not self.names:
            raise DataError(
                path, "no image files in this folder", f"Use {', '.join(sorted(SUFFIXES))}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def _identity(self) -> list[Any]:
        return [[name, content_hash(self.path / name)] for name in self.names]

    def read(self, image_ids: np.ndarray) -> list[np.ndarray]:
        """Read images, in the order asked for: uint8 (height, width, 3), RGB."""
        names = [self.names[i] for i in self._checked(image_ids)]
        return [_decode((self.path / n).read_bytes, self.path / n) for n in names]


class ZipImages(StoredImages):
    """Image files in a zip; id = place in the list of names, digits sorted as numbers."""

    kind = "zip"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._archive: tuple[int, zipfile.ZipFile] | None = None
        entries = (i.filename for i in self._zip().infolist() if not i.is_dir())
        self.names = _image_names(n for n in entries if not n.startswith("__MACOSX/"))
        if not self.names:
            raise DataError(
                path, "no image files in this zip", f"Use {', '.join(sorted(SUFFIXES))}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_archive": None}

    def _zip(self) -> zipfile.ZipFile:
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                self._archive = (os.getpid(), zipfile.ZipFile(self.path))
            except (zipfile.BadZipFile, OSError) as error:
                raise DataError(
                    self.path, f"not a readable zip ({_line(error)})", _FETCH
                ) from error
        return self._archive[1]

    def __len__(self) -> int:
        return len(self.names)

    def _identity(self) -> list[Any]:
        return [content_hash(self.path)]

    def read(self, image_ids: np.ndarray) -> list[np.ndarray]:
        """Read images, in the order asked for: uint8 (height, width, 3), RGB."""
        archive = self._zip()
        names = [self.names[i] for i in self._checked(image_ids)]
        return [_decode(partial(archive.read, n), f"{self.path}:{n}") for n in names]


class NpyImages(StoredImages):
    """Rows of a .npy array, uint8 (images, height, width[, 1, 3 or 4]), read by memory map."""

    kind = "npy"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        array = read_npy(self.path, memory_map=True)
        self._shape = tuple(int(n) for n in array.shape)
        channels = self._shape[3] if len(self._shape) == 4 else 1
        if len(self._shape) not in (3, 4) or channels not in (1, 3, 4) or array.dtype != np.uint8:
            raise DataError(
                path,
                f"{array.dtype} {self._shape} found, uint8 (images, height, width[, 3]) expected",
                "Convert to uint8 with the colour axis last",
            )

    def __len__(self) -> int:
        return self._shape[0]

    def _identity(self) -> list[Any]:
        return [content_hash(self.path)]

    def read(self, image_ids: np.ndarray) -> list[np.ndarray]:
        """Read images, in the order asked for: uint8 (height, width, 3), RGB."""
        array = read_npy(self.path, memory_map=True)
        images = []
        for i in self._checked(image_ids):
            image = np.asarray(array[i])
            image = image[..., None] if image.ndim == 2 else image
            images.append(np.repeat(image, 3, 2) if image.shape[2] == 1 else image[..., :3].copy())
        return images


def read_npy(path: Path, *, memory_map: bool = False) -> np.ndarray:
    """Read one array.

    Raises
    ------
    DataError
        If the file is damaged, holds objects, or is an archive of several arrays.
    """
    try:
        found = np.load(path, mmap_mode="r" if memory_map else None, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            path, f"not a readable .npy array ({_line(error)})", "Save it again"
        ) from error
    if not isinstance(found, np.ndarray):
        names = ", ".join(found.files)
        found.close()
        raise DataError(
            path, f"is an .npz archive ({names}), not a .npy array", "Save one array by np.save"
        )
    return found


def _image_names(names: Any) -> list[str]:
    """Keep image files that are not hidden; sort them with digits read as numbers."""
    kept = [
        n for n in names if Path(n).suffix.lower() in SUFFIXES and not Path(n).name.startswith(".")
    ]
    return sorted(kept, key=lambda n: ([_number(p) for p in re.split(r"(\d+)", n)], n))


def _number(part: str) -> tuple[int, int, str]:
    return (0, int(part), "") if part.isdecimal() else (1, 0, part)


def _decode(load: Callable[[], bytes], where: object) -> np.ndarray:
    """Decode one encoded image to uint8 (height, width, 3)."""
    try:
        with Image.open(io.BytesIO(load())) as image:
            if image.mode.startswith("I;16"):
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            return np.array(image.convert("RGB"))
    except (*_DECODING_ERRORS, zipfile.BadZipFile) as error:
        raise DataError(
            where, f"cannot be decoded as an image ({_line(error)})", "Replace this file"
        ) from error


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
