"""Runs joined at voxels and parcels: what is checked, what is averaged, what is shown."""

import io
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from chasm.errors import DataError
from chasm.evaluation.comparison import compare
from chasm.evaluation.comparison_tables import (
    best_linear,
    comparison_grid,
    findings,
    markdown,
    show,
)
from chasm.evaluation.cost import Cost
from chasm.evaluation.joining import join_parcels, join_voxels, parcel_means, read_runs
from chasm.evaluation.predictions import Membership, PredictionFile, PredictionRow, Units
from chasm.evaluation.scores import score
from chasm.io import write_json

N_VOXELS, SIZE = 42, 5
LABELS = np.where(np.arange(N_VOXELS) < 40, np.arange(N_VOXELS) // SIZE, -1)
N_PARCELS = 8


def naive_means(voxels, labels=LABELS):
    """Mean of each parcel's voxels, in a plain loop."""
    return np.stack([voxels[..., labels == k].mean(-1) for k in range(labels.max() + 1)], axis=-1)


@pytest.fixture
def voxels(predictions):
    """Voxel-level file: two linear rows and a GRU."""
    made = predictions(n_units=N_VOXELS, unit="voxel")
    rows = {
        "GRU": replace(made.rows["stage 1"], n_parameters=1000),
        "ridge": made.rows["ridge"],
        "linear probe (CLS)": made.rows["linear probe (CLS)"],
    }
    info = replace(made.info, model="gru")
    return replace(made, rows=rows, info=info, targets={}, parcel_labels=np.arange(N_VOXELS))


@pytest.fixture
def parcels(voxels):
    """Parcel-level file of the same trials: two linear rows, a Stage 1 and its network alone."""
    rng = np.random.default_rng(5)
    target = naive_means(voxels.target)
    guess = target + 0.3 * rng.normal(size=target.shape)
    return replace(
        voxels,
        target=target,
        train_mean=naive_means(voxels.train_mean),
        repeat_targets=naive_means(voxels.repeat_targets),
        rows={
            "stage 1": PredictionRow(guess, "model", 2000),
            "stage 1, network alone": PredictionRow(guess + 0.1, "component"),
            "ridge": PredictionRow(target + rng.normal(size=target.shape), "baseline", 72),
        },
        units=Units(np.full(N_PARCELS, SIZE), np.ones(N_PARCELS), np.zeros((N_PARCELS, 3))),
        membership={"prf-visualrois": Membership(np.full((N_PARCELS, 1), SIZE), ("V1v",))},
        info=replace(voxels.info, unit="parcel", model="stage1"),
        parcel_labels=LABELS,
    )


@pytest.fixture
def folder(tmp_path, voxels, parcels):
    """Folders of two runs with their predictions."""

    def write(**files):
        for name, file in files.items():
            file.write(tmp_path / name / "predictions.h5")
        return [tmp_path / name / "predictions.h5" for name in files]

    return write


def test_parcel_means_equal_a_loop_and_leave_nan_out():
    rng = np.random.default_rng(0)
    labels = np.array([2, 0, -1, 1, 0, 2, 2, 1])
    values = rng.normal(size=(3, 8))
    np.testing.assert_allclose(parcel_means(values, labels), naive_means(values, labels))
    values[:, [0, 3, 7]] = np.nan
    expected = np.stack(
        [values[:, [1, 4]].mean(1), np.full(3, np.nan), values[:, [5, 6]].mean(1)], axis=1
    )
    np.testing.assert_allclose(parcel_means(values, labels), expected)


def test_models_of_parcels_are_expanded_and_models_of_voxels_averaged(folder, voxels, parcels):
    runs = read_runs(folder(stage1=parcels, gru=voxels))
    assert [run.label for run in runs] == ["GRU", "stage 1"]
    at_voxels, at_parcels = join_voxels(runs), join_parcels(runs)

    names = ["ridge", "linear probe (CLS)", "GRU", "stage 1", "stage 1, network alone"]
    assert list(at_voxels.rows) == names
    assert list(at_parcels.rows) == ["ridge", "GRU", "stage 1", "stage 1, network alone"]
    assert at_voxels.info.unit == "voxel"
    assert at_parcels.info.unit == "parcel"
    assert {row.kind for row in at_voxels.rows.values()} == {"baseline", "model"}

    guess = parcels.rows["stage 1"].values
    expanded = at_voxels.rows["stage 1"].values
    for voxel, parcel in enumerate(LABELS):
        expected = voxels.train_mean[voxel] if parcel < 0 else guess[:, parcel]
        np.testing.assert_allclose(expanded[:, voxel], expected, atol=1e-6)
    np.testing.assert_allclose(at_voxels.rows["GRU"].values, voxels.rows["GRU"].values, atol=1e-6)
    np.testing.assert_allclose(at_voxels.rows["ridge"].values, voxels.rows["ridge"].values)

    averaged = naive_means(voxels.rows["GRU"].values)
    np.testing.assert_allclose(at_parcels.rows["GRU"].values, averaged, atol=1e-6)
    np.testing.assert_allclose(at_parcels.rows["stage 1"].values, guess, atol=1e-6)
    np.testing.assert_allclose(at_parcels.rows["ridge"].values, parcels.rows["ridge"].values)
    np.testing.assert_allclose(at_parcels.target, naive_means(voxels.target), atol=1e-6)


def test_other_parcels_are_read_at_the_first_ones(folder, parcels, voxels):
    """Parcels of 10 voxels give each parcel of 5 in them their own value."""
    coarse = np.where(LABELS >= 0, LABELS // 2, -1)
    target = naive_means(voxels.target, coarse)
    other = replace(
        parcels,
        target=target,
        train_mean=naive_means(voxels.train_mean, coarse),
        repeat_targets=None,
        rows={"one-stream Mamba": PredictionRow(target + 1, "model")},
        units=Units(np.full(4, 10), np.ones(4), np.zeros((4, 3))),
        membership={},
        parcel_labels=coarse,
    )
    joined = join_parcels(read_runs(folder(a=parcels, b=other)))
    # The first in the order of the table, one-stream Mamba, sets the parcels.
    np.testing.assert_allclose(joined.rows["one-stream Mamba"].values, target + 1, atol=1e-6)
    np.testing.assert_allclose(
        joined.rows["stage 1"].values,
        naive_means(parcels.rows["stage 1"].values[:, LABELS], coarse),
        atol=1e-6,
    )
    assert joined.n_units == 4


def test_runs_of_one_kind_share_its_published_value(folder, voxels, tmp_path):
    other = replace(voxels, info=replace(voxels.info, model="gru-large"))
    (level,) = compare(folder(a=voxels, b=other), tmp_path / "out", n_boot=0).levels
    published = {line.label: line.cells[-1] for line in comparison_grid(level).lines}
    assert published["GRU (gru)"] == published["GRU (gru-large)"] == ".237 · .461"


def test_a_file_given_twice_counts_once(folder, voxels, tmp_path):
    paths = folder(gru=voxels)
    (level,) = compare([*paths, *map(str, paths)], tmp_path / "out", n_boot=0).levels
    assert [name for name, row in level.file.rows.items() if row.kind == "model"] == ["GRU"]


def test_a_level_without_its_runs_is_left_out(folder, voxels, parcels):
    assert join_parcels(read_runs(folder(gru=voxels))) is None
    assert join_voxels(read_runs(folder(stage1=parcels))) is None


def test_files_of_a_level_that_is_gone_are_removed(folder, voxels, parcels, tmp_path):
    paths, out = folder(gru=voxels, stage1=parcels), tmp_path / "out"
    per_level = {f"{name}{{}}.{end}" for name, end in
                 (("predictions", "h5"), ("scores", "csv"), ("costs", "csv"))}  # fmt: skip
    for chosen, suffix in ((paths[:1], ""), (paths[1:], "_parcels")):
        compare(paths, out, n_boot=0)
        compare(chosen, out, n_boot=0)
        expected = {name.format(suffix) for name in per_level} | {"table.md", "report.html"}
        assert {path.name for path in out.iterdir()} == expected


def test_runs_of_one_name_are_told_apart_by_their_recipes(folder, voxels):
    other = replace(voxels, info=replace(voxels.info, model="gru-large"))
    runs = read_runs(folder(a=voxels, b=other))
    assert [run.label for run in runs] == ["GRU (gru)", "GRU (gru-large)"]
    with pytest.raises(DataError, match=r"b/predictions\.h5: another run is called 'GRU \(gru\)'"):
        read_runs(folder(a=voxels, b=voxels))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda f: {"info": replace(f.info, subject="subj02")}, "subject: found 'subj02'"),
        (lambda f: {"info": replace(f.info, simulated=False)}, "simulated"),
        (lambda f: {"info": replace(f.info, split="paper")}, "split: found 'paper'"),
        (lambda f: {"info": replace(f.info, fingerprints={"store": "0"})}, "fingerprints: store 0"),
        (
            lambda f: {"info": replace(f.info, fingerprints={"store": "3f9a", "tokens": "1"})},
            "fingerprints: tokens 1, expected 77bc",
        ),
        (lambda f: {"image_id": f.image_id[::-1]}, "/image_id"),
        (lambda f: {"repeats": f.repeats * 0 + 1}, "/repeats"),
        (lambda f: {"target": f.target + 0.1}, "/target: its responses to the same images differ"),
        (lambda f: {"parcel_labels": None}, "/parcel_labels: is missing"),
        (lambda f: {"rows": {"ridge": f.rows["ridge"]}}, "/predictions: holds no model"),
    ],
)
def test_files_that_do_not_belong_together_are_named(change, field, folder, voxels, parcels):
    paths = folder(gru=voxels, stage1=replace(parcels, **change(parcels)))
    with pytest.raises(DataError) as caught:
        read_runs(paths)
    text = str(caught.value)
    assert text.startswith(str(paths[1]))
    assert field in text


