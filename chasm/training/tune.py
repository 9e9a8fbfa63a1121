"""Sweeps: an Optuna study over the keys of a recipe, by several processes or machines at once."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import torch
from optuna.study import Study
from optuna.trial import TrialState

from chasm.data.datamodule import NSDDataModule
from chasm.data.subjects import SubjectsDataModule
from chasm.errors import ConfigError, TrainingError
from chasm.io import digest
from chasm.progress import bar
from chasm.training.recipes import Recipe
from chasm.training.runs import TrainingData, run_folder, training_data
from chasm.training.search_space import Sweep, Value
from chasm.training.side_by_side import default_jobs, heard
from chasm.training.study import Storage, counts, n_finished, open_study, quiet
from chasm.training.trials import POLL, Plan, worker
from chasm.training.tune_report import Findings, write_findings

log = logging.getLogger(__name__)

MAX_RESTARTS = 10
"""Workers that are started again because they were stopped."""

_STOPPED = (128 + signal.SIGTERM, *(-number for number in signal.Signals))
"""Exit statuses of workers that a signal ended."""

MAX_GRID = 1000
"""Most combinations of a grid."""


class SweepInterruptedError(TrainingError):
    """A sweep was stopped from outside before its end."""

    def __init__(self, study: str, by: signal.Signals) -> None:
        super().__init__(study, f"the sweep was stopped ({by.name})", "The same command goes on.")
        self.exit_status = 128 + by


class Tuned(NamedTuple):
    """A study, the folder of its results, and its findings if a trial is complete."""

    study: Study
    folder: Path
    findings: Findings | None


def tune(
    sweep: Sweep,
    recipe: Recipe,
    *,
    trials: int | None = None,
    workers: int | None = None,
    storage: str | None = None,
    study: str | None = None,
    timeout: float | None = None,
) -> Tuned:
    """Search the space of a sweep until the study has as many finished trials as are wanted.

    A study that has them is left as it is; one that was stopped goes on. A Stage 1 that the
    recipe builds on is trained first.

    Parameters
    ----------
    sweep, recipe
        What is searched, and the recipe without search, see
        `chasm.training.space_checks.check_space`.
    trials
        Finished trials, pruned ones included; None for what the sweep says.
    workers
        Processes; None for one for each GPU, or else for each thread of torch, at most four.
    storage
        File (SQLite or journal) or URL of a database; None for ``study.db`` in the folder.
    study
        Name of the study; None for the sweep's.
    timeout
        Seconds after which no trial begins.

    Raises
    ------
    ConfigError
        An option cannot be used.
    DataError
        The storage cannot be used, or its study is of something else.
    TrainingError
        Trials failed, too many of them.
    SweepInterruptedError
        The sweep was stopped by a signal.
    """
    quiet()
    trials, name = sweep.trials if trials is None else trials, study or sweep.study
    for option, value in (("--trials", trials), ("--workers", workers), ("--timeout", timeout)):
        if value is not None and value <= 0:
            raise ConfigError(option, f"found {value}", "Give a number above 0.")
    if Path(name).name != name or name.startswith("."):
        raise ConfigError("--study", f"{name!r} is no name", "Use letters, digits and dashes.")
    data = training_data(recipe)
    run = run_folder(recipe, data)  # trains the Stage 1, if there is one
    folder = run.parent / "sweeps" / name
    place = Storage.of(storage, folder)
    plan = Plan(
        place, name, sweep, recipe.resolved(), trials,
        None if timeout is None else time.time() + timeout,
    )  # fmt: skip
    facts = {
        "data": digest(_fingerprints(data)),
        "recipe": run.name,
        "search space": digest(sweep.described()),
        "sampler": sweep.sampler.kind,
        "major version of Optuna": optuna.__version__.partition(".")[0],
    }
    found = open_study(place, name, recipe.selection.mode, facts, _queue(sweep, recipe))
    log.info("study %s in %s: %d of %d trials", name, place.name, n_finished(found), trials)
    left = trials - n_finished(found)
    if left > 0:
        _run_workers(plan, found, min(workers or default_workers(), left))
    findings = None
    if counts(found)[TrialState.COMPLETE]:
        findings = Findings(found, sweep, recipe, _facts(data))
        write_findings(findings, folder)
    _check_end(plan, found)
    return Tuned(found, folder, findings)


def _facts(data: TrainingData) -> dict[str, Any]:
    parts = _parts(data)
    return {
        "simulated": any(part.store.simulated for part in parts),
        "subject": ", ".join(part.store.subject for part in parts),
        "dataset": ", ".join(dict.fromkeys(part.store.dataset for part in parts)),
        "weights_label": parts[0].tokens.weights_label,
    }


def _parts(data: TrainingData) -> list[NSDDataModule]:
    return list(data.parts.values()) if isinstance(data, SubjectsDataModule) else [data]


def _fingerprints(data: TrainingData) -> list[list[str]]:
    return [[part.store.fingerprint, part.tokens.fingerprint] for part in _parts(data)]


def _queue(sweep: Sweep, recipe: Recipe) -> list[dict[str, Value]]:
    """Say what a new study tries first: the recipe as it is, or a whole grid, shuffled."""
    if sweep.sampler.kind != "grid":
        usual = sweep.values_of(recipe.settings())
        return [] if usual is None else [usual]
    found = list(sweep.grid())
    if len(found) > MAX_GRID:
        raise ConfigError(
            f"{sweep.path}: space", f"a grid of {len(found)} combinations, at most {MAX_GRID}",
            "Take wider steps, or the sampler tpe or random.",
        )  # fmt: skip
    order = np.random.default_rng(sweep.sampler.seed).permutation(len(found))
    return [found[i] for i in order]


def default_workers() -> int:
    """One for each GPU, else one for each thread of torch, at most four."""
    return max(1, torch.cuda.device_count()) if torch.cuda.is_available() else default_jobs()


def gpu_of(worker: int) -> str | None:
    """Tell which GPU a worker uses, by its number; None without one."""
    if not torch.cuda.is_available():
        return None
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    return gpus[worker % len(gpus)]


def _run_workers(plan: Plan, study: Study, workers: int) -> None:
    """Keep workers at work; one that was killed is started again."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // workers)
    restarts = MAX_RESTARTS
    running: dict[int, Any] = {}
    with ExitStack() as stack, bar() as display, _stoppable(plan.study, running):
        task = display.add_task(f"study {plan.study}", total=plan.trials)

        def start(number: int) -> None:
            # A queue for each: a process that is killed may take the lock of its queue with it.
            queue = stack.enter_context(heard(context))
            arguments = (plan, queue, threads, os.getpid(), gpu_of(number))
            running[number] = context.Process(target=worker, args=arguments)
            running[number].start()

        for number in range(workers):
            start(number)
        while running:
            wait([process.sentinel for process in running.values()], POLL)
            display.update(task, completed=n_finished(study))
            for number, process in list(running.items()):
                if process.is_alive():
                    continue
                process.join()
                del running[number]
                if process.exitcode in _STOPPED and restarts > 0:
                    restarts -= 1
                    log.warning("worker %d was stopped; another one begins", number)
                    start(number)


@contextmanager
def _stoppable(study: str, running: dict[int, Any]) -> Iterator[None]:
    """Stop the workers, each after its last whole epoch, when this process is to stop."""

    def stop(number: int, frame: object) -> None:
        raise SweepInterruptedError(study, signal.Signals(number))

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number in before:
            signal.signal(number, signal.SIG_IGN)
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_end(plan: Plan, study: Study) -> None:
    """Tell when a study ended early because its trials failed."""
    found = counts(study)
    finished = n_finished(study)
    if plan.deadline and time.time() > plan.deadline:
        log.warning("time is up: %d of %d trials", finished, plan.trials)
    elif finished < plan.trials and not (found[TrialState.COMPLETE] and _is_grid(plan)):
        errors = [t.user_attrs["error"] for t in study.trials if "error" in t.user_attrs]
        raise TrainingError(
            f"study {plan.study}",
            f"{finished} of {plan.trials} trials are finished, {found[TrialState.FAIL]} failed"
            + (f", the last one: {errors[-1]}" if errors else ""),
            "Correct the search space or the recipe; the same command goes on.",
        )


def _is_grid(plan: Plan) -> bool:
    return plan.sweep.sampler.kind == "grid"
