"""Few images of a new subject: cells, curves, tables, sentences, figure."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge

from chasm.errors import ConfigError
from chasm.evaluation.aggregate import ScoredTarget, bootstrap_tables, image_scores_of
from chasm.evaluation.bootstrap import TargetSums, resample_counts
from chasm.evaluation.prediction_parts import RunInfo
from chasm.evaluation.published import PUBLISHED_TRANSFER, TRANSFER_NOTE
from chasm.evaluation.regions import make_regions
from chasm.evaluation.transfer import METRICS, Cell, Scorer
from chasm.evaluation.transfer_arms import ARMS, FeatureTable, SolvedArms, check_arms
from chasm.evaluation.transfer_page import curve_figure, render_curve
from chasm.evaluation.transfer_rows import WITHIN, TransferRow, TransferTable, render
from chasm.evaluation.transfer_rows import findings as row_findings
from chasm.evaluation.transfer_rows import markdown as row_markdown
from chasm.evaluation.transfer_tables import Curve, curve_frame, draws_frame, findings, markdown
from chasm.models.kernels import linear_kernels
from chasm.training.sources import fit_head

N_BOOT = 200


def cell(arm, n, draw, value, shift=0.0, seed=0):
    """A cell whose every metric is `value`, its resamples spread by .01 around it."""
    noise = np.random.default_rng(seed).normal(0, 0.01, N_BOOT) + shift
    return Cell(
        arm, n, draw, 10 * n,
        dict.fromkeys(METRICS, value), dict.fromkeys(METRICS, value + noise),
    )  # fmt: skip


def curve(cells, **changes):
    info = RunInfo("subj07", "nsd", True, "voxel", "clean", "weight-free", "few", "pyramid")
    fields = {
        "cells": tuple(cells), "ceiling": dict.fromkeys(METRICS, 0.9), "target_variance": 0.4,
        "info": info, "sources": ("subj01", "subj02"), "n_images": 50, "n_boot": N_BOOT, "seed": 0,
    }  # fmt: skip
    return Curve(**(fields | changes))


@pytest.fixture
def cells():
    """The ridge head far above, then like, then below ridge; LoRA with one draw only."""
    values = {20: (0.05, 0.15), 100: (0.20, 0.20), 800: (0.40, 0.30)}
    found = []
    for n, (ridge, head) in values.items():
        for draw in (0, 1):
            found.append(cell("ridge", n, draw, ridge + 0.02 * draw, seed=1))
            found.append(cell("ridge_head", n, draw, head + 0.02 * draw, seed=2 + draw))
        found.append(cell("lora", n, 0, ridge, seed=1))
    blind = cell("mean_pattern", 20, 0, 0.0)
    blind.points["voxelwise_correlation_mean"] = np.nan  # it is constant over images
    blind.samples["voxelwise_correlation_mean"][:] = np.nan
    return [*found, blind]


def test_a_cell_comes_back_from_its_file_and_a_damaged_one_does_not(tmp_path, caplog):
    path = tmp_path / "cells" / "ridge-20-0.npz"
    assert Cell.read(path) is None
    first = cell("ridge", 20, 3, 0.25)
    first.write(path)
    again = Cell.read(path)
    assert (again.arm, again.n, again.draw, again.n_trained) == ("ridge", 20, 3, 200)
    assert again.points == first.points
    for key in METRICS:
        np.testing.assert_array_equal(again.samples[key], first.samples[key])
    assert not caplog.records
    path.write_bytes(path.read_bytes()[:-200])
    assert Cell.read(path) is None
    assert "damaged" in caplog.text


def test_draws_are_averaged_before_images_are_resampled(cells):
    frame = curve_frame(cells).set_index(["arm", "n", "metric"])
    line = frame.loc["ridge_head", 20, "r2"]
    assert line["value"] == pytest.approx(0.16)
    assert line["draws"] == 2
    assert line["sd_draws"] == pytest.approx(np.std([0.15, 0.17], ddof=1))
    own = [c.samples["r2"] for c in cells if (c.arm, c.n) == ("ridge_head", 20)]
    np.testing.assert_allclose(line[["low", "high"]].astype(float),
                               np.percentile((own[0] + own[1]) / 2, [2.5, 97.5]))  # fmt: skip
    other = [c.samples["r2"] for c in cells if (c.arm, c.n) == ("ridge", 20)]
    change = ((own[0] - other[0]) + (own[1] - other[1])) / 2
    np.testing.assert_allclose(line[["difference_low", "difference_high"]].astype(float),
                               np.percentile(change, [2.5, 97.5]))  # fmt: skip
    assert line["difference"] == pytest.approx(0.1)
    assert np.isnan(frame.loc["ridge", 20, "r2"]["difference"])


def test_an_arm_with_fewer_draws_is_compared_over_the_draws_that_both_have(cells):
    line = curve_frame(cells).set_index(["arm", "n", "metric"]).loc["lora", 100, "r2"]
    # Its value is that of ridge in draw 0; ridge's mean over both draws is .01 higher.
    assert line["difference"] == pytest.approx(0.0, abs=1e-12)
    assert (line["draws"], line["difference_draws"]) == (1, 1)
    assert np.isnan(line["sd_draws"])


def test_the_sentences_say_where_an_adapter_is_above_below_or_beside_ridge(cells):
    text = " ".join(findings(curve(cells)))
    assert "Ridge head is above ridge from scratch at N = 20 (+0.100)" in text
    assert "below ridge from scratch at N = 800 (-0.100)" in text
    assert "not told apart from ridge from scratch at N = 100 (+0.000)" in text
    assert "By voxelwise correlation (mean): Ridge head is above ridge from scratch at N" in text
    assert "LoRA is not told apart from ridge from scratch" in text
    assert "banded" not in text
    swapped = [
        cell({"ridge": "ridge_head", "ridge_head": "ridge"}.get(c.arm, c.arm), c.n, c.draw,
             c.points["r2"], seed=5 + c.draw)
        for c in cells
    ]  # fmt: skip
    assert "Ridge head is above ridge from scratch at N = 800" in " ".join(findings(curve(swapped)))
    with_banded = [*cells, *(cell("banded_ridge", 20, d, 0.3, seed=d) for d in (0, 1))]
    text = " ".join(findings(curve(with_banded)))
    assert "Ridge head is below banded ridge from scratch at N = 20 (-0.140)" in text
    assert "LoRA is below banded" not in text  # it is nowhere above ridge


def test_tables_and_page_hold_every_arm_the_ceiling_and_the_word_simulated(cells):
    shown = curve(cells, left_out=(3000,), failed={"LoRA, 20 images, draw 1": "it <diverged>"})
    text = markdown(shown)
    assert "# SIMULATED" in text
    assert "0.160 ± 0.014 [0.1" in text
    assert "| noise ceiling | 0.900 |" in text
    assert "N = 3000." in text
    assert "LoRA, 20 images, draw 1 is missing: it <diverged>" in text
    page = render_curve(shown, "<svg></svg>", {"source": "ab12"})
    assert "it &lt;diverged&gt;" in page
    assert page.count("SIMULATED") >= 2
    assert "<svg" in page
    assert "ab12" in page
    real = curve(cells, info=RunInfo("subj07", "nsd", False, "voxel", "clean"))
    assert "SIMULATED" not in render_curve(real, "", {}) + markdown(real)


def test_the_figure_has_a_line_per_arm_and_names_a_ceiling_out_of_sight(cells):
    figure = curve_figure(curve(cells))
    assert "SIMULATED" in figure.get_suptitle()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [ARMS[arm].label for arm in ("mean_pattern", "ridge", "ridge_head", "lora")]
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert "0.90 ↑" in axes.texts[0].get_text()
    near = curve_figure(curve(cells, ceiling=dict.fromkeys(METRICS, 0.5))).axes[0]
    assert any(np.allclose(line.get_ydata(), 0.5) for line in near.get_lines())


def test_without_intervals_and_without_a_ceiling_there_are_still_tables(cells):
    bare = [Cell(c.arm, c.n, c.draw, 1, c.points, dict.fromkeys(METRICS, np.empty(0)))
            for c in cells]  # fmt: skip
    shown = curve(bare, ceiling=dict.fromkeys(METRICS, np.nan), n_boot=0)
    assert shown.metric == "r2"
    text = markdown(shown)
    assert "No intervals" in text
    assert "Explained variance R²" in text
    assert "nan" not in text.lower()
    assert len(curve_figure(shown).axes) == 3


def test_draws_frame_has_every_cell(cells):
    frame = draws_frame(cells)
    assert len(frame) == len(cells) * len(METRICS)
    assert set(frame.columns) >= {"arm", "n", "draw", "metric", "value"}


class Fixed(Scorer):
    """A scorer of given responses, without a subject."""

    def __init__(self, target, train, units, ncsnr):
        self.responses, self.seed = train, 0
        self.target = ScoredTarget(
            "target", target, train.mean(0), ncsnr**2 / (ncsnr**2 + 1 / 3),
            np.full(len(target), 3), None, make_regions(units, {}), 0.0,
        )  # fmt: skip
        self._sums = TargetSums(target, train.mean(0))
        self.counts = resample_counts(len(target), N_BOOT, 0)


def test_scores_of_a_cell_are_those_of_their_definitions(predictions, naive_pearson):
    file = predictions(unit="voxel")
    train = np.random.default_rng(3).normal(file.train_mean, 1, (30, file.n_units))
    scorer = Fixed(file.target, train, file.units, file.units.ncsnr)
    values = file.rows["stage 1"].values
    found = scorer.score("head", 30, 1, 77, values)
    y, mean = file.target, train.mean(0)
    r2 = 1 - ((y - values) ** 2).sum(0) / ((y - mean) ** 2).sum(0)
    assert found.points["noise_normalised_r2"] == pytest.approx(
        r2.sum() / scorer.target.ceiling.sum()
    )
    r = [naive_pearson(values[:, v], y[:, v]) for v in range(file.n_units)]
    assert found.points["voxelwise_correlation_median"] == pytest.approx(np.median(r))
    patterns = [naive_pearson(a, b) for a, b in zip(values, y, strict=True)]
    assert found.points["pattern_correlation"] == pytest.approx(np.mean(patterns))
    centred = [naive_pearson(a - mean, b - mean) for a, b in zip(values, y, strict=True)]
    assert found.points["pattern_correlation_centred"] == pytest.approx(np.mean(centred))
    assert found.points["mse"] == pytest.approx(((y - values) ** 2).mean())
    images = {"head": image_scores_of(values, scorer.target)}
    resampled = bootstrap_tables({"head": values}, images, scorer.target, scorer.counts)["head"]
    for key in METRICS:
        np.testing.assert_allclose(found.samples[key], resampled[key][:, 0])
        assert found.samples[key].shape == (N_BOOT,)
    scorer.counts = scorer.counts[:0]
    assert scorer.score("head", 30, 1, 77, values).samples["r2"].shape == (0,)
    scorer.counts = resample_counts(len(y), N_BOOT, 0)
    # The same resamples for every arm: a better prediction wins in nearly all of them.
    worse = scorer.score("ridge", 30, 1, 77, file.rows["linear probe (CLS)"].values)
    assert (found.samples["r2"] > worse.samples["r2"]).mean() > 0.95


@pytest.fixture
def regression():
    """Tokens of 60 images, a source's features of the last 50, responses to 30 of these."""
    rng = np.random.default_rng(0)
    tokens = {"cls": rng.normal(size=(60, 1, 6)), "patches": rng.normal(size=(60, 4, 3))}
    spaces = {name: rng.normal(size=(50, width)) for name, width in
              (("global", 5), ("local", 9), ("responses", 7))}  # fmt: skip
    weights = rng.normal(size=(7, 8))
    responses = spaces["responses"][:30] @ weights + rng.normal(size=(30, 8))
    return tokens, spaces, responses.astype(np.float32)


