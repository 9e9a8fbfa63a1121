"""Sweeps: what a trial is worth, who runs it, what becomes of one that was stopped."""

import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import optuna
import pandas as pd
import pytest
import yaml
from optuna.trial import TrialState

from chasm.data.store import SubjectStore
from chasm.errors import ConfigError, DataError, TrainingError
from chasm.training import study as studies
from chasm.training import trials as workers
from chasm.training import tune as sweeps
from chasm.training.recipes import Recipe
from chasm.training.run_files import is_finished, read_provenance
from chasm.training.runs import RunInterruptedError, fit
from chasm.training.search_space import read_sweep
from chasm.training.study import Storage, counts, open_study, quiet
from chasm.training.trials import Objective, Plan, work
from chasm.training.tune import gpu_of, tune
from chasm.training.tune_report import Findings, write_findings

RATE = "model.init_args.learning_rate"
RATES = {RATE: {"type": "categorical", "choices": [1e-2, 1e-3]}}


@pytest.fixture
def sweep_file(tiny_recipe, tmp_path):
    """Write a sweep of the smallest recipe; by default two learning rates, one epoch each."""

    def write(space=None, **others):
        path = tmp_path / "sweep.yaml"
        content = {
            "recipe": tiny_recipe[1],
            "trials": 2,
            "sampler": {"kind": "grid"},
            "pruner": {"kind": "none"},
            "settings": {"trainer.max_epochs": 1},
            "space": RATES if space is None else space,
        }
        path.write_text(yaml.safe_dump({**content, **others}, sort_keys=False))
        return path

    return write


@pytest.fixture
def here(monkeypatch):
    """Let the workers of a sweep work in this process, one after another."""

    def run(plan, study, count):
        for _ in range(count):
            work(plan)

    monkeypatch.setattr(sweeps, "_run_workers", run)


def swept(path, args, **options):
    sweep = read_sweep(path)
    return tune(sweep, Recipe(sweep.arguments(args[2:])), **options)


def plan_of(path, args, trials, storage):
    sweep = read_sweep(path)
    return Plan(storage, "s", sweep, Recipe(sweep.arguments(args[2:])).resolved(), trials)


def test_a_sweep_finds_the_best_recipe_and_a_diverged_trial_is_a_failed_one(
    sweep_file, tiny_recipe, here
):
    path = sweep_file({RATE: {"type": "categorical", "choices": [1e30, 1e-2, 1e-3]}})
    tuned = swept(path, tiny_recipe, trials=3)
    failed = [t for t in tuned.study.trials if t.state == TrialState.FAIL]
    assert [t.params[RATE] for t in failed] == [1e30]
    assert "Lower the learning rate" in failed[0].user_attrs["error"]
    assert "\n" not in failed[0].user_attrs["error"]
    trials = [t for t in tuned.study.trials if t.state == TrialState.COMPLETE]
    assert len(trials) == 2
    for trial in trials:
        assert read_provenance(Path(trial.user_attrs["run"]))["status"] == "finished"
        curves = pd.read_csv(f"{trial.user_attrs['run']}/metrics.csv")
        assert trial.value == pytest.approx(curves["val/mse"].min(), rel=1e-6)
        assert trial.intermediate_values == {0: pytest.approx(trial.value)}
    best = min(trials, key=lambda t: t.value)
    # The best recipe is one that `fit` takes, and its run is current.
    found = tuned.folder / "best.yaml"
    assert found.read_text().startswith("# SIMULATED. Sweep sweep of smoke, subj01: the best trial")
    recipe = Recipe(["-c", str(found)])
    assert recipe.settings()["model"]["init_args"]["learning_rate"] == best.params[RATE]
    assert recipe.settings()["trainer"]["max_epochs"] == 1
    before = (Path(best.user_attrs["run"]) / "checkpoints" / "best.ckpt").stat().st_mtime_ns
    assert str(fit(recipe)) == best.user_attrs["run"]
    assert (fit(recipe) / "checkpoints" / "best.ckpt").stat().st_mtime_ns == before
    table = pd.read_csv(tuned.folder / "trials.csv")
    assert list(table[RATE]) == [t.params[RATE] for t in tuned.study.trials]
    assert sorted(table["state"]) == ["complete", "complete", "fail"]
    assert table.loc[table["state"] == "fail", "error"].str.contains("learning rate").all()
    page = (tuned.folder / "report.html").read_text()
    assert "SIMULATED" in page
    assert "test images were not read" in page
    assert "Lower the learning rate" in page
    assert f"Best: trial {best.number}" in page
    for figure in ("history", "curves", "slices"):
        assert (tuned.folder / f"{figure}.png").stat().st_size > 5000
    # The same command again trains nothing.
    again = swept(path, tiny_recipe, trials=3)
    ended = [t.datetime_complete for t in again.study.trials]
    assert ended == [t.datetime_complete for t in tuned.study.trials]


