import numpy as np
import pytest
from scipy.stats import permutation_test

from ablations.effects import effects
from ablations.significance import adjust, sign_flip_p, sign_flips


def of_scipy(contrasts, **options):
    return permutation_test(
        (contrasts,), np.sum, permutation_type="samples", vectorized=True, **options
    ).pvalue


def test_every_pattern_of_signs_gives_the_p_of_scipy():
    contrasts = np.random.default_rng(0).normal(0.4, 1, (9, 5))
    signs = sign_flips(9, 512, seed=0)
    assert signs.shape == (512, 9)
    assert len(np.unique(signs, axis=0)) == 512
    np.testing.assert_allclose(sign_flip_p(contrasts, signs), of_scipy(contrasts))


def test_random_signs_approach_the_p_of_scipy():
    contrasts = np.random.default_rng(1).normal([0, 0.15, 0.3, -0.2], 1, (60, 4))
    p = sign_flip_p(contrasts, sign_flips(60, 20_000, seed=0))
    reference = of_scipy(contrasts, n_resamples=20_000, rng=np.random.default_rng(2), batch=500)
    error = 2 * np.sqrt(2 * reference * (1 - reference) / 20_000)
    assert (np.abs(p - reference) < 2 * error + 1e-4).all()


def test_no_p_below_one_over_the_permutations():
    contrasts = np.column_stack([np.full(40, 1.0), np.zeros(40), np.full(40, np.nan)])
    p = sign_flip_p(contrasts, sign_flips(40, 199, seed=0))
    np.testing.assert_allclose(p, [1 / 200, 1, np.nan])
    assert np.isnan(sign_flip_p(contrasts, sign_flips(40, 0, seed=0))).all()


def test_many_contrasts_are_tested_in_parts():
    contrasts = np.random.default_rng(0).normal(size=(8, 600))
    signs = sign_flips(8, 256, seed=0)
    whole = sign_flip_p(contrasts, signs)
    one_by_one = [sign_flip_p(column[:, None], signs)[0] for column in contrasts.T]
    np.testing.assert_array_equal(whole, one_by_one)


def test_p_is_uniform_where_nothing_is_planted():
    rng = np.random.default_rng(0)
    contrasts = rng.normal(size=(50, 2000)) * rng.uniform(0.1, 4, (50, 1))
    p = sign_flip_p(contrasts, sign_flips(50, 999, seed=1))
    for level in (0.05, 0.2, 0.5):
        assert np.mean(p <= level) == pytest.approx(level, abs=3 * np.sqrt(level / 2000))


def test_the_p_of_an_effect_is_that_of_its_images(test_set, values_of):
    """From squared errors per image, spelled out, by scipy."""
    test = test_set(n_images=10, ceiling=np.full(24, 0.5))
    one = values_of(test)
    frame = effects([one], test, permutations=1024).frame
    total = np.square(test.target - test.train_mean).sum(axis=0)
    errors = {key: np.square(test.target - value) for key, value in one.predictions.items()}
    contrast = {
        "specialisation": (errors["global"] - errors["local"]) / total,
        "necessity_local": (errors["global"] - errors["both"]) / total,
    }
    for quantity, per_unit in contrast.items():
        per_region = np.column_stack([per_unit[:, r.members].mean(axis=1) for r in test.regions])
        chosen = (frame["quantity"] == quantity) & (frame["scale"] == "ceiling")
        found = frame[chosen & (frame["level"] == "roi")]
        np.testing.assert_allclose(found["p"], of_scipy(per_region))
        np.testing.assert_allclose(found["value"], per_region.sum(axis=0) / 0.5)
    per_region = np.column_stack(
        [contrast["specialisation"][:, r.members].mean(axis=1) for r in test.regions]
    )
    early_less_higher = per_region[:, :2].mean(axis=1) - per_region[:, 2:].mean(axis=1)
    found = frame[(frame["quantity"] == "asymmetry") & (frame["scale"] == "ceiling")]
    np.testing.assert_allclose(found["p"], of_scipy(early_less_higher[:, None]))


def step_up(p):
    """Benjamini and Hochberg's procedure, written out."""
    p = np.asarray(p)
    order = np.argsort(p)
    q = p[order] * len(p) / np.arange(1, len(p) + 1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum.accumulate(q[::-1])[::-1]
    return np.minimum(adjusted, 1)


def test_q_is_over_rois_and_subjects_within_an_encoder(test_set, values_of):
    frames = []
    for subject in ("subj01", "subj02"):
        test = test_set(subject=subject, seed=int(subject[-1]))
        values = [values_of(test), values_of(test, encoder="ridge", model_class="linear", seed=5)]
        frames.append(effects(values, test, permutations=99).frame)
    joined = adjust(frames)
    assert len(joined) == sum(map(len, frames))
    assert set(joined["subject"]) == {"subj01", "subj02"}
    for encoder in ("stage 1", "ridge"):
        family = joined[
            (joined["encoder"] == encoder)
            & (joined["quantity"] == "specialisation")
            & (joined["scale"] == "ceiling")
            & (joined["level"] == "roi")
        ]
        assert len(family) == 8
        np.testing.assert_allclose(family["q"], step_up(family["p"]))
    assert joined.loc[joined["level"] != "roi", "q"].isna().all()
    assert joined.loc[(joined["level"] == "roi") & joined["p"].notna(), "q"].notna().all()
