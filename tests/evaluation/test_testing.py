"""`chasm test` on a run: what it refuses, what it makes again, what it fits baselines to."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from chasm.errors import ConfigError, DataError
from chasm.evaluation import testing
from chasm.evaluation.predictions import PredictionFile
from chasm.evaluation.testing import predict_run, report_run, score_run
from chasm.io import write_json
from chasm.training.recipes import Recipe
from chasm.training.run_files import read_provenance
from chasm.training.runs import fit, load

TOP_P = ["--model.init_args.target", "top_p", "--model.init_args.top_p", "0.5"]


def arguments(toy_dataset, folder, *extra):
    recipe = Path(__file__).parents[2] / "experiments" / "smoke.yaml"
    return [
        "-c", str(recipe), "--data.dataset_dir", str(toy_dataset), "--runs", str(folder),
        "--trainer.max_epochs", "1", *extra,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(toy_dataset, tmp_path_factory):
    """Run on top-p targets of image means; its folder is only read."""
    return fit(Recipe(arguments(toy_dataset, tmp_path_factory.mktemp("runs"), *TOP_P)))


@pytest.fixture(scope="module")
def tested(trained, tmp_path_factory):
    """Copy of the run with its predictions and report; only read."""
    run = tmp_path_factory.mktemp("tested") / "run"
    shutil.copytree(trained, run)
    score_run(run, n_boot=0)
    return run


@pytest.fixture
def run(tested, tmp_path):
    """Tested run of one's own."""
    return shutil.copytree(tested, tmp_path / "run")


def readings(run):
    return len((run / "test_readings.jsonl").read_text().splitlines())


def say_trained_on_another(run, part):
    """Let the run say that its store, or its tokens, were others."""
    facts = read_provenance(run)
    facts[part]["fingerprint"] = "0" * 32
    write_json(run / "provenance.json", facts)
    return facts[part]["path"]


def offset_of(row, target):
    """Mean of prediction minus target, in standard deviations of the target."""
    return float(np.mean(row.values - target) / np.std(target))


def test_baselines_are_fitted_to_each_target(tested):
    file = PredictionFile.read(tested / "predictions.h5")
    own = file.targets["top_p"]
    baselines = [name for name, row in file.rows.items() if row.kind == "baseline"]
    assert list(own.rows) == baselines
    assert len(baselines) == 4
    assert file.rows["stage 1"].trained_on == "top_p"
    # The mean of the larger half lies well above the mean of all voxels.
    assert np.mean(own.train_mean - file.train_mean) > 0.3 * np.std(own.values)
    for name in baselines:
        assert (file.rows[name].trained_on, own.rows[name].trained_on) == ("target", "top_p")
        assert abs(offset_of(file.rows[name], file.target)) < 0.2
        assert abs(offset_of(own.rows[name], own.values)) < 0.2
        assert offset_of(file.rows[name], own.values) < -0.3
    text = (tested / "report" / "table.md").read_text()
    assert "on top-p parcel means: stage 1." in text


