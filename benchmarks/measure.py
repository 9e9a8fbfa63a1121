"""What the benchmarks share: rows of results, clocks, memory, fresh processes, the machine.

A script of this folder takes `options`, makes `Row` s, and ends with `finish`, which shows them
and writes them where ``--json`` says; `run.py` collects them. What is timed runs in a fresh
process where memory is measured (`apart`), and ways that are compared take turns (`in_turns`).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from chasm.io import write_json
from chasm.processes import n_cores
from chasm.progress import console

PACKAGES = (
    "chasm-fmri", "torch", "numba", "numpy", "scipy", "scikit-learn", "himalaya", "lightning",
    "timm", "h5py", "nibabel", "mamba-ssm", "causal-conv1d",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One measurement.

    Parameters
    ----------
    part
        The benchmark, e.g. "scan".
    case
        What is done, the same for the ways that are compared, e.g. "32 x 256 x 1024 x 16".
    way
        How it is done, e.g. "numba".
    seconds
        Median time of doing it once; NaN where only something else was measured.
    memory_mb
        Peak of the resident memory above what was there before, in 1e6 bytes.
    reference
        The way of the same case that it is compared with.
    bytes, flops
        What must be moved to and from memory at least, and computed, for the roofline.
    note
        A few words for the table.
    """

    part: str
    case: str
    way: str
    seconds: float
    memory_mb: float | None = None
    reference: str | None = None
    bytes: float | None = None
    flops: float | None = None
    note: str = ""


def options(description: str | None, repeats: int = 3) -> argparse.ArgumentParser:
    """Make a parser of the options that all benchmarks have.

    Parameters
    ----------
    description
        The script's docstring; its first line is shown by ``--help``.
    repeats
        Default of ``--repeats``.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--quick", action="store_true", help="toy sizes: a test of the script")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def finish(rows: list[Row], given: argparse.Namespace) -> None:
    """Show the rows, and write them where ``--json`` says."""
    screen = Console()
    if not screen.is_terminal:
        screen = Console(width=140)
    screen.print(table(rows, f"{given.threads} threads"))
    if given.json:
        write_rows(rows, given.json)


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write rows as a JSON list; see `read_rows`."""
    write_json(path, [asdict(row) for row in rows])


def read_rows(path: Path) -> list[Row]:
    """Read what `write_rows` wrote."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


# Time.


def seconds(step: Callable[[], object]) -> float:
    """Time one run."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def times(step: Callable[[], object], repeats: int, warm: int = 1) -> list[float]:
    """Time a step several times, after `warm` runs that do not count."""
    for _ in range(warm):
        step()
    return [seconds(step) for _ in range(repeats)]


def in_turns(
    steps: Mapping[str, Callable[[], object]], repeats: int, warm: int = 1
) -> dict[str, list[float]]:
    """Time several ways, one after the other in each round, so that a slow minute hits them all."""
    for step in steps.values():
        times(step, 0, warm)
    found: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(repeats):
        for way, step in steps.items():
            found[way].append(seconds(step))
    return found


# Memory.


def extra_memory(step: Callable[[], object]) -> float | None:
    """Give the peak of this process's resident memory during a step above that before, in MB.

    Memory that an earlier step freed and the allocator kept hides some: measure in a fresh
    process. Other processes, such as a loader's workers, do not count. None where the system does
    not tell.
    """
    before = reset_peak()
    step()
    peak = peak_memory()
    return None if before is None or peak is None else peak - before


def reset_peak(device: str = "cpu") -> float | None:
    """Let the peak of the memory begin anew; give what is in use now, in MB.

    On the CPU that is the resident memory, whose peak the kernel keeps, so that nothing short is
    missed (Linux; None elsewhere); on CUDA what PyTorch has allocated.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def peak_memory(device: str = "cpu") -> float | None:
    """Give the peak of the memory since `reset_peak`, in MB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return _resident("VmHWM") if Path("/proc/self/status").is_file() else None


