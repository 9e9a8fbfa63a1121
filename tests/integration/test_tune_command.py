"""`chasm tune` as it is used: killed, stopped, repeated."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from optuna.trial import TrialState

from chasm.cli import main
from chasm.training import study as studies
from chasm.training.study import Storage, counts

RATE = "model.init_args.learning_rate"


@pytest.fixture
def sweep_file(tiny_recipe, tmp_path):
    """Write a sweep of the smallest recipe's learning rate."""

    def write(epochs):
        path = tmp_path / "sweep.yaml"
        content = {
            "recipe": tiny_recipe[1],
            "pruner": {"kind": "none"},
            "settings": {"trainer.max_epochs": epochs},
            "space": {RATE: {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}},
        }
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


def test_a_password_is_shown_nowhere(sweep_file, tiny_recipe, monkeypatch, capsys):
    url = "oracle://me:secret@host/d?password=secret"
    args = ["tune", "-c", str(sweep_file(1)), *tiny_recipe[2:], "--storage", url]
    monkeypatch.setattr(sys, "argv", ["chasm", *args])
    handlers = logging.getLogger("chasm").handlers[:]
    try:
        assert main(args) == 2
    finally:
        logging.getLogger("chasm").handlers[:] = handlers
        logging.getLogger("chasm").propagate = True
    said = capsys.readouterr()
    assert "oracle://me:***@host/d: the driver" in said.err
    assert "secret" not in said.err + said.out + " ".join(sys.argv)  # argv goes into provenance
    assert "secret" not in repr(Storage.of(url, Path()))


@pytest.mark.slow
def test_a_sweep_survives_kill_9_of_a_worker(sweep_file, tiny_recipe, tmp_path):
    path = sweep_file(8)
    storage = Storage.of(str(tmp_path / "s.db"), tmp_path)
    command = [sys.executable, "-m", "chasm.cli", "tune", "-c", str(path), *tiny_recipe[2:],
               "--trials", "5", "--workers", "2", "--storage", storage.place]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    runs, deadline = tmp_path / "runs", time.monotonic() + 300
    while not (found := list(runs.rglob("last.ckpt"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found
    study = studies.load_study(storage, "sweep")
    victim = next(t for t in study.trials if t.user_attrs.get("run") == str(found[0].parents[1]))
    os.kill(int(victim.user_attrs["worker"].split(":")[1]), signal.SIGKILL)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert f"trial {victim.number} was stopped before its end" in " ".join(said.split())
    assert "another one begins" in said
    assert "best.yaml" in out
    trials = study.trials
    assert counts(study) == {TrialState.COMPLETE: 5, TrialState.FAIL: 1}
    assert trials[victim.number].state == TrialState.FAIL
    (again,) = (t for t in trials if t.params == victim.params and t.state == TrialState.COMPLETE)
    assert again.user_attrs["run"] == victim.user_attrs["run"]
    assert sorted(again.intermediate_values) == list(range(8))
    logs = sorted((Path(victim.user_attrs["run"]) / "logs").glob("*/metrics.csv"))
    assert pd.read_csv(logs[1])["epoch"].min() > 0  # it went on from a whole epoch


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_with_the_same_command(sweep_file, tiny_recipe, tmp_path):
    path = sweep_file(10)
    storage = Storage.of(str(tmp_path / "s.journal"), tmp_path)
    command = [sys.executable, "-m", "chasm.cli", "tune", "-c", str(path), *tiny_recipe[2:],
               "--trials", "3", "--workers", "2", "--storage", storage.place]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "runs").rglob("last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert "The same command goes on" in " ".join(said.split())
    study = studies.load_study(storage, "sweep")
    assert not counts(study)[TrialState.COMPLETE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    found = counts(study)
    assert found[TrialState.COMPLETE] == 3
    assert not found[TrialState.RUNNING] + found[TrialState.WAITING]
