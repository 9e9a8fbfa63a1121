"""`chasm baselines`: recipes fitted, tested, costed and compared; a failure costs one row."""

from pathlib import Path

import pandas as pd
import pytest

from chasm.cli import main
from chasm.errors import ChasmError, ConfigError
from chasm.pipeline_baselines import _check_protocol, find_recipes, run_baselines

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
GRU, SMOKE = EXPERIMENTS / "baselines" / "gru.yaml", EXPERIMENTS / "smoke.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("baselines")


@pytest.fixture(scope="module")
def args(toy_dataset, folder):
    """What every recipe is given: the toy, one epoch, and where the runs go."""
    return [
        "--data.dataset_dir", str(toy_dataset), "--runs", str(folder / "runs"),
        "--trainer.max_epochs", "1", "--model.init_args.encoder.init_args.d_model", "8",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def broken(folder):
    """Recipe whose training cannot begin."""
    path = folder / "broken.yaml"
    path.write_text(SMOKE.read_text().replace("name: smoke", "name: broken") + "  devices: 3\n")
    return path


@pytest.fixture(scope="module")
def compared(args, broken):
    """Folder and tables of two recipes and a broken one between them."""
    return run_baselines(args, [GRU, broken, SMOKE], n_boot=100)


def test_the_table_is_made_of_the_recipes_that_worked(compared, broken, folder):
    out, comparison = compared
    assert out == folder / "runs" / "toy" / "subj01" / "baselines"
    at_voxels, at_parcels = comparison.levels
    assert [level.scores.info.unit for level in comparison.levels] == ["voxel", "parcel"]
    linear = ["ridge", "ridge (patches)", "banded ridge", "linear probe (CLS)"]
    assert list(at_voxels.file.rows) == list(at_parcels.file.rows) == [*linear, "GRU", "stage 1"]
    assert set(at_voxels.costs) == set(at_voxels.file.rows)
    assert at_voxels.costs["GRU"] == at_parcels.costs["GRU"]
    assert at_voxels.costs["ridge"].flops > at_parcels.costs["ridge"].flops
    assert list(comparison.failed) == [str(broken)]
    assert "trainer.devices" in comparison.failed[str(broken)]
    text = (out / "table.md").read_text()
    assert "SIMULATED" in text
    assert f"{broken} is missing: trainer.devices" in text
    assert pd.read_csv(out / "scores.csv")["simulated"].all()


def test_linear_rows_are_fitted_once_per_kind_of_unit(compared):
    out, _ = compared
    assert len(list((out.parent / "linear").glob("*.h5"))) == 2


def test_what_is_current_is_not_made_again(compared, args, monkeypatch):
    out, comparison = compared
    files = sorted(out.parent.glob("*/predictions.h5")) + sorted(out.parent.glob("*/cost.json"))
    before = {path: path.stat().st_mtime_ns for path in files if path.parent != out}
    assert len(before) == 4
    _, again = run_baselines(args, [GRU, SMOKE], n_boot=100)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not again.failed
    for level, other in zip(comparison.levels, again.levels, strict=True):
        pd.testing.assert_frame_equal(level.scores.frame, other.scores.frame)
    readings = [len(p.read_text().splitlines()) for p in out.parent.glob("*/test_readings.jsonl")]
    assert readings == [1, 1]


def test_the_command_ends_with_3_when_a_row_is_missing(compared, args, broken, capsys):
    status = main(["baselines", "--recipes", str(GRU), str(broken), "--n-boot", "0", *args])
    said = capsys.readouterr()
    assert status == 3
    assert f"1 recipe(s) failed: {broken}" in said.err
    assert "GRU" in said.out
    assert "SIMULATED" in said.out
    assert main(["baselines", "--recipes", str(GRU), "--n-boot", "0", *args]) == 0
    assert "Report: " in capsys.readouterr().out


def test_an_error_of_every_recipe_is_the_error(args, broken, folder, tmp_path):
    with pytest.raises(ChasmError, match=r"trainer\.devices"):
        run_baselines(args, [broken], n_boot=0)
    elsewhere = [tmp_path.name if a.endswith("toy") else a for a in args]
    with pytest.raises(ChasmError, match="no such subject store"):
        run_baselines(elsewhere, [GRU, SMOKE], n_boot=0)


def test_recipes_are_files_folders_or_patterns(tmp_path, monkeypatch):
    for name in ("b.yaml", "a.yaml", "note.txt"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    assert [p.name for p in find_recipes(["."])] == ["a.yaml", "b.yaml"]
    assert [p.name for p in find_recipes(["b.yaml", "*.yaml"])] == ["b.yaml", "a.yaml"]
    with pytest.raises(ConfigError, match=r"--recipes: c\*\.yaml names no recipe"):
        find_recipes(["c*.yaml"])
    monkeypatch.chdir(EXPERIMENTS.parent)
    names = [p.stem for p in find_recipes()]
    assert {"mlp", "gru", "lstm", "one_stream", "transformer", "stage1", "stage2"} <= set(names)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--n-boot", "50"], "--n-boot"),
        (["-c", "x.yaml"], "Name recipes by --recipes"),
        (["--size", "toy"], "Add --simulate"),
        (["--mask", "V1"], "Add --nsd"),
    ],
)
def test_bad_arguments_end_in_one_line(given, message, capsys):
    assert main(["baselines", "--recipes", str(SMOKE), *given]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize("places", [None, ["paper"]])
def test_the_recipes_of_the_makefile_share_one_protocol(places, monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parent)
    found = find_recipes(*([[str(EXPERIMENTS / place) for place in places]] if places else []))
    assert len(found) >= 9
    _check_protocol([], found)


def test_recipes_of_two_protocols_are_refused_before_training(args, folder):
    mixed = [SMOKE, EXPERIMENTS / "paper" / "stage1.yaml"]
    with pytest.raises(ConfigError, match=r"data\.backbone is"):
        run_baselines(args, mixed, n_boot=100)
    assert not list(folder.glob("runs/*/*/paper-*"))


def test_a_stage_1_that_others_build_on_keeps_its_own_row(toy_dataset, folder):
    options = ["--data.dataset_dir", str(toy_dataset), "--runs", str(folder / "runs2"),
               "--trainer.max_epochs", "1"]  # fmt: skip
    _, comparison = run_baselines(options, [EXPERIMENTS / "smoke_stage2.yaml", SMOKE], n_boot=100)
    rows = list(comparison.levels[0].file.rows)
    assert "stage 1" in rows
    assert any(row.startswith("stage 2") for row in rows)