def _resident(field: str) -> float:
    """Read a field of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1.024e-3 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


# Fresh processes.


def apart(script: str | Path, *arguments: object, answer: bool = True) -> Any:
    """Run a script in a fresh process and give the JSON of its last line of output.

    Parameters
    ----------
    script, arguments
        What to run.
    answer
        Whether it gives an answer by `say`, and its errors are kept for the message; else both
        streams are the caller's, progress is seen, and None is returned.

    Raises
    ------
    RuntimeError
        It failed; the last lines of its errors are in the message.
    """
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=answer, text=True, check=False)
    if done.returncode:
        last = (done.stderr or "").strip().splitlines()[-5:]
        raise RuntimeError("\n".join([f"{' '.join(command)} ended with {done.returncode}", *last]))
    return json.loads(done.stdout.splitlines()[-1]) if answer else None


def apart_in_turns(
    script: str | Path, ways: Mapping[str, Sequence[object]], rounds: int | Mapping[str, int]
) -> dict[str, dict[str, float | None]]:
    """Run the arguments of each way in fresh processes, in turns.

    Each process says ``{"seconds": ..., "memory_mb": ...}`` (`say`). `rounds` may differ by way.

    Returns
    -------
    dict
        By way, the median of the seconds, the largest memory, and what else the first one said.
    """
    count = dict.fromkeys(ways, rounds) if isinstance(rounds, int) else dict(rounds)
    plan = [(turn, way) for turn in range(max(count.values(), default=0)) for way in ways]
    plan = [(turn, way) for turn, way in plan if turn < count[way]]
    said: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for number, (_, way) in enumerate(plan, 1):
        said[way].append(apart(script, *ways[way]))
        console.print(f"{Path(script).stem}: {way} ({number} of {len(plan)})", markup=False)
    found: dict[str, dict[str, float | None]] = {}
    for way, turns in said.items():
        memory = [turn["memory_mb"] for turn in turns if turn["memory_mb"] is not None]
        found[way] = {
            **turns[0],
            "seconds": median(turn["seconds"] for turn in turns),
            "memory_mb": max(memory, default=None),
        }
    return found


def say(result: Any) -> None:
    """Give a result to the process that called this one by `apart`."""
    sys.stdout.write(json.dumps(result) + "\n")


# The machine.


def machine() -> dict[str, Any]:
    """Say what this runs on: processor, memory, system, versions, date, revision."""
    from chasm.training.provenance import git_revision

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": n_cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "revision": git_revision(),
    }


def processor() -> str:
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def peak_rates(threads: int, size: int = 3072, mb: int = 512) -> dict[str, float]:
    """Measure what this machine can do, for the roofline.

    Parameters
    ----------
    threads
        Of PyTorch.
    size
        Rows of the square float32 matrices that are multiplied.
    mb
        Megabytes that are copied, far more than the caches hold.

    Returns
    -------
    dict
        ``flops``, of a float32 matrix product per second, and ``bytes``, read and written by a
        copy per second; the best of several runs each.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    left, right = torch.randn(size, size), torch.randn(size, size)
    source = torch.ones(mb * 250_000)
    target = torch.empty_like(source)
    product = min(times(lambda: left @ right, 5))
    copy = min(times(lambda: target.copy_(source), 5))
    torch.set_num_threads(before)
    return {"flops": 2 * size**3 / product, "bytes": 2 * source.nbytes / copy}


# The table.

TEXTS = ("case", "way", "than", "note")
"""Columns that are no numbers."""


def ratios(rows: list[Row]) -> dict[tuple[str, str, str], tuple[float | None, float | None]]:
    """Give how many times faster and smaller a row is than its reference, by (part, case, way)."""
    found = {(row.part, row.case, row.way): row for row in rows}
    result: dict[tuple[str, str, str], tuple[float | None, float | None]] = {}
    for key, row in found.items():
        base = found.get((row.part, row.case, row.reference or ""))
        if base is None:
            result[key] = None, None
            continue
        memory = None
        if base.memory_mb is not None and row.memory_mb:
            memory = base.memory_mb / row.memory_mb
        result[key] = base.seconds / row.seconds, memory
    return result


def table(rows: list[Row], title: str = "") -> Table:
    """Show rows; speed and memory are relative to the way that a row names."""
    shown = Table(title=title or None)
    found = columns(rows)
    for name in found:
        shown.add_column(name, justify="left" if name in TEXTS else "right")
    for cells in zip(*found.values(), strict=True):
        shown.add_row(*cells)
    return shown


def columns(rows: list[Row]) -> dict[str, list[str]]:
    """Write the cells of a table by column; a column without any is left out."""
    relative = [ratios(rows)[row.part, row.case, row.way] for row in rows]
    found = {
        "case": [row.case for row in rows],
        "way": [row.way for row in rows],
        "time": [duration(row.seconds) for row in rows],
        "memory": [megabytes(row.memory_mb) for row in rows],
        "times faster": [factor(pair[0]) for pair in relative],
        "times smaller": [factor(pair[1]) for pair in relative],
        "than": [row.reference or "" for row in rows],
        "note": [row.note for row in rows],
    }
    return {name: cells for name, cells in found.items() if any(cells)}


def duration(value: float) -> str:
    """Write seconds with three digits and a fitting unit."""
    if np.isnan(value):
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1 or unit == "µs":
            return f"{digits(value * scale)} {unit}"
    raise AssertionError


def megabytes(value: float | None) -> str:
    """Write MB, or GB from 1000 MB on."""
    if value is None:
        return ""
    return f"{value / 1e3:.2f} GB" if value >= 1e3 else f"{value:.0f} MB"


def factor(value: float | None) -> str:
    """Write a ratio with three digits."""
    return "" if value is None or np.isnan(value) else f"{digits(value)}x"


def digits(value: float) -> str:
    """Write three significant digits without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