def naive_top_half(betas, parcellation):
    """Mean of the larger half of each parcel's voxels, (rows, parcels), in plain loops."""
    labels = parcellation.labels.numpy()
    columns = []
    for parcel in range(parcellation.n_parcels):
        voxels = np.sort(betas[:, labels == parcel], axis=1)[:, ::-1]
        columns.append(voxels[:, : max(1, voxels.shape[1] // 2)].mean(axis=1))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("samples", ["image_means", "trials"])
def test_own_targets_are_what_training_saw(samples, tested, toy_dataset, tmp_path):
    if samples == "image_means":
        run = tested
    else:
        run = fit(Recipe(arguments(toy_dataset, tmp_path, *TOP_P, "--data.samples", samples)))
        score_run(run, n_boot=0)
    own = PredictionFile.read(run / "predictions.h5").targets["top_p"]
    model, data, _ = load(run)
    values = {}
    for part in ("train", "test"):
        shown = data.dataset(part)
        rows = []
        for trials in shown.trials:
            betas = data.store.zscore(trials, shown.mean, shown.std)
            if samples == "trials":
                rows.append(naive_top_half(betas, model.parcellation).mean(axis=0))
            else:
                rows.append(naive_top_half(betas.mean(0, keepdims=True), model.parcellation)[0])
        values[part] = np.stack(rows)
    assert (data.dataset("test").repeats > 1).any()
    np.testing.assert_allclose(own.values, values["test"], atol=1e-5)
    np.testing.assert_allclose(own.train_mean, values["train"].mean(axis=0), atol=1e-5)


def test_current_predictions_are_left_as_they_are(run):
    before = (run / "predictions.h5").stat().st_mtime_ns
    score_run(run, n_boot=0)
    score_run(run, n_boot=0, n_draws=7)  # it has no latent
    assert (run / "predictions.h5").stat().st_mtime_ns == before
    assert readings(run) == 1
    score_run(run, n_boot=0, fresh=True)
    assert (run / "predictions.h5").stat().st_mtime_ns > before
    assert readings(run) == 2


def test_a_reading_is_noted_with_the_command_that_asked(run):
    predict_run(run, fresh=True, by="chasm baselines")
    lines = (run / "test_readings.jsonl").read_text().splitlines()
    assert [json.loads(line)["by"] for line in lines] == ["chasm test", "chasm baselines"]


def test_an_unfinished_run_is_refused(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    write_json(run / "provenance.json", read_provenance(run) | {"status": "running"})
    with pytest.raises(DataError, match=r"run: .*no finished run.*chasm fit"):
        score_run(run, n_boot=0)
    with pytest.raises(DataError, match="no finished run"):
        score_run(tmp_path / "nothing", n_boot=0)
    assert not (run / "predictions.h5").exists()
    assert not (run / "test_readings.jsonl").exists()


def test_too_few_resamples_are_refused_before_the_test_images_are_read(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--n-boot.*at least 100"):
        score_run(run, n_boot=50)
    assert not (run / "test_readings.jsonl").exists()


@pytest.mark.parametrize("part", ["store", "tokens"])
def test_changed_data_are_refused_although_predictions_are_current(part, run):
    path = say_trained_on_another(run, part)
    with pytest.raises(DataError) as caught:
        score_run(run, n_boot=0)
    assert str(caught.value).startswith(path)
    assert "the run was trained on 000000000000" in str(caught.value)
    assert readings(run) == 1


def test_a_report_of_a_changed_store_has_no_map_and_says_so(run, caplog):
    page = run / "report" / "report.html"
    report_run(run, n_boot=0, fresh=True)
    assert "axial slices" in page.read_text()
    path = say_trained_on_another(run, "store")
    with caplog.at_level(logging.WARNING, logger=testing.__name__):
        report_run(run, n_boot=0)
    assert "no brain map" in caplog.text
    assert path in caplog.text
    assert "axial slices" not in page.read_text()


def test_a_report_needs_no_store_but_a_test_does(run, toy_dataset, tmp_path, caplog):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(toy_dataset), str(tmp_path / "gone")))
    with caplog.at_level(logging.WARNING, logger=testing.__name__):
        report_run(run, n_boot=0)
    assert "no brain map" in caplog.text
    with pytest.raises(DataError, match=r"gone/subj01\.h5.*no such subject store"):
        score_run(run, n_boot=0)


@pytest.mark.parametrize("kept", [0, 100, 3000, -2000])
def test_damaged_predictions_are_made_again(kept, run, caplog):
    path = run / "predictions.h5"
    whole = PredictionFile.read(path)
    path.write_bytes(path.read_bytes()[:kept])
    with caplog.at_level(logging.WARNING, logger=testing.__name__):
        score_run(run, n_boot=0)
    assert "predicting again" in caplog.text
    assert readings(run) == 2
    again = PredictionFile.read(path)
    for name, row in whole.rows.items():
        np.testing.assert_allclose(again.rows[name].values, row.values, atol=1e-5)


def test_garbage_beside_the_report_is_written_again(run):
    path = run / "report" / "scores.json"
    good = path.read_text()
    path.write_text("{not json")
    score_run(run, n_boot=0)
    assert json.loads(path.read_text()) == json.loads(good)
    assert readings(run) == 1


def test_a_report_needs_predictions(trained):
    with pytest.raises(DataError, match=r"predictions\.h5: no such file.*chasm test"):
        report_run(trained, n_boot=0)
