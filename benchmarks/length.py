"""Cost of Stage 1 from 64 to 1024 tokens: ours against a Transformer of the same width.

    python benchmarks/length.py

Forward and backward of a batch of 8, dual-stream Mamba and the Transformer of
experiments/paper/transformer.yaml, both 512 wide, taking turns. The exponent is the slope of
log time over log tokens: 1 is linear, 2 is quadratic. Operations: three forward passes' (the
backward pass has two); bytes: tokens and weights, which are read twice, and gradients written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import matplotlib as mpl
import numpy as np
import torch
from measure import Row, finish, in_turns, options
from torch import Tensor

from chasm.evaluation.cost import count_flops
from chasm.io import atomic_path
from chasm.models.encoder import ParcelEncoder
from chasm.models.stage1 import DualStreamEncoder
from chasm.models.token_models import TransformerEncoder
from chasm.progress import track

mpl.use("Agg")

TOKENS = (64, 128, 256, 512, 1024)
BATCH = 8
OURS, THEIRS = "dual-stream Mamba", "Transformer"
_COLOURS = {OURS: "#2a78b5", THEIRS: "#a0522d"}


def make_encoder(way: str, tokens: int, quick: bool) -> ParcelEncoder:
    """Make one of the two for so many patches."""
    sizes = (24, 1, 24, tokens, 10) if quick else (768, 1, 768, tokens, 524)
    width = {"d_model": 16} if quick else {}
    if way == OURS:
        return DualStreamEncoder(*sizes, **width)
    return TransformerEncoder(*sizes, **width)


def make_step(way: str, tokens: int, quick: bool) -> Callable[[], object]:
    """Make a forward and backward pass on random tokens."""
    encoder = make_encoder(way, tokens, quick)
    width = encoder.patch_scaler.mean.shape[-1]
    cls, patches = torch.randn(BATCH, 1, width), torch.randn(BATCH, tokens, width)
    weights = list(encoder.parameters())

    def step() -> tuple[Tensor | None, ...]:
        loss = encoder(cls, patches).parcels.square().mean()
        return torch.autograd.grad(loss, weights, allow_unused=True)

    return step


def work(way: str, tokens: int, quick: bool) -> tuple[float, float]:
    """Count bytes and operations of a step at the least."""
    encoder = make_encoder(way, tokens, quick).eval()
    width = encoder.patch_scaler.mean.shape[-1]
    flops = count_flops(encoder, torch.randn(1, 1, width), torch.randn(1, tokens, width))
    weights = sum(p.numel() for p in encoder.parameters())
    return 4.0 * (3 * weights + BATCH * (tokens + 1) * width), 3.0 * BATCH * flops


def exponents(rows: Sequence[Row]) -> dict[str, float]:
    """Fit the slope of log time over log tokens, by way."""
    found = {}
    for way in dict.fromkeys(row.way for row in rows):
        mine = [row for row in rows if row.way == way]
        tokens = [int(row.case.split()[0]) for row in mine]
        if len(tokens) > 1:
            slope = np.polyfit(np.log(tokens), np.log([row.seconds for row in mine]), 1)[0]
            found[way] = float(slope)
    return found


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw time over tokens, both axes logarithmic, slopes in the legend."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 3.6), layout="constrained")
    for way, slope in exponents(rows).items():
        mine = [row for row in rows if row.way == way]
        tokens = [int(row.case.split()[0]) for row in mine]
        axes.loglog(
            tokens, [row.seconds for row in mine], "o-", color=_COLOURS.get(way),
            label=f"{way}: time ~ tokens^{slope:.2f}",
        )  # fmt: skip
    first = next(row for row in rows if row.way == OURS)
    start = int(first.case.split()[0])
    linear = [first.seconds * n / start for n in tokens]
    axes.loglog(tokens, linear, "--", color="0.6", zorder=0, label="linear: tokens^1")
    axes.set_xticks(tokens, [str(n) for n in tokens])
    seconds = [2.0**power for power in range(-10, 11)]
    shown = [each for each in seconds if axes.get_ylim()[0] <= each <= axes.get_ylim()[1]]
    axes.set_yticks(shown, [f"{each:g}" for each in shown])
    axes.minorticks_off()
    axes.set_xlabel("patch tokens per image")
    axes.set_ylabel(f"s, forward + backward of {BATCH} images")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Run the benchmark, show the table and the slopes."""
    given = options(__doc__, repeats=5).parse_args()
    torch.set_num_threads(given.threads)
    lengths = TOKENS[:3] if given.quick else TOKENS
    found: dict[tuple[str, int], float] = {}
    for tokens in track(lengths, "lengths", len(lengths)):
        torch.manual_seed(0)
        steps = {way: make_step(way, tokens, given.quick) for way in (OURS, THEIRS)}
        for way, taken in in_turns(steps, given.repeats).items():
            found[way, tokens] = median(taken)
    rows = [
        Row(
            "length", f"{tokens} tokens", way, seconds, None, THEIRS if way == OURS else None,
            *work(way, tokens, given.quick),
        )
        for (way, tokens), seconds in found.items()
    ]  # fmt: skip
    finish(rows, given)


if __name__ == "__main__":
    main()
