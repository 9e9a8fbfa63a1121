import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chasm.noise_ceiling import (
    RepeatAccumulator,
    RunningMoments,
    ncsnr,
    noise_ceiling,
    pattern_ceiling,
    repeat_groups,
    unit_ncsnr,
)


def simulate(n_images, repeats, snr, seed=0):
    """Trials of variance 1 whose signal-to-noise ratio is known."""
    rng = np.random.default_rng(seed)
    snr = np.asarray(snr)
    image_ids = rng.permutation(np.repeat(np.arange(n_images), repeats))
    signal = rng.normal(size=(n_images, len(snr))) * snr
    noise = rng.normal(size=(len(image_ids), len(snr)))
    return (signal[image_ids] + noise) / np.sqrt(1 + snr**2), image_ids


def naive_ncsnr(betas, image_ids, k):
    noise = np.mean(
        [
            np.var(betas[image_ids == i], axis=0, ddof=1)
            for i in np.unique(image_ids)
            if (image_ids == i).sum() == k
        ],
        axis=0,
    )
    return np.sqrt(np.maximum(0, 1 - noise) / noise)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_groups_hold_every_trial_once_and_with_its_image(ids):
    groups = repeat_groups(ids)
    trials = np.concatenate([g.ravel() for g in groups.values()])
    assert sorted(trials) == list(range(len(ids)))
    for k, group in groups.items():
        for row in group:
            assert len(row) == k == ids.count(ids[row[0]])
            assert {ids[t] for t in row} == {ids[row[0]]}
            assert list(row) == sorted(row)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_ncsnr_is_the_published_formula(k):
    betas, ids = simulate(40, np.random.default_rng(1).integers(1, 5, 40), [0.2, 0.5, 1.0])
    np.testing.assert_allclose(ncsnr(betas, ids, k), naive_ncsnr(betas, ids, k), rtol=1e-12)


def test_ncsnr_recovers_the_truth():
    truth = np.array([0.3, 0.6, 1.2])
    betas, ids = simulate(6000, 3, truth)
    np.testing.assert_allclose(ncsnr(betas, ids), truth, rtol=0.06)
    np.testing.assert_allclose(unit_ncsnr(betas * [5, 0.1, 2] + 7, ids), truth, rtol=0.06)


def test_unit_ncsnr_with_mixed_repeats_is_unbiased_and_free_of_scale():
    counts = np.random.default_rng(3).integers(1, 4, 8000)
    betas, ids = simulate(8000, counts, [0.8], seed=4)
    estimate = unit_ncsnr(betas, ids)
    np.testing.assert_allclose(estimate, 0.8, rtol=0.06)
    np.testing.assert_allclose(unit_ncsnr(betas * 30 - 4, ids), estimate, rtol=1e-9)


def test_without_repeats_there_is_no_ncsnr():
    betas, ids = np.random.default_rng(0).normal(size=(20, 2)), np.arange(20)
    assert np.isnan(ncsnr(betas, ids)).all()
    assert np.isnan(ncsnr(betas, ids, None)).all()
    assert np.isnan(unit_ncsnr(betas, ids)).all()
    with pytest.raises(ValueError, match="at least 2"):
        ncsnr(betas, ids, 1)


def test_pure_noise_has_no_signal():
    rng = np.random.default_rng(5)
    repeats = rng.normal(size=(500, 3, 4))
    repeats -= repeats.mean(axis=1, keepdims=True)  # images do not differ at all
    assert (unit_ncsnr(repeats.reshape(-1, 4), np.repeat(np.arange(500), 3)) == 0).all()


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_moments_do_not_depend_on_the_blocks(sizes, seed):
    rows = np.random.default_rng(seed).normal(3, 2, size=(sum(sizes), 4))
    moments = RunningMoments(4)
    for part in np.split(rows, np.cumsum(sizes)[:-1]):
        moments.update(part)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-10)
    if len(rows) > 1:
        np.testing.assert_allclose(moments.variance, rows.var(0, ddof=1), rtol=1e-10)
    else:
        assert np.isnan(moments.variance).all()


def test_accumulator_in_blocks_equals_whole():
    values = np.random.default_rng(0).normal(size=(30, 3, 5))
    whole, parts = RepeatAccumulator(5), RepeatAccumulator(5)
    whole.update(values)
    for part in np.array_split(values, 7):
        parts.update(part)
    parts.update(values[:0])
    np.testing.assert_allclose(parts.noise_variance, whole.noise_variance, rtol=1e-12)
    np.testing.assert_allclose(parts.signal_variance, whole.signal_variance, rtol=1e-12)
    assert parts.n_images == 30


def test_noise_ceiling_formulas():
    snr = np.array([0.0, 0.5, 2.0, np.nan, np.inf])
    expected = np.array([0, 0.25 / (0.25 + 1 / 3), 4 / (4 + 1 / 3), np.nan, 1])
    np.testing.assert_allclose(noise_ceiling(snr, 3), expected)
    n1, n2, n3 = 4, 2, 5
    repeats = [1] * n1 + [2] * n2 + [3] * n3
    mixed = (n1 / 1 + n2 / 2 + n3 / 3) / (n1 + n2 + n3)
    np.testing.assert_allclose(
        noise_ceiling(snr[1:3], repeats), snr[1:3] ** 2 / (snr[1:3] ** 2 + mixed)
    )
    with pytest.raises(ValueError, match="repeat"):
        noise_ceiling(snr, [3, 0])


def test_noise_ceiling_is_the_correlation_of_the_truth():
    rng = np.random.default_rng(8)
    signal = rng.normal(size=200_000) * 0.7
    mean = signal + rng.normal(size=(3, 200_000)).mean(0)
    assert np.corrcoef(signal, mean)[0, 1] ** 2 == pytest.approx(noise_ceiling(0.7, 3), abs=5e-3)


def test_pattern_ceiling_is_reached_by_the_truth():
    rng = np.random.default_rng(2)
    signal = rng.normal(size=(60, 1, 3000)) * 0.6
    repeats = signal + rng.normal(size=(60, 3, 3000))
    repeats[:20, 2] = np.nan
    repeats[:5, 1] = np.nan
    reached = [
        np.corrcoef(s[0], np.nanmean(r, axis=0))[0, 1] for s, r in zip(signal, repeats, strict=True)
    ]
    assert pattern_ceiling(repeats) == pytest.approx(np.mean(reached), abs=0.01)


def test_pattern_ceiling_by_hand():
    rng = np.random.default_rng(4)
    values = rng.normal(size=(5, 1, 30)) + rng.normal(size=(5, 3, 30))
    pairs = [np.corrcoef(v[a], v[b])[0, 1] for v in values for a, b in ((0, 1), (0, 2), (1, 2))]
    rho = np.mean(pairs)
    assert pattern_ceiling(values) == pytest.approx(np.sqrt(3 * rho / (1 + 2 * rho)), rel=1e-10)


def test_pattern_ceiling_at_its_limits():
    rng = np.random.default_rng(0)
    pattern = rng.normal(size=(4, 1, 20))
    assert pattern_ceiling(np.repeat(pattern, 2, axis=1)) == pytest.approx(1)
    assert pattern_ceiling(np.concatenate([pattern, -pattern], axis=1)) == 0
    assert np.isnan(pattern_ceiling(pattern))


def test_pattern_ceiling_leaves_out_units_with_nan():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 1, 20)) + rng.normal(size=(6, 2, 20))
    broken = values.copy()
    broken[2, 1, 7] = np.nan
    assert pattern_ceiling(broken) == pytest.approx(pattern_ceiling(np.delete(values, 7, axis=2)))
