import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from chasm.data.session_moments import SessionMoments


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(1, 600), st.integers(0, 1000))
def test_moments_equal_numpy(n_trials, n_voxels, seed):
    rng = np.random.default_rng(seed)
    betas = rng.integers(-32768, 32768, (n_voxels, n_trials)).astype(np.int16)
    moments = SessionMoments.of(betas)
    assert moments.n == n_trials
    np.testing.assert_array_equal(moments.total, betas.sum(axis=1, dtype=np.int64))
    np.testing.assert_allclose(moments.mean, betas.mean(axis=1), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(moments.std, betas.std(axis=1, ddof=1), rtol=1e-12)


def test_moments_without_some_trials_are_those_of_the_others():
    betas = np.random.default_rng(0).integers(-900, 900, (300, 21)).astype(np.int16)
    left_out = np.arange(21) % 4 == 1
    rest = SessionMoments.of(betas).without(SessionMoments.of(betas[:, left_out]))
    expected = SessionMoments.of(betas[:, ~left_out])
    assert rest.n == expected.n == 21 - left_out.sum()
    for field in ("total", "squares", "mean", "std"):
        np.testing.assert_array_equal(getattr(rest, field), getattr(expected, field))


def test_sums_of_the_largest_values_are_exact():
    betas = np.full((2, 750), -32768, np.int16)
    betas[1, 17] = -32767  # one unit in one trial of a thousand times its value
    moments = SessionMoments.of(betas)
    assert moments.squares.tolist() == [750 * 32768**2, 749 * 32768**2 + 32767**2]
    assert moments.constant.tolist() == [True, False]
    np.testing.assert_allclose(moments.std[1], np.std([1] + [0] * 749, ddof=1), rtol=1e-12)


def test_zero_and_constant_voxels():
    betas = np.array([[0, 0, 0], [5, 5, 5], [-1, 1, 0], [0, 0, 1]], np.int16)
    moments = SessionMoments.of(betas)
    assert moments.zero.tolist() == [True, False, False, False]
    assert moments.constant.tolist() == [True, True, False, False]