def poisoned(dataset, target):
    """Copy a prepared dataset; the betas of every test image become NaN."""
    shutil.copytree(dataset, target)
    store = SubjectStore.open(target / "subj01.h5")
    special = store.images.ids[store.images.shared & store.images.special]
    rows = np.flatnonzero(store.trials["image_id"].isin(special))
    assert len(rows) > 10
    with h5py.File(target / "subj01.h5", "r+") as file:
        attributes = dict(file["betas"].attrs)
        betas = file["betas"][:].astype(np.float32)
        betas[rows] = np.nan
        del file["betas"]
        file["betas"] = betas
        file["betas"].attrs.update(attributes)
        for statistic in file["normalisation/all"].values():
            statistic[:] = np.nan
    return target


def test_no_test_response_reaches_a_sweep(sweep_file, tiny_recipe, toy_dataset, tmp_path, here):
    linear = {"type": "categorical", "choices": ["none", "banded_ridge"]}
    path = sweep_file({"model.init_args.linear": linear})
    clean = swept(path, tiny_recipe)
    folder = poisoned(toy_dataset, tmp_path / "poisoned" / "toy")
    args = [*tiny_recipe, "--data.dataset_dir", str(folder), "--runs", str(tmp_path / "p")]
    found = swept(path, args)
    assert [t.params for t in found.study.trials] == [t.params for t in clean.study.trials]
    assert [t.value for t in found.study.trials] == [t.value for t in clean.study.trials]
    assert np.isfinite([t.value for t in found.study.trials]).all()


def test_a_study_whose_trials_all_fail_ends_with_the_reason(
    sweep_file, tiny_recipe, here, monkeypatch
):
    monkeypatch.setattr(workers, "MAX_FAILURES", 2)
    path = sweep_file(
        {RATE: {"type": "float", "low": 1e30, "high": 1e31}}, trials=9, sampler={"kind": "random"}
    )
    with pytest.raises(TrainingError, match=r"2 trials in a row failed.*Lower the learning rate"):
        swept(path, tiny_recipe)


def test_a_hopeless_trial_is_stopped_and_leaves_no_checkpoint(sweep_file, tiny_recipe, here):
    space = {RATE: {"type": "float", "low": 1e-9, "high": 1e-2, "log": True}}
    path = sweep_file(
        space, sampler={"kind": "random"}, pruner={"kind": "median", "startup": 1, "warmup": 0},
        settings={"trainer.max_epochs": 2}, trials=3,
    )  # fmt: skip
    tuned = swept(path, tiny_recipe)
    first, *others = tuned.study.trials
    assert first.params[RATE] == 1e-3  # the recipe as it is
    assert tuned.findings.usual.number == 0
    worst = max(others, key=lambda t: t.value)
    assert worst.params[RATE] < 1e-4
    assert worst.state == TrialState.PRUNED
    assert list(worst.intermediate_values) == [0]
    run = worst.user_attrs["run"]
    assert not is_finished(Path(run))
    assert not list(Path(run).glob("checkpoints/*.ckpt"))
    # A trial with the same values ends as that one did, without training.
    plan = plan_of(path, tiny_recipe, 4, Storage.of(None, tuned.folder))
    tuned.study.enqueue_trial(worst.params)
    work(Plan(plan.storage, "sweep", plan.sweep, plan.recipe, 4))
    twin = tuned.study.trials[3]
    assert (twin.state, twin.value) == (TrialState.PRUNED, worst.value)
    assert not list(Path(run).glob("checkpoints/*.ckpt"))


def test_a_stopped_trial_goes_on_from_its_last_epoch(
    sweep_file, tiny_recipe, tmp_path, monkeypatch
):
    quiet()
    space = {RATE: {"type": "categorical", "choices": [1e-3]}}
    path = sweep_file(space, settings={"trainer.max_epochs": 3})
    unbroken = fit(Recipe([*tiny_recipe, "--runs", str(tmp_path / "unbroken")]))
    storage = Storage.of(str(tmp_path / "s.db"), tmp_path)
    study = open_study(storage, "s", "min", {}, [{RATE: 1e-3}])
    from chasm.training import runs

    class StopInEpoch1(runs.SeededSteps):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if trainer.current_epoch == 1 and batch_idx == 1:
                raise KeyboardInterrupt

    plan = plan_of(path, tiny_recipe, 1, storage)
    with monkeypatch.context() as patch:
        patch.setattr(runs, "SeededSteps", StopInEpoch1)
        with pytest.raises((KeyboardInterrupt, RunInterruptedError)):
            work(plan)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.WAITING]
    work(plan)
    first, again = study.trials
    assert again.state == TrialState.COMPLETE
    assert again.params == first.params
    assert again.user_attrs["run"] == first.user_attrs["run"]
    assert list(again.intermediate_values) == [0, 1, 2]
    assert again.value == read_provenance(unbroken)["trained"]["selected_score"]
    attempts = list((Path(again.user_attrs["run"]) / "logs").iterdir())
    assert len(attempts) == 2


