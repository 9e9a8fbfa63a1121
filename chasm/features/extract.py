"""Fill the token cache: resumable, and safe when several processes do it at once.

Rows are divided into blocks. A process takes a block's lock, computes the images that are
missing in it batch by batch, and writes tokens first and checksums last, so that an image is
either there with its checksum or not there. Batches depend only on the request, which makes a
continued run equal to an unbroken one. The checksum of each image's pixels is kept beside those
of its tokens, so that images that changed later are noticed.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock, Timeout

from chasm.errors import CacheError
from chasm.features.backbones import Backbone
from chasm.features.cache import (
    CHECKS,
    CLS,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    PATCHES,
    REBUILD,
    TokenCache,
    cache_folder,
    checksum,
)
from chasm.io import atomic_folder, digest, write_json
from chasm.progress import bar

if TYPE_CHECKING:
    from chasm.data.images import ImageSource

log = logging.getLogger(__name__)

BLOCK_ROWS = 128
"""Images per lock; two processes divide the work in portions of this size."""
PIXEL_SAMPLE = 32
"""How many images whose tokens are there are compared with the pixels of then."""


def extract(
    images: ImageSource,
    backbone: Backbone,
    image_ids: np.ndarray,
    root: Path,
    *,
    batch_size: int = 32,
    device: str = "cpu",
    fresh: bool = False,
) -> TokenCache:
    """Compute the tokens of images that are not in the cache yet.

    Parameters
    ----------
    images
        Source of the pixels; its ids are the rows 0..len-1.
    backbone
        Frozen backbone.
    image_ids
        Images wanted, int64, any order.
    root
        Folder of all token caches.
    batch_size
        Images per forward pass.
    device
        Where the backbone runs.
    fresh
        Compute `image_ids` again although they are there; other images keep their tokens. A
        damaged cache is made anew as a whole: not while another process fills it.

    Returns
    -------
    TokenCache
        Holds at least `image_ids`. Tokens that were there are compared with their checksums, and
        a sample of their images with those of the pixels; only what is missing is computed.

    Raises
    ------
    CacheError
        If the cache is damaged or cannot be written, images have changed since their tokens were
        computed, an id is not in the source, or tokens do not fit float16.
    """
    ids = np.unique(np.asarray(image_ids, dtype=np.int64))
    folder = cache_folder(root, images.fingerprint, backbone.key)
    _make_folder(folder, images, backbone, fresh)
    cache = TokenCache.open(folder)
    missing = cache.missing(ids)
    if fresh:
        missing = ids
    else:
        there = np.setdiff1d(ids, missing)
        cache.verify(there)
        check_pixels(cache, images, there)
    if not missing.size:
        return cache
    block_rows = cache.manifest["block_rows"]
    blocks = [ids[ids // block_rows == block] for block in np.unique(missing // block_rows)]
    backbone = backbone.to(device)
    with bar() as display, _Writer(cache) as writer:
        task = display.add_task(f"tokens of {backbone.key['model']}", total=len(ids))

        def fill(wanted: np.ndarray) -> None:
            if fresh:
                writer.forget(wanted)
            for start in range(0, len(wanted), batch_size):
                batch = cache.missing(wanted[start : start + batch_size])
                if batch.size:
                    pixels = images.read(batch)
                    writer.write(batch, pixels, *_compute(pixels, backbone, batch, device))
                display.update(task, completed=len(ids) - cache.missing(ids).size)

        held_elsewhere = []
        for wanted in blocks:
            try:
                with _lock(folder, wanted[0] // block_rows, wait=False):
                    fill(wanted)
            except Timeout:
                held_elsewhere.append(wanted)
        for wanted in held_elsewhere:
            with _lock(folder, wanted[0] // block_rows, wait=True):
                fill(wanted)
    still_missing = TokenCache.open(folder).missing(ids)
    if still_missing.size:
        raise CacheError(
            folder,
            f"{still_missing.size} images vanished: another process started the cache anew",
            "Run `chasm extract` again.",
        )
    return cache


def check_pixels(cache: TokenCache, images: ImageSource, image_ids: np.ndarray) -> None:
    """Compare images with the checksums kept when their tokens were computed.

    Parameters
    ----------
    cache
        Holds the tokens of `image_ids`.
    images
        Source of the pixels.
    image_ids
        Images of which up to `PIXEL_SAMPLE`, evenly spread, are read.

    Raises
    ------
    CacheError
        Names the images whose pixels differ.
    """
    ids = np.asarray(image_ids, dtype=np.int64)
    count = min(PIXEL_SAMPLE, len(ids))
    if not count:
        return
    sample = ids[np.linspace(0, len(ids) - 1, count).round().astype(int)]
    known = cache.checks[sample, 2]
    changed = sample[[checksum(p) != k for p, k in zip(images.read(sample), known, strict=True)]]
    if changed.size:
        names = ", ".join(str(i) for i in changed[:8]) + (" …" if changed.size > 8 else "")
        raise CacheError(
            cache.folder / CHECKS,
            f"{changed.size} of {count} sampled images have changed since their tokens were "
            f"computed: images {names}",
            f"Put the old images back, or: {REBUILD}",
        )


def _lock(folder: Path, block: int, *, wait: bool) -> FileLock:
    """Lock of one block of rows; released by the system when its process dies."""
    return FileLock(folder / "locks" / f"{block:05d}.lock", timeout=-1 if wait else 0)


def _make_folder(folder: Path, images: ImageSource, backbone: Backbone, fresh: bool) -> None:
    """Make an empty cache under its final name, unless it is there already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if fresh and folder.exists():
            try:
                TokenCache.open(folder)
            except CacheError as error:
                log.warning("made anew: %s", error)
                shutil.rmtree(folder)
        if folder.exists():
            return
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "key": folder.name,
            "images": {"fingerprint": images.fingerprint, "count": len(images)},
            "sizes": {
                "n_cls": backbone.n_cls,
                "cls_width": backbone.cls_width,
                "n_patches": backbone.n_patches,
                "patch_width": backbone.patch_width,
                "grid": list(backbone.grid),
            },
            "block_rows": BLOCK_ROWS,
            "weights_label": backbone.weights_label,
            "backbone": backbone.key,
            "made_with": {"torch": torch.__version__},
        }
        content = {k: manifest[k] for k in ("images", "sizes", "block_rows", "weights_label")}
        manifest["check"] = digest(content)
        with atomic_folder(folder) as temporary:
            write_json(temporary / MANIFEST, manifest)
            (temporary / "locks").mkdir()
            for name, (shape, dtype) in TokenCache(temporary, manifest).layout.items():
                with (temporary / name).open("wb") as stream:
                    stream.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)


