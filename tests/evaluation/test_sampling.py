"""Draws against repeats: plain loops, known distributions, and what is said of them."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from chasm.evaluation import tables
from chasm.evaluation.bootstrap import resample_counts
from chasm.evaluation.predictions import Draws
from chasm.evaluation.regions import make_regions
from chasm.evaluation.sampling import NO_USE, compare_spreads, finding, unit_variances
from chasm.evaluation.scores import score


def spreads(file, membership=None):
    """The comparison without intervals, over all units unless there is a membership."""
    regions = make_regions(file.units, membership or {})
    return compare_spreads(file, regions, np.zeros((0, file.n_images)))


def with_draws(file, n=5, seed=0):
    """A file with draws of uneven spread around its model's predictions."""
    rng = np.random.default_rng(seed)
    sd = rng.uniform(0.1, 0.8, file.target.shape)
    drawn = file.rows["stage 1"].values + sd * rng.normal(size=(n, *file.target.shape))
    return replace(file, draws=Draws(n, seed, drawn.mean(0), drawn.var(0, ddof=1)))


def known_world(ratio, n_draws, n_images=400, n_units=50, seed=0):
    """Repeats of noise variance 1 around zero, and draws of variance `ratio` around zero."""
    rng = np.random.default_rng(seed)
    repeats = rng.normal(size=(n_images, 3, n_units))
    drawn = np.sqrt(ratio) * rng.normal(size=(n_draws, n_images, n_units))
    return repeats, Draws(n_draws, seed, drawn.mean(0), drawn.var(0, ddof=1))


def file_of(predictions, repeats, draws):
    n_images, _, n_units = repeats.shape
    return replace(
        predictions(n_images, n_units, unit="voxel", membership={}, targets={}),
        repeat_targets=repeats,
        target=repeats.mean(1),
        draws=draws,
    )


@pytest.mark.parametrize("mixed", [False, True])
def test_spreads_agree_with_plain_loops(predictions, mixed):
    file = with_draws(predictions(unit="voxel", mixed=mixed))
    frame = spreads(file, file.membership).set_index(["atlas", "region"])
    factor = stats.t(df=4).ppf(0.975) * np.sqrt(1 + 1 / 5)
    within, freedom, inside, held = np.zeros(40), 0, np.zeros(40), 0
    for image, k in enumerate(file.repeats):
        trials = file.repeat_targets[image, :k]
        freedom += k - 1
        held += k
        if k > 1:
            within += (k - 1) * trials.var(axis=0, ddof=1)
        half = factor * np.sqrt(file.draws.variance[image])
        for trial in trials:
            inside += np.abs(trial - file.draws.mean[image]) <= half
    repeated, covered = within / freedom, inside / held
    drawn = file.draws.variance.mean(axis=0)
    noise = 1 / (1 + file.units.ncsnr**2)
    for key, weights in (
        (("", "all"), np.ones(40)),
        (("streams", "Early"), file.membership["streams"].counts[:, 0]),
        (("prf-visualrois", "V1v"), file.membership["prf-visualrois"].counts[:, 0]),
    ):
        line = frame.loc[key]
        mean = {name: np.average(v, weights=weights) for name, v in (
            ("d", drawn), ("r", repeated), ("n", noise), ("c", covered))}  # fmt: skip
        assert line["draw_variance"] == pytest.approx(mean["d"])
        assert line["repeat_variance"] == pytest.approx(mean["r"])
        assert line["noise_variance"] == pytest.approx(mean["n"])
        assert line["ratio"] == pytest.approx(mean["d"] / mean["r"])
        assert line["noise_ratio"] == pytest.approx(mean["d"] / mean["n"])
        assert line["coverage"] == pytest.approx(mean["c"])
    for found, expected in zip(unit_variances(file), (drawn, repeated), strict=True):
        np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("n_draws", [2, 5, 20])
def test_draws_like_the_repeats_cover_them_as_promised(predictions, n_draws):
    file = file_of(predictions, *known_world(1.0, n_draws))
    line = spreads(file).iloc[0]
    assert line["ratio"] == pytest.approx(1, abs=0.03)
    assert line["coverage"] == pytest.approx(0.95, abs=0.005)


