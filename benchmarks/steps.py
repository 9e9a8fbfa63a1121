"""A training step of Stage 1 and Stage 2 at paper size: ours against the published way.

    python benchmarks/steps.py
    python benchmarks/steps.py --stages 1 --ways published numba

Ours is what `chasm fit` runs: experiments/paper/stage1.yaml and stage2.yaml, their data module,
module and Trainer. A step is all of it: fetching, loss, backward, clipping, optimiser, metrics.
The published way is `published.py`. In "scan removed" the scan gives its input back: what is left
are matrix products, the floor of any scan. Every way runs in fresh processes, in turns; memory is
the peak over the steps above what was there before the first, the optimiser's state included.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from measure import Row, apart_in_turns, finish, options, peak_memory, reset_peak, say
from published import (
    PublishedStage1,
    PublishedStage2,
    PublishedTraining,
    SingleTrials,
    make_decoder,
    make_encoder,
)
from subject import TOY, make_subject
from torch import Tensor

from chasm.evaluation.cost import count_flops, random_batch
from chasm.memory import keep_freed_memory
from chasm.progress import quiet_lightning
from chasm.training.base import EncodingModule
from chasm.training.callbacks import SeededSteps, StopTogether
from chasm.training.recipes import Recipe

ROOT = Path(__file__).parents[1]

WAYS = ("published", "torch", "numba", "scan removed")
CLOSE = WAYS[2:]
"""Ways compared within a fifth: next to each other, and two turns more than the others."""
BATCH = {1: 32, 2: 16}
"""Trials in a step, by stage: the paper's text."""

IMAGES = 256
PASSES_OVER_WEIGHTS = 11
"""Forward and backward read the weights; their gradient is written, and read for its norm; AdamW
reads weight, gradient and both moments and writes all but the gradient."""

TOY_MODEL: dict[int, dict[str, int]] = {
    1: {"d_model": 16, "global_blocks": 1, "local_blocks": 1},
    2: {"d_model": 16, "encoder_blocks": 1, "decoder_blocks": 1, "d_hidden": 32, "n_queries": 4},
}
"""Sizes of the networks for ``--quick``."""


class _Removed(torch.autograd.Function):
    """A scan that does nothing; everything before it still gets a gradient."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, *others: Tensor) -> Tensor:
        ctx.shapes = [other.shape for other in others]
        return u.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        same = gradient.shape
        rest = [gradient if s == same else gradient.new_zeros(s) for s in ctx.shapes]
        return gradient, *rest


def removed_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *,
    z: Tensor, delta_bias: Tensor, **_: Any,
) -> Tensor:  # fmt: skip
    """Stand in for `selective_scan` in a Mamba layer."""
    found: Tensor = _Removed.apply(u, delta, A, B, C, D, z, delta_bias)
    return found


class Clock(L.Callback):
    """When every training step ended, its loss, and the peak of memory."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[Tensor] = []
        self.before: float | None = None
        self.peak: float | None = None
        self.fit_start = self.train_start = 0.0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin what a fit does once."""
        self.fit_start = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the steps."""
        self.train_start = time.perf_counter()
        self.before = reset_peak(pl_module.device.type)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """End a step."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.losses.append(outputs["loss"].detach())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the peak, the batch and gradients still there."""
        self.peak = peak_memory(pl_module.device.type)

    @property
    def seconds(self) -> list[float]:
        """Time of every step but the first."""
        return [b - a for a, b in pairwise(self.ends)]

    @property
    def memory_mb(self) -> float | None:
        """Peak above what was there before the first step, in MB."""
        return None if self.before is None or self.peak is None else self.peak - self.before


def recipe_of(stage: int, folder: Path, quick: bool, scan: str, *more: str) -> Recipe:
    """Give the paper's recipe on the data of a folder, with a back end of the scan."""
    part = "encoder" if stage == 1 else "decoder"
    settings = {"scan": scan} | (TOY_MODEL[stage] if quick else {})
    args = ["-c", str(ROOT / "experiments" / "paper" / f"stage{stage}.yaml")]
    args += ["--data.dataset_dir", str(folder), "--data.batch_size", str(BATCH[stage])]
    args += ["--trainer.accelerator", "cpu"]
    for key, value in settings.items():
        args += [f"--model.init_args.{part}.init_args.{key}", str(value)]
    return Recipe([*args, *more])


def make_ours(stage: int, folder: Path, quick: bool, scan: str, *more: str) -> tuple[Recipe, Any]:
    """Make a recipe's module; a Stage 2 gets a Stage 1 with random weights."""
    recipe = recipe_of(stage, folder, quick, scan, *more)
    module = recipe.make_model()
    if stage == 2:
        stage1 = recipe_of(1, folder, quick, scan).make_model()
        data = recipe.make_data()
        stage1.build(data.sizes, data.parcellation)
        module.take_stage1(stage1)
    return recipe, module


