"""Runs: reproducible, resumable, blind to test images."""

import json
import shutil
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from chasm.data.store import SubjectStore
from chasm.errors import ChasmError, ConfigError, DataError, TrainingError
from chasm.training.recipes import Recipe
from chasm.training.run_files import is_finished, merge_metrics
from chasm.training.runs import RunInterruptedError, fit, load


def weights(run, name="last"):
    saved = torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return saved["state_dict"]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_a_run_holds_what_is_needed_to_repeat_it(tiny_recipe):
    recipe = Recipe(tiny_recipe)
    run = fit(recipe)
    facts = json.loads((run / "provenance.json").read_text())
    assert facts["status"] == "finished"
    assert facts["simulated"] is True
    assert facts["seed"] == 0
    assert facts["store"]["fingerprint"] == recipe.make_data().store.fingerprint
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["trained"]["epochs"] == 3
    curves = pd.read_csv(run / "metrics.csv")
    assert list(curves["epoch"]) == [0, 1, 2]
    assert {"train/loss", "val/mse", "val/pattern_correlation", "val/loss"} <= set(curves.columns)
    # The saved config gives the same run again.
    again = Recipe(["-c", str(run / "config.yaml")])
    assert again.settings() == recipe.settings()
    assert fit(again) == run


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tiny_recipe, tmp_path):
    first = fit(Recipe(tiny_recipe))
    second = fit(Recipe([*tiny_recipe, "--runs", str(tmp_path / "again")]))
    other = fit(Recipe([*tiny_recipe, "--seed_everything", "1"]))
    assert_same(weights(first), weights(second))
    assert other != first
    key = "encoder.global_stream.projection.weight"
    assert not torch.equal(weights(first)[key], weights(other)[key])


def test_a_finished_run_is_current_and_fresh_trains_again(tiny_recipe):
    run = fit(Recipe(tiny_recipe))
    before = (run / "checkpoints" / "best.ckpt").stat().st_mtime_ns
    assert fit(Recipe(tiny_recipe)) == run
    assert (run / "checkpoints" / "best.ckpt").stat().st_mtime_ns == before
    assert fit(Recipe(tiny_recipe), fresh=True) == run
    assert (run / "checkpoints" / "best.ckpt").stat().st_mtime_ns > before


@pytest.mark.parametrize("mode", ["min", "max"])  # the last epoch is the best, or the first is
def test_a_resumed_run_equals_an_unbroken_one(tiny_recipe, tmp_path, monkeypatch, mode):
    args = [*tiny_recipe, "--trainer.max_epochs", "4", "--selection.mode", mode]
    unbroken = fit(Recipe(args))
    broken_args = [*args, "--runs", str(tmp_path / "broken")]
    from chasm.training import runs
    from chasm.training.callbacks import SeededSteps

    class StopInEpoch2(SeededSteps):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if trainer.current_epoch == 2 and batch_idx == 1:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "SeededSteps", StopInEpoch2)
        with pytest.raises(RunInterruptedError) as stopped:
            fit(Recipe(broken_args))
    assert stopped.value.exit_status == 130
    (folder,) = (tmp_path / "broken").glob("*/*/smoke-*")
    assert not is_finished(folder)
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] == 1, "it goes on from the last whole epoch"
    resumed = fit(Recipe(broken_args))
    assert resumed == folder
    assert_same(weights(unbroken), weights(resumed))
    assert_same(weights(unbroken, "best"), weights(resumed, "best"))
    whole, joined = (pd.read_csv(run / "metrics.csv") for run in (unbroken, resumed))
    assert list(joined["epoch"]) == [0, 1, 2, 3]
    np.testing.assert_array_equal(whole["val/mse"], joined["val/mse"])


def test_validation_selects_the_checkpoint(tiny_recipe):
    run = fit(Recipe([*tiny_recipe, "--trainer.max_epochs", "5"]))
    curves = pd.read_csv(run / "metrics.csv")
    saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert saved["epoch"] == curves.loc[curves["val/mse"].idxmin(), "epoch"]


