from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

import ablations.worlds_gated as gated
from ablations.effects import effects
from ablations.values import TestSet
from ablations.worlds import EARLY, HIGHER, Sizes, make_layout, make_world, region_keys
from ablations.worlds_encoders import (
    coalition_values,
    derangements,
    estimated_ceiling,
    fit_additive,
    fit_interacting,
    population_r2,
    token_kernels,
    world_test_set,
)
from ablations.worlds_null import (
    NullWorlds,
    asymmetry_of,
    null_layout,
    null_p,
    null_worlds,
    subject_sizes,
)
from chasm.errors import DataError
from chasm.evaluation.regions import Region
from chasm.models.kernels import linear_kernels

SIZES = Sizes(
    n_train=120, n_test=100, n_population=900, n_repeated=300,
    n_categories=4, n_scenes=3, side=3, n_channels=2, n_voxels=12,
)  # fmt: skip


def make(share=(0.8, 0.3), ceiling=(0.5, 0.3), sizes=SIZES, seed=0, **options):
    rng = np.random.default_rng(seed)
    layout = make_layout(share, ceiling, sizes.n_voxels, sizes.repeats, rng)
    return make_world(layout, sizes, rng, **options)


@pytest.fixture(scope="module")
def world():
    return make()


def test_the_planted_shares_are_exact(world):
    local, global_ = world.parts["local"], world.parts["global"]
    share = np.repeat([0.8, 0.3], 4 * 12)
    np.testing.assert_allclose(local.var(axis=0), share, rtol=1e-10)
    np.testing.assert_allclose(global_.var(axis=0), 1 - share, rtol=1e-10)
    np.testing.assert_allclose((local + global_).var(axis=0), 1, rtol=1e-10)
    gist = world.cls[:, 0].astype(float)
    np.testing.assert_allclose(gist.T @ local, 0, atol=1e-2)  # float32 tokens
    assert np.abs(gist.T @ global_).max() > 100


def test_a_multiplicative_part_is_orthogonal_and_has_its_share():
    for kind in ("product", "gain"):
        parts = make(interaction=0.3, multiplicative=kind).parts
        local, global_, product = (parts[k] for k in ("local", "global", "interaction"))
        np.testing.assert_allclose(product.var(axis=0), 0.3, rtol=1e-10)
        np.testing.assert_allclose((product * local).mean(axis=0), 0, atol=1e-10)
        np.testing.assert_allclose(sum(parts.values()).var(axis=0), 1, rtol=0.2)
        assert np.all((local + global_).var(axis=0) == pytest.approx(0.7))


def test_ceilings_are_those_of_the_layout():
    many = replace(SIZES, n_train=10, n_test=3000, n_population=0, n_repeated=0)
    world = make(sizes=many)
    medians = [np.median(world.ceiling[r.members]) for r in world.layout.regions()]
    np.testing.assert_allclose(medians, [0.5] * 4 + [0.3] * 4, atol=0.02)
    np.testing.assert_allclose(estimated_ceiling(world), world.ceiling, atol=0.09)
    assert np.mean(estimated_ceiling(world) - world.ceiling) == pytest.approx(0, abs=0.02)
    trials = world.trials[world.trials_of(world.test)]
    np.testing.assert_allclose(trials.var(axis=0), 1, atol=0.12)


def test_noise_is_correlated_over_the_sheet_and_has_a_part_common_to_a_trial():
    world = make(
        ceiling=(0.0, 0.0), sizes=replace(SIZES, n_test=4000, n_population=0, n_repeated=0)
    )
    found = np.corrcoef(world.trials, rowvar=False)
    assert found[0, 1] == pytest.approx(0.9 * np.exp(-1.8 / 4) + 0.1, abs=0.03)
    assert found[0, -1] == pytest.approx(0.1, abs=0.03)


def explained(values, by):
    x = np.column_stack([by, np.ones(len(by))])
    left = values - x @ np.linalg.lstsq(x, values, rcond=None)[0]
    return 1 - left.var(axis=0) / values.var(axis=0)


def test_a_leak_puts_the_gist_into_the_patches():
    world = make(leak=0.6)
    gist, patches = world.cls[:, 0].astype(float), world.patches.astype(float)
    assert patches.shape[1:] == (9, 3)
    by_channel = explained(patches.reshape(len(gist), -1), gist).reshape(9, 3)
    np.testing.assert_allclose(by_channel[:, :2], 0, atol=1e-6)
    np.testing.assert_allclose(by_channel[:, 2], 0.36, atol=0.08)


def test_mean_responses_are_means_over_trials(world):
    rows = world.train[[3, 7]]
    expected = [world.trials[world.image == row].mean(axis=0) for row in rows]
    np.testing.assert_allclose(world.mean_response(rows), expected)
    assert set(np.bincount(world.image)[world.train]) == {1, 2, 3}


