from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chasm import metrics
from chasm.errors import ConfigError
from chasm.evaluation.bootstrap import (
    TargetSums,
    image_means,
    interval,
    resample_counts,
    unit_scores,
)
from chasm.evaluation.predictions import PredictionRow
from chasm.evaluation.regions import weighted_mean, weighted_median
from chasm.evaluation.scores import score


def test_counts_are_resamples_with_replacement():
    counts = resample_counts(37, 4000, seed=5)
    assert counts.shape == (4000, 37)
    assert (counts.sum(axis=1) == 37).all()
    # Each image is drawn Binomial(37, 1/37) times.
    assert counts.mean() == pytest.approx(1.0)
    assert counts.var() == pytest.approx(36 / 37, rel=0.02)
    np.testing.assert_array_equal(counts, resample_counts(37, 4000, seed=5))
    assert not np.array_equal(counts, resample_counts(37, 4000, seed=6))


@pytest.mark.parametrize("n_boot", [-1, 1, 99])
def test_too_few_resamples_are_refused(predictions, n_boot):
    with pytest.raises(ConfigError, match=r"--n-boot: .*0 for no intervals or at least 100"):
        score(predictions(), n_boot=n_boot)


def naive_resamples(prediction, target, train_mean, counts, pearson):
    """Gather the images of every resample and score every unit in plain loops."""
    r, r2, error = (np.zeros((len(counts), target.shape[1])) for _ in range(3))
    for b, count in enumerate(counts.astype(int)):
        images = np.repeat(np.arange(len(count)), count)
        for u in range(target.shape[1]):
            y, p = target[images, u], prediction[images, u]
            r[b, u] = pearson(y, p)
            r2[b, u] = 1 - np.sum((y - p) ** 2) / np.sum((y - train_mean[u]) ** 2)
            error[b, u] = np.mean((y - p) ** 2)
    return r, r2, error


def test_sums_equal_a_naive_loop_over_resamples(naive_pearson):
    rng = np.random.default_rng(0)
    target = rng.normal(3.0, 1.0, (41, 7))
    prediction = 0.6 * target + rng.normal(100.0, 0.7, (41, 7))
    train_mean = rng.normal(3.0, 0.1, 7)
    counts = resample_counts(41, 60, seed=1)
    found = unit_scores(prediction, TargetSums(target, train_mean), counts)
    expected = naive_resamples(prediction, target, train_mean, counts, naive_pearson)
    for values, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(values, reference, rtol=1e-9, atol=1e-9)


def test_one_resample_of_every_image_is_the_metric_itself():
    rng = np.random.default_rng(1)
    target, prediction = rng.normal(size=(2, 50, 9))
    prediction[:, 2] = 4.0
    target[:, 5] = -1.5
    mean = rng.normal(0, 0.2, 9)
    found = unit_scores(prediction, TargetSums(target, mean), np.ones((1, 50)))
    p, y = torch.from_numpy(prediction), torch.from_numpy(target)
    np.testing.assert_allclose(found.correlation[0], metrics.voxelwise_correlation(p, y))
    np.testing.assert_allclose(found.r2[0], metrics.r2(p, y, torch.from_numpy(mean)))
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(found.correlation[0])), [2, 5])


def test_image_means_leave_nan_images_out():
    values = np.array([1.0, np.nan, 4.0, 7.0])
    counts = np.array([[1, 1, 1, 1], [2, 2, 0, 0], [0, 4, 0, 0], [0, 0, 1, 3]], dtype=float)
    np.testing.assert_allclose(image_means(values, counts), [4.0, 1.0, np.nan, 6.25])


def test_interval_is_the_percentile_interval():
    samples = np.random.default_rng(0).normal(size=(999, 3))
    low, high = interval(samples)
    np.testing.assert_allclose(low, np.quantile(samples, 0.025, axis=0))
    np.testing.assert_allclose(high, np.quantile(samples, 0.975, axis=0))
    assert all(np.isnan(part).all() for part in interval(samples[:0]))


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    seed=st.integers(0, 1000),
    with_nan=st.booleans(),
)
def test_weighted_aggregates_equal_repeated_units(weights, seed, with_nan):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 6, (3, len(weights))).astype(float)
    if with_nan:
        values[1, rng.integers(len(weights))] = np.nan
    w = np.array(weights, dtype=float)
    median = weighted_median(values, w)
    mean = weighted_mean(values, w[:, None])[:, 0]
    for sample, found_median, found_mean in zip(values, median, mean, strict=True):
        repeated = np.repeat(sample, weights)
        repeated = repeated[np.isfinite(repeated)]
        if len(repeated) == 0:
            assert np.isnan([found_median, found_mean]).all()
        else:
            assert found_median == np.median(repeated)
            assert found_mean == pytest.approx(np.mean(repeated))


def test_paired_differences_use_the_same_resamples(predictions):
    """Two rows that differ by nothing differ by exactly nothing in every resample."""
    file = predictions()
    twin = type(file.rows["ridge"])(file.rows["ridge"].values, "model")
    file.rows["twin"] = twin
    frame = score(file, n_boot=100).frame
    part = frame[(frame["row"] == "twin") & frame["value"].notna() & (frame["kind"] == "model")]
    assert (part["best_baseline"] == "ridge").all()
    assert (part[["difference", "difference_low", "difference_high"]].to_numpy() == 0).all()


def test_intervals_cover_the_truth(predictions):
    """Of 100 samples of 120 images, about 95 % of the intervals hold the true score.

    The truth is the score on 5,000 images of the same world.
    """
    rng = np.random.default_rng(0)
    n_units = 12
    gain = rng.uniform(0.3, 0.9, n_units)
    mixing = rng.normal(size=(4, n_units)) / 2
    names = ["pattern_correlation", "noise_normalised_r2", "voxelwise_correlation_mean", "mse"]
    template = predictions(
        n_units=n_units, unit="voxel", membership={}, targets={}, rows={}, repeat_targets=None
    )

    def scored(n_images, n_boot, seed):
        shared = rng.normal(size=(n_images, 4)) @ mixing
        file = replace(
            template,
            image_id=np.arange(n_images),
            repeats=np.full(n_images, 3),
            target=gain * shared + np.sqrt(1 - gain**2) * rng.normal(size=shared.shape),
            train_mean=np.zeros(n_units),
            rows={
                "model": PredictionRow(
                    0.7 * gain * (shared + 0.5 * rng.normal(size=shared.shape)), "model"
                )
            },
        )
        frame = score(file, n_boot=n_boot, seed=seed).frame
        return frame[frame["row"] == "model"].set_index("metric").loc[names]

    truth = scored(5_000, 0, 0)["value"]
    hits = np.zeros(len(names))
    for run in range(100):
        table = scored(120, 300, run)
        hits += (table["low"] <= truth) & (truth <= table["high"])
    coverage = dict(zip(names, hits / 100, strict=True))
    # Binomial(100, .95) has a standard error of .022.
    assert all(0.88 <= value <= 1 for value in coverage.values()), coverage
