"""Cost of an ablation: from streams computed once, and by whole passes, side by side in one run.

    python benchmarks/ablations.py
    python benchmarks/ablations.py --donors 40 --threads 4

A Stage 1 of the paper's size with random weights predicts random tokens. "Once" computes the two
streams of a batch once and only what follows them under every intervention; "whole passes" runs
the model again for each. Times are medians over the repeats, the two ways taking turns; ratios
are to whole passes. Both ways must give the same predictions. Operations are each way's own;
bytes are the weights, read once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from measure import Row, finish, in_turns, options
from torch import Tensor

from chasm.data.batches import Batch
from chasm.data.datamodule import DataSizes
from chasm.evaluation.cost import count_flops, random_batch
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
from chasm.progress import console
from chasm.training.modules import Stage1Module

SIZES = DataSizes(
    n_cls=1, cls_width=768, n_patches=256, patch_width=768, n_voxels=15724, n_parcels=1573
)
"""DINOv2 ViT-B/14 and subject 1 of NSD with ten voxels in a parcel."""

TOY = DataSizes(n_cls=1, cls_width=16, n_patches=9, patch_width=16, n_voxels=300, n_parcels=30)
"""For ``--quick``."""

STREAMS: tuple[Stream, ...] = ("global", "local")
COALITIONS: tuple[tuple[Stream, ...], ...] = ((), ("local",), ("global",), STREAMS)
"""Streams that are replaced."""

Predict = Callable[[], list[Tensor]]


def make_module(sizes: DataSizes) -> Stage1Module:
    """Make a Stage 1 of the paper's size in eval mode."""
    torch.manual_seed(0)
    module = Stage1Module()
    module.build(sizes, sequential(sizes.n_voxels, 10))
    return module.eval()


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


class _Work(torch.nn.Module):
    """A way as a model, so that its operations can be counted."""

    def __init__(self, module: Stage1Module, predict: Callable[[], object]) -> None:
        super().__init__()
        self.module, self.predict = module, predict

    def forward(self) -> None:
        """Do it."""
        self.predict()


def check_equal(ways: dict[str, Predict]) -> None:
    """Refuse to time two ways that do not do the same."""
    for once, whole in zip(ways["once"](), ways["whole passes"](), strict=True):
        torch.testing.assert_close(once, whole, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def main() -> None:
    """Run the benchmark and show the table."""
    parser = options(__doc__)
    parser.add_argument("--images", type=int, default=32, help="in the batch")
    parser.add_argument("--donors", type=int, default=20, help="of each image, for resampling")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sizes, images, n_donors = SIZES, given.images, given.donors
    if given.quick:
        sizes, images, n_donors = TOY, 4, 2
    module, batch = make_module(sizes), random_batch(sizes, images, torch.device("cpu"))
    sites = [part.site for stream in STREAMS for part in on_stream(module, stream, "mean")]
    reference = collect(module, [batch], sites)
    works = {
        "4 coalitions": four_coalitions(module, batch, reference),
        f"2 streams, {n_donors} donors": donors_of_both(module, batch, n_donors),
    }
    check_equal(works["4 coalitions"])
    check_equal(donors_of_both(module, batch, 2))
    weights = 4.0 * sum(p.numel() for p in module.parameters())
    rows = []
    for name, ways in works.items():
        console.print(f"timing {name}")
        steps = {"one pass": partial(module, batch), **ways}
        times = in_turns(steps, given.repeats, warm=0)
        clean = median(times["one pass"])
        for way, found in times.items():
            cost = "" if way == "one pass" else f"{median(found) / clean:.2f} times one pass"
            reference_way = "whole passes" if way == "once" else None
            case = f"{name}, {images} images"
            work = weights, count_flops(_Work(module, steps[way]))
            rows.append(
                Row("ablations", case, way, median(found), None, reference_way, *work, cost)
            )
    finish(rows, given)


if __name__ == "__main__":
    main()
