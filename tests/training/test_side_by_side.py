"""Recipes trained in processes of their own: the same runs, logs heard here, failures apart."""

import logging
import os
import signal
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool

import pytest

from chasm.training import side_by_side
from chasm.training.recipes import Recipe
from chasm.training.run_files import is_finished, read_provenance
from chasm.training.side_by_side import Fitted, default_jobs, fit_side_by_side


@pytest.fixture
def recipes(tiny_recipe):
    """Two recipes that differ in their seed, and one that cannot train, one epoch each."""
    args = [*tiny_recipe, "--trainer.max_epochs", "1"]
    return {
        "a%": Recipe([*args, "--seed_everything", "1"]),
        "b": Recipe([*args, "--seed_everything", "2"]),
        "bad": Recipe([*args, "--trainer.devices", "3"]),
    }


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_recipe_is_trained_and_a_failure_is_named(jobs, recipes, caplog):
    with caplog.at_level(logging.INFO, logger="chasm"):
        found = fit_side_by_side(recipes, jobs)
    assert list(found) == ["a%", "b", "bad"]
    seeds = [read_provenance(found[name].run)["seed"] for name in ("a%", "b")]
    assert seeds == [1, 2]
    assert all(is_finished(found[name].run) for name in ("a%", "b"))
    assert found["bad"].run is None
    assert found["bad"].error.startswith("trainer.devices: training side by side uses one device")
    said = [record.getMessage() for record in caplog.records]
    prefix = {1: "", 2: "b: "}[jobs]
    assert any(line.startswith(f"{prefix}epoch 1 of 1") for line in said)


def test_current_runs_are_left_as_they_are(recipes):
    one = {"a%": recipes["a%"]}
    first = fit_side_by_side(one)
    checkpoint = first["a%"].run / "checkpoints" / "best.ckpt"
    written = checkpoint.stat().st_mtime_ns
    assert fit_side_by_side(one, jobs=2) == first
    assert checkpoint.stat().st_mtime_ns == written
    assert fit_side_by_side(one, fresh=True) == first
    assert checkpoint.stat().st_mtime_ns > written


def test_a_process_that_dies_costs_its_recipe_only():
    done = Future()
    done.set_exception(BrokenProcessPool("killed"))
    found = side_by_side._result(done)
    assert found == Fitted(None, "a process that trains ended unexpectedly (out of memory?)")
    other = Future()
    other.set_exception(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        side_by_side._result(other)


def test_training_ends_when_the_parent_is_gone(monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
    parents = iter([7, 7, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(side_by_side.time, "sleep", lambda seconds: None)
    side_by_side._end_with(7)
    assert sent == [(os.getpid(), signal.SIGTERM)]
    assert next(parents, None) is None


@pytest.mark.parametrize(("cuda", "threads", "jobs"), [(True, 8, 1), (False, 2, 2), (False, 64, 4)])
def test_jobs_follow_the_machine(cuda, threads, jobs, monkeypatch):
    monkeypatch.setattr(side_by_side.torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(side_by_side.torch, "get_num_threads", lambda: threads)
    assert default_jobs() == jobs
