import numpy as np
import pytest
import torch
from scipy import stats

from chasm import metrics, noise_ceiling
from chasm.evaluation import patterns
from chasm.evaluation.bootstrap import resample_counts
from chasm.evaluation.catalogue import METRICS
from chasm.evaluation.predictions import Membership, PredictionRow
from chasm.evaluation.regions import make_regions
from chasm.evaluation.scores import score


def value(scores, row, metric, region="all", target="target", column="value", atlas=None):
    frame = scores.frame
    part = frame[
        (frame["row"] == row)
        & (frame["metric"] == metric)
        & (frame["region"] == region)
        & (frame["target"] == target)
    ]
    if atlas is not None:
        part = part[part["atlas"] == atlas]
    assert len(part) == 1
    return part[column].iloc[0]


def repeated(values, weights):
    """One entry per voxel: the brute-force reading of voxel weights."""
    return np.repeat(values, weights)


@pytest.mark.parametrize("mixed", [False, True])
def test_unit_metrics_agree_with_scipy_voxel_by_voxel(predictions, mixed):
    file = predictions(mixed=mixed)
    scores = score(file, n_boot=0)
    prediction = file.rows["stage 1"].values
    r = np.array(
        [stats.pearsonr(p, y)[0] for p, y in zip(prediction.T, file.target.T, strict=True)]
    )
    sse = np.sum((file.target - prediction) ** 2, axis=0)
    r2 = 1 - sse / np.sum((file.target - file.train_mean) ** 2, axis=0)
    nc = file.units.ncsnr**2 / (file.units.ncsnr**2 + np.mean(1 / file.repeats))
    early = file.membership["streams"].counts[:, 0]
    mid = file.membership["streams"].counts[:, 1:4].sum(axis=1)
    v1 = file.membership["prf-visualrois"].counts[:, 0]
    for region, weights in (
        ("all", file.units.size), ("Early", early), ("Mid", mid), ("V1v", v1),
    ):  # fmt: skip
        expected = {
            "voxelwise_correlation_mean": repeated(r, weights).mean(),
            "voxelwise_correlation_median": np.median(repeated(r, weights)),
            "r2": repeated(r2, weights).mean(),
            "noise_normalised_r2": repeated(r2, weights).sum() / repeated(nc, weights).sum(),
            "noise_normalised_signed_r2": repeated(np.sign(r) * r**2, weights).sum()
            / repeated(nc, weights).sum(),
            "mse": repeated(sse, weights).mean() / file.n_images,
        }
        for metric, number in expected.items():
            assert value(scores, "stage 1", metric, region) == pytest.approx(number, rel=1e-9)
        ceiling = repeated(nc, weights)
        assert value(scores, "noise ceiling", "r2", region) == pytest.approx(ceiling.mean())
        found = value(scores, "noise ceiling", "voxelwise_correlation_mean", region)
        assert found == pytest.approx(np.sqrt(ceiling).mean())
        assert value(scores, "noise ceiling", "noise_normalised_r2", region) == 1
        noise = repeated(file.target.var(axis=0) * (1 - nc), weights).mean()
        assert value(scores, "noise ceiling", "mse", region) == pytest.approx(noise)
        assert value(scores, "ridge", "r2", region, column="mean_nc") == pytest.approx(
            ceiling.mean()
        )
        assert value(scores, "ridge", "r2", region, column="n_voxels") == weights.sum()
        variance = repeated(file.target.var(axis=0), weights).mean()
        found = value(scores, "ridge", "mse", region, column="target_variance")
        assert found == pytest.approx(variance)


def test_pattern_metrics_agree_with_scipy_image_by_image(predictions):
    file = predictions()
    scores = score(file, n_boot=0)
    prediction = file.rows["ridge"].values
    higher = file.membership["streams"].counts[:, 4:].sum(axis=1) > file.units.size / 2
    for region, units in (("all", slice(None)), ("Higher", higher)):
        plain, centred = [], []
        for p, y in zip(prediction, file.target, strict=True):
            mean = file.train_mean[units]
            plain.append(stats.pearsonr(p[units], y[units])[0])
            centred.append(stats.pearsonr(p[units] - mean, y[units] - mean)[0])
        found = value(scores, "ridge", "pattern_correlation", region)
        assert found == pytest.approx(np.mean(plain), rel=1e-9)
        found = value(scores, "ridge", "pattern_correlation_centred", region)
        assert found == pytest.approx(np.mean(centred), rel=1e-9)
    assert np.isnan(value(scores, "ridge", "pattern_correlation", "V1v"))
    assert np.isnan(value(scores, "ridge", "identification_top1", "Higher"))


