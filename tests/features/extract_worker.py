"""Images and backbones of the cache tests; run as a script it extracts in its own process.

Usage: extract_worker.py ROOT LOG KIND FIRST LAST TOGETHER

TOGETHER processes that share LOG go on only when each of them has images in hand, however long
one of them took to start.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from chasm.features import extract as extraction
from chasm.features.backbones import Backbone, BackboneSpec, Tokens, create_backbone

N_IMAGES = 96


class Images:
    """Random images whose ids are written to a log whenever they are read."""

    fingerprint = "test-images"

    def __init__(self, log=None, together=1):
        self.log, self.together = log, together

    def __len__(self):
        return N_IMAGES

    def read(self, image_ids):
        if self.log is not None:
            with Path(self.log).open("a") as stream:
                stream.write("".join(f"{os.getpid()} {i}\n" for i in image_ids))
            self._wait_for_the_others()
        return [
            np.random.default_rng(int(i)).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            for i in image_ids
        ]

    def _wait_for_the_others(self):
        deadline = time.monotonic() + 60
        while (
            len({line.split()[0] for line in Path(self.log).read_text().splitlines()})
            < self.together
        ):
            assert time.monotonic() < deadline, "the other process has read no image"
            time.sleep(0.005)


class TinyBackbone(Backbone):
    """Two CLS layers of width 5 and four patches of two layers of width 3."""

    def __init__(self, pause=0.0, scale=1.0):
        super().__init__()
        self.n_cls, self.cls_width, self.n_patches, self.patch_width = 2, 5, 4, 6
        self.grid, self.image_size = (2, 2), 32
        self.cls_layers, self.patch_layers = (1, 2), (1, 2)
        self.weights_label = "UNTRAINED"
        self.key = {"model": "tiny", "weights": {"source": "UNTRAINED"}}
        self.pause, self.scale = pause, scale

    def preprocess(self, images):
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255

    def forward(self, images):
        time.sleep(self.pause)
        flat = images.flatten(1)
        cls, patches = flat[:, :10].reshape(-1, 2, 5), flat[:, 10:34].reshape(-1, 4, 6).clone()
        patches[..., 3:] *= self.scale
        return Tokens(cls, patches)


def vit():
    return create_backbone(BackboneSpec("vit_tiny_patch16_224", "untrained", 64, (3,), (4,)))


if __name__ == "__main__":
    root, log, kind, first, last, together = sys.argv[1:]
    torch.set_num_threads(1)
    extraction.BLOCK_ROWS, extraction.PIXEL_SAMPLE = 16, 0  # reads of the log are computations
    backbone = vit() if kind == "vit" else TinyBackbone(pause=0.03)
    ids = np.arange(int(first), int(last))
    images = Images(log, int(together))
    extraction.extract(images, backbone, ids, Path(root), batch_size=8).verify(ids)
