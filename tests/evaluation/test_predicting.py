"""Predictions files of models of voxels: whose units, in which order, with which rows."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from chasm.data.splits import training_statistics
from chasm.errors import ConfigError
from chasm.evaluation import predicting
from chasm.evaluation.predicting import predict_test
from chasm.evaluation.predictions import PredictionFile
from chasm.evaluation.reading import Reading
from chasm.evaluation.testing import predict_run, score_run
from chasm.training.recipes import Recipe
from chasm.training.runs import fit, load

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def recipe_on(dataset, folder, name, *extra):
    return Recipe([
        "-c", str(EXPERIMENTS / name), "--data.dataset_dir", str(dataset), "--runs", str(folder),
        "--trainer.max_epochs", "1", *extra,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def stage2(toy_dataset, tmp_path_factory):
    """Run of the smallest Stage 2, tested with three draws; only read."""
    run = fit(recipe_on(toy_dataset, tmp_path_factory.mktemp("runs"), "smoke_stage2.yaml"))
    score_run(run, n_boot=0, n_draws=3)
    return run


@pytest.fixture(scope="module")
def stage2_file(stage2):
    return PredictionFile.read(stage2 / "predictions.h5")


def naive_responses(data, image_ids):
    """Mean over repeats of the session-z-scored betas, image by image."""
    store = data.store
    mean, std = training_statistics(store, data.data_split)
    betas = np.asarray(store.betas, dtype=np.float64) / store.scale
    z = (betas - mean[store.session_index]) / std[store.session_index]
    shown = store.trials["image_id"].to_numpy()
    return np.stack([z[shown == image].mean(axis=0) for image in image_ids])


def test_units_of_a_stage_2_are_the_voxels_of_the_store(stage2, stage2_file):
    model, data, _ = load(stage2)
    file, store = stage2_file, data.store
    assert (file.info.unit, file.n_units) == ("voxel", store.n_voxels)
    assert (file.units.size == 1).all()
    np.testing.assert_array_equal(file.units.ncsnr, store.voxels["ncsnr"].to_numpy(np.float32))
    np.testing.assert_array_equal(file.units.position, store.voxels[["x", "y", "z"]].to_numpy())
    np.testing.assert_array_equal(file.parcel_labels, model.parcellation.labels)
    labels = store.rois_of("streams").labels
    early = file.membership["streams"].counts[:, file.membership["streams"].names.index("early")]
    np.testing.assert_array_equal(early, labels == 1)
    np.testing.assert_allclose(file.target, naive_responses(data, file.image_id), atol=1e-5)
    train = naive_responses(data, data.data_split.train)
    np.testing.assert_allclose(file.train_mean, train.mean(axis=0), atol=1e-5)
    assert file.targets == {}
    assert len((stage2 / "test_readings.jsonl").read_text().splitlines()) == 1


def test_rows_of_a_stage_2_are_the_model_its_parts_and_baselines_per_voxel(stage2, stage2_file):
    model, data, _ = load(stage2)
    kinds = {name: row.kind for name, row in stage2_file.rows.items()}
    own, *others = kinds
    assert (own, kinds[own]) == (model.row_name, "model")
    assert kinds["stage 1, expanded"] == "component"
    baselines = [name for name in others if kinds[name] == "baseline"]
    assert {"ridge", "banded ridge", "linear probe (CLS)"} <= set(baselines)
    # A voxel has its parcel's value, of whatever batch; voxels of a parcel differ in the model.
    expanded, whole = (stage2_file.rows[name].values for name in ("stage 1, expanded", own))
    inside = np.flatnonzero(stage2_file.parcel_labels == 0)
    np.testing.assert_array_equal(
        expanded[:, inside], expanded[:, inside[:1]] + 0 * expanded[:, inside]
    )
    assert np.ptp(whole[:, inside], axis=1).min() > 0
    data.setup("test")
    batch = data.on_after_batch_transfer(data.dataset("test").__getitems__([5, 0]), 0)
    with torch.inference_mode():
        found = model.rows(batch)
    np.testing.assert_allclose(whole[[5, 0]], found[own], atol=1e-5)
    # Baselines are fitted to single voxels: they beat the mean where a voxel has signal.
    ridge = stage2_file.rows["ridge"].values
    r = [stats.pearsonr(p, y)[0] for p, y in zip(ridge.T, stage2_file.target.T, strict=True)]
    assert np.mean(r) > 0.1
    assert np.ptp(ridge[:, inside], axis=1).min() > 0


def test_the_gate_is_that_of_the_model(stage2, stage2_file):
    model, data, _ = load(stage2)
    data.setup("test")
    batch = data.on_after_batch_transfer(data.dataset("test").__getitems__([3]), 0)
    with torch.inference_mode():
        np.testing.assert_allclose(stage2_file.gate[3], model.gate_of(batch)[0], atol=1e-5)
    assert stage2_file.gate.shape[0] == stage2_file.n_images
    np.testing.assert_allclose(stage2_file.gate.sum(axis=2), 1, atol=1e-5)
    share = stage2_file.gate[..., 0].mean(axis=1)
    details = stage2_file.rows[model.row_name].details
    assert details["mean share of the global stream"] == pytest.approx(share.mean(), rel=1e-5)


def test_draws_are_summarised_and_seeded(stage2, stage2_file):
    model, data, recipe = load(stage2)
    assert (stage2_file.draws.n, stage2_file.draws.seed) == (3, recipe.seed)
    data.setup("test")
    reading = Reading(model, data)
    again = predicting.predict_rows(reading, 3, recipe.seed).draws
    np.testing.assert_allclose(again.mean, stage2_file.draws.mean, atol=1e-5)
    np.testing.assert_allclose(again.variance, stage2_file.draws.variance, atol=1e-6)
    first = next(iter(data.test_dataloader()))
    batch = data.on_after_batch_transfer(first, 0)
    with torch.inference_mode():
        drawn = model.draws(batch, 3, torch.Generator().manual_seed(recipe.seed)).numpy()
    n = drawn.shape[1]
    np.testing.assert_allclose(stage2_file.draws.mean[:n], drawn.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(
        stage2_file.draws.variance[:n], drawn.var(axis=0, ddof=1), rtol=1e-3, atol=1e-7
    )
    assert stage2_file.draws.variance.max() > 0
    assert predicting.predict_rows(reading, 0, recipe.seed).draws is None


def test_predictions_with_another_number_of_draws_are_not_current(stage2, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stage2, run)
    path = run / "predictions.h5"
    before = path.stat().st_mtime_ns
    predict_run(run, n_draws=3)
    assert path.stat().st_mtime_ns == before
    predict_run(run, n_draws=2)
    assert PredictionFile.read(path).draws.n == 2
    predict_run(run, n_draws=1)
    assert PredictionFile.read(path).draws is None
    before = path.stat().st_mtime_ns
    predict_run(run, n_draws=0)
    assert path.stat().st_mtime_ns == before
    assert len((run / "test_readings.jsonl").read_text().splitlines()) == 3


def test_an_error_of_a_model_that_can_draw_is_not_hidden(stage2, monkeypatch):
    model, data, recipe = load(stage2)
    data.setup("test")

    def broken(*_, **__):
        raise ConfigError("draws", "broken", "Mend it.")

    monkeypatch.setattr(model, "draws", broken)
    with pytest.raises(ConfigError, match="broken"):
        predicting.predict_rows(Reading(model, data), 3, recipe.seed)
    # Without a latent it is not asked at all.
    monkeypatch.setattr(model.decoder, "latent", None)
    assert predicting.predict_rows(Reading(model, data), 3, recipe.seed).draws is None


def test_the_report_of_a_stage_2_compares_it_with_the_stage_before(stage2):
    table = (stage2 / "report" / "table.md").read_text()
    assert "stage 2 − stage 1, expanded" in table
    assert "Spread of 3 draws per image and of repeated presentations" in table
    assert "Voxelwise correlation" in table
    page = (stage2 / "report" / "report.html").read_text()
    for section in ("draws", "gate", "images"):
        assert f'id="{section}"' in page
    assert (stage2 / "report" / "draws.csv").is_file()
    assert json.loads((stage2 / "report" / "scores.json").read_text())["pixels"] is True


def test_single_voxels_are_in_the_store_s_order_whatever_the_parcels(toy_dataset, tmp_path):
    """Parcels of one voxel, numbered by area: another order than the store's."""
    recipe = recipe_on(
        toy_dataset, tmp_path, "smoke.yaml", "--data.parcels.size", "1", "--data.parcels.kind",
        "atlas", "--data.parcels.atlas", "streams",
    )  # fmt: skip
    run = fit(recipe)
    model, data, recipe = load(run)
    labels = model.parcellation.labels.numpy()
    assert not np.array_equal(labels, np.arange(len(labels)))
    data.setup("test")
    file = predict_test(run, model, data, recipe, "checkpoint")
    assert (file.info.unit, file.n_units) == ("voxel", data.store.n_voxels)
    np.testing.assert_allclose(file.target, naive_responses(data, file.image_id), atol=1e-5)
    np.testing.assert_array_equal(file.units.position, data.store.coordinates())
    np.testing.assert_array_equal(file.units.ncsnr, data.store.voxels["ncsnr"].astype(np.float32))
    batch = data.on_after_batch_transfer(data.dataset("test").__getitems__([4]), 0)
    with torch.inference_mode():
        own = model.rows(batch)[model.row_name][0].numpy()
    np.testing.assert_allclose(file.rows[model.row_name].values[4], own[labels], atol=1e-5)
    assert file.draws is None


def test_voxels_of_recordings_are_called_units(stage2, monkeypatch):
    model, data, recipe = load(stage2)
    assert predicting._info(stage2, model, data, recipe, "").unit == "voxel"
    data.store.source = "arrays"
    assert predicting._info(stage2, model, data, recipe, "").unit == "unit"
    monkeypatch.setattr(type(model), "unit", "parcel")
    assert predicting._info(stage2, model, data, recipe, "").unit == "parcel"