def test_ridge_head_is_ridge_on_the_features_of_the_source(regression):
    tokens, spaces, responses = regression
    ids = np.arange(10, 60)
    arms = SolvedArms(tokens, FeatureTable(ids, spaces), ids[:30], responses, ids[30:], seed=0)
    values, n_weights = arms.predict("ridge_head")
    assert n_weights == 8 * (1 + 5 + 9 + 7)
    kernels = {s: linear_kernels(v, np.arange(30), np.arange(30, 50)) for s, v in spaces.items()}
    fitted = fit_head(kernels, responses, seed=0)
    assert fitted.shares_[:, 2].min() > 0  # the responses were made from those of the source
    # With the chosen shares and penalties, scikit-learn's ridge gives the same, voxel by voxel.
    for unit in range(8):
        parts = []
        for (_, x), share in zip(spaces.items(), fitted.shares_[unit], strict=True):
            z = (x - x[:30].mean(0)) / x[:30].std(0)
            parts.append(np.sqrt(share / x.shape[1]) * z)
        z = np.concatenate(parts, axis=1)
        ridge = Ridge(alpha=float(fitted.alpha_[unit])).fit(z[:30], responses[:, unit])
        np.testing.assert_allclose(values[:, unit], ridge.predict(z[30:]), atol=1e-3)


