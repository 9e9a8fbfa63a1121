"""`chasm adapt`, `chasm fewshot`, `chasm transfer-table`, on toys, from the command line."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from chasm.cli import main
from chasm.commands.transfer import ROWS, parse_rows
from chasm.data.splits import FewShot
from chasm.errors import ChasmError, ConfigError
from chasm.evaluation.predictions import PredictionFile
from chasm.evaluation.testing import predict_run
from chasm.evaluation.transfer_cells import Cells, Shots, draw_shots
from chasm.evaluation.transfer_tables import curve_frame
from chasm.features.cache import CHECKS
from chasm.pipeline_fewshot import Plan, _trained_source, few_shot_curve
from chasm.pipeline_transfer import adapt, epochs_of, open_target, transfer_table
from chasm.training.recipes import Recipe
from chasm.training.runs import check_subjects

SOURCE = """# A source for tests: the smallest Stage 1, for voxels.
name: source
subjects: [1]
data:
  backbone: {model: pyramid}
  parcels: {size: 1}
  batch_size: 16
model:
  class_path: chasm.training.modules.Stage1Module
  init_args:
    learning_rate: 3.0e-3
    encoder:
      class_path: chasm.models.stage1.DualStreamEncoder
      init_args: {d_model: 8, d_state: 4, global_blocks: 1, local_blocks: 1, d_head: 8, d_gate: 8,
        d_contrast: 8, d_embedding: 8, readout: spatial}
trainer: {max_epochs: 1}
"""
ADAPT = """# An adapter for tests.
name: adapt
source: source.yaml
subjects: [1]
data:
  subject: 2
  backbone: {model: pyramid}
  parcels: {size: 1}
  batch_size: 16
model:
  class_path: chasm.training.adapters.AdapterModule
  init_args: {arm: head, learning_rate: 3.0e-3}
trainer: {max_epochs: 1}
"""
SOLVED = ("mean_pattern", "ridge", "ridge_head")
PLAN = Plan((12, 20), (*SOLVED, "head"), draws=2, trained_numbers=(20,), steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recipes, and their runs."""
    folder = tmp_path_factory.mktemp("transfer")
    (folder / "source.yaml").write_text(SOURCE)
    (folder / "adapt.yaml").write_text(ADAPT)
    return folder


def arguments(folder, data):
    return ["-c", str(folder / "adapt.yaml"), "--data.dataset_dir", str(data),
            "--runs", str(folder / "runs")]  # fmt: skip


@pytest.fixture(scope="module")
def args(folder, toy_subjects):
    return arguments(folder, toy_subjects)


@pytest.fixture(scope="module")
def drawn(args):
    """A curve with solved arms and one trained arm."""
    return few_shot_curve(args, PLAN, n_boot=100, jobs=1)


def test_a_curve_has_every_arm_number_and_draw(drawn):
    folder, curve = drawn
    found = {(c.arm, c.n, c.draw) for c in curve.cells}
    solved = {(arm, n, draw) for arm in SOLVED for n in (12, 20) for draw in (0, 1)}
    assert found == solved | {("head", 20, 0)}
    assert curve.sources == ("subj01",)
    assert curve.info.simulated
    assert not curve.failed
    table = pd.read_csv(folder / "curve.csv")
    assert table["simulated"].all()
    heads = table[(table["arm"] == "ridge_head") & (table["metric"] == "r2")]
    assert heads["difference_low"].notna().all()
    for name in ("draws.csv", "table.md", "curve.png", "curve.svg", "report.html"):
        assert (folder / name).stat().st_size > 500
    assert "SIMULATED" in (folder / "table.md").read_text()


def test_a_curve_that_is_there_reads_the_test_images_no_more(drawn, args, monkeypatch):
    folder, curve = drawn
    readings = (folder / "test_readings.jsonl").read_text()
    assert len(readings.splitlines()) == 1
    assert json.loads(readings)["by"] == "chasm fewshot"
    monkeypatch.setattr("chasm.evaluation.transfer_cells.Scorer", None)
    monkeypatch.setattr("chasm.pipeline_fewshot._write", lambda *_: None)
    _, again = few_shot_curve(args, PLAN, n_boot=100, jobs=1)
    assert (folder / "test_readings.jsonl").read_text() == readings
    pd.testing.assert_frame_equal(curve_frame(again.cells), curve_frame(curve.cells))


