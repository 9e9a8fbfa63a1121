import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from ablations.effects import effects
from ablations.matching import MIN_UNITS, match_ceilings


def weights_of(sizes):
    """(units, regions) for regions that follow each other."""
    membership = np.repeat(np.arange(len(sizes)), sizes)
    return (membership[:, None] == np.arange(len(sizes))).astype(float)


def draw(sizes, means, seed=0):
    """Ceilings around each region's mean, with the spread of real ones."""
    rng = np.random.default_rng(seed)
    snr = np.concatenate([
        mean / (1 - mean) * np.exp(rng.normal(0, 0.8, size))
        for size, mean in zip(sizes, means, strict=True)
    ])  # fmt: skip
    return snr / (1 + snr)


def test_matched_regions_have_one_distribution():
    sizes, means = [700, 300, 120, 200], [0.37, 0.31, 0.15, 0.12]
    ceiling, weights = draw(sizes, means), weights_of(sizes)
    found = match_ceilings(ceiling, weights, "abcd")
    assert found.reason == ""
    assert ((found.weights > 0) <= (weights > 0)).all()
    assert (found.weights <= 1).all()
    drawn = np.random.default_rng(0).uniform(size=found.weights.shape) < found.weights
    samples = [ceiling[column] for column in drawn.T]
    before = [ceiling[column > 0] for column in weights.T]
    assert ks_2samp(before[0], before[3]).pvalue < 1e-20
    for sample in samples[1:]:
        assert ks_2samp(samples[0], sample).statistic < 0.2
    np.testing.assert_allclose(np.ptp(np.average(
        np.repeat(ceiling[:, None], 4, axis=1), axis=0, weights=found.weights)), 0, atol=1e-9,
    )  # fmt: skip
    kish = found.weights.sum(axis=0) ** 2 / (found.weights**2).sum(axis=0)
    np.testing.assert_allclose(found.effective, kish)
    assert (found.effective < sizes).all()


def test_regions_that_match_already_keep_all_units():
    ceiling, weights = np.tile(np.linspace(0.1, 0.5, 40), 3), weights_of([40] * 3)
    found = match_ceilings(ceiling, weights * [1, 2, 5], "abc")
    np.testing.assert_allclose(found.weights, weights * [1, 2, 5])
    np.testing.assert_allclose(found.effective, 40)


def test_ceilings_that_are_all_the_same_match():
    found = match_ceilings(np.full(30, 0.3), weights_of([10, 20]), "ab")
    np.testing.assert_allclose(found.effective, [10, 20])


def test_ceilings_without_overlap_cannot_be_matched():
    ceiling = np.concatenate([np.linspace(0.3, 0.5, 50), np.linspace(0.05, 0.2, 50)])
    found = match_ceilings(ceiling, weights_of([50, 50]), "ab")
    assert found.reason == "the regions of the two sets have no noise ceilings in common"
    assert not found.weights.any()


def test_too_few_matched_units_are_named():
    ceiling = np.concatenate([np.linspace(0.1, 0.5, 60), [0.1, 0.3, 0.5]])
    found = match_ceilings(ceiling, weights_of([60, 3]), ["V1v", "tiny"])
    assert found.reason == "matching the noise ceilings leaves 3.0 units of tiny"


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=6),
    seed=st.integers(0, 10_000),
    coarse=st.booleans(),
)
def test_weights_are_a_thinning_of_the_regions(sizes, seed, coarse):
    rng = np.random.default_rng(seed)
    ceiling = draw(sizes, rng.uniform(0.1, 0.4, len(sizes)), seed)
    if coarse:
        ceiling = np.round(ceiling, 1)
    weights = weights_of(sizes) * rng.integers(1, 6, (sum(sizes), 1))
    ceiling = np.append(ceiling, np.nan)  # a unit in no region
    weights = np.append(weights, np.zeros((1, len(sizes))), axis=0)
    found = match_ceilings(ceiling, weights, [str(index) for index in range(len(sizes))])
    assert np.isfinite(found.weights).all()
    assert ((found.weights >= 0) & (found.weights <= weights + 1e-12)).all()
    if found.reason:
        assert not found.weights.any()
        return
    assert (found.effective >= MIN_UNITS).all()
    known = np.where(np.isfinite(ceiling), ceiling, 0)
    means = known @ found.weights / found.weights.sum(axis=0)
    np.testing.assert_allclose(means, means[0], atol=1e-9)


def test_matching_removes_a_difference_that_only_the_ceiling_makes(test_set, additive_values):
    """D of every unit depends on its ceiling alone, and early regions have higher ceilings."""
    sizes = [60] * 4
    ceiling = draw(sizes, [0.35, 0.35, 0.2, 0.2])
    test = test_set(n_images=100, n_units=240, ceiling=ceiling)
    local = ceiling**2 * (test.target - test.train_mean)
    frame = effects([additive_values(test, local, 0 * local)], test).frame
    asymmetry = frame[frame["quantity"] == "asymmetry"].set_index("scale")["value"]
    assert asymmetry["ceiling"] > 0.05
    assert abs(asymmetry["matched"]) < 0.1 * asymmetry["ceiling"]
    facts = frame[(frame["scale"] == "matched") & (frame["quantity"] == "v_both")]
    assert facts["mean_ceiling"].to_numpy() == pytest.approx(facts["mean_ceiling"].iloc[0])
    assert (facts.loc[facts["level"] == "roi", "n_units"] < 60).all()
