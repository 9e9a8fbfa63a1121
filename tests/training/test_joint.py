"""Several subjects at once: one backbone, heads of their own, a run for each."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from chasm.errors import DataError
from chasm.evaluation.predictions import PredictionFile
from chasm.evaluation.testing import predict_run
from chasm.models.adapters import backbone_state, belongs
from chasm.training.checkpoints import load_module
from chasm.training.joint import JointModule, subject_runs
from chasm.training.modules import Stage1Module
from chasm.training.recipes import Recipe
from chasm.training.run_files import is_finished
from chasm.training.runs import RunInterruptedError, fit, load

from .conftest import joint_recipe, poison_test_images


def saved(run, name="best"):
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_subjects_have_one_backbone_and_heads_of_their_own(joint_run):
    checkpoint = saved(joint_run)
    one, two = (load_module(run / "checkpoints" / "best.ckpt") for run in subject_runs(joint_run))
    assert one.n_units != two.n_units, "this test needs subjects of different sizes"
    assert_same(backbone_state(one.encoder), backbone_state(two.encoder))
    state = checkpoint["state_dict"]
    for name in backbone_state(one.encoder):
        first, second = (state[f"models.{n}.encoder.{name}"] for n in (0, 1))
        assert first.data_ptr() == second.data_ptr(), "stored once"
    # Every trained tensor has one state in the optimiser.
    heads = [n for n, _ in two.encoder.named_parameters() if belongs(n, two.encoder.head_names)]
    expected = len(list(one.encoder.parameters())) + len(heads)
    assert sum(len(g["params"]) for g in checkpoint["optimizer_states"][0]["param_groups"]) == (
        expected
    )


def test_every_subject_has_an_ordinary_finished_run(joint_run):
    runs = subject_runs(joint_run)
    assert [run.name for run in runs] == ["subj01", "subj02"]
    whole = json.loads((joint_run / "provenance.json").read_text())
    curves = pd.read_csv(joint_run / "metrics.csv")
    best = curves["val/mse"].idxmin()
    np.testing.assert_allclose(
        curves["val/mse"], curves[["val/subj01/mse", "val/subj02/mse"]].mean(axis=1), rtol=1e-6
    )
    for run in runs:
        assert is_finished(run)
        model, data, recipe = load(run)
        assert isinstance(model, Stage1Module)
        assert recipe.subjects is None
        facts = json.loads((run / "provenance.json").read_text())
        assert facts["store"]["fingerprint"] == data.store.fingerprint
        assert facts["trained"]["epochs"] == whole["trained"]["epochs"] == 2
        assert facts["trained"]["n_parameters"] == sum(p.numel() for p in model.parameters())
        # The selected epoch's own score, from predictions and by NumPy.
        images = data.dataset("validation")
        batch = data.on_after_batch_transfer(images.__getitems__(list(range(len(images)))), 0)
        with torch.inference_mode():
            error = model(batch).numpy() - model.units_of(batch["betas"], "mean").numpy()
        own = pd.read_csv(run / "metrics.csv")
        assert own.loc[best, "val/mse"] == pytest.approx(np.square(error).mean(), rel=1e-5)
        assert curves.loc[best, f"val/{run.name}/mse"] == own.loc[best, "val/mse"]
        assert not any("subj" in column for column in own.columns)


def test_a_subjects_run_is_tested_like_any_other(joint_run, tmp_path):
    run = tmp_path / "subj02"
    shutil.copytree(subject_runs(joint_run)[1], run)
    predictions = PredictionFile.read(predict_run(run))
    assert next(iter(predictions.rows)) == "stage 1"


def test_only_a_finished_run_has_runs_of_its_subjects(joint_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(joint_run, run)
    assert len(subject_runs(run)) == 2
    facts = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps(facts | {"status": "running"}))
    assert subject_runs(run) == []
    assert subject_runs(subject_runs(joint_run)[0]) == []


def test_it_remembers_the_subjects_it_was_trained_with(joint_run):
    first = load_module(subject_runs(joint_run)[0] / "checkpoints" / "best.ckpt").trained_on
    (other,) = first["trained_with"]
    assert (first["subject"], other["subject"]) == ("subj01", "subj02")
    assert first["images"] == other["images"]
    assert not torch.isin(first["train"], other["train"]).all()


def test_the_joint_checkpoint_names_the_subjects_runs(joint_run):
    with pytest.raises(DataError, match=r"2 subjects.*subj01, subj02"):
        load_module(joint_run / "checkpoints" / "best.ckpt")


def test_the_loss_is_the_mean_over_subjects_each_with_its_own_head(joint_run, monkeypatch):
    models = [load_module(run / "checkpoints" / "best.ckpt") for run in subject_runs(joint_run)]
    joint = JointModule(dict(zip(("one", "two"), models, strict=True)))
    monkeypatch.setattr(joint, "log", lambda *args, **options: None)
    batches = {}
    for name, run in zip(joint.names, subject_runs(joint_run), strict=True):
        data = load(run)[1]
        batches[name] = data.on_after_batch_transfer(data.dataset("train").__getitems__([0, 3]), 0)
    alone = [m.terms(batches[n])[1]["total"].detach() for n, m in joint.subjects.items()]
    assert float(joint.training_step(batches, 0).detach()) == pytest.approx(
        sum(map(float, alone)) / 2
    )


def test_an_interrupted_run_equals_an_unbroken_one(joint_run, toy_subjects, tmp_path, monkeypatch):
    from chasm.training import runs
    from chasm.training.callbacks import SeededSteps

    class StopInEpoch1(SeededSteps):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if trainer.current_epoch == 1 and batch_idx == 1:
                raise KeyboardInterrupt

    recipe = Recipe(joint_recipe(toy_subjects, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(runs, "SeededSteps", StopInEpoch1)
        with pytest.raises(RunInterruptedError):
            fit(recipe)
    (folder,) = tmp_path.glob("*/*/smoke-*")
    assert not is_finished(folder)
    resumed = fit(recipe)
    assert resumed == folder
    assert_same(saved(joint_run)["state_dict"], saved(resumed)["state_dict"])
    whole, joined = (pd.read_csv(run / "metrics.csv") for run in (joint_run, resumed))
    np.testing.assert_array_equal(whole["val/loss"], joined["val/loss"])
    np.testing.assert_array_equal(whole["val/subj02/mse"], joined["val/subj02/mse"])
    for one, other in zip(subject_runs(joint_run), subject_runs(resumed), strict=True):
        assert_same(saved(one)["state_dict"], saved(other)["state_dict"])


def test_no_test_response_of_any_subject_reaches_training(joint_run, toy_subjects, tmp_path):
    folder = tmp_path / "poisoned" / "toy"
    shutil.copytree(toy_subjects, folder)
    poison_test_images(folder)
    run = fit(Recipe(joint_recipe(folder, tmp_path / "runs")))
    assert_same(saved(joint_run)["state_dict"], saved(run)["state_dict"])
    assert np.isfinite(pd.read_csv(run / "metrics.csv")["val/mse"]).all()


def test_every_subject_has_its_closed_form_where_the_recipe_asks(joint_run):
    curves = pd.read_csv(joint_run / "metrics.csv")
    best = curves["val/mse"].idxmin()
    for run in subject_runs(joint_run):
        model = load_module(run / "checkpoints" / "best.ckpt")
        assert bool(model.linear.fitted)
        assert float(model.share) == pytest.approx(curves.loc[best, f"val/{run.name}/share_linear"])
