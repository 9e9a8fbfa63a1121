"""What a GPU has to show: parity, time and memory of a step, mixed precision (make bench-gpu).

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --quick      # the same code without a GPU, as a test

Writes docs/benchmarks_gpu.md; without a CUDA device it ends with an error and leaves the file.
Parity: back ends and layers on the device against float64 on the CPU, values and all gradients,
with inputs rounded to the narrow type before both. Steps are those of `steps.py`, each way in a
fresh process; memory is the peak of what PyTorch allocates above what was there before them.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import (
    TEXTS,
    Row,
    apart,
    columns,
    machine,
    options,
    say,
)  # fmt: skip
from rich.console import Console
from scan import make_inputs
from steps import make_ours, measure_published, run_ours
from subject import TOY, make_subject
from torch import Tensor, nn

from chasm.errors import ChasmError, ConfigError
from chasm.io import write_text
from chasm.models import scan, ssd
from chasm.models.cuda_packages import explain
from chasm.models.mamba import Mamba
from chasm.models.mamba2 import Mamba2
from chasm.progress import console, track

FOLDER = Path(__file__).parents[1] / "docs"
BACKENDS = ("mamba_ssm", "numba", "torch", "reference")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest error, relative to the largest number of each array."""

IMAGES = 1024
BATCHES = (32, 256)
PRECISIONS = ("bf16-mixed", "16-mixed")
FAILED = "FAILED"
Arrays = dict[str, Tensor]
Runs = Callable[[Arrays], Tensor]


@dataclass(frozen=True)
class Parity:
    """Largest relative errors of one back end; a reason where it cannot run."""

    what: str
    backend: str
    dtype: torch.dtype
    value: float = math.nan
    gradient: float = math.nan
    reason: str = ""

    @property
    def good(self) -> bool:
        """Whether both errors are within the tolerance."""
        return max(self.value, self.gradient) <= TOLERANCE[self.dtype]