@pytest.mark.parametrize("ratio", [0.04, 0.5, 3.0])
def test_narrow_and_wide_draws_cover_what_theory_says(predictions, ratio):
    n = 10
    file = file_of(predictions, *known_world(ratio, n))
    line = spreads(file).iloc[0]
    assert line["ratio"] == pytest.approx(ratio, rel=0.03)
    # Repeat minus mean of draws has variance 1 + ratio / n, over s: a scaled Student t.
    reach = stats.t(n - 1).ppf(0.975) * np.sqrt(ratio * (1 + 1 / n) / (1 + ratio / n))
    assert line["coverage"] == pytest.approx(1 - 2 * stats.t(n - 1).sf(reach), abs=0.006)


def test_a_collapsed_latent_covers_nothing(predictions):
    file = predictions(unit="voxel")
    values = file.rows["stage 1"].values
    file = replace(file, draws=Draws(20, 0, values, np.zeros_like(values)))
    line = spreads(file).iloc[0]
    assert (line["draw_variance"], line["ratio"], line["coverage"]) == (0, 0, 0)
    said = finding(spreads(file))
    assert "variance of draws is 0 %" in said
    assert said.endswith(NO_USE)
    assert NO_USE not in finding(spreads(with_draws(file)))
    scores = score(file, n_boot=100)
    assert "0.0 % of the single presentations lie where 95 % of draws do" in tables.markdown(scores)


def test_intervals_are_those_of_resampled_images(predictions):
    file = with_draws(predictions(unit="voxel", mixed=True))
    counts = resample_counts(file.n_images, 100, seed=1)
    frame = compare_spreads(file, make_regions(file.units, {}), counts)
    ratios, coverages = [], []
    for count in counts.astype(int):
        images = np.repeat(np.arange(file.n_images), count)
        part = replace(
            file, image_id=np.arange(len(images)), repeats=file.repeats[images],
            target=file.target[images], repeat_targets=file.repeat_targets[images], rows={},
            targets={}, draws=Draws(5, 0, file.draws.mean[images], file.draws.variance[images]),
        )  # fmt: skip
        line = spreads(part).iloc[0]
        ratios.append(line["ratio"])
        coverages.append(line["coverage"])
    for name, samples in (("ratio", ratios), ("coverage", coverages)):
        low, high = np.quantile(samples, [0.025, 0.975])
        assert frame[f"{name}_low"].iloc[0] == pytest.approx(low)
        assert frame[f"{name}_high"].iloc[0] == pytest.approx(high)
        assert low < frame[name].iloc[0] < high


def test_without_draws_or_repeats_there_is_nothing_to_compare(predictions):
    file = predictions(unit="voxel")
    assert spreads(file) is None
    assert spreads(replace(with_draws(file), repeat_targets=None)) is None
    assert tables.draws_grid(score(file, n_boot=0)) is None


def test_images_shown_once_have_no_spread_but_can_be_covered(predictions):
    file = with_draws(predictions(unit="voxel", max_repeats=1))
    line = spreads(file).iloc[0]
    assert np.isnan(line["repeat_variance"])
    assert np.isnan(line["ratio"])
    assert 0 < line["coverage"] < 1
    assert "of that of repeats" not in finding(line.to_frame().T)


def test_parcel_means_have_no_noise_variance_from_the_ncsnr(predictions):
    file = with_draws(predictions(unit="parcel"))
    line = spreads(file).iloc[0]
    assert np.isnan(line["noise_variance"])
    assert np.isfinite(line["ratio"])


def test_the_table_shows_groups_and_says_what_draws_are(predictions):
    scores = score(with_draws(predictions(unit="voxel")), n_boot=100)
    grid = tables.draws_grid(scores)
    assert [line.label for line in grid.lines] == ["all", "Early", "Mid", "Higher"]
    assert "not the noise of a measurement" in grid.note
    faint = replace(file_draws := with_draws(predictions(unit="voxel")), draws=replace(
        file_draws.draws, variance=1e-6 * file_draws.draws.variance))  # fmt: skip
    small = spreads(faint)["ratio"].iloc[0]
    assert tables.draws_grid(score(faint, n_boot=0)).lines[0].cells[3] == f"{small:.1e}"
    line = scores.spreads.iloc[0]
    cells = grid.lines[0].cells
    assert cells[0] == f"{line['draw_variance']:.3g}"
    assert cells[3].value == line["ratio"]
    assert (cells[5].value, cells[5].low) == (line["coverage"], line["coverage_low"])
