"""The token cache: tokens of frozen backbones on disk, memory-mapped, keyed and checked.

A cache is a folder ``<root>/<key>/``, one row per image of the image source:

=================  ========================================================================
``manifest.json``  format, key, image fingerprint, backbone key, sizes
``cls.f16``        (images, layers, width) little-endian float16, sparse until filled
``patches.f16``    (images, patches, width) little-endian float16, sparse until filled
``crc.u32``        (images, 3) little-endian uint32, CRC-32 of the CLS tokens, of the patch
                   tokens and of the pixels of each image; 0 = this image is not there yet
``locks/``         lock files of the blocks of rows that processes divide among themselves
=================  ========================================================================

`chasm.features.extract` fills it; this module reads it.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from chasm.errors import CacheError
from chasm.features.backbones import BackboneSpec, matches
from chasm.io import digest
from chasm.progress import track

log = logging.getLogger(__name__)

FORMAT = "chasm-token-cache"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
CLS, PATCHES, CHECKS = "cls.f16", "patches.f16", "crc.u32"

REBUILD = "Extract these images anew with `chasm extract --fresh`."
DELETE = "Delete this folder and run `chasm extract` again."


def cache_key(image_fingerprint: str, backbone_key: dict[str, Any]) -> str:
    """Name of the cache of these images under this backbone."""
    content = digest([FORMAT_VERSION, image_fingerprint, backbone_key])
    return f"{_folder_prefix(backbone_key['model'])}{content}"


def _folder_prefix(model: str) -> str:
    return f"{model.replace('/', '_')}-"


def cache_folder(root: Path, image_fingerprint: str, backbone_key: dict[str, Any]) -> Path:
    """Where the tokens of these images under this backbone are, or will be."""
    return Path(root) / cache_key(image_fingerprint, backbone_key)


def checksum(row: np.ndarray) -> int:
    """CRC-32 of one image's tokens or pixels, never 0, which stands for those not there."""
    return zlib.crc32(row.tobytes()) or 0xFFFFFFFF