def _compute(
    images: Sequence[np.ndarray], backbone: Backbone, batch: np.ndarray, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of one batch as float16: (images, layers, width) and (images, patches, width)."""
    pixels = backbone.preprocess(images).to(device)
    cls, patches = backbone(pixels)
    per_layer = patches.split(backbone.patch_width // len(backbone.patch_layers), dim=-1)
    model = backbone.key["model"]
    for layer, values in zip(backbone.cls_layers, cls.unbind(1), strict=True):
        _require_float16(values, f"{model}:CLS token of block {layer}", batch)
    for layer, values in zip(backbone.patch_layers, per_layer, strict=True):
        _require_float16(values, f"{model}:patch tokens of block {layer}", batch)
    return cls.half().cpu().numpy(), patches.half().cpu().numpy()


def _require_float16(values: torch.Tensor, where: str, batch: np.ndarray) -> None:
    """Raise `CacheError` if some value would not be finite in float16."""
    finite = values.half().isfinite().flatten(1).all(1)
    if bool(finite.all()):
        return
    row = int((~finite).nonzero()[0])
    largest = float(values[row].abs().max())
    raise CacheError(
        where,
        f"image {batch[row]} has a value of magnitude {largest:.4g}; float16 holds up to 65504",
        "Choose another layer with `--data.backbone.cls_layers` or `--data.backbone.patch_layers`.",
    )


class _Writer:
    """The three files of a cache, open for writing rows of images."""

    def __init__(self, cache: TokenCache) -> None:
        self.cache = cache
        self.streams: dict[str, IO[bytes]] = {}

    def __enter__(self) -> _Writer:
        for name in (CLS, PATCHES, CHECKS):
            self.streams[name] = (self.cache.folder / name).open("r+b", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        for stream in self.streams.values():
            stream.close()

    def forget(self, ids: np.ndarray) -> None:
        """Count the tokens of some images of one block, which the caller has locked, as missing."""
        first, last = ids[0], ids[-1]
        checks = np.array(self.cache.checks[first : last + 1])
        checks[ids - first] = 0
        self._put(CHECKS, first, checks, rows=len(checks))
        self._sync(CHECKS)

    def write(
        self, ids: np.ndarray, pixels: Sequence[np.ndarray], cls: np.ndarray, patches: np.ndarray
    ) -> None:
        """Store the tokens of some images of one block, which the caller has locked.

        Parameters
        ----------
        ids
            Images, ascending.
        pixels
            Of each image, uint8 (height, width, 3).
        cls, patches
            float16, (images, layers, width) and (images, patches, width).

        Raises
        ------
        CacheError
            If the disk does not take them; the images then count as missing.
        """
        first, last = ids[0], ids[-1]
        checks = np.array(self.cache.checks[first : last + 1])
        for image, *content in zip(ids, cls, patches, pixels, strict=True):
            for name, values in zip((CLS, PATCHES), content[:2], strict=True):
                self._put(name, image, values)
            checks[image - first] = [checksum(values) for values in content]
        self._sync(CLS, PATCHES)
        self._put(CHECKS, first, checks, rows=len(checks))
        self._sync(CHECKS)

    def _put(self, name: str, row: int, values: np.ndarray, rows: int = 1) -> None:
        data = values.astype(self.cache.layout[name][1], copy=False).tobytes()
        stream = self.streams[name]
        try:
            stream.seek(int(row) * (len(data) // rows))
            written = stream.write(data)
        except OSError as error:
            raise self._full(name, error.strerror) from error
        if written != len(data):
            raise self._full(name, f"{written} of {len(data)} bytes written")

    def _sync(self, *names: str) -> None:
        for name in names:
            try:
                os.fsync(self.streams[name].fileno())
            except OSError as error:
                raise self._full(name, error.strerror) from error

    def _full(self, name: str, reason: str | None) -> CacheError:
        return CacheError(
            self.cache.folder / name,
            f"tokens cannot be written ({reason})",
            "Free some space and run again; what is finished is kept.",
        )