def naive_identification(prediction, target):
    """Rank every image's prediction in a plain loop (no ties)."""
    n = len(target)
    ranks = []
    for i in range(n):
        r = [stats.pearsonr(target[i], prediction[j])[0] for j in range(n)]
        ranks.append(sum(other > r[i] for other in r))
    ranks = np.array(ranks)
    return (ranks < 1).astype(float), (ranks < 5).astype(float), 1 - ranks / (n - 1)


def test_identification_equals_a_naive_ranking_and_the_metric(predictions):
    file = predictions(n_images=25)
    prediction = file.rows["linear probe (CLS)"].values
    found = patterns.identification_scores(prediction, file.target)
    for values, expected in zip(
        found.values(), naive_identification(prediction, file.target), strict=True
    ):
        np.testing.assert_allclose(values, expected)
    whole = metrics.identification(torch.tensor(prediction), torch.tensor(file.target))
    for key, name in (("top1", "top1"), ("top5", "top5"), ("two_way", "two_way")):
        assert np.mean(found[f"identification_{name}"]) == pytest.approx(whole[key])


def test_identification_leaves_constant_patterns_out_and_is_at_chance_without_the_image(
    predictions,
):
    file = predictions(n_images=20)
    prediction = file.rows["ridge"].values.copy()
    prediction[3] = 0.5
    found = patterns.identification_scores(prediction, file.target)
    whole = metrics.identification(torch.tensor(prediction), torch.tensor(file.target))
    assert np.isnan(found["identification_top1"]).sum() == whole["excluded"] == 1
    assert np.nanmean(found["identification_two_way"]) == pytest.approx(whole["two_way"])
    blind = patterns.identification_scores(np.tile(file.train_mean, (20, 1)), file.target)
    assert np.mean(blind["identification_top1"]) == pytest.approx(1 / 20)
    assert np.mean(blind["identification_top5"]) == pytest.approx(5 / 20)
    assert np.mean(blind["identification_two_way"]) == pytest.approx(0.5)


def test_the_mean_pattern_scores_nothing_but_pattern_correlation(predictions):
    scores = score(predictions(), n_boot=100)
    assert value(scores, "mean pattern", "pattern_correlation") > 0.05
    assert value(scores, "mean pattern", "r2") == 0
    assert value(scores, "mean pattern", "noise_normalised_r2") == 0
    for metric in ("pattern_correlation_centred", "voxelwise_correlation_mean"):
        assert np.isnan(value(scores, "mean pattern", metric))
    left_out = value(scores, "mean pattern", "voxelwise_correlation_mean", column="left_out")
    assert left_out == 40
    assert value(scores, "mean pattern", "pattern_correlation_centred", column="left_out") == 60


@pytest.mark.parametrize("mixed", [False, True])
def test_pattern_ceiling_is_that_of_the_library(predictions, mixed):
    file = predictions(mixed=mixed)
    scores = score(file, n_boot=200)
    expected = noise_ceiling.pattern_ceiling(file.repeat_targets)
    assert value(scores, "noise ceiling", "pattern_correlation") == pytest.approx(expected)
    low = value(scores, "noise ceiling", "pattern_correlation", column="low")
    high = value(scores, "noise ceiling", "pattern_correlation", column="high")
    assert low < expected < high


def test_constant_units_are_counted_and_left_out(predictions):
    file = predictions()
    prediction = file.rows["stage 1"].values.copy()
    prediction[:, :3] = 0.25
    rows = {"stage 1": PredictionRow(prediction, "model")}
    changed, whole = (
        score(predictions(rows=r), n_boot=100) for r in (rows, {"stage 1": file.rows["stage 1"]})
    )
    assert value(changed, "stage 1", "voxelwise_correlation_mean", column="left_out") == 3
    assert value(changed, "stage 1", "r2", column="left_out") == 0
    weights = file.units.size[3:]
    r = whole.unit_correlation["stage 1"][3:]
    expected = np.average(r, weights=weights)
    assert value(changed, "stage 1", "voxelwise_correlation_mean") == pytest.approx(expected)
    assert np.isfinite(value(changed, "stage 1", "voxelwise_correlation_mean", column="low"))


def test_noise_normalised_scores_use_only_units_above_the_threshold(predictions):
    file = predictions()
    nc = file.units.ncsnr**2 / (file.units.ncsnr**2 + 1 / 3)
    chosen = nc > 0.5
    assert 0 < chosen.sum() < len(nc)
    scores = score(file, n_boot=0, nc_threshold=0.5)
    r2, weights = scores.unit_r2["ridge"], file.units.size
    expected = np.sum((weights * r2)[chosen]) / np.sum((weights * nc)[chosen])
    assert value(scores, "ridge", "noise_normalised_r2") == pytest.approx(expected)