def test_scratch_arms_never_see_the_source(regression):
    tokens, spaces, responses = regression
    ids = np.arange(10, 60)
    poisoned = {name: np.full_like(values, np.nan) for name, values in spaces.items()}
    arms = SolvedArms(tokens, FeatureTable(ids, poisoned), ids[:30], responses, ids[30:], seed=0)
    for arm in ("ridge", "banded_ridge", "mean_pattern"):
        values, _ = arms.predict(arm)
        assert values.shape == (20, 8)
        assert np.isfinite(values).all()
    np.testing.assert_allclose(values, np.tile(responses.mean(0), (20, 1)), atol=1e-6)


def test_arms_are_known_ones_in_their_order():
    assert check_arms(["lora", "mean_pattern"]) == ("mean_pattern", "ridge", "lora")
    with pytest.raises(ConfigError, match=r"--arms: there is no arm 'ridgehead'\. Use some of"):
        check_arms(["ridgehead"])


def table(**changes):
    info = RunInfo("subj07", "nsd", True, "voxel", "clean", "weight-free", "table", "pyramid")

    def row(sources, arms, target="subj07"):
        cells = {arm: cell(arm, 800, 0, value, seed=i) for i, (arm, value) in enumerate(arms)}
        return TransferRow(sources, target, cells, dict.fromkeys(METRICS, 0.9), 0.4, 50, info)

    scratch = [("mean_pattern", 0.0), ("ridge", 0.2)]
    rows = (
        row(("subj01",), [*scratch, ("ridge_head", 0.35), ("head", 0.1)]),
        row(("subj01", "subj02"), [*scratch, ("head", 0.2)]),
        row(("subj07",), [*scratch, (WITHIN, 0.3)]),
    )  # fmt: skip
    return TransferTable(rows, N_BOOT, **changes)