class TokenCache:
    """Read-only view of a token cache. Cheap to make, to pickle and to fork: files open lazily.

    Parameters
    ----------
    folder
        The cache's folder.
    manifest
        Its checked manifest; use `TokenCache.open`.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def open(cls, folder: Path) -> TokenCache:
        """Open a cache and check that manifest and files agree.

        Raises
        ------
        CacheError
            If there is none, it is damaged, or its format is not this program's.
        """
        folder = Path(folder)
        cache = cls(folder, _read_manifest(folder, REBUILD))
        for name, (shape, dtype) in cache.layout.items():
            path = folder / name
            expected = prod(shape) * np.dtype(dtype).itemsize
            found = path.stat().st_size if path.is_file() else None
            if found != expected:
                size = "missing" if found is None else f"{found} bytes"
                raise CacheError(
                    path, f"{size}; {expected} bytes expected from {MANIFEST}", REBUILD
                )
        return cache

    @classmethod
    def find(cls, root: Path, image_fingerprint: str, spec: BackboneSpec) -> TokenCache | None:
        """Find the cache of these images under `spec`, without building the backbone.

        Folders that cannot be read are skipped with a warning, unless nothing fits and the
        name of one of them says that it may be the cache that is looked for.

        Returns
        -------
        TokenCache or None
            None if nothing was extracted yet.

        Raises
        ------
        CacheError
            If the cache is damaged or of a newer chasm, or several fit (the hub's weights changed
            in between).
        """
        found, unreadable = [], []
        of_model = re.compile(re.escape(_folder_prefix(spec.model)) + "[0-9a-f]{16}")
        for path in sorted(Path(root).glob(f"[!.]*/{MANIFEST}")):
            try:
                manifest = _read_manifest(path.parent, DELETE)
                fits = manifest["images"]["fingerprint"] == image_fingerprint and matches(
                    spec, manifest["backbone"]
                )
            except _OlderFormatError as error:
                log.warning("not used: %s", error)
            except CacheError as error:
                log.warning("not used: %s", error)
                if of_model.fullmatch(path.parent.name):
                    unreadable.append(error)
            else:
                found += [path.parent] * fits
        if unreadable and not found:
            raise unreadable[0]
        if len(found) > 1:
            raise CacheError(
                root,
                f"{len(found)} caches fit {spec.model} ({', '.join(p.name for p in found)})",
                "Delete the one whose weights are out of date.",
            )
        return cls.open(found[0]) if found else None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}

    @property
    def n_images(self) -> int:
        """Number of rows: images of the source, extracted or not."""
        return self.manifest["images"]["count"]

    @property
    def weights_label(self) -> str:
        """Where the backbone's weights came from, to be shown beside every result."""
        return self.manifest["weights_label"]

    @property
    def fingerprint(self) -> str:
        """Identity of images, backbone, weights, layers and transform."""
        return self.manifest["key"]

    @property
    def layout(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each file."""
        sizes = self.manifest["sizes"]
        return {
            CLS: ((self.n_images, sizes["n_cls"], sizes["cls_width"]), "<f2"),
            PATCHES: ((self.n_images, sizes["n_patches"], sizes["patch_width"]), "<f2"),
            CHECKS: ((self.n_images, 3), "<u4"),
        }

    def _map(self, name: str) -> np.memmap:
        shape, dtype = self.layout[name]
        return np.memmap(self.folder / name, dtype=dtype, mode="r", shape=shape)

    @cached_property
    def cls(self) -> np.memmap:
        """CLS tokens, (images, layers, width) float16; row = image id."""
        return self._map(CLS)

    @cached_property
    def patches(self) -> np.memmap:
        """Patch tokens, (images, patches, width) float16; row = image id."""
        return self._map(PATCHES)

    @cached_property
    def checks(self) -> np.memmap:
        """Checksums of CLS tokens, patch tokens and pixels, (images, 3) uint32; 0 = not there."""
        return self._map(CHECKS)

    def missing(self, image_ids: np.ndarray) -> np.ndarray:
        """Return those of `image_ids` whose tokens are not there yet.

        Raises
        ------
        CacheError
            If an id is outside the image source.
        """
        ids = np.asarray(image_ids, dtype=np.int64)
        outside = ids[(ids < 0) | (ids >= self.n_images)]
        if outside.size:
            raise CacheError(
                f"{self.folder / MANIFEST}:images/count",
                f"image id {outside[0]} is outside 0..{self.n_images - 1}",
                "Check that the store and the cache belong to the same images.",
            )
        return ids[(np.asarray(self.checks[ids]) == 0).any(axis=1)]

    def verify(self, image_ids: np.ndarray | None = None) -> None:
        """Compare tokens with their checksums.

        Parameters
        ----------
        image_ids
            Images that must be there and whole; by default all that were extracted.

        Raises
        ------
        CacheError
            Names the file and the first image that is missing or damaged.
        """
        if image_ids is None:
            image_ids = np.flatnonzero((np.asarray(self.checks) != 0).all(axis=1))
        image_ids = np.asarray(image_ids, dtype=np.int64)
        missing = self.missing(image_ids)
        if missing.size:
            raise CacheError(
                self.folder / CHECKS,
                f"image {missing[0]} and {missing.size - 1} others have no tokens yet",
                "Run `chasm extract` again; it continues where it stopped.",
            )
        for name, tokens, column in ((CLS, self.cls, 0), (PATCHES, self.patches, 1)):
            many = len(image_ids) > 1000
            for image in track(image_ids, f"checking {name}") if many else image_ids:
                if checksum(tokens[image]) != self.checks[image, column]:
                    raise CacheError(
                        self.folder / name,
                        f"the tokens of image {image} do not match their checksum in {CHECKS}",
                        REBUILD,
                    )


class _OlderFormatError(CacheError):
    """A cache of an older chasm, which this one neither reads nor needs."""


def _read_manifest(folder: Path, remedy: str) -> dict[str, Any]:
    """Read and check a manifest; `CacheError` with this remedy if it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CacheError(
            path, "there is no token cache", "Make it with `chasm extract`."
        ) from error
    except (ValueError, OSError) as error:
        raise CacheError(path, f"not readable as JSON ({error})", remedy) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CacheError(f"{path}:format", f"not {FORMAT!r}", remedy)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        older = isinstance(version, int) and version < FORMAT_VERSION
        raise (_OlderFormatError if older else CacheError)(
            f"{path}:format_version",
            f"found {version}, this program reads {FORMAT_VERSION}",
            DELETE if older else f"Update chasm. Or: {DELETE}",
        )
    try:
        key = cache_key(manifest["images"]["fingerprint"], manifest["backbone"])
        content = {k: manifest[k] for k in ("images", "sizes", "block_rows", "weights_label")}
        intact = key == manifest["key"] and digest(content) == manifest["check"]
    except (KeyError, TypeError, AttributeError) as error:
        raise CacheError(path, f"field {error} is missing or malformed", remedy) from error
    if not intact:
        raise CacheError(f"{path}:key", "the manifest was changed after it was written", remedy)
    return manifest
