"""A subject of random numbers, ready for training: store and token cache, at NSD's size or less.

No images, no backbone: what is timed is what comes after them. Trials are laid out as NSD's:
every image is shown three times, over the whole of a session.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chasm.data.images import open_images
from chasm.data.nsd_facts import NSD_SUBJECTS
from chasm.data.store_writer import StoreWriter
from chasm.features.backbones import HUB, BackboneSpec, resolve_layers, versions_of
from chasm.features.cache import (
    CHECKS,
    CLS,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    PATCHES,
    TokenCache,
    cache_folder,
    checksum,
)
from chasm.io import atomic_folder, digest, write_json
from chasm.progress import track

BACKBONE = BackboneSpec(
    "vit_base_patch14_dinov2", image_size=224, cls_layers=(12,), patch_layers=(12,)
)
"""The one that experiments/paper names."""

REPEATS = 3
_SCALE = 300.0
_BLOCK = 512


@dataclass(frozen=True)
class Sizes:
    """Sizes of a subject; the defaults are subject 1 of NSD on ViT-B/14."""

    voxels: int = NSD_SUBJECTS[1].nsdgeneral_voxels
    patches: int = 256
    width: int = 768


TOY = Sizes(voxels=310, patches=9, width=24)
"""For ``--quick``."""


def make_subject(folder: Path, images: int, sizes: Sizes | None = None) -> Path:
    """Write ``subj01.h5`` and ``tokens/`` into a folder, or keep those that are there.

    Parameters
    ----------
    folder
        Where; of `images` images it takes ``images * (0.4 MB tokens + 0.1 MB betas)``.
    images
        Images, each shown `REPEATS` times; a tenth of them are shared ones.
    sizes
        NSD's where None.

    Returns
    -------
    Path
        `folder`.
    """
    sizes = sizes or Sizes()
    if (folder / "subj01.h5").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    pixels = folder / "images.npy"
    np.save(pixels, np.random.default_rng(0).integers(0, 255, (images, 8, 8, 3), np.uint8))
    _write_tokens(folder / "tokens", open_images("npy", pixels).fingerprint, images, sizes)
    _write_store(folder / "subj01.h5", pixels, images, sizes)
    return folder


def _write_store(path: Path, pixels: Path, images: int, sizes: Sizes) -> None:
    rng = np.random.default_rng(1)
    n_trials = REPEATS * images
    order = np.tile(np.arange(images), REPEATS)
    statistics = np.zeros((1, sizes.voxels)), np.ones((1, sizes.voxels))
    shared = np.arange(images) < max(1, images // 10)
    with StoreWriter(
        path, n_trials=n_trials, n_voxels=sizes.voxels, dtype=np.int16, scale=_SCALE
    ) as writer:
        for start in range(0, n_trials, _BLOCK):
            rows = min(_BLOCK, n_trials - start)
            values = rng.standard_normal((rows, sizes.voxels), np.float32)
            writer.append(np.rint(_SCALE * values))
        one = np.ones(n_trials, np.int64)
        repeat = np.repeat(np.arange(REPEATS), images)
        writer.write_trials(session=one, run=one, image_id=order, repeat=repeat)
        writer.write_normalisation("train", *statistics, np.flatnonzero(~shared))
        writer.write_normalisation("all", *statistics)
        writer.write_voxels({"n_mask": sizes.voxels, "n_invalid": 0, "n_constant": 0})
        writer.write_images(np.arange(images), shared, shared, open_images("npy", pixels))
        writer.write_attributes(
            subject="subj01", dataset="random", source="simulated", beta_version="",
            source_path="", source_signature="random", split_seed=0,
        )  # fmt: skip


def _write_tokens(root: Path, fingerprint: str, images: int, sizes: Sizes) -> None:
    key = {
        "model": BACKBONE.model, "weights": {"source": HUB},
        "cls_layers": list(resolve_layers(BACKBONE.cls_layers, 12, "cls_layers")),
        "patch_layers": list(resolve_layers(BACKBONE.patch_layers, 12, "patch_layers")),
        "n_blocks": 12, "image_size": 224, "default_image_size": 518,
        "versions": versions_of(BACKBONE.model),
    }  # fmt: skip
    content = {
        "images": {"fingerprint": fingerprint, "count": images},
        "sizes": {
            "n_cls": 1, "cls_width": sizes.width, "n_patches": sizes.patches,
            "patch_width": sizes.width,
        },
        "block_rows": 256,
        "weights_label": "random numbers",
    }  # fmt: skip
    folder = cache_folder(root, fingerprint, key)
    manifest = {
        "format": FORMAT, "format_version": FORMAT_VERSION, "key": folder.name, **content,
        "backbone": key, "check": digest(content),
    }  # fmt: skip
    rng = np.random.default_rng(2)
    with atomic_folder(folder) as temporary:
        write_json(temporary / MANIFEST, manifest)
        shapes = TokenCache(temporary, manifest).layout
        checks = np.ones(shapes[CHECKS][0], "<u4")
        for column, name in enumerate((CLS, PATCHES)):
            with (temporary / name).open("wb") as stream:
                for image in track(range(images), f"writing {name}", images):
                    row = rng.standard_normal(shapes[name][0][1:], np.float32).astype("<f2")
                    checks[image, column] = checksum(row)
                    stream.write(row.tobytes())
        (temporary / CHECKS).write_bytes(checks.tobytes())