def test_without_a_ceiling_nothing_is_normalised(predictions):
    file = predictions()
    units = type(file.units)(file.units.size, np.full(40, np.nan), file.units.position)
    scores = score(predictions(units=units, repeat_targets=None), n_boot=100)
    assert "noise ceiling" not in set(scores.frame["row"])
    assert np.isnan(value(scores, "stage 1", "noise_normalised_r2"))
    # The best baseline is then the one with the best R².
    assert (scores.frame["best_baseline"] == "ridge").all()


def test_alternative_targets_have_their_own_mean_and_no_borrowed_ceiling(predictions):
    file = predictions()
    scores = score(file, n_boot=100)
    assert list(scores.frame["target"].unique()) == ["target", "top_p"]
    other = file.targets["top_p"]
    expected = np.mean(np.average((other.values - other.train_mean) ** 2, axis=0, weights=None)
                       @ file.units.size) / file.units.size.sum()  # fmt: skip
    assert value(scores, "mean pattern", "mse", target="top_p") == pytest.approx(expected)
    assert np.isnan(value(scores, "ridge", "noise_normalised_r2", target="top_p"))
    assert "noise ceiling" not in set(scores.frame.loc[scores.frame["target"] == "top_p", "row"])


def test_rows_fitted_to_a_target_are_scored_there_and_only_there(predictions):
    """An offset between two targets must not count as an error of a row fitted to each."""
    from dataclasses import replace

    file = predictions()
    ridge = file.rows["ridge"]
    own = replace(ridge, values=ridge.values + 0.2, trained_on="top_p")
    top_p = replace(file.targets["top_p"], rows={"ridge": own})
    plain, fitted = (
        score(replace(file, targets={"top_p": target}), n_boot=100)
        for target in (file.targets["top_p"], top_p)
    )
    for metric in ("r2", "mse"):
        main = value(plain, "ridge", metric)
        assert value(fitted, "ridge", metric) == main
        assert value(fitted, "ridge", metric, target="top_p") == pytest.approx(main)
        # The probe was not fitted to the target, so it carries the offset of .2 as an error.
        own, borrowed = (
            value(fitted, "linear probe (CLS)", metric, target=t) for t in ("target", "top_p")
        )
        assert abs(own - borrowed) > 0.01
    assert value(fitted, "ridge", "r2", target="top_p", column="trained_on") == "top_p"
    assert value(fitted, "ridge", "r2", column="trained_on") == "target"
    assert value(fitted, "mean pattern", "r2", target="top_p", column="trained_on") == "top_p"


def test_the_mean_pattern_is_the_best_baseline_where_no_other_beats_it(predictions):
    file = predictions()
    rows = {
        "ridge": PredictionRow(-2 * file.rows["ridge"].values, "baseline"),
        "stage 1": file.rows["stage 1"],
    }
    for kept in (rows, {"stage 1": rows["stage 1"]}):
        scores = score(predictions(rows=kept), n_boot=100)
        assert (scores.frame["best_baseline"] == "mean pattern").all()
        found = value(scores, "stage 1", "r2", column="difference")
        assert found == value(scores, "stage 1", "r2")
        assert np.isnan(
            value(scores, "stage 1", "pattern_correlation_centred", column="difference")
        )


def with_component(file):
    """The model's earlier stage beside it: worse, and no baseline."""
    model = file.rows["stage 1"].values
    noise = 0.3 * np.random.default_rng(9).normal(size=model.shape)
    rows = {"stage 2": PredictionRow(model, "model"), "ridge": file.rows["ridge"],
            "stage 1, expanded": PredictionRow(1.2 * model + noise, "component")}  # fmt: skip
    return rows


def test_a_model_is_compared_with_its_component_on_the_same_resamples(predictions):
    file = predictions(targets={})
    rows = with_component(file)
    scores = score(predictions(targets={}, rows=rows), n_boot=100, seed=5)
    frame = scores.frame
    assert list(frame["row"].unique()) == [
        "mean pattern", "ridge", "stage 1, expanded", "stage 2", "noise ceiling",
    ]  # fmt: skip
    assert set(frame.loc[frame["row"] == "stage 1, expanded", "kind"]) == {"component"}
    assert (frame["best_baseline"] == "ridge").all()
    assert set(zip(scores.gains["row"], scores.gains["other"], strict=True)) == {
        ("stage 2", "stage 1, expanded")
    }
    line = scores.gains.query("metric == 'mse' and region == 'all'").iloc[0]
    counts = resample_counts(60, 100, 5)
    errors = [np.square(rows[name].values - file.target) @ file.units.size / file.units.size.sum()
              for name in ("stage 2", "stage 1, expanded")]  # fmt: skip
    samples = counts @ (errors[0] - errors[1]) / 60
    assert line["difference"] == pytest.approx(np.mean(errors[0] - errors[1]))
    low, high = np.quantile(samples, [0.025, 0.975])
    assert (line["difference_low"], line["difference_high"]) == pytest.approx((low, high))