def test_other_voxels_are_refused(folder, voxels, parcels):
    paths = folder(gru=voxels, stage1=replace(parcels, parcel_labels=np.append(LABELS, -1)))
    with pytest.raises(
        DataError, match=r"stage1/predictions\.h5:/parcel_labels: 43 voxels, but 42"
    ):
        read_runs(paths)


def test_nothing_to_compare_is_refused():
    with pytest.raises(DataError, match="no predictions"):
        read_runs([])


@pytest.fixture
def compared(folder, voxels, parcels, tmp_path):
    """Comparison with intervals, a cost for the GRU and a recipe that failed."""
    paths = folder(gru=voxels, stage1=parcels)
    cost = Cost(1234567, 1000000, 2500000, 12.34, 32, "CPU, 2 threads")
    write_json(paths[0].parent / "cost.json", vars(cost))
    failed = {"lstm.yaml": "it diverged"}
    return compare(paths, tmp_path / "out", n_boot=200, failed=failed), tmp_path / "out"


def test_scores_are_those_of_the_joined_files(compared, voxels):
    comparison, out = compared
    at_voxels, at_parcels = comparison.levels
    for level, name in ((at_voxels, "predictions.h5"), (at_parcels, "predictions_parcels.h5")):
        again = score(PredictionFile.read(out / name), n_boot=200)
        pd.testing.assert_frame_equal(again.frame, level.scores.frame, atol=1e-6)
    alone = score(replace(voxels, membership={}), n_boot=0).frame
    for row in ("GRU", "ridge"):
        found, expected = (
            frame[(frame["row"] == row) & (frame["metric"] == "r2") & (frame["level"] == "all")]
            for frame in (at_voxels.scores.frame, alone)
        )
        assert found["value"].item() == pytest.approx(expected["value"].item(), abs=1e-6)