def test_an_interrupted_curve_goes_on_with_what_is_missing(drawn, args, monkeypatch):
    folder, curve = drawn
    kept = {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.npz")}
    assert len(kept) == 13
    lost = [path for path in kept if path.name.startswith(("ridge_head-12-1", "head-20-0"))]
    assert len(lost) == 2
    lost[0].unlink()
    lost[1].write_bytes(lost[1].read_bytes()[:50])
    monkeypatch.setattr("chasm.pipeline_fewshot._write", lambda *_: None)
    _, again = few_shot_curve(args, PLAN, n_boot=100, jobs=1)
    assert {path for path in kept if path.stat().st_mtime_ns != kept[path]} == set(lost)
    pd.testing.assert_frame_equal(curve_frame(again.cells), curve_frame(curve.cells))


@pytest.fixture
def no_report(monkeypatch):
    """`chasm adapt` without its report, which takes most of its time on the toy."""
    monkeypatch.setattr(
        "chasm.pipeline_transfer.score_run", lambda run, n_boot, **rest: predict_run(run, **rest)
    )


def test_the_ridge_head_of_the_curve_is_that_of_the_adapter(drawn, args, no_report):
    _, curve = drawn
    run = adapt(args, arm="ridge_head", n=20, draw=1, n_boot=0)
    file = PredictionFile.read(run / "predictions.h5")
    assert file.rows["ridge head"].kind == "model"
    mse = np.mean((file.rows["ridge head"].values - file.target) ** 2)
    cell = next(c for c in curve.cells if (c.arm, c.n, c.draw) == ("ridge_head", 20, 1))
    assert cell.points["mse"] == pytest.approx(mse, rel=1e-4)
    # The ridge beside it has the same images, validation included: the curve's ridge.
    mse = np.mean((file.rows["ridge"].values - file.target) ** 2)
    cell = next(c for c in curve.cells if (c.arm, c.n, c.draw) == ("ridge", 20, 1))
    assert cell.points["mse"] == pytest.approx(mse, rel=1e-5)
    mean = next(c for c in curve.cells if (c.arm, c.n, c.draw) == ("mean_pattern", 20, 1))
    assert mean.points["mse"] == pytest.approx(np.mean((file.train_mean - file.target) ** 2))


def test_adapt_says_what_was_fitted_and_takes_the_least_steps(args, no_report, capsys):
    assert main(["adapt", *args, "--n", "12", "--arm", "head", "--steps", "3"]) == 0
    said = capsys.readouterr().out
    assert "Parameters fitted to the new subject: " in said
    run = Path(next(line for line in said.splitlines() if line.startswith("Run: ")).split()[1])
    facts = json.loads((run / "provenance.json").read_text())["trained"]
    assert 0 < facts["n_trained"] < facts["n_parameters"]
    assert facts["steps"] == 3


def test_epochs_over_few_images_are_those_of_the_recipe_or_more(args):
    recipe = Recipe([*args, "--trainer.max_epochs", "4"])
    shots = Shots(40, 0, np.arange(40), 33, FewShot(40))
    assert epochs_of(recipe, shots, 80) == ["--trainer.max_epochs", "27"]  # three batches of 16
    assert epochs_of(recipe, shots, 5) == ["--trainer.max_epochs", "4"]
    assert epochs_of(recipe, shots._replace(few=None), 80) == []


def test_test_responses_reach_no_solved_arm(args, folder, toy_subjects, tmp_path):
    """With other numbers as the new subject's test responses, every prediction is the same."""
    poisoned = tmp_path / "toy"
    shutil.copytree(toy_subjects, poisoned)
    data = Recipe(args).make_data()
    test = np.isin(data.store.trials["image_id"], data.full_split.test)
    with h5py.File(poisoned / "subj02.h5", "r+") as file:
        betas = file["betas"][:]
        betas[test] = 12345
        file["betas"][:] = betas
    source = _trained_source(Recipe(args))
    found = []
    for own in (args, arguments(folder, poisoned)):
        target = open_target(Recipe(own), own, source)
        cells = Cells(
            target.recipe, target.sources, target.prints, tmp_path / "cells", 0, "chasm fewshot"
        )
        solver = cells._solver(draw_shots(target.data, FewShot(20, 1)), with_features=True)
        found.append([solver.predict(arm)[0] for arm in SOLVED])
        found[-1].append(cells.scorer.target.values)
    *clean, target = found[0]
    *same, other = found[1]
    assert not np.allclose(target, other)
    for first, second in zip(clean, same, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--arm", "ridge"], r"--arm: there is no 'ridge'\. Use one of ridge_head, head"),
        (["--n", "5000"], r"data\.few_shot\.n: 5000 of \d+ train images\. Ask for 8 to"),
        (["--n", "7"], r"data\.few_shot\.n: 7 of"),
        (["--data.subject", "1"], "subjects: the new subject, subj01, is one of the source's"),
        (["--n-boot", "50"], "--n-boot: 50 resamples"),
        (["--size", "toy"], "Add --simulate"),
    ],
)
def test_bad_arguments_of_adapt_end_in_one_line(args, given, message, capsys):
    assert main(["adapt", *args, *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--arms", "ridge,nothing"], "--arms: there is no arm 'nothing'"),
        (["--numbers", "20,5000"], "data.few_shot.n: 5000 of"),
        (["--numbers", "4"], "data.few_shot.n: 4 of"),
        (["--draws", "0"], "--draws"),
        (["--numbers", "20", "--trained-numbers", "30"], "--trained-numbers: [30] are not of"),
        (["--data.few_shot.n", "20"], "Use --numbers and --draws"),
        (["--data.subject", "1"], "is one of the source's"),
        (["--trainer.devices", "2"], "chasm fewshot uses one device"),
    ],
)
def test_bad_arguments_of_fewshot_end_in_one_line(args, given, message, capsys):
    assert main(["fewshot", *args, *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_recipe_must_be_named(capsys):
    assert main(["fewshot", "--draws", "1"]) == 2
    assert "Add -c experiments/adapt.yaml" in capsys.readouterr().err


def test_a_token_cache_that_misses_images_is_named(folder, toy_subjects, tmp_path):
    other = tmp_path / "toy"
    shutil.copytree(toy_subjects, other)
    own = arguments(folder, other)
    data = Recipe(own).make_data()
    checks = data.tokens.folder / CHECKS
    rows = np.memmap(checks, dtype="<u4", mode="r+", shape=data.tokens.layout[CHECKS][0])
    rows[data.full_split.test[:3]] = 0
    rows.flush()
    with pytest.raises(ChasmError, match=r"tokens of 3 of \d+ images are missing"):
        Cells(Recipe(own), [], [], tmp_path / "cells", 0, "chasm fewshot")


def test_rows_are_parsed():
    rows = parse_rows(ROWS)
    assert rows[0] == (("1",), "7")
    assert rows[3] == (("1", "2", "5"), "7")
    assert rows[4] == (("7",), "7")
    for text in ("1,2", "1>", ">7", "1,,2>7", ""):
        with pytest.raises(Exception, match="is no row like"):
            parse_rows(text)


@pytest.mark.slow
def test_the_table_trains_its_sources_and_has_every_row(args, folder, capsys):
    options = ["--rows", "1>2;2", "--n-boot", "100", "--jobs", "1"]
    assert main(["transfer-table", *args, *options]) == 0
    said = capsys.readouterr().out
    assert "SIMULATED" in said
    out = folder / "runs" / "toy" / "transfer-table"
    table = pd.read_csv(out / "scores.csv")
    assert set(table["arm"]) == {"mean_pattern", "ridge", "ridge_head", "head", "within"}
    assert (table.loc[table["arm"] == "within", "source"] == "subj02").all()
    ridge = table[(table["arm"] == "ridge") & (table["metric"] == "mse")]
    assert ridge["value"].nunique() == 1  # on the same images, whatever the source
    assert "Never to be ranked" in (out / "table.md").read_text()
    run = next((folder / "runs" / "toy").glob("subj01/*/checkpoints")).parent
    with pytest.raises(ConfigError, match="is no recipe"):
        transfer_table([*args, "--source", str(run)], parse_rows("1>2"))


def test_an_arm_that_failed_is_named_and_the_status_is_3(drawn, args, monkeypatch, capsys):
    folder, curve = drawn
    broken = replace(curve, failed={"LoRA, 20 images, draw 0": "training diverged"})
    monkeypatch.setattr("chasm.pipeline_fewshot.few_shot_curve", lambda *_, **__: (folder, broken))
    assert main(["fewshot", *args]) == 3
    said = capsys.readouterr()
    assert "LoRA, 20 images, draw 0 is missing: training diverged" in said.out.replace("\n", " ")
    assert "1 failed: LoRA, 20 images, draw 0" in said.err


def test_images_of_the_first_session_come_in_their_order(args):
    data = Recipe(args).make_data()
    shots = draw_shots(data, FewShot(12, 0, "presentation"))
    shown = data.store.trials["image_id"].to_numpy()
    own = shown[np.isin(shown, data.full_split.train)]
    first = list(dict.fromkeys(own.tolist()))[:12]
    assert shots.image_ids.tolist() == sorted(first)
    assert (shots.n, shots.n_train) == (12, 10)
    again = Recipe([*args, *shots.args]).make_data()
    np.testing.assert_array_equal(again.dataset("given").image_ids, shots.image_ids)
    assert draw_shots(data, None).args == []


def test_subjects_of_a_recipe_say_nothing_of_a_source_that_is_trained(args, tmp_path):
    named = [*args, "--data.subject", "1"]
    with pytest.raises(ConfigError, match="is one of the source's"):
        check_subjects(Recipe(named))
    check_subjects(Recipe([*named, "--source", str(tmp_path)]))
