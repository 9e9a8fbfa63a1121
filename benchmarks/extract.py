"""Images per second of `chasm extract` for each backbone, against a plain loop over the images.

    python benchmarks/extract.py

Ours reads, resizes, computes, checks and stores tokens, at the best of several batch sizes. The
plain loop is the customary one: each image through PIL and timm's own transform (for the pyramid,
ours), then the model, one at a time; tokens are kept in memory. Weights are random: time does not
depend on them. Bytes are those of an image's pixels and of its stored tokens; operations are
matrix products and convolutions.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from measure import Row, finish, in_turns, options, seconds
from PIL import Image

from chasm.data.images import open_images
from chasm.evaluation.cost import count_flops
from chasm.features.backbones import PYRAMID, Backbone, BackboneSpec, create_backbone
from chasm.features.extract import extract
from chasm.progress import track

MODELS = {PYRAMID: 64, "vit_small_patch14_dinov2": 32, "vit_base_patch14_dinov2": 16}
"""Backbone, and images that are timed."""
QUICK = {PYRAMID: 4, "vit_tiny_patch16_224": 4}
BATCH_SIZES = (1, 4, 8, 16, 32)
SIZE = 224


def plain_loop(backbone: Backbone, images: np.ndarray) -> None:
    """Compute the tokens of one image after the other."""
    model = getattr(backbone, "model", None)
    tokens = []
    with torch.inference_mode():
        if model is None:
            tokens = [backbone(backbone.preprocess(image[None])) for image in images]
            return
        config = timm.data.resolve_data_config({"input_size": (3, SIZE, SIZE)}, model=model)
        transform = timm.data.create_transform(**config)
        for image in images:
            tokens.append(model.forward_features(transform(Image.fromarray(image))[None]))


def ours(backbone: Backbone, pixels: Path, n_images: int, batch_size: int) -> None:
    """Fill a token cache."""
    with tempfile.TemporaryDirectory(dir=pixels.parent) as root:
        images = open_images("npy", pixels)
        extract(images, backbone, np.arange(n_images), Path(root), batch_size=batch_size)


def work(backbone: Backbone, image: np.ndarray) -> tuple[float, float]:
    """Count the bytes and operations of an image."""
    tokens = backbone.n_cls * backbone.cls_width + backbone.n_patches * backbone.patch_width
    flops = count_flops(backbone, backbone.preprocess(image[None]))
    return float(image.nbytes + 2 * tokens), float(flops)


def measure(folder: Path, quick: bool, repeats: int) -> list[Row]:
    """Time every backbone, the ways taking turns."""
    rows = []
    models = QUICK if quick else MODELS
    for name, n_images in track(models.items(), "extracting", len(models)):
        images = np.random.default_rng(0).integers(0, 256, (n_images, 425, 425, 3), np.uint8)
        pixels = folder / f"{name}.npy"
        np.save(pixels, images)
        size = None if name == PYRAMID else SIZE
        backbone = create_backbone(BackboneSpec(name, "untrained", size))
        steps: dict[int, Callable[[], None]] = {
            size: partial(ours, backbone, pixels, n_images, size)
            for size in BATCH_SIZES
            if size <= n_images
        }
        best = min(steps, key=lambda size: seconds(steps[size]))
        found = in_turns(
            {"plain loop": partial(plain_loop, backbone, images), "ours": steps[best]}, repeats
        )
        moved, flops = work(backbone, images[0])
        for way, taken in found.items():
            rate = n_images / float(np.median(taken))
            rows.append(
                Row(
                    "extract", name, way, float(np.median(taken)) / n_images,
                    None, None if way == "plain loop" else "plain loop", moved, flops,
                    note=f"{rate:.1f} images/s" + f", batches of {best}" * (way == "ours"),
                )
            )  # fmt: skip
    return rows


def main() -> None:
    """Run the benchmark and show the table."""
    given = options(__doc__).parse_args()
    torch.set_num_threads(given.threads)
    logging.disable(logging.WARNING)  # that the weights are random
    with tempfile.TemporaryDirectory(prefix="chasm-extract-") as folder:
        rows = measure(Path(folder), given.quick, 1 if given.quick else given.repeats)
    finish(rows, given)


if __name__ == "__main__":
    main()