def test_no_image_is_its_own_donor():
    donor = derangements(9, 20, np.random.default_rng(0))
    assert donor.shape == (8, 9)  # there are no more shifts
    assert not (donor == np.arange(9)).any()
    assert all(sorted(row) == list(range(9)) for row in donor)


def with_mean(world, stream, rows):
    """The same world, one stream's tokens at their train mean in some images."""
    tokens = getattr(world, stream).copy()
    tokens[rows] = tokens[world.train].mean(axis=0)
    return replace(world, **{stream: tokens})


@pytest.mark.parametrize("fit", [fit_additive, fit_interacting])
def test_coalitions_are_predictions_from_tokens_at_their_train_mean(world, fit):
    rng = np.random.default_rng
    clean = fit(world, 3, rng(0))
    rest = np.concatenate([world.test, world.population])
    for gone, kept in (("cls", "local"), ("patches", "global")):
        ablated = fit(with_mean(world, gone, rest), 3, rng(0))
        np.testing.assert_allclose(ablated.test["both"], clean.test[kept], atol=1e-4)
        np.testing.assert_allclose(ablated.population["both"], clean.population[kept], atol=1e-4)
    np.testing.assert_allclose(clean.test["none"], np.broadcast_to(
        world.mean_response(world.train).mean(axis=0), clean.test["none"].shape), atol=0.1
    )  # fmt: skip


@pytest.mark.parametrize("fit", [fit_additive, fit_interacting])
def test_interchange_is_the_prediction_from_tokens_of_two_images(world, fit):
    rng = np.random.default_rng
    clean = fit(world, 2, rng(0))
    cls = world.cls.copy()
    cls[world.test] = cls[world.test[clean.donor[1]]]
    swapped = fit(replace(world, cls=cls), 2, rng(0))
    np.testing.assert_allclose(clean.interchange[1], swapped.test["both"], atol=1e-4)


def test_the_product_kernel_is_that_of_products_of_features(world):
    from ablations.worlds_encoders import _product

    kernels = token_kernels(world)
    cls, patches = (
        (x - x[world.train].mean(axis=0)) / x[world.train].std(axis=0)
        for x in (t.reshape(len(world.cls), -1).astype(float) for t in (world.cls, world.patches))
    )
    features = np.einsum("na,nb->nab", cls, patches).reshape(len(cls), -1)
    train = features[world.train] @ features[world.train].T
    found = _product(kernels["cls"], kernels["patches"], 1)
    np.testing.assert_allclose(found.train, train / np.diagonal(train).mean(), atol=1e-4)
    assert found.n_features == features.shape[1]
    # Not what standardising the products themselves would give: the mean must stay where it is.
    own = linear_kernels(features.astype(np.float32), world.train)
    assert np.abs(own.train - found.train).max() > 0.01


def test_population_r2_is_that_of_many_noisy_images(world):
    encoder = fit_additive(world, 0, np.random.default_rng(0))
    mean = world.mean_response(world.train).mean(axis=0)
    found = population_r2(world, encoder.population, mean)
    rng = np.random.default_rng(1)
    signal = world.expected(world.population)
    noise = np.sqrt(1 / (1 + world.layout.q) / 3)
    y = signal + noise * rng.normal(size=(40, *signal.shape))
    for name in ("local", "both"):
        error = np.square(y - encoder.population[name]).sum(axis=(0, 1))
        expected = 1 - error / np.square(y - mean).sum(axis=(0, 1))
        np.testing.assert_allclose(found[name], expected, atol=0.03)


def test_a_gated_world_gives_total_and_direct_effects(world, monkeypatch):
    monkeypatch.setattr(gated, "STEPS", 12)
    found = gated.fit_gated(world, np.random.default_rng(0))
    np.testing.assert_array_equal(found.predictions["both"], found.held["both"])
    assert np.abs(found.predictions["local"] - found.held["local"]).max() > 1e-4
    constant = found.predictions["none"]
    np.testing.assert_allclose(constant, np.broadcast_to(constant[:1], constant.shape), atol=1e-5)


# Null worlds.


def make_subject(n_units=40, **changes):
    rng = np.random.default_rng(0)
    weights = np.zeros((3, n_units))
    weights[0, :20], weights[1, 15:30], weights[2, 30:] = 5, 3, 1
    fields = {
        "subject": "subj01", "dataset": "toy", "simulated": True, "unit": "parcel",
        "target": rng.normal(size=(20, n_units)), "train_mean": np.zeros(n_units),
        "ceiling": rng.uniform(0.2, 0.5, n_units), "n_boot": 0,
        "regions": tuple(
            Region(f"R{i}", "roi", "a", w, np.flatnonzero(w)) for i, w in enumerate(weights)
        ),
        "early": ("a:R0", "a:gone"), "higher": ("a:R1", "a:R2"),
    }  # fmt: skip
    return TestSet(**(fields | changes))


