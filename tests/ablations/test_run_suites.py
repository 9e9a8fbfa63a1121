"""The runner on a trained toy: predictions under interventions, files, bad input."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from ablations.gather import check_run, gather, read_groups, read_test_set
from ablations.passes import Passes
from ablations.run import Options, find_suite, main, run_of, run_suite
from ablations.suite import read_suite
from chasm.errors import ConfigError, DataError
from chasm.evaluation.reading import Reading, open_run
from chasm.interventions import Intervention, on_stream
from chasm.models.sites import sites_of
from chasm.training.linear_module import LinearModule
from chasm.training.recipes import Recipe
from chasm.training.runs import fit
from tests.conftest import TINY

CPU = torch.device("cpu")
QUICK = Options(n_boot=100, null_worlds=0)


def args_of(folder, runs, *more):
    return [*TINY, "--data.dataset_dir", str(folder), "--runs", str(runs), *more]


@pytest.fixture(scope="module")
def run(toy_dataset, tmp_path_factory):
    """A toy Stage 1 with a closed-form partner, trained for an epoch."""
    more = ["--model.init_args.linear", "banded_ridge", "--trainer.max_epochs", "1"]
    return fit(Recipe(args_of(toy_dataset, tmp_path_factory.mktemp("ablated"), *more)))


@pytest.fixture
def opened(run):
    found = open_run(run)
    found.data.setup()
    return found


def passes_of(opened):
    model, data = opened.model, opened.data
    return Passes(model, data, Reading(model, data).sorted_units, CPU)


def whole(opened, change=lambda batch: batch):
    """Predict by whole passes over changed batches, without any of the suite's code."""
    parts = []
    with torch.inference_mode():
        for batch in opened.data.test_dataloader():
            parts.append(opened.model(change(opened.data.on_after_batch_transfer(batch, 0))))
    return torch.cat(parts).numpy()


def test_streams_that_are_computed_once_give_what_whole_passes_give(opened):
    passes = passes_of(opened)
    np.testing.assert_array_equal(passes.predict(), whole(opened))
    removed = passes.predict([Intervention("features.cls", "zero")])
    zeroed = whole(opened, lambda batch: {**batch, "cls": batch["cls"] * 0})
    np.testing.assert_array_equal(removed, zeroed)


def test_interchange_at_the_streams_is_interchange_of_the_tokens(opened):
    passes = passes_of(opened)
    ids = np.sort(opened.data.data_split.test)
    donor = np.roll(np.arange(len(ids)), 1)
    sites = [one.site for one in on_stream(opened.model, "global", "mean")]
    found = passes.predict([Intervention(site, "value") for site in sites], donor)
    place = {int(image): row for row, image in enumerate(ids)}

    def swapped(batch):
        rows = [ids[donor[place[int(image)]]] for image in batch["image_id"]]
        return {**batch, "cls": torch.from_numpy(opened.data.tokens.cls[rows]).float()}

    np.testing.assert_allclose(found, whole(opened, swapped), atol=1e-6)


def test_the_mean_of_a_stream_takes_away_the_image_and_keeps_the_offset(opened):
    passes = passes_of(opened)
    both = [*on_stream(opened.model, "global", "mean"), *on_stream(opened.model, "local", "mean")]
    constant = passes.predict(both)
    assert np.ptp(constant, axis=0).max() < 1e-5
    assert np.abs(constant).max() > 1e-3


def test_a_suite_gives_every_condition_for_both_classes_of_model(opened):
    suite = read_suite(find_suite("cls"))
    suite = replace(suite, donors=3, conditions=suite.conditions[:2])
    found = gather(opened.model, opened.data, suite, 0, CPU)
    assert not found.left_out
    shape = found.values.predictions["both"].shape
    assert found.values.interchange[0].shape == (3, *shape)
    assert set(found.values.extra) == {"CLS zeroed", "CLS of other images"}
    held, free = found.values.held, found.values.predictions
    np.testing.assert_allclose(held["both"], free["both"], atol=1e-6)
    assert np.abs(held["local"] - free["local"]).max() > 0
    linear = gather(
        LinearModule(opened.model).solve(opened.data).eval(), opened.data, suite, 0, CPU
    ).values
    assert (linear.encoder, linear.model_class, linear.held) == ("banded ridge", "linear", None)
    parts = linear.predictions
    np.testing.assert_allclose(
        parts["both"] - parts["none"],
        parts["local"] + parts["global"] - 2 * parts["none"],
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ["swap", "gate", "layers", "inputs"])
def test_every_condition_of_a_suite_changes_the_prediction(opened, name):
    suite = replace(read_suite(find_suite(name)), interchange=False)
    conditions = tuple(replace(one, repeats=min(one.repeats, 2)) for one in suite.conditions)
    found = gather(opened.model, opened.data, replace(suite, conditions=conditions), 0, CPU)
    assert len(found.values.extra) == len(conditions)
    for predicted in found.values.extra.values():
        assert np.abs(predicted - found.values.predictions["both"]).max() > 1e-6


