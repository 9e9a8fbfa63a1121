"""What a person may give as images, read one at a time as 8-bit RGB.

Whatever is accepted has the very pixels that `chasm extract` would see. What has no single
faithful reading as 8-bit RGB is refused:

====================================  ====================================================
grey, 1 bit, palette                  read; grey values stand in all three channels
alpha that is opaque everywhere       left out
16-bit grey that holds 8-bit values   read
transparent pixels                    refused: what lies behind them is not in the file
other 16-bit, 32-bit, float           refused: reducing them needs a choice of range
CMYK, Lab, HSV, YCbCr                 refused: the conversion depends on a profile
several frames, a turned photograph   refused: which frame, and which way up, is not said
====================================  ====================================================
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from chasm.data.images import StoredImages, open_images, read_npy
from chasm.errors import ConfigError, DataError

_ORIENTATION = 0x0112
"""Exif tag that says how a photograph is to be turned."""
_PLAIN_MODES = frozenset({"RGB", "L", "1", "P"})
_ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "RGBa", "La"})
_BY_HAND = "Convert it to 8-bit RGB yourself, where you can see the result"
_DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, UnidentifiedImageError,
    Image.DecompressionBombError, zipfile.BadZipFile,
)  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """One image that has not been read yet.

    Attributes
    ----------
    name
        File name, row of an array or brick, or place in a list.
    read
        Returns uint8 (height, width, 3); raises a `DataError` that names the image.
    """

    name: str
    read: Callable[[], np.ndarray]


def pictures_of(images: Any) -> list[Picture]:
    """List the images behind a path, an array, a PIL image, a tensor, or any sequence of these.

    Parameters
    ----------
    images
        A path: an image file; a folder (its image files, sorted with digits read as numbers) or
        a ``.zip`` of them; a ``.npy`` array; an ``.h5`` or ``.hdf5`` file with ``imgBrick``, as
        NSD's stimuli. A NumPy array: uint8 (height, width[, 1, 3 or 4]), or (images, height,
        width, 1, 3 or 4). A PIL image. A tensor: (1, 3 or 4, height, width), or a batch of
        these; uint8, or floating from 0 to 1 (rounded to 8 bits). Sizes may differ.

    Raises
    ------
    DataError
        There is nothing at a path, or it holds no image.
    ConfigError
        An object is none of these.
    """
    found = list(_pictures(images, ""))
    if not found:
        raise DataError("images", "none given", "Give at least one image")
    return found


def _pictures(images: Any, name: str) -> Iterator[Picture]:
    if isinstance(images, (str, Path)):
        yield from _at_path(Path(images))
    elif isinstance(images, Image.Image):
        yield Picture(name or "0", partial(_from_pil, images, name or "image"))
    elif isinstance(images, (np.ndarray, torch.Tensor)):
        yield from _rows(images, name)
    elif isinstance(images, Iterable) and not isinstance(images, (bytes, dict)):
        for index, item in enumerate(images):
            yield from _pictures(item, f"{name}.{index}" if name else str(index))
    else:
        raise ConfigError(
            "images",
            f"a {type(images).__name__} is no image",
            "Give paths, NumPy arrays, PIL images, tensors, or a list of these.",
        )


def _rows(images: np.ndarray | torch.Tensor, name: str) -> Iterator[Picture]:
    """One image of 2 or 3 axes, or a batch of 4."""
    read: Any = _from_array if isinstance(images, np.ndarray) else _from_tensor
    if images.ndim != 4:
        yield Picture(name or "0", partial(read, images, f"image {name or 0}"))
        return
    for row in range(len(images)):
        label = f"{name}.{row}" if name else str(row)
        yield Picture(label, partial(_from_row, images, row, read, label))


def _from_row(images: Any, row: int, read: Callable[..., np.ndarray], label: str) -> np.ndarray:
    return read(images[row], f"image {label}")


def _at_path(path: Path) -> Iterator[Picture]:
    suffix = path.suffix.lower()
    if path.is_dir():
        for name in open_images("folder", path).names:  # type: ignore[attr-defined]
            yield Picture(name, partial(_from_file, path / name))
    elif not path.exists():
        raise DataError(path, "no such file or folder", "Give an image or a folder of images")
    elif suffix == ".zip":
        names = open_images("zip", path).names  # type: ignore[attr-defined]
        archive = zipfile.ZipFile(path)
        for name in names:
            yield Picture(name, partial(_from_zip, archive, name, f"{path}:{name}"))
    elif suffix in (".h5", ".hdf5"):
        brick = open_images("hdf5", path)
        for row in range(len(brick)):
            yield Picture(str(row), partial(_from_brick, brick, row))
    elif suffix == ".npy":
        array = read_npy(path, memory_map=True)
        for picture in _rows(array, ""):
            yield Picture(picture.name, partial(_named, picture.read, f"{path}:{picture.name}"))
    else:
        yield Picture(str(path), partial(_from_file, path))


def _named(read: Callable[[], np.ndarray], where: str) -> np.ndarray:
    try:
        return read()
    except DataError as error:
        raise DataError(where, error.problem, error.remedy) from error


def _from_brick(brick: StoredImages, row: int) -> np.ndarray:
    return brick.read(np.array([row]))[0]


def _from_file(path: Path) -> np.ndarray:
    try:
        return _decode(path.read_bytes(), path)
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})", "Replace this file") from error


def _from_zip(archive: zipfile.ZipFile, name: str, where: str) -> np.ndarray:
    try:
        data = archive.read(name)
    except (*_DAMAGE, RuntimeError) as error:  # RuntimeError: encrypted, or of an unknown kind
        raise DataError(where, f"cannot be read ({error})", "Zip it again") from error
    return _decode(data, where)


def _decode(data: bytes, where: object) -> np.ndarray:
    with _damage_named(where), Image.open(BytesIO(data)) as image:
        return _pixels_of(image, where)


def _from_pil(image: Image.Image, where: object) -> np.ndarray:
    with _damage_named(where):
        return _pixels_of(image, where)


@contextmanager
def _damage_named(where: object) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, UnidentifiedImageError):
            line = "of no format that can be read"
        raise DataError(where, f"cannot be decoded as an image ({line})", "Replace it") from error


def _pixels_of(image: Image.Image, where: object) -> np.ndarray:
    """Pixels of a PIL image, if they have one reading as 8-bit RGB."""
    # Pillow cuts 16-bit colours to 8 without a word; only a file not loaded yet tells.
    tiles = getattr(image, "tile", None) or []
    if image.mode in ("RGB", "RGBA", "LA") and any("16" in str(tile[3]) for tile in tiles):
        raise DataError(where, "has 16 bits per channel", _BY_HAND)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a JPEG photograph with its own preview
        raise DataError(where, f"holds {frames} frames", "Save the one you mean as an image")
    turned = image.getexif().get(_ORIENTATION, 1)
    if turned not in (0, 1):
        raise DataError(
            where, f"is to be turned before it is shown (Exif orientation {turned})",
            "Save it upright",
        )  # fmt: skip
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        _require_opaque(rgba[..., 3], where)
        return rgba[..., :3].copy()
    if image.mode in _PLAIN_MODES:
        return np.array(image.convert("RGB"))
    if image.mode.startswith("I;16"):
        return _eight_bits_of(np.asarray(image), where)
    raise DataError(where, f"has the colour mode {image.mode}", _BY_HAND)


def _require_opaque(alpha: np.ndarray, where: object) -> None:
    if alpha.min() < 255:
        raise DataError(
            where, "has transparent pixels", "Put it on the background that you mean, without alpha"
        )


def _eight_bits_of(grey: np.ndarray, where: object) -> np.ndarray:
    """16-bit grey values that stand for 8-bit ones (k × 257), as RGB."""
    high = (grey >> 8).astype(np.uint8)
    if (high.astype(np.int64) * 257 != grey).any():
        raise DataError(where, "has 16-bit grey values that 8 bits cannot hold", _BY_HAND)
    return np.repeat(high[..., None], 3, axis=2)


def _from_array(image: np.ndarray, where: object) -> np.ndarray:
    """uint8 (height, width[, 1, 3 or 4]) as RGB."""
    if image.dtype != np.uint8:
        raise DataError(
            where, f"is an array of {image.dtype}, whose range is not known",
            "Scale it to 0..255 and convert it to uint8",
        )  # fmt: skip
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or not pixels.size:
        raise DataError(
            where, f"has shape {image.shape}", "Give (height, width, 3): the colour axis last"
        )
    if pixels.shape[2] == 4:
        _require_opaque(pixels[..., 3], where)
    if pixels.shape[2] == 1:
        return np.repeat(np.asarray(pixels), 3, axis=2)
    return np.array(pixels[..., :3])


def _from_tensor(image: torch.Tensor, where: object) -> np.ndarray:
    """(channels, height, width), uint8 or floating in 0..1, as RGB."""
    image = image.detach().cpu()
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4):
        raise DataError(
            where, f"is a tensor of shape {tuple(image.shape)}",
            "Give (3, height, width): the colour axis first",
        )  # fmt: skip
    if image.is_floating_point():
        low, high = (float(image.min()), float(image.max())) if image.numel() else (0.0, 0.0)
        if not (low >= 0 and high <= 1):
            raise DataError(
                where, f"has values from {low:.4g} to {high:.4g}, not from 0 to 1",
                "Undo any normalisation: give values in 0..1, or uint8",
            )  # fmt: skip
        image = (image.double() * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise DataError(where, f"is a tensor of {image.dtype}", "Give uint8, or floats in 0..1")
    return _from_array(image.permute(1, 2, 0).numpy(), where)