def run_ours(
    recipe: Recipe, module: EncodingModule, steps: int, **trainer: Any
) -> tuple[Clock, L.Trainer]:
    """Train a few steps with the recipe's Trainer and `chasm fit`'s callbacks."""
    quiet_lightning()
    clock = Clock()
    made = recipe.make_trainer(
        max_steps=steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[SeededSteps(recipe.seed), StopTogether(), clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    )
    data = recipe.make_data()
    data.setup("fit")
    made.fit(module, datamodule=data)
    return clock, made


def make_published(
    stage: int, folder: Path, quick: bool, batch: int, device: str
) -> PublishedTraining:
    """Make the published training on the same trials."""
    data = recipe_of(stage, folder, quick, "reference").make_data()
    sizes, size = data.sizes, data.parcels.size
    trials = SingleTrials(data.dataset("train", "trials"), size)
    encoder = make_encoder(sizes, **(TOY_MODEL[1] if quick else {}))
    if stage == 1:
        return PublishedStage1(trials, encoder, batch, device)
    decoder = make_decoder(sizes, data.parcellation, **(TOY_MODEL[2] if quick else {}))
    return PublishedStage2(trials, encoder, decoder, batch, device)


def measure_published(
    stage: int, folder: Path, quick: bool, steps: int, batch: int, device: str = "cpu"
) -> dict[str, Any]:
    """Measure the published way in this process: seconds per step, MB and the last loss."""
    training = make_published(stage, folder, quick, batch, device)
    before = reset_peak(device)
    ends, loss = [], 0.0
    for found in islice(training.run(), steps + 1):
        loss = found["loss"]
        ends.append(time.perf_counter())
    peak = peak_memory(device)
    memory = None if before is None or peak is None else peak - before
    seconds = median(b - a for a, b in pairwise(ends))
    return {"seconds": seconds, "memory_mb": memory, "loss": loss}


def measure(stage: int, way: str, folder: Path, quick: bool, steps: int) -> dict[str, Any]:
    """Measure one way in this process: seconds per step and MB."""
    torch.manual_seed(0)
    if way == "published":
        return measure_published(stage, folder, quick, steps, BATCH[stage])
    keep_freed_memory()  # as the command line does
    scan = "torch" if way == "scan removed" else way
    recipe, module = make_ours(stage, folder, quick, scan)
    if way == "scan removed":
        with patch("chasm.models.mamba.selective_scan", removed_scan):
            clock, _ = run_ours(recipe, module, steps + 1)
    else:
        clock, _ = run_ours(recipe, module, steps + 1)
    once = clock.train_start - clock.fit_start
    return {"seconds": median(clock.seconds), "memory_mb": clock.memory_mb, "once": once}


def work_of(stage: int, folder: Path, quick: bool) -> tuple[float, float]:
    """Count the operations of a step and the bytes that it moves at least.

    Operations: three forward passes' (the backward pass has two). Bytes: `PASSES_OVER_WEIGHTS`
    over every trained parameter; activations, which caches may hold, are left out.
    """
    recipe, module = make_ours(stage, folder, quick, "reference")
    data = recipe.make_data()
    module.build(data.sizes, data.parcellation)
    batch = random_batch(data.sizes, 1, torch.device("cpu"))
    network = module.encoder if stage == 1 else module.decoder
    tokens = [batch["cls"], batch["patches"]]
    if stage == 2:
        tokens.append(torch.zeros(1, data.sizes.n_parcels))
    flops = 3 * BATCH[stage] * count_flops(network.eval(), *tokens)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return flops, 4 * PASSES_OVER_WEIGHTS * trained


def rows_of(stage: int, folder: Path, given: argparse.Namespace) -> list[Row]:
    """Measure the ways of a stage in turns."""
    common = ["--threads", given.threads, "--repeats", given.repeats, "--data", folder]
    common += ["--quick"] * given.quick
    ways = {way: ["--worker", f"{stage}:{way}", *common] for way in given.ways}
    rounds = {way: given.rounds + 2 * (way in CLOSE and not given.quick) for way in ways}
    found = apart_in_turns(__file__, ways, rounds)
    flops, moved = work_of(stage, folder, given.quick)
    case = f"stage {stage}, batch {BATCH[stage]}"
    rows = []
    for way, result in found.items():
        once = result.get("once")
        note = f"{once:.1f} s once per fit for {IMAGES} images" if once and once > 0.5 else ""
        reference = None if way == "published" else "published"
        rows.append(
            Row("steps", case, way, result["seconds"], result["memory_mb"], reference, moved,
                flops, note)
        )  # fmt: skip
    return rows


def main() -> None:
    """Run the benchmark and show the table."""
    parser = options(__doc__)
    parser.add_argument("--stages", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3, help="turns a way takes")
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.worker:
        stage, way = given.worker.split(":")
        say(measure(int(stage), way, given.data, given.quick, given.repeats))
        return
    with tempfile.TemporaryDirectory() as folder:
        made = (Path(folder), 64, TOY) if given.quick else (Path(folder), IMAGES)
        data = make_subject(*made)
        finish([row for stage in given.stages for row in rows_of(stage, data, given)], given)


if __name__ == "__main__":
    main()