def test_a_suite_runs_through_the_command_and_only_once(run, capsys):
    options = ["--run", str(run), "--n-boot", "100", "--null-worlds", "0", "--no-linear"]
    assert main(["gate", *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "SIMULATED" in shown
    assert "asymmetry not estimable" in shown
    folder = run / "ablations" / "gate"
    frame = pd.read_csv(folder / "effects.csv")
    assert frame["simulated"].all()
    assert "SIMULATED" in (folder / "report.html").read_text()
    for condition in read_suite(find_suite("gate")).conditions:
        assert (frame["quantity"] == f"change:{condition.name}").any()
    readings = [json.loads(line) for line in (run / "test_readings.jsonl").open()]
    assert [one["by"] for one in readings] == ["ablation suite gate"]
    before = (folder / "report.html").stat().st_mtime_ns
    assert main(["gate", *options]) == 0
    assert (folder / "report.html").stat().st_mtime_ns == before
    assert "SIMULATED" in capsys.readouterr().out


def test_groups_of_the_user_take_the_place_of_the_atlases(opened, tmp_path):
    n = opened.data.store.n_voxels
    path = tmp_path / "groups.csv"
    units = np.arange(n)[: n - n % 2]
    names = np.where(units < n // 2, "a", "b")
    pd.DataFrame({"unit": units, "group": names}).to_csv(path, index=False)
    suite = read_suite(find_suite("cls"))
    test = read_test_set(opened.model, opened.data, suite, path, 100)
    regions = {f"{one.atlas}:{one.name}": one for one in test.regions}
    assert set(regions) == {":all", "groups:a", "groups:b"}
    labels = opened.model.parcellation.labels.numpy()
    inside = np.bincount(labels[units[names == "a"]][labels[units[names == "a"]] >= 0])
    np.testing.assert_array_equal(regions["groups:a"].weights[: len(inside)], inside)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("unit,name\n0,a\n", "columns unit, name"),
        ("unit,group\n0,a\n0,b\n", "one twice"),
        ("unit,group\n99999,a\n", "names 99999"),
        ("unit,group\nx,a\n", "names x"),
        ("", "cannot be read"),
    ],
)
def test_a_bad_table_of_groups_is_named(tmp_path, text, problem):
    path = tmp_path / "groups.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=problem):
        read_groups(path, 50)


def test_an_unknown_site_lists_the_sites(opened):
    suite = read_suite(find_suite("gate"))
    (first, *_) = suite.conditions
    bad = replace(first, interventions=(Intervention("gates", "mean"),))
    with pytest.raises(ConfigError, match=r"gates.*Its sites: features.cls, .*gate"):
        gather(opened.model, opened.data, replace(suite, conditions=(bad,)), 0, CPU)


def test_a_suite_for_a_stage_2_refuses_a_stage_1(run):
    with pytest.raises(ConfigError, match="suite routes: it is made for a Stage 2, stage 1 is"):
        run_suite(read_suite(find_suite("routes")), [run], run / "x", QUICK)


def test_a_map_that_does_not_fit_is_refused(opened, monkeypatch):
    monkeypatch.setattr("ablations.passes.MAP_BYTES", 1000)
    with pytest.raises(ConfigError, match="residualise: the map from 1 CLS tokens"):
        passes_of(opened).predict([Intervention("features.patches", "residualise")])


def test_a_model_without_separate_streams_is_told_what_fits(toy_dataset, opened):
    encoder = "chasm.models.token_models.MLPEncoder"
    more = ["--model.init_args.encoder.class_path", encoder]
    more += ["--model.init_args.loss.init_args.contrastive_weight", "0"]
    recipe = ["-c", TINY[1], *more]
    model = Recipe(recipe).make_model()
    model.build(opened.data.sizes, opened.data.parcellation)
    suite = read_suite(find_suite("cls"))
    with pytest.raises(ConfigError, match=r"no separate streams .*features.cls.*inputs.yaml"):
        gather(model, opened.data, suite, 0, CPU)
    inputs = replace(read_suite(find_suite("inputs")), donors=2)
    found = gather(model.eval(), opened.data, inputs, 0, CPU).values
    assert found.held is None
    assert len(sites_of(model)) == 2


def test_a_checkpoint_that_names_no_validation_images_is_refused(run, opened):
    check_run(run, opened)
    facts = opened.model.trained_on
    test = torch.from_numpy(opened.data.data_split.test)
    for changed, problem in (
        (None, "names no validation images"),
        (facts | {"validation": test[:0]}, "names no validation images"),
        (facts | {"validation": test}, "validation images are test images"),
        (facts | {"train": test}, "train images are test images"),
    ):
        opened.model.trained_on = changed
        with pytest.raises(DataError, match=problem):
            check_run(run, opened)


def test_what_is_no_run_is_refused(tmp_path, run):
    assert run_of(run / "checkpoints" / "best.ckpt") == run
    with pytest.raises(DataError, match=r"config\.yaml is missing"):
        run_of(tmp_path)
    with pytest.raises(DataError, match="not the selected checkpoint"):
        run_of(run / "checkpoints" / "last.ckpt")
    assert main(["cls", "--run", str(tmp_path)]) == 2


def test_options_that_cannot_be_used_are_refused(run):
    cls = read_suite(find_suite("cls"))
    with pytest.raises(ConfigError, match="only one of them"):
        run_suite(cls, [run], run / "x", replace(QUICK, early=("streams:early",)))
    with pytest.raises(ConfigError, match="10 resamples"):
        run_suite(cls, [run], run / "x", replace(QUICK, n_boot=10))