def test_the_table_has_every_row_with_difference_cost_and_published_value(compared):
    comparison, _ = compared
    level = comparison.levels[0]
    grid = comparison_grid(level)
    lines = {line.label: dict(zip(grid.columns, line.cells, strict=True)) for line in grid.lines}
    assert list(lines) == [
        "mean pattern", "ridge", "linear probe (CLS)", "GRU", "stage 1", "stage 1, network alone",
        "noise ceiling",
    ]  # fmt: skip
    best = best_linear(level.scores)
    frame = level.scores.frame
    frame = frame[(frame["metric"] == "noise_normalised_r2") & (frame["level"] == "all")]
    values = frame.set_index("row")["value"]
    assert best == values[["ridge", "linear probe (CLS)", "mean pattern"]].idxmax()
    difference = lines["GRU"][f"Noise-norm. R² − {best}"]
    assert difference.value == pytest.approx(values["GRU"] - values[best])
    assert difference.low < difference.value < difference.high
    assert lines[best][f"Noise-norm. R² − {best}"] == "–"
    assert lines["GRU"]["Parameters"] == "1.23\N{NO-BREAK SPACE}M"
    assert lines["GRU"]["trained"] == "1\N{NO-BREAK SPACE}M"
    assert lines["GRU"]["GFLOP / image"] == "0.0025"
    assert lines["GRU"]["ms / batch of 32"] == "12.3"
    assert lines["stage 1"]["Parameters"] == "–"
    moved = "stage 1, stage 1, network alone: each voxel has its parcel's value"
    assert f"Linear rows were fitted to the voxels. {moved}" in grid.note
    published = {name: cells["Published: pattern r · MSE"] for name, cells in lines.items()}
    assert published["GRU"] == ".237 · .461"
    assert published["linear probe (CLS)"] == ".407 · .357"
    assert published["stage 1"] == published["noise ceiling"] == "–"
    for phrase in (
        "session-z", "3-repeat mean", "subjects 1, 2, 5, 7",
        "(trained rows: best epoch selected on test)",
    ):  # fmt: skip
        assert phrase in grid.note
    at_parcels = comparison_grid(comparison.levels[1])
    assert at_parcels.columns[-1] == "Published: pattern r"
    assert {line.label: line.cells[-1] for line in at_parcels.lines}["stage 1"] == ".585"