def test_without_a_component_there_is_no_gain(predictions):
    scores = score(predictions(), n_boot=0)
    assert scores.gains.empty
    assert "difference" in scores.gains


def test_the_mask_is_no_roi(predictions):
    file = predictions()
    counts = file.units.size[:, None]
    for inside, expected in ((counts, 0), (counts - (np.arange(40) == 3)[:, None], 1)):
        mask = Membership(inside, ("nsdgeneral",))
        regions = make_regions(file.units, {**file.membership, "nsdgeneral": mask})
        assert sum(region.atlas == "nsdgeneral" for region in regions) == expected


def test_ideal_observer_is_at_one_within_its_interval():
    """The noise-free signal as prediction explains all that can be explained."""
    from dataclasses import replace

    rng = np.random.default_rng(4)
    n_images, n_units = 400, 60
    ncsnr = rng.uniform(0.3, 1.5, n_units)
    signal_variance = ncsnr**2 / (1 + ncsnr**2)
    signal = rng.normal(size=(n_images, n_units)) * np.sqrt(signal_variance)
    noise = rng.normal(size=(n_images, 3, n_units)) * np.sqrt(1 - signal_variance)
    trials = signal[:, None] + noise
    from chasm.evaluation.predictions import PredictionFile, RunInfo, Units

    file = PredictionFile(
        image_id=np.arange(n_images),
        repeats=np.full(n_images, 3),
        target=trials.mean(axis=1),
        train_mean=np.zeros(n_units),
        rows={"ideal": PredictionRow(signal, "model")},
        units=Units(np.ones(n_units, int), ncsnr, np.full((n_units, 3), np.nan)),
        info=RunInfo("s", "d", True, "voxel", "clean"),
        repeat_targets=trials,
    )
    scores = score(file, n_boot=300)
    low, high = (value(scores, "ideal", "noise_normalised_r2", column=c) for c in ("low", "high"))
    assert low < 1 < high
    assert high - low < 0.1
    ceiling = value(scores, "noise ceiling", "pattern_correlation")
    assert value(scores, "ideal", "pattern_correlation") == pytest.approx(ceiling, abs=0.01)
    shuffled = replace(file, rows={"ideal": PredictionRow(signal[::-1].copy(), "model")})
    assert value(score(shuffled, n_boot=0), "ideal", "noise_normalised_r2") < -0.5


def test_regions_follow_the_voxels(predictions):
    file = predictions()
    empty = Membership(np.zeros((40, 1), int), ("FFA-2",))
    regions = make_regions(file.units, {**file.membership, "floc-faces": empty})
    by_name = {(region.atlas, region.name): region for region in regions}
    assert ("floc-faces", "FFA-2") not in by_name
    assert [region.name for region in regions[:4]] == ["all", "Early", "Mid", "Higher"]
    groups = sum(by_name["streams", name].n_voxels for name in ("Early", "Mid", "Higher"))
    assert groups == by_name["", "all"].n_voxels == file.units.size.sum()
    counts = file.membership["streams"].counts
    mid = counts[:, 1] + counts[:, 2] + counts[:, 3]
    np.testing.assert_array_equal(by_name["streams", "Mid"].weights, mid)
    np.testing.assert_array_equal(
        by_name["streams", "Mid"].members, np.flatnonzero(2 * mid > file.units.size)
    )
    plain = make_regions(file.units, {})
    assert [region.name for region in plain] == ["all"]


def test_every_row_has_every_metric_and_scoring_is_deterministic(predictions):
    file = predictions()
    first, second = (score(file, n_boot=100, seed=3).frame for _ in range(2))
    assert first.equals(second)
    part = first[(first["target"] == "target") & (first["region"] == "all")]
    assert set(part["metric"]) == set(METRICS)
    assert list(part["row"].unique()) == [
        "mean pattern", "ridge", "linear probe (CLS)", "stage 1", "noise ceiling",
    ]  # fmt: skip
    model = part[part["row"] == "stage 1"]
    assert ((model["low"] <= model["value"]) & (model["value"] <= model["high"])).all()
    difference = value_of = model.set_index("metric")
    ridge = part[part["row"] == "ridge"].set_index("metric")
    np.testing.assert_allclose(difference["difference"], value_of["value"] - ridge["value"])