def layout_of(subject, **sizes):
    return null_layout(
        subject.ceiling, subject.regions, subject.early, subject.higher,
        replace(SIZES, **sizes), np.random.default_rng(0),
    )  # fmt: skip


def test_null_worlds_take_the_ceilings_of_the_subject():
    subject = make_subject()
    layout, early, higher = layout_of(subject, n_voxels=100)
    np.testing.assert_array_equal(np.bincount(layout.region), [20, 10, 10])  # no unit twice
    assert early == ("simulated:a R0",)
    assert higher == ("simulated:a R1", "simulated:a R2")
    ceiling = layout.q / (layout.q + 1 / 3)
    for index, units in enumerate((slice(0, 20), slice(20, 30), slice(30, 40))):
        np.testing.assert_allclose(
            np.sort(ceiling[layout.region == index]), np.sort(subject.ceiling[units])
        )
    assert len(layout_of(subject, n_voxels=4)[0].q) == 12


def test_null_worlds_need_ceilings_in_both_sets():
    ceiling = np.where(np.arange(40) < 15, np.nan, 0.3)
    ceiling[15:20] = 0
    with pytest.raises(DataError, match="early or higher regions without a unit"):
        layout_of(make_subject(ceiling=ceiling))


def test_null_worlds_depend_on_their_seed_only():
    small = replace(SIZES, n_population=0, n_repeated=0, n_train=150, n_test=60)
    subject = make_subject()
    one, two = (null_worlds(subject, small, n, 3) for n in (2, 1))
    first, second = one.asymmetry["ceiling"]
    assert first == two.asymmetry["ceiling"][0]
    assert abs(first - second) > 0


def test_p_against_null_worlds_is_uniform_under_the_null_at_any_level():
    rng = np.random.default_rng(0)

    def draw(level):
        return 0.3 * level**2 - 0.2 * level + 0.05 * rng.normal(size=np.shape(level))

    p = []
    for _ in range(300):
        x = rng.uniform(-0.9, 0.9, 40)
        null = NullWorlds(x, {"ceiling": draw(x)})
        p.append(null.p_values(0.7, {"ceiling": float(draw(0.7))})["ceiling"])
    assert stats.kstest(p, "uniform").pvalue > 0.01
    at_zero = null.p_values(0.7, {"ceiling": 0.3 * 0.49 - 0.14 + 0.3})
    assert at_zero["ceiling"] < 1e-3


def test_no_p_without_enough_worlds_or_an_estimate():
    x = np.linspace(-1, 1, 19)
    few = NullWorlds(x, {"ceiling": x**2})
    assert np.isnan(few.p_values(0.0, {"ceiling": 1.0})["ceiling"])
    x = np.linspace(-1, 1, 30)
    enough = NullWorlds(x, {"ceiling": np.sin(50 * x)})
    assert np.isnan(enough.p_values(0.0, {"ceiling": np.nan})["ceiling"])
    assert np.isfinite(enough.p_values(0.0, {"ceiling": 0.5})["ceiling"])


def test_null_worlds_are_as_large_as_the_subject_but_not_larger_than_those_calibrated():
    small = subject_sizes(n_train=100, n_test=50, n_repeated=120, repeats=1)
    assert (small.n_train, small.n_test, small.n_repeated, small.repeats) == (100, 50, 0, 2)
    huge = subject_sizes(n_train=9000, n_test=1000, n_repeated=10_000, repeats=3)
    assert (huge.n_train, huge.n_test, huge.n_repeated) == (400, 515, 9000)


def test_the_p_of_a_claim_is_the_largest_over_scales(world):
    test = world_test_set(world, region_keys(EARLY), region_keys(HIGHER), n_boot=0, seed=0)
    values = coalition_values(fit_additive(world, 0, np.random.default_rng(0)))
    frame = effects([values], test, permutations=0).frame
    level, asymmetry = asymmetry_of(frame)
    assert np.isfinite([level, *asymmetry.values()]).all()
    x = np.linspace(-1, 1, 60)
    spread = {"ceiling": 0.01, "share": 10.0, "matched": 0.01}
    null = NullWorlds(x, {scale: width * np.sin(99 * x) for scale, width in spread.items()})
    p = null.p_values(level, asymmetry)
    assert p["ceiling"] < 0.001
    assert p["share"] > 0.5
    assert null_p(null, frame) == p["share"]
    missing = replace(null, asymmetry={**null.asymmetry, "matched": np.full(60, np.nan)})
    assert null_p(missing, frame) is None


def test_the_test_set_says_that_it_is_simulated(world):
    found = world_test_set(world, region_keys(EARLY), region_keys(HIGHER), n_boot=0, seed=0)
    assert found.simulated
    assert [r.name for r in found.regions] == [*EARLY, *HIGHER]
    np.testing.assert_allclose(found.target, world.mean_response(world.test))
