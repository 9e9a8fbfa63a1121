"""Batches per second of the data loader at NSD's size, against the published way of loading.

    python benchmarks/loading.py

Ours is `NSDDataModule`'s train loader as it is on a CPU, with memory-mapped tokens and parcels
made from the whole batch. The published way fetches single trials, each with a row of the betas'
and of the tokens' HDF5 file, finds its parcels in a loop, and collates items one by one; the
betas are z-scored beforehand, as in its files. Files are in the page cache.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from measure import Row, finish, in_turns, options
from published import top_p_parcels
from subject import BACKBONE, TOY, make_subject
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from chasm.data.datamodule import NSDDataModule

PARCEL, TOP_P = 30, 0.7


class PublishedItems(Dataset[dict[str, Tensor]]):
    """Single trials, read from HDF5 one at a time.

    Parameters
    ----------
    path
        HDF5 file with ``betas`` (trials, voxels), ``cls`` and ``patches`` (images, ...) float32.
    image_of
        (trials,), the row of each trial's image.
    """

    def __init__(self, path: Path, image_of: np.ndarray) -> None:
        self.path, self.image_of = path, image_of
        self.file: h5py.File | None = None

    def __len__(self) -> int:
        return len(self.image_of)

    def __getitem__(self, trial: int) -> dict[str, Tensor]:
        if self.file is None:
            self.file = h5py.File(self.path, "r")
        image, betas = int(self.image_of[trial]), self.file["betas"][trial]
        return {
            "cls": torch.from_numpy(self.file["cls"][image]),
            "patches": torch.from_numpy(self.file["patches"][image]),
            "betas": torch.from_numpy(betas),
            "parcels": torch.from_numpy(top_p_parcels(betas, PARCEL)),
        }


def write_published(path: Path, data: NSDDataModule) -> np.ndarray:
    """Write what the published loader reads, and give the image row of each of its trials."""
    items = data.dataset("train", "trials")
    images, image_of = np.unique(items.image_ids, return_inverse=True)
    with h5py.File(path, "w") as file:
        betas = file.create_dataset("betas", (len(items), data.store.n_voxels), np.float32)
        for start in range(0, len(items), 256):
            rows = np.arange(start, min(start + 256, len(items)))
            betas[start : start + 256] = items.betas(rows)
        file["cls"] = np.asarray(data.tokens.cls[images], np.float32)
        patches = file.create_dataset("patches", (len(images), *data.tokens.patches.shape[1:]), "f")
        for row, image in enumerate(images):
            patches[row] = data.tokens.patches[image]
    return image_of


def forever(loader: DataLoader[Any]) -> Iterator[Any]:
    """Give the batches of epoch after epoch."""
    return chain.from_iterable(repeat(loader))


def fetch(batches: Iterator[Any], n: int) -> Callable[[], object]:
    """Make a step that takes the next `n` batches and keeps none."""
    return lambda: deque(islice(batches, n), maxlen=0)


def measure(folder: Path, quick: bool, repeats: int) -> list[Row]:
    """Time a batch of 32 train images or trials, the ways taking turns."""
    n_images, n_batches, size = (40, 1, 8) if quick else (1200, 10, 32)
    make_subject(folder, n_images, TOY if quick else None)
    data = NSDDataModule(
        "subj01", str(folder), BACKBONE, "paper", statistics="all", batch_size=size
    )
    image_of = write_published(folder / "published.h5", data)
    parcellation = data.parcellation

    def with_parcels(loader: DataLoader[Any]) -> Iterator[Any]:
        for batch in forever(loader):
            batch["parcels"] = parcellation.aggregate(batch["betas"], "top_p", TOP_P)
            yield data.on_after_batch_transfer(batch, 0)

    trials = NSDDataModule(
        "subj01",
        str(folder),
        BACKBONE,
        "paper",
        statistics="all",
        batch_size=size,
        samples="trials",
    )
    published = DataLoader(PublishedItems(folder / "published.h5", image_of), size, shuffle=True)
    ways = {
        "published": forever(published),
        "ours, trials": with_parcels(trials.train_dataloader()),
        "ours, image means": with_parcels(data.train_dataloader()),
    }
    found = in_turns({way: fetch(b, n_batches) for way, b in ways.items()}, repeats)
    rows = []
    for way, taken in found.items():
        seconds = float(np.median(taken)) / n_batches
        rows.append(
            Row(
                "loading", f"batch of {size}", way, seconds,
                reference=None if way == "published" else "published",
                bytes=float(size * (data.tokens.patches[0].nbytes + 2 * data.store.n_voxels)),
                note=f"{1 / seconds:.1f} batches/s",
            )
        )  # fmt: skip
    return rows


def main() -> None:
    """Run the benchmark and show the table."""
    parser = options(__doc__, repeats=5)
    parser.add_argument("--folder", type=Path, help="where the files (3 GB) are made and kept")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(prefix="chasm-loading-") as folder:
        rows = measure(given.folder or Path(folder), given.quick, given.repeats)
    finish(rows, given)


if __name__ == "__main__":
    main()
