"""Trials of a sweep: what a worker process does until the study has enough of them.

A trial is an ordinary run, found again by its recipe: one that was stopped goes on from its last
whole epoch. Trials are compared by the value that selects checkpoints, on validation images; test
images are never read.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import pandas as pd
import yaml
from filelock import FileLock
from lightning.pytorch.callbacks import Callback
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import TrialState
from optuna_integration import PyTorchLightningPruningCallback

from chasm.errors import ChasmError, TrainingError
from chasm.io import write_text
from chasm.training.recipes import Recipe
from chasm.training.run_files import read_provenance
from chasm.training.runs import RunBusyError, RunInterruptedError, fit, run_folder, training_data
from chasm.training.search_space import Sweep, Value, as_arguments
from chasm.training.side_by_side import Named, begin
from chasm.training.study import (
    Storage,
    bring_back_dead,
    counts,
    load_study,
    n_finished,
    queue_again,
    quiet,
    twin_of,
)

log = logging.getLogger(__name__)

MAX_FAILURES = 10
"""Trials that may fail in a row before a worker gives up."""

POLL = 1.0
"""Seconds between two looks at what other workers do."""

_EXPECTED = (ChasmError, RuntimeError, OSError, ValueError)
"""What a recipe that cannot be trained may end in."""


@dataclass(frozen=True)
class Plan:
    """What a worker needs to know.

    Attributes
    ----------
    storage, study
        Where the trials are.
    sweep
        What is searched, and how.
    recipe
        The recipe without search, resolved YAML.
    trials
        Finished trials that are wanted.
    deadline
        Time (seconds since the epoch) after which no trial begins.
    """

    storage: Storage
    study: str
    sweep: Sweep
    recipe: str
    trials: int
    deadline: float | None = None

    def sampler(self, number: int) -> BaseSampler:
        """Make the sampler of one trial: what it draws depends on the trials before it alone."""
        options = self.sweep.sampler
        seed = int(np.random.SeedSequence((options.seed, number)).generate_state(1)[0])
        if options.kind != "tpe":
            return RandomSampler(seed)  # all trials of a grid are queued beforehand
        return TPESampler(
            seed=seed,
            n_startup_trials=options.startup,
            group=any(d.when for d in self.sweep.space),
            constant_liar=True,
        )

    def pruner(self) -> BasePruner:
        """Make what stops trials early."""
        options = self.sweep.pruner
        if options.kind == "median":
            return MedianPruner(options.startup, options.warmup)
        if options.kind == "hyperband":
            epochs = yaml.safe_load(self.recipe)["trainer"]["max_epochs"]
            return HyperbandPruner(max(1, options.warmup), epochs or "auto")
        return NopPruner()

    def due(self, study: Study) -> Literal["run", "wait", "end"]:
        """Tell a worker what to do next; it may wait for others, whose trials may fail."""
        found = counts(study)
        finished = found[TrialState.COMPLETE] + found[TrialState.PRUNED]
        running = found[TrialState.RUNNING]
        if finished >= self.trials or (self.deadline and time.time() > self.deadline):
            return "end"
        if finished + running >= self.trials:
            return "wait"
        if self.sweep.sampler.kind == "grid" and not found[TrialState.WAITING]:
            return "wait" if running else "end"
        return "run"


class Objective:
    """Trains the recipe of a trial and gives its best validation value.

    Parameters
    ----------
    plan, study
        Of what.
    path
        The recipe without search.
    label
        Is told what the messages to come are about.
    """

    def __init__(self, plan: Plan, study: Study, path: Path, label: Callable[[str], None]) -> None:
        self.plan, self.study, self.path, self.label = plan, study, path, label
        self.turn: FileLock = plan.storage.turn
        self.held: FileLock | None = None
        self.number = -1
        self.error: str | None = None
        self.stopped = False

    def __call__(self, trial: optuna.Trial) -> float:
        """Train; the turn goes to the next worker as soon as the values are known."""
        self.number, self.error, self.stopped = trial.number, None, False
        self.held = self.plan.storage.lock(self.plan.study, trial.number)
        self.held.acquire()
        values = self.plan.sweep.suggest(trial)
        trial.set_user_attr("worker", f"{platform.node()}:{os.getpid()}")
        self.turn.release()
        self.label(f"trial {trial.number}")
        log.info("%s", "  ".join(f"{k.split('.')[-1]} {v}" for k, v in values.items()))
        try:
            return self._train(trial, values)
        except (RunInterruptedError, KeyboardInterrupt):
            self.stopped = True
            raise
        except _EXPECTED as error:
            self.error = " ".join(str(error).split()) or type(error).__name__
            trial.set_user_attr("error", self.error)
            log.warning("failed: %s", self.error)
            raise

    def _train(self, trial: optuna.Trial, values: dict[str, Value]) -> float:
        recipe = Recipe(["-c", str(self.path), *as_arguments(values)])
        run = run_folder(recipe, training_data(recipe))
        trial.set_user_attr("run", str(run))
        # Another worker may train the same recipe: two trials may well have the same values.
        with self.plan.storage.lock(self.plan.study, run.name):
            twin = twin_of(self.study, trial)
            if twin is not None:
                return _like(trial, twin)
            monitor = recipe.selection.monitor
            try:
                _fit_in_turn(recipe, PyTorchLightningPruningCallback(trial, monitor))
            except optuna.TrialPruned:
                for checkpoint in run.glob("checkpoints/*.ckpt"):  # nothing goes on from them
                    checkpoint.unlink()
                raise
        if not self.study.trials[trial.number].intermediate_values:  # the run was current
            curve = pd.read_csv(run / "metrics.csv").dropna(subset=monitor)
            for epoch, value in zip(curve["epoch"], curve[monitor], strict=True):
                trial.report(float(value), int(epoch))
        return float(read_provenance(run)["trained"]["selected_score"])


def _fit_in_turn(recipe: Recipe, callback: Callback) -> None:
    """Train; where another study or command trains this very run, wait for it."""
    while True:
        try:
            fit(recipe, callbacks=[callback])
            return
        except RunBusyError:
            log.info("waiting for the process that trains the same run")
            time.sleep(30 * POLL)


def _like(trial: optuna.Trial, twin: optuna.trial.FrozenTrial) -> float:
    """End as an earlier trial of the same values did."""
    log.info("as trial %d", twin.number)
    for epoch, value in twin.intermediate_values.items():
        trial.report(value, epoch)
    if twin.state == TrialState.PRUNED:
        raise optuna.TrialPruned(f"as trial {twin.number}")
    assert twin.value is not None
    return twin.value


def work(plan: Plan, label: Callable[[str], None] = lambda name: None) -> None:
    """Run trials until the study has as many as are wanted.

    Raises
    ------
    RunInterruptedError
        Training was stopped by a signal; the trial is queued again.
    TrainingError
        Too many trials failed in a row.
    """
    quiet()
    in_row = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        write_text(path, plan.recipe)
        study = load_study(plan.storage, plan.study)
        study.pruner = plan.pruner()
        objective = Objective(plan, study, path, label)
        while (due := _turn(plan, study, objective)) != "end":
            if due == "wait":
                time.sleep(POLL)
                continue
            in_row = 0 if objective.error is None else in_row + 1
            if in_row == MAX_FAILURES:
                raise TrainingError(
                    f"study {plan.study}",
                    f"{in_row} trials in a row failed, the last one: {objective.error}",
                    "Correct the search space or the recipe.",
                )


def _turn(plan: Plan, study: Study, objective: Objective) -> Literal["run", "wait", "end"]:
    """Take the turn, and run one trial if one is due."""
    objective.turn.acquire()
    try:
        bring_back_dead(study, plan.storage)
        due = plan.due(study)
        if due == "run":
            study.sampler = plan.sampler(len(study.get_trials(deepcopy=False)))
            _one_trial(plan, study, objective)
        return due
    finally:
        objective.turn.release(force=True)


def _one_trial(plan: Plan, study: Study, objective: Objective) -> None:
    try:
        study.optimize(objective, n_trials=1, catch=_EXPECTED)
    except ValueError:  # of Optuna: another machine saw no heartbeat and failed the trial
        log.warning("it was given to another worker")
    finally:
        if objective.held is not None:
            objective.held.release()
            plan.storage.forget(plan.study, objective.number)
        if objective.stopped:
            with objective.turn:
                queue_again(study, objective.number, asked=True)
    if objective.stopped:
        raise KeyboardInterrupt
    _say_end(study, objective.number)


def _say_end(study: Study, number: int) -> None:
    trial = study.trials[number]
    if trial.state == TrialState.FAIL:
        return
    value = "" if trial.value is None else f", {trial.value:.5g}"
    log.info("%s%s   (%d finished)", trial.state.name.lower(), value, n_finished(study))


def worker(plan: Plan, queue: Any, threads: int, parent: int, gpu: str | None) -> None:
    """Do `work` in a process of its own: log to the parent, end with it, use one GPU."""
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    queue.cancel_join_thread()
    begin(queue, threads, parent)
    handler = logging.getLogger("chasm").handlers[0]

    def label(name: str) -> None:
        handler.filters[:] = [Named(name)]

    try:
        work(plan, label)
    except (RunInterruptedError, KeyboardInterrupt):
        sys.exit(128 + signal.SIGTERM)
    except ChasmError as error:
        log.error("%s", error)
        sys.exit(error.exit_status)
    except Exception:
        log.exception("a worker ended unexpectedly")
        raise