def values_and_gradients(run: Runs, inputs: Arrays) -> list[Tensor]:
    """Run and differentiate; everything as float64 on the CPU, the value first."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    y = run(leaves)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    (y * weights.to(y.device, y.dtype)).sum().backward()
    gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    return [found.detach().double().cpu() for found in (y, *gradients)]


def compare(
    what: str, backend: str, dtype: torch.dtype, runs: tuple[Runs, Runs], inputs: Arrays,
    wide: Iterable[str], device: str,
) -> Parity:  # fmt: skip
    """Compare a back end on the device with the reference in float64 on the CPU.

    Parameters
    ----------
    what, backend, dtype
        What is compared.
    runs
        With the back end, and with the reference.
    inputs
        Arguments of both; those in `wide` are float32 whatever `dtype` is.
    wide
        See `inputs`.
    device
        Where the back end runs.
    """
    kept = set(wide)
    rounded = {k: v.detach() if k in kept else v.detach().to(dtype) for k, v in inputs.items()}
    try:
        found = values_and_gradients(runs[0], {k: v.to(device) for k, v in rounded.items()})
    except ChasmError as error:
        return Parity(what, backend, dtype, reason=str(error))
    exact = values_and_gradients(runs[1], {k: v.double() for k, v in rounded.items()})
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]
    return Parity(what, backend, dtype, errors[0], max(errors[1:]))


def scan_parity(device: str, quick: bool) -> list[Parity]:
    """Compare every back end of both scans, and both layers, in every type."""
    size = (2, 9, 8, 4) if quick else (4, 256, 256, 16)
    inputs = make_inputs(size)
    heads = _ssd_inputs(*size)

    def selective(backend: str) -> Runs:
        return lambda x: scan.selective_scan(**x, delta_softplus=True, backend=backend)

    def by_heads(backend: str) -> Runs:
        return lambda x: ssd.ssd(**x, backend=backend)

    found = []
    for dtype in TOLERANCE:
        for name in BACKENDS:
            runs = selective(name), selective("reference")
            found.append(
                compare("scan", name, dtype, runs, inputs, ("A", "D", "delta_bias"), device)
            )
            if name != "numba":
                runs = by_heads(name), by_heads("reference")
                found.append(
                    compare("Mamba-2 scan", name, dtype, runs, heads, ("A", "D", "dt_bias"), device)
                )
    width = 32 if quick else 256
    for what, kind in (("Mamba layer", Mamba), ("Mamba-2 layer", Mamba2)):
        options = {"headdim": 16} if kind is Mamba2 else {}
        layer = kind(width, **options)
        tokens = {"x": torch.randn(2, size[1], width)}
        tokens |= {name: value.detach() for name, value in layer.named_parameters()}
        own, exact = kind(width, **options).to(device), kind(width, scan="reference", **options)
        runs = _called(own), _called(exact.double())
        found.append(compare(what, "auto", torch.float32, runs, tokens, (), device))
    return found


def _called(layer: nn.Module) -> Runs:
    def run(x: Arrays) -> Tensor:
        weights = {name: value for name, value in x.items() if name != "x"}
        found: Tensor = torch.func.functional_call(layer, weights, (x["x"],))
        return found

    return run


def _ssd_inputs(batch: int, time: int, channels: int, states: int) -> Arrays:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    heads = 4
    return {
        "x": normal(batch, time, heads, channels // heads),
        "dt": normal(batch, time, heads),
        "A": -torch.arange(1.0, heads + 1),
        "B": normal(batch, time, 1, states),
        "C": normal(batch, time, 1, states),
        "D": normal(heads),
        "dt_bias": normal(heads) - 4,
    }


# Steps.


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Measure one step in this process: ``stage:way:batch:precision``."""
    stage, way, batch, precision = given.worker.split(":")
    torch.manual_seed(0)
    try:
        if way == "published":
            return measure_published(
                int(stage), given.data, given.quick, given.repeats, int(batch), given.device
            )
        part = "encoder" if stage == "1" else "decoder"
        more = ["--data.batch_size", batch, "--trainer.accelerator", given.device]
        if precision != "32-true":
            more += ["--trainer.precision", precision]
            more += [f"--model.init_args.{part}.init_args.full_precision", "false"]
        name = way
        if way == "Mamba-2":
            more += [f"--model.init_args.{part}.init_args.block", "mamba2"]
            name = "auto"
        recipe, module = make_ours(int(stage), given.data, given.quick, name, *more)
        clock, _ = run_ours(recipe, module, given.repeats + 1)
    except torch.OutOfMemoryError:
        return {"problem": "out of memory"}
    except ConfigError as error:
        return {"problem": str(error)}
    losses = torch.stack(clock.losses)
    return {
        "seconds": sorted(clock.seconds)[len(clock.seconds) // 2],
        "memory_mb": clock.memory_mb,
        "loss": float(losses[-1]),
        "finite": bool(losses.isfinite().all()),
    }


def step_rows(folder: Path, given: argparse.Namespace) -> list[Row]:
    """Measure steps of both stages, the published way and ours with each back end."""
    batches = (8,) if given.quick else BATCHES
    ways = ["published", "mamba_ssm", "torch", "Mamba-2"]
    if given.device == "cpu":
        ways.remove("mamba_ssm")
    plan = [(s, b, w, "32-true") for s in (1, 2) for b in batches for w in ways]
    precisions = PRECISIONS if given.device == "cuda" else PRECISIONS[:1]
    plan += [(s, batches[0], w, p) for p in precisions for s in (1, 2) for w in ways[1:]]
    common = ["--device", given.device, "--data", folder, "--repeats", given.repeats]
    common += ["--threads", given.threads, *["--quick"] * given.quick]
    rows = []
    for stage, batch, way, precision in track(plan, "steps", len(plan)):
        worker = f"{stage}:{way}:{batch}:{precision}"
        try:
            found = apart(__file__, "--worker", worker, *common)
        except RuntimeError as error:
            found = {"problem": f"{FAILED}: {str(error).splitlines()[-1]}"}
        case = f"stage {stage}, batch {batch}, {precision}"
        reference = "published" if precision == "32-true" and way != "published" else None
        note = str(found.get("problem", "")).replace("|", "/")
        if not note:
            finite = "" if found.get("finite", True) else ", NOT FINITE"
            note = f"last loss {found['loss']:.4f}{finite}"
        rows.append(
            Row("gpu", case, way, found.get("seconds", math.nan), found.get("memory_mb"),
                reference, note=note)
        )  # fmt: skip
    return rows


def is_wrong(row: Row) -> bool:
    """Whether a step failed, or lost its numbers."""
    return "NOT FINITE" in row.note or FAILED in row.note


# The page.


def page(here: dict[str, Any], given: argparse.Namespace, parity: list[Parity], rows: list[Row]
         ) -> str:  # fmt: skip
    """Write docs/benchmarks_gpu.md."""
    device = torch.device(given.device)
    what = here["accelerator"] if given.device == "cuda" else f"{here['processor']} (no GPU)"
    versions = ", ".join(f"{name} {value}" for name, value in here["versions"].items())
    bad = [p for p in parity if not p.reason and not p.good]
    wrong = [row for row in rows if is_wrong(row)]
    lines = [
        "# Benchmarks on a GPU",
        "",
        "Written by `make bench-gpu` (`python benchmarks/gpu.py`); do not edit.",
        "",
        f"- Device: {what}; {here['date']}; revision {here['revision']}",
        f"- Versions: {versions}, CUDA {torch.version.cuda}",
        f"- Mamba: {explain(device, scan.resolve_backend(device))}",
        f"- Mamba-2: {explain(device, ssd.resolve_backend(device), 'mamba2')}",
        f"- Parity: {len(bad)} of {sum(not p.reason for p in parity)} outside the tolerance; "
        f"steps: {len(wrong)} of {len(rows)} failed or not finite",
        "",
        "## Parity with float64 on the CPU",
        "",
        "| what | back end | type | error of values | of gradients | tolerance | |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for p in parity:
        errors = f"{p.value:.1e} | {p.gradient:.1e}" if not p.reason else " | "
        verdict = p.reason or ("good" if p.good else "**not good**")
        kind = str(p.dtype).removeprefix("torch.")
        lines.append(
            f"| {p.what} | {p.backend} | {kind} | {errors} | {TOLERANCE[p.dtype]:g} | {verdict} |"
        )
    lines += ["", "## Training steps", ""]
    shown = columns(rows)
    lines += ["| " + " | ".join(shown) + " |"]
    lines += ["|" + "".join("---|" if name in TEXTS else "---:|" for name in shown)]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*shown.values(), strict=True)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Check and measure, then write the page."""
    parser = options(__doc__, repeats=10)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, help="where to write (docs)")
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.device == "cuda" and not torch.cuda.is_available():
        console.print(
            "benchmarks/gpu.py: there is no CUDA device. Run it on a machine with one.",
            markup=False,
        )
        return 1
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if given.worker:
        say(measure(given))
        return 0
    torch.manual_seed(0)
    parity = scan_parity(given.device, given.quick)
    with tempfile.TemporaryDirectory() as folder:
        made = (Path(folder), 64, TOY) if given.quick else (Path(folder), IMAGES)
        rows = step_rows(make_subject(*made), given)
    out = given.folder or (
        FOLDER if given.device == "cuda" and not given.quick else Path("runs/benchmarks-quick")
    )
    write_text(out / "benchmarks_gpu.md", page(machine(), given, parity, rows))
    Console().print((out / "benchmarks_gpu.md").read_text(), markup=False)
    wrong = [p for p in parity if not p.reason and not p.good] or [r for r in rows if is_wrong(r)]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