def test_loading_gives_the_selected_weights_and_the_same_predictions(tiny_recipe):
    run = fit(Recipe(tiny_recipe))
    model, data, _ = load(run)
    assert_same(weights(run, "best"), model.state_dict())
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    again, _, _ = load(run)
    with torch.inference_mode():
        assert torch.equal(model(batch), again(batch))


def test_a_checkpoint_alone_is_enough_for_lightning(tiny_recipe):
    run = fit(Recipe(tiny_recipe))
    model, _, _ = load(run)
    alone = type(model).load_from_checkpoint(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert_same(model.state_dict(), alone.state_dict())


def poison(dataset, target, value):
    """Copy a prepared dataset and overwrite the betas of every test image."""
    shutil.copytree(dataset, target)
    store = SubjectStore.open(target / "subj01.h5")
    special = store.images.ids[store.images.shared & store.images.special]
    rows = np.flatnonzero(store.trials["image_id"].isin(special))
    assert len(rows) > 10
    with h5py.File(target / "subj01.h5", "r+") as file:
        betas = file["betas"][:]
        if np.isnan(value):
            betas = betas.astype(np.float32)
            betas[rows] = np.nan
            attributes = dict(file["betas"].attrs)
            del file["betas"]
            file["betas"] = betas
            file["betas"].attrs.update(attributes)
        else:
            betas[rows] = value
            file["betas"][:] = betas
        for statistic in file["normalisation/all"].values():
            statistic[:] = np.nan
    return target


@pytest.mark.parametrize("value", [np.nan, 32767])
def test_no_test_response_reaches_training(tiny_recipe, toy_dataset, tmp_path, value):
    clean = fit(Recipe(tiny_recipe))
    folder = poison(toy_dataset, tmp_path / "poisoned" / "toy", value)
    run = fit(
        Recipe([*tiny_recipe, "--data.dataset_dir", str(folder), "--runs", str(tmp_path / "p")])
    )
    assert_same(weights(clean, "best"), weights(run, "best"))
    assert np.isfinite(pd.read_csv(run / "metrics.csv")["val/mse"]).all()


def test_no_test_response_reaches_a_ridge_penalty(tiny_recipe, toy_dataset, tmp_path):
    from chasm.models.baselines import baseline_kernels, fit_to_kernels

    def predictions(folder):
        data = Recipe([*tiny_recipe, "--data.dataset_dir", str(folder)]).make_data()
        train = data.dataset("train")
        tokens = {"cls": data.tokens.cls, "patches": data.tokens.patches}
        betas = train.betas(range(len(train)))
        kernels = baseline_kernels(tokens, train.image_ids, data.data_split.test)
        return fit_to_kernels(kernels, betas, train.image_ids)

    poisoned = poison(toy_dataset, tmp_path / "poisoned" / "toy", np.nan)
    for name, found in predictions(toy_dataset).items():
        np.testing.assert_array_equal(found.values, predictions(poisoned)[name].values)


def test_missing_tokens_are_named(toy_dataset, tiny_recipe, tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    shutil.copy(toy_dataset / "subj01.h5", folder)
    with pytest.raises(DataError, match=r"tokens.*no token cache.*chasm extract"):
        fit(Recipe([*tiny_recipe, "--data.dataset_dir", str(folder)]))


def test_a_missing_store_is_named(tiny_recipe, tmp_path):
    with pytest.raises(DataError, match=r"subj01.h5.*no such subject store.*chasm prepare"):
        fit(Recipe([*tiny_recipe, "--data.dataset_dir", str(tmp_path / "nothing")]))


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--trainer.max_epoch", "3"], "max_epoch"),
        (["--data.subjec", "1"], "data.subjec"),
        (["--model.init_args.encoder.init_args.widht", "3"], "widht"),
        (["--data.parcels.kind", "hexagonal"], "hexagonal"),
        (["-c", "no/such/recipe.yaml"], "no/such/recipe.yaml"),
    ],
)
def test_an_unknown_key_or_value_is_one_line_that_names_it(tiny_recipe, extra, named):
    with pytest.raises(ConfigError) as caught:
        Recipe([*tiny_recipe, *extra])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_atlas_lists_the_atlases(tiny_recipe):
    args = [*tiny_recipe, "--data.parcels.kind", "atlas", "--data.parcels.atlas", "brodmann"]
    with pytest.raises(ChasmError, match=r"brodmann.*streams"):
        fit(Recipe(args))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_with_its_status_and_one_line(tiny_recipe, tmp_path, number, status):
    command = [
        sys.executable,
        "-m",
        "chasm.cli",
        "fit",
        *tiny_recipe,
        "--trainer.max_epochs",
        "999",
    ]
    # A suite in the background is started with SIGINT ignored, which a child would inherit.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    runs = tmp_path / "runs"
    deadline = time.monotonic() + 120
    while not list(runs.rglob("last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == status, said
    assert "training stopped" in said.splitlines()[-1]
    (run,) = runs.glob("*/*/smoke-*")
    assert not is_finished(run)
    assert (run / "metrics.csv").is_file()


def test_a_value_that_is_not_logged_cannot_select(tiny_recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"val/mze.*val/mse"):
        fit(Recipe([*tiny_recipe, "--selection.monitor", "val/mze"]))
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def test_a_diverged_run_is_no_finished_run(tiny_recipe, tmp_path):
    args = [*tiny_recipe, "--model.init_args.learning_rate", "1e30"]
    with pytest.raises(TrainingError, match="learning rate"):
        fit(Recipe(args))
    (run,) = (tmp_path / "runs").glob("*/*/smoke-*")
    assert not is_finished(run)


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_damaged_checkpoint_is_named(tiny_recipe, name):
    run = fit(Recipe(tiny_recipe))
    path = run / "checkpoints" / f"{name}.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    facts = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps(facts | {"status": "running"}))
    with pytest.raises(DataError, match=rf"{name}.ckpt.*--fresh"):
        load(run) if name == "best" else fit(Recipe(tiny_recipe))


def test_a_pickle_in_place_of_weights_is_refused(tiny_recipe):
    run = fit(Recipe(tiny_recipe))
    torch.save({"state_dict": {}, "sizes": print}, run / "checkpoints" / "best.ckpt")
    with pytest.raises(DataError, match=r"best\.ckpt"):
        load(run)


@pytest.mark.parametrize("value", ["0", "-3"])
def test_a_batch_has_at_least_one_image(tiny_recipe, value):
    with pytest.raises(ConfigError, match=r"batch_size.*Use 1 or more"):
        fit(Recipe([*tiny_recipe, "--data.batch_size", value]))


def test_merged_metrics_prefer_the_later_attempt(tmp_path):
    for attempt, epochs in enumerate([[0, 1, 2], [2, 3]]):
        folder = tmp_path / "logs" / f"attempt-{attempt}"
        folder.mkdir(parents=True)
        pd.DataFrame({"epoch": epochs, "step": epochs, "val/mse": [attempt] * len(epochs)}).to_csv(
            folder / "metrics.csv", index=False
        )
    failed = tmp_path / "logs" / "attempt-2"  # in its first step
    failed.mkdir()
    (failed / "metrics.csv").write_text("lr-AdamW/pg1\n0.1\n")
    merge_metrics(tmp_path)
    merged = pd.read_csv(tmp_path / "metrics.csv")
    assert list(merged["epoch"]) == [0, 1, 2, 3]
    assert list(merged["val/mse"]) == [0, 0, 1, 1]


def test_the_number_that_a_scheduler_gave_does_not_matter_to_a_process_alone(
    tiny_recipe, monkeypatch
):
    for name in ("LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    args = [*tiny_recipe, "--model.init_args.linear", "banded_ridge", "--trainer.max_epochs", "1"]
    run = fit(Recipe(args))
    assert (run / "metrics.csv").is_file()
    assert weights(run, "best")["linear.fitted"]