def test_the_transfer_table_has_published_values_that_are_not_to_be_ranked():
    text = row_markdown(table(failed={"subj01 → subj05": "no"}))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    labels = [line.split("|")[1].strip(" *") for line in lines]
    assert labels[1:] == [
        "subj07: mean pattern",
        "subj07: ridge from scratch",
        "subj01 → subj07: ridge head",
        "subj01 → subj07: trained head",
        "subj01, subj02 → subj07: trained head",
        "subj07 alone (within subject)",
        "subj07: noise ceiling",
    ]
    assert lines[3].rstrip("| ").endswith("–")  # the paper has no ridge head
    assert ".436 · .294" in lines[4]
    assert ".451 · .239" in lines[-2]
    assert "Never to be ranked" in text
    assert "SIMULATED" in text.splitlines()[0]
    assert "subj01 → subj05 is missing: no" in text
    assert TRANSFER_NOTE in render(table())
    assert len(PUBLISHED_TRANSFER) == 5


def test_the_sentences_of_the_transfer_table_follow_its_numbers():
    above, below, beside = row_findings(table())
    assert "subj01 → subj07: ridge head (+0.150)" in above
    assert "within subject" in above
    assert "subj01 → subj07: trained head (-0.100)" in below
    assert "subj01, subj02 → subj07: trained head (+0.000)" in beside


def test_the_tidy_table_reads_back(tmp_path):
    from chasm.evaluation.report import write_facts
    from chasm.evaluation.transfer_rows import transfer_frame

    made = table()
    write_facts(transfer_frame(made), made.rows[0].info, tmp_path / "scores.csv")
    found = pd.read_csv(tmp_path / "scores.csv")
    assert found["simulated"].all()
    heads = found[(found["arm"] == "head") & (found["metric"] == "pattern_correlation")]
    assert heads["published"].tolist() == [".436 · .294", ".448 · .269"]
