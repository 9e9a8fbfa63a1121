"""Time and memory of the selective scan's back ends, side by side in one run.

    python benchmarks/scan.py                      # every size, reference and torch
    python benchmarks/scan.py --sizes stage1 --threads 4

Each measurement runs forward and backward in a fresh process, back ends taking turns. Time is the
median of the repeats; extra memory is the peak of the process during one forward and backward
above what the inputs occupied before it (outputs and gradients included).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from chasm.models.scan import selective_scan

SIZES = {
    "small": (8, 64, 256, 16),
    "demo": (32, 64, 256, 16),
    "stage1": (32, 256, 1024, 16),
}
"""Batch, time, channels, states; "stage1" is the paper's local stream."""


def make_inputs(size: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """Make the arguments of a scan as a Mamba layer gives them, with gradients asked for."""
    batch, time_steps, channels, states = size
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {
        "u": normal(batch, time_steps, channels).mT,
        "delta": normal(batch, time_steps, channels).mT,
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": normal(batch, time_steps, states).mT,
        "C": normal(batch, time_steps, states).mT,
        "D": normal(channels),
        "z": normal(batch, time_steps, channels).mT,
        "delta_bias": normal(channels) - 4,
    }
    return {name: value.requires_grad_() for name, value in inputs.items()}


def resident_bytes() -> int:
    """Read the resident memory of this process (Linux)."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


def extra_memory(step: Callable[[], object]) -> int:
    """Give the peak of the resident memory while `step` runs, above the memory before."""
    before = resident_bytes()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    done.set()
    watcher.join()
    return max(peak, resident_bytes()) - before


def measure(backend: str, size: tuple[int, int, int, int], repeats: int) -> dict[str, float]:
    """Measure one back end in this process."""
    # Few steps of every channel start the threads, without memory that the real run could reuse.
    warm = make_inputs((size[0], 4, *size[2:]))
    selective_scan(**warm, delta_softplus=True, backend=backend).sum().backward()
    inputs = make_inputs(size)
    gradient = torch.ones_like(inputs["u"])
    leaves = list(inputs.values())

    def step() -> tuple[Tensor, ...]:
        y = selective_scan(**inputs, delta_softplus=True, backend=backend)
        return torch.autograd.grad(y, leaves, gradient)

    memory = extra_memory(step)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return {"ms": median(times), "mb": memory / 1e6}


def measure_apart(backend: str, size: str, repeats: int, threads: int) -> dict[str, float]:
    """Measure in a fresh process, so that memory kept by an earlier run does not hide any."""
    command = [sys.executable, __file__, "--worker", backend, "--sizes", size]
    command += ["--repeats", str(repeats), "--threads", str(threads)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output)
    return result


def main() -> None:
    """Run the benchmark and show the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--backends", nargs="+", default=["reference", "torch"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="turns each back end takes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        result = measure(options.worker, SIZES[options.sizes[0]], options.repeats)
        sys.stdout.write(json.dumps(result))
        return
    table = Table(title=f"Selective scan, forward + backward, float32, {options.threads} threads")
    for column in ("size", "batch, time, channels, states", "back end", "ms", "extra MB"):
        table.add_column(column, justify="right")
    table.add_column(f"speed / {options.backends[0]}", justify="right")
    for size in options.sizes:
        rounds = [
            {
                name: measure_apart(name, size, options.repeats, options.threads)
                for name in options.backends
            }
            for _ in range(options.rounds)
        ]
        base = median(turn[options.backends[0]]["ms"] for turn in rounds)
        for name in options.backends:
            ms = median(turn[name]["ms"] for turn in rounds)
            mb = max(turn[name]["mb"] for turn in rounds)
            table.add_row(
                size, str(SIZES[size])[1:-1], name, f"{ms:.1f}", f"{mb:.0f}", f"{base / ms:.2f}"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