def test_workers_take_no_more_than_is_wanted_and_wait_for_others(sweep_file, tiny_recipe, tmp_path):
    quiet()
    storage = Storage.of(str(tmp_path / "s.db"), tmp_path)
    study = open_study(storage, "s", "min", {})
    grid = plan_of(sweep_file(), tiny_recipe, 2, storage)
    free = plan_of(sweep_file(sampler={"kind": "tpe"}), tiny_recipe, 2, storage)
    assert (grid.due(study), free.due(study)) == ("end", "run")  # nothing of the grid is queued
    study.enqueue_trial({})
    assert grid.due(study) == "run"
    first = study.ask()
    assert (grid.due(study), free.due(study)) == ("wait", "run")
    second = study.ask()
    assert free.due(study) == "wait"
    study.tell(first, 1.0)
    study.tell(second, state=TrialState.FAIL)
    assert (grid.due(study), free.due(study)) == ("end", "run")
    study.tell(study.ask(), state=TrialState.PRUNED)
    assert free.due(study) == "end"
    late = Plan(storage, "s", free.sweep, free.recipe, 9, time.time() - 1)
    assert late.due(study) == "end"


def test_what_is_drawn_depends_on_the_trials_before_alone(sweep_file, tiny_recipe, tmp_path):
    space = {RATE: {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}
    path = sweep_file(space, sampler={"kind": "tpe", "startup": 3, "seed": 1})
    plan = plan_of(path, tiny_recipe, 9, Storage.of(None, tmp_path))

    def drawn(n, broken=()):
        study = optuna.create_study()
        for number in range(n):
            study.sampler = plan.sampler(number)
            trial = study.ask()
            value = plan.sweep.suggest(trial)[RATE]
            study.tell(trial, (np.log(value) + 6) ** 2)
        return [t.params[RATE] for t in study.trials]

    assert drawn(8) == drawn(8)
    assert len(set(drawn(8))) == 8
    assert drawn(8)[:5] == drawn(5)


def test_a_study_of_something_else_is_refused(sweep_file, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "_run_workers", lambda *arguments: None)
    with pytest.raises(TrainingError, match="0 of 2 trials are finished"):
        swept(sweep_file(), tiny_recipe)
    space = {RATE: {"type": "categorical", "choices": [1e-2, 1e-4]}}
    for name, others, more in (
        ("search space", {"space": space}, []),
        ("sampler", {"sampler": {"kind": "random"}}, []),
        ("recipe", {}, ["--data.batch_size", "8"]),
    ):
        with pytest.raises(DataError, match=rf"study sweep: was begun with another {name}.*--stu"):
            swept(sweep_file(**others), [*tiny_recipe, *more])
    storage = str(tmp_path / "other.db")
    optuna.create_study(storage=f"sqlite:///{storage}", study_name="sweep")
    monkeypatch.setattr(studies, "PATIENCE", 0.0)
    with pytest.raises(DataError, match="not made by `chasm tune`"):
        swept(sweep_file(), tiny_recipe, storage=storage)


@pytest.mark.parametrize(("options", "named"), [
    ({"trials": 0}, "--trials"), ({"workers": 0}, "--workers"), ({"timeout": -1.0}, "--timeout"),
    ({"study": "a/b"}, "--study"),
])  # fmt: skip
def test_options_that_cannot_be_used_are_named(options, named, sweep_file, tiny_recipe):
    with pytest.raises(ConfigError, match=named):
        swept(sweep_file(), tiny_recipe, **options)


def test_every_worker_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(sweeps.torch.cuda, "is_available", lambda: False)
    assert gpu_of(0) is None
    monkeypatch.setattr(sweeps.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweeps.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu_of(i) for i in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert [gpu_of(i) for i in range(3)] == ["3", "GPU-5", "3"]


def test_findings_of_conditions_pruned_and_failed_trials(sweep_file, tiny_recipe, tmp_path):
    quiet()
    gate, width = (f"model.init_args.encoder.init_args.{name}" for name in ("gate", "d_gate"))
    space = {
        RATE: {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
        gate: {"type": "categorical", "choices": ["image", "parcel"]},
        width: {"type": "int", "low": 8, "high": 16, "step": 8, "when": {gate: "parcel"}},
    }
    sweep = read_sweep(sweep_file(space))
    study = optuna.create_study(
        study_name="s", direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0)
    )
    for number in range(12):
        trial = study.ask()
        values = sweep.suggest(trial)
        trial.report(number, 0)
        if number in (4, 7):
            study.tell(trial, state=TrialState.PRUNED if number == 4 else TrialState.FAIL)
        else:
            study.tell(trial, number + 10 * (values[gate] == "parcel"))
    recipe = Recipe([*tiny_recipe, "--selection.mode", "max"])
    facts = {"simulated": True, "subject": "subj01", "dataset": "toy", "weights_label": None}
    findings = Findings(study, sweep, recipe, facts)
    best = max((t for t in study.trials if t.state == TrialState.COMPLETE), key=lambda t: t.value)
    assert findings.best.number == findings.complete[0].number == best.number
    assert findings.usual is None
    assert [len(line.cells) for line in findings.grid().lines] == [5] * 5
    assert findings.grid().columns[0] == f"#{best.number}"
    assert findings.sentences()[0].startswith("10 trials were trained to their end, 1 were stopped")
    write_findings(findings, tmp_path / "found")
    table = pd.read_csv(tmp_path / "found" / "trials.csv")
    assert table[width].isna().equals(table[gate] == "image")
    assert Counter(table["state"]) == {"complete": 10, "pruned": 1, "fail": 1}
    assert (tmp_path / "found" / "importance.png").is_file()
    found = Recipe(["-c", str(tmp_path / "found" / "best.yaml")]).settings()["model"]["init_args"]
    assert found["encoder"]["init_args"]["gate"] == "parcel"
    assert found["encoder"]["init_args"]["d_gate"] == best.params[width]


@pytest.mark.parametrize("kind", ["db", "journal"])
def test_workers_never_run_the_same_trial_and_no_more_than_are_wanted(
    kind, sweep_file, tiny_recipe, tmp_path, monkeypatch
):
    quiet()
    space = {RATE: {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}
    path = sweep_file(space, sampler={"kind": "tpe", "startup": 4})
    plan = plan_of(path, tiny_recipe, 9, Storage.of(str(tmp_path / f"s.{kind}"), tmp_path))
    study = open_study(plan.storage, "s", "min", {})
    run = []

    def train(objective, trial, values):
        run.append((trial.number, values[RATE]))
        time.sleep(0.1)
        if trial.number == 3:
            raise TrainingError("run", "diverged", "Lower the rate.")
        return values[RATE]

    monkeypatch.setattr(Objective, "_train", train)
    monkeypatch.setattr(workers, "POLL", 0.05)
    with ThreadPoolExecutor(3) as pool:  # locks hold between threads as between processes
        assert [done.result() for done in [pool.submit(work, plan) for _ in range(3)]] == [None] * 3
    assert sorted(number for number, _ in run) == list(range(10))
    assert len({rate for _, rate in run}) == 10
    assert counts(study) == {TrialState.COMPLETE: 9, TrialState.FAIL: 1}


@pytest.mark.slow
def test_the_stage_1_of_a_stage_2_is_trained_once_before_the_trials(
    sweep_file, tiny_recipe, tmp_path, here
):
    stage2 = str(Path(tiny_recipe[1]).with_name("smoke_stage2.yaml"))
    tuned = swept(sweep_file(recipe=stage2), tiny_recipe)
    assert [t.state for t in tuned.study.trials] == [TrialState.COMPLETE] * 2
    (stage1,) = (tmp_path / "runs").glob("*/*/smoke-????????")
    assert len(list((stage1 / "logs").iterdir())) == 1
    assert len(list((tmp_path / "runs").glob("*/*/smoke-stage2-*"))) == 2
    recipe = Recipe(["-c", str(tuned.folder / "best.yaml")])
    assert recipe.stage1.name == "smoke.yaml"
    assert str(fit(recipe)) == tuned.study.best_trial.user_attrs["run"]


@pytest.mark.slow
def test_two_workers_never_run_the_same_trial(sweep_file, tiny_recipe):
    path = sweep_file({RATE: {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}},
                      sampler={"kind": "tpe", "startup": 2}, trials=4)  # fmt: skip
    tuned = swept(path, tiny_recipe, workers=2)
    trials = tuned.study.trials
    assert [t.state for t in trials] == [TrialState.COMPLETE] * 4
    assert [t.number for t in trials] == list(range(4))
    runs = [t.user_attrs["run"] for t in trials]
    assert len(set(runs)) == 4  # and no two of the same values
    assert len({t.user_attrs["worker"] for t in trials}) == 2
    assert all(len(list((Path(run) / "logs").iterdir())) == 1 for run in runs)
    assert not [p for p in Storage.of(None, tuned.folder).locks.glob("sweep.[0-9]*") if p.is_file()
                and p.suffix[1:].isdigit()]  # fmt: skip
