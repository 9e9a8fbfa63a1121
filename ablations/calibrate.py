"""Measure how often the suite is right, on simulated brains whose truth is known.

``python -m ablations.calibrate`` simulates and judges every variant of the specification. Every
finished run is a line of a file, so that a calibration that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import threadpoolctl

from ablations.calibration_criteria import CRITERIA, Calibration, Line, coverage, null_of
from ablations.calibration_runs import VARIANTS, Variant, run
from ablations.calibration_table import DOCS, show, write_docs
from chasm.errors import ChasmError, ConfigError
from chasm.io import write_text
from chasm.progress import bar

Records = dict[str, list[dict[str, Any]]]


def calibrate(
    variants: Sequence[Variant], runs: Mapping[str, int], seed: int, out: Path, jobs: int
) -> Records:
    """Do the runs that are not done, `jobs` at a time.

    Parameters
    ----------
    variants
        What to simulate.
    runs
        Number of runs by variant; their seeds are `seed` and the following numbers.
    seed
        Of the first run.
    out
        Folder of the finished runs, a JSON line each.
    jobs
        Processes, each with one thread; 1 works in this process.

    Returns
    -------
    dict
        Runs by variant, ordered by seed.
    """
    found: Records = {one.name: finished(out, one) for one in variants}
    missing = [
        (one, k)
        for one in variants
        for k in range(seed, seed + runs[one.name])
        if k not in {record["seed"] for record in found[one.name]}
    ]
    for record in _done(missing, jobs):
        found[record["variant"]].append(record)
        with path_of(out, record["variant"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return {
        name: sorted(
            (one for one in some if seed <= one["seed"] < seed + runs[name]),
            key=lambda one: one["seed"],
        )
        for name, some in found.items()
    }


def path_of(out: Path, variant: str) -> Path:
    """File of the runs of a variant."""
    return out / f"{variant.replace(' ', '-').lower()}.jsonl"


def finished(out: Path, variant: Variant) -> list[dict[str, Any]]:
    """Read the finished runs of a variant; what another version of it wrote is removed."""
    path = path_of(out, variant.name)
    out.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = [record for record in map(_record, lines) if record]
    kept = [record for record in records if record["digest"] == variant.digest]
    if len(kept) < len(lines):
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def _record(line: str) -> dict[str, Any] | None:
    """Read a line; None for one that a kill cut short."""
    try:
        found: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found


def _done(missing: Sequence[tuple[Variant, int]], jobs: int) -> Iterator[dict[str, Any]]:
    """Give runs as they finish, with progress."""
    if not missing:
        return
    with bar() as display:
        task = display.add_task("calibration runs", total=len(missing))
        for record in _results(missing, jobs):
            yield record
            display.advance(task)


def _results(missing: Sequence[tuple[Variant, int]], jobs: int) -> Iterator[dict[str, Any]]:
    if jobs == 1:
        with threadpoolctl.threadpool_limits(1):
            yield from (run(variant, seed) for variant, seed in missing)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _begin, (os.getpid(),)) as pool:
        waiting = [pool.submit(run, variant, seed) for variant, seed in missing]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(parent: int) -> None:
    """One thread per process, no progress of its own, and an end when the parent is gone."""
    threadpoolctl.threadpool_limits(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of torch, where it is imported later
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(2)
    os.kill(os.getpid(), signal.SIGTERM)


def judge(records: Records) -> Calibration:
    """Judge every variant; null worlds are shared by the variants with the same ceilings."""
    lines: list[Line] = []
    for name, runs in records.items():
        pair = VARIANTS[name].ceiling
        alike = [k for other in records if VARIANTS[other].ceiling == pair for k in records[other]]
        lines += CRITERIA[name](name, runs, null_of(alike))
    return Calibration(lines, coverage(records))


def main(args: Sequence[str] | None = None) -> int:
    """``python -m ablations.calibrate``."""
    parser = argparse.ArgumentParser(prog="python -m ablations.calibrate", description=__doc__)
    add = parser.add_argument
    add("--runs", type=int, default=200, help="runs of planted, reversed and both nulls")
    add("--other-runs", type=int, default=100, help="runs of every other variant")
    add("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="processes")
    add("--seed", type=int, default=0, help="seed of the first run")
    add("--out", type=Path, default=Path("runs/calibration"), help="folder of finished runs")
    add("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    add("--write-docs", action="store_true", help=f"put the table into {DOCS.name}")
    found = parser.parse_args(args)
    chosen = [VARIANTS[name] for name in found.variants]
    runs = {one.name: found.runs if one.many else found.other_runs for one in chosen}
    try:
        for name in ("runs", "other_runs", "jobs"):
            if getattr(found, name) < 1:
                option = f"--{name.replace('_', '-')}"
                raise ConfigError(option, f"found {getattr(found, name)}", "Use 1 or more.")
        result = judge(calibrate(chosen, runs, found.seed, found.out, found.jobs))
        show(result)
        if found.write_docs:
            options = f"--runs {found.runs} --other-runs {found.other_runs} --seed {found.seed}"
            write_docs(result, f"python -m ablations.calibrate {options}")
    except ChasmError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from the finished runs\n")
        return 130
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
