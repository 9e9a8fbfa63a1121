"""Cost of an ablation: from streams computed once, and by whole passes, side by side in one run.

    python benchmarks/ablations.py
    python benchmarks/ablations.py --donors 40 --threads 4

A Stage 1 of the paper's size with random weights predicts random tokens. "Once" computes the two
streams of a batch once and only what follows them under every intervention; "whole passes" runs
the model again for each. Times are medians over the repeats, the two ways taking turns; ratios
are to one pass without interventions. Both ways must give the same predictions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from chasm.data.batches import Batch
from chasm.data.datamodule import DataSizes
from chasm.interventions import (
    Intervention,
    Reference,
    collect,
    derangements,
    intervene,
    on_stream,
)
from chasm.models.sites import Stream
from chasm.parcellation import sequential
from chasm.progress import track
from chasm.training.modules import Stage1Module

SIZES = DataSizes(
    n_cls=1, cls_width=768, n_patches=256, patch_width=768, n_voxels=15724, n_parcels=1573
)
"""DINOv2 ViT-B/14 and subject 1 of NSD with ten voxels in a parcel."""

STREAMS: tuple[Stream, ...] = ("global", "local")
COALITIONS: tuple[tuple[Stream, ...], ...] = ((), ("local",), ("global",), STREAMS)
"""Streams that are replaced."""

Predict = Callable[[], list[Tensor]]


def make_module() -> Stage1Module:
    """Make a Stage 1 of the paper's size in eval mode."""
    torch.manual_seed(0)
    module = Stage1Module()
    module.build(SIZES, sequential(SIZES.n_voxels, 10))
    return module.eval()


def make_batch(images: int) -> Batch:
    """Draw tokens."""
    generator = torch.Generator().manual_seed(1)
    return Batch(
        cls=torch.randn(images, SIZES.n_cls, SIZES.cls_width, generator=generator),
        patches=torch.randn(images, SIZES.n_patches, SIZES.patch_width, generator=generator),
        betas=torch.zeros(images, SIZES.n_voxels),
        image_id=torch.arange(images),
        trial=torch.arange(images),
    )


def four_coalitions(module: Stage1Module, batch: Batch, reference: Reference) -> dict[str, Predict]:
    """Give both ways to predict with each set of streams at its mean."""
    cuts = [
        [part for stream in cut for part in on_stream(module, stream, "mean")] for cut in COALITIONS
    ]

    def under(cut: list[Intervention], predict: Callable[[], Tensor]) -> Tensor:
        with intervene(module, cut, reference):
            return predict()

    def once() -> list[Tensor]:
        streams = module.streams(batch)
        return [under(cut, lambda: module.from_streams(streams)) for cut in cuts]

    def whole() -> list[Tensor]:
        return [under(cut, lambda: module(batch)) for cut in cuts]

    return {"once": once, "whole passes": whole}


def donors_of_both(module: Stage1Module, batch: Batch, n_donors: int) -> dict[str, Predict]:
    """Give both ways to average predictions over donors, for each stream in turn."""
    donors = derangements(len(batch["image_id"]), n_donors)

    def mean_over(predict: Callable[[Tensor], Tensor]) -> Tensor:
        total = predict(donors[0])
        for rows in donors[1:]:
            total += predict(rows)
        return total / n_donors

    def replaced(streams: dict[str, Tensor], stream: Stream, rows: Tensor) -> Tensor:
        cut = on_stream(module, stream, "resample")
        given = {part.site: streams[part.site][rows] for part in cut}
        with intervene(module, cut, donors=given):
            return module.from_streams(streams)

    def other_cls(rows: Tensor) -> Tensor:
        return module.from_streams(module.streams({**batch, "cls": batch["cls"][rows]}))

    def other_patches(rows: Tensor) -> Tensor:
        return module.from_streams(module.streams({**batch, "patches": batch["patches"][rows]}))

    def once() -> list[Tensor]:
        streams = module.streams(batch)
        return [mean_over(partial(replaced, streams, stream)) for stream in STREAMS]

    def whole() -> list[Tensor]:
        return [mean_over(other_cls), mean_over(other_patches)]

    return {"once": once, "whole passes": whole}


def seconds(work: Callable[[], object]) -> float:
    """Measure one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def check_equal(ways: dict[str, Predict]) -> None:
    """Refuse to time two ways that do not do the same."""
    for once, whole in zip(ways["once"](), ways["whole passes"](), strict=True):
        torch.testing.assert_close(once, whole, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def main() -> None:
    """Run the benchmark and show the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=32, help="in the batch")
    parser.add_argument("--donors", type=int, default=20, help="of each image, for resampling")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module, batch = make_module(), make_batch(options.images)
    sites = [part.site for stream in STREAMS for part in on_stream(module, stream, "mean")]
    reference = collect(module, [batch], sites)
    works = {
        "4 coalitions": four_coalitions(module, batch, reference),
        f"2 streams, {options.donors} donors": donors_of_both(module, batch, options.donors),
    }
    check_equal(works["4 coalitions"])
    check_equal(donors_of_both(module, batch, 2))
    times: dict[tuple[str, str], list[float]] = {}
    for _ in track(range(options.repeats), "repeats", options.repeats):
        times.setdefault(("one pass", ""), []).append(seconds(lambda: module(batch)))
        for name, ways in works.items():
            for way, work in ways.items():
                times.setdefault((name, way), []).append(seconds(work))
    clean = median(times["one pass", ""])
    title = f"Stage 1, batch of {options.images}, float32, {options.threads} threads"
    table = Table(title=title)
    for column in ("what", "streams", "s", "ratio to one pass"):
        table.add_column(column, justify="right")
    for (name, way), found in times.items():
        table.add_row(name, way, f"{median(found):.2f}", f"{median(found) / clean:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