def test_linear_rows_are_costed_from_their_parameters(compared, voxels):
    comparison, _ = compared
    count = voxels.rows["ridge"].n_parameters
    cost = comparison.levels[0].costs["ridge"]
    assert cost.parameters == count
    assert cost.flops == 2 * N_VOXELS * (count // N_VOXELS - 1)
    assert comparison.levels[1].costs["ridge"].flops == 2 * N_PARCELS * (72 // N_PARCELS - 1)


def test_findings_name_every_trained_row_once(compared):
    comparison, _ = compared
    for level in comparison.levels:
        text = " ".join(findings(level))
        trained = [name for name, row in level.file.rows.items() if row.kind == "model"]
        for name in trained:
            assert text.count(f"{name} (") == 1
        assert f"best linear row is {best_linear(level.scores)}" in text


def test_what_is_written_says_simulated_and_names_what_failed(compared):
    comparison, out = compared
    names = {path.name for path in out.iterdir()}
    per_level = ("predictions{}.h5", "scores{}.csv", "costs{}.csv")
    both = {name.format(suffix) for name in per_level for suffix in ("", "_parcels")}
    assert names == both | {"table.md", "report.html"}
    text = (out / "table.md").read_text()
    assert text == markdown(comparison)
    assert text.startswith("# SIMULATED · subj01")
    assert "lstm.yaml is missing: it diverged" in text
    page = (out / "report.html").read_text()
    assert "SIMULATED data" in page
    assert "lstm.yaml is missing: it diverged" in page
    assert page.count("<table") >= 5
    assert not re.search(r'(src|href)="(?!#|data:)', page), "the page needs nothing beside it"
    for suffix in ("", "_parcels"):
        scores = pd.read_csv(out / f"scores{suffix}.csv")
        costs = pd.read_csv(out / f"costs{suffix}.csv")
        assert scores["simulated"].all()
        facts = ["subject", "dataset", "simulated", "unit", "split", "weights"]
        assert list(costs.columns[:6]) == list(scores.columns[:6]) == facts
        assert costs["simulated"].all()
        assert (costs["unit"] == ("parcel" if suffix else "voxel")).all()
        assert set(costs["row"]) <= set(scores["row"])


def test_a_terminal_gets_every_row_with_scores_and_with_costs(compared):
    comparison, _ = compared
    stream = io.StringIO()
    show(comparison, Console(file=stream, width=180, no_color=True))
    text = stream.getvalue()
    assert text.count("SIMULATED · subj01") == 2
    for row in ("mean pattern", "linear probe (CLS)", "stage 1, network alone", "noise ceiling"):
        assert text.count(f"│ {row} ") == (4 if "probe" not in row else 2)
    assert "lstm.yaml is missing" in text.splitlines()[-1]


def test_without_a_ceiling_the_differences_are_of_r2(folder, voxels, tmp_path):
    units = replace(voxels.units, ncsnr=np.full(N_VOXELS, np.nan))
    file = replace(voxels, units=units, repeat_targets=None)
    comparison = compare(folder(gru=file), tmp_path / "out", n_boot=0)
    (level,) = comparison.levels
    assert f"R² − {best_linear(level.scores)}" in comparison_grid(level).columns
    assert len(findings(level)) == 1
