import numpy as np
import pytest
from sklearn.linear_model import Ridge

from chasm.errors import ConfigError, DataError
from chasm.models.baselines import (
    LinearEncoder,
    baseline_kernels,
    fit_to_kernels,
    image_folds,
)
from chasm.models.kernels import linear_kernels


def fit_afresh(tokens, train, test, targets):
    return fit_to_kernels(baseline_kernels(tokens, train, test), targets, train)


def make_world(n_train=80, n_test=30, n_units=6, seed=0, noise=0.5):
    """CLS drives the first half of the units, the patches drive the second half."""
    rng = np.random.default_rng(seed)
    n = n_train + n_test + 5
    cls = rng.normal(2.0, 3.0, (n, 2, 4)).astype(np.float16)
    patches = rng.normal(-1.0, 0.5, (n, 9, 3)).astype(np.float16)
    half = n_units // 2
    flat_cls = cls.reshape(n, -1).astype(float)
    flat_patches = patches.reshape(n, -1).astype(float)
    signal = np.concatenate(
        [
            flat_cls @ rng.normal(size=(8, half)),
            flat_patches @ rng.normal(size=(27, n_units - half)),
        ],
        axis=1,
    )
    signal = (signal - signal.mean(0)) / signal.std(0) + 0.7
    targets = signal + noise * rng.normal(size=signal.shape)
    rows = rng.permutation(n)
    train, test = rows[:n_train], rows[n_train : n_train + n_test]
    return {"cls": cls, "patches": patches}, train, test, targets


def standardised(tokens, train, test):
    flat = tokens.reshape(len(tokens), -1).astype(np.float64)
    mean, std = flat[train].mean(0), flat[train].std(0)
    keep = std > 0
    z = (flat[:, keep] - mean[keep]) / std[keep]
    scale = np.sqrt(np.mean(np.sum(z[train] ** 2, axis=1)))
    return z[train] / scale, z[test] / scale


def naive_ridge(X, X_test, Y, alphas, folds):
    """Choose the penalty per unit in a plain loop over folds and penalties."""
    losses = np.zeros((len(alphas), Y.shape[1]))
    for a, alpha in enumerate(alphas):
        for train, held_out in folds:
            fitted = Ridge(alpha=alpha).fit(X[train], Y[train]).predict(X[held_out])
            losses[a] += np.mean((fitted - Y[held_out]) ** 2, axis=0) / len(folds)
    best = np.asarray(alphas)[losses.argmin(axis=0)]
    predicted = np.column_stack(
        [Ridge(alpha=a).fit(X, Y[:, u]).predict(X_test) for u, a in enumerate(best)]
    )
    return best, predicted, losses.min(axis=0)


def test_kernels_equal_explicit_features_and_leave_constant_ones_out():
    tokens, train, test, _ = make_world()
    tokens["patches"][:, 2, 1] = 0.25
    kernels = linear_kernels(tokens["patches"], train, test, block_bytes=4 * 120 * 3 * 2)
    X, X_test = standardised(tokens["patches"], train, test)
    np.testing.assert_allclose(kernels.train, X @ X.T, atol=2e-6)
    np.testing.assert_allclose(kernels.test, X_test @ X.T, atol=2e-6)
    assert kernels.n_features == 26
    assert np.mean(np.diagonal(kernels.train)) == pytest.approx(1.0, abs=1e-6)


def test_ridge_equals_a_naive_loop_over_penalties():
    tokens, train, test, targets = make_world(noise=1.0)
    Y = targets[train]
    kernels = {"patches": linear_kernels(tokens["patches"], train, test)}
    alphas = [0.01, 0.1, 1.0, 10.0, 100.0]
    encoder = LinearEncoder(("patches",), alphas=alphas, n_folds=4, seed=3)
    encoder.fit(kernels, Y, train)
    X, X_test = standardised(tokens["patches"], train, test)
    best, predicted, _ = naive_ridge(X, X_test, Y, alphas, image_folds(train, 4, 3))
    np.testing.assert_allclose(encoder.alpha_, best)
    np.testing.assert_allclose(encoder.predict(kernels), predicted, atol=2e-4)
    assert encoder.n_parameters_ == 6 * 28


def test_banded_ridge_equals_the_best_naive_mixture():
    tokens, train, test, targets = make_world(noise=1.0, seed=1)
    Y = targets[train]
    kernels = {name: linear_kernels(value, train, test) for name, value in tokens.items()}
    shares = np.array([[0.5, 0.5], [0.9, 0.1], [0.1, 0.9], [1.0, 0.0]])
    alphas = [0.1, 1.0, 10.0]
    encoder = LinearEncoder(("cls", "patches"), shares=shares, alphas=alphas).fit(kernels, Y)
    cls, cls_test = standardised(tokens["cls"], train, test)
    patches, patches_test = standardised(tokens["patches"], train, test)
    folds = image_folds(np.arange(len(train)), 5, 0)
    fits = []
    for a, b in np.sqrt(shares):
        X = np.concatenate([a * cls, b * patches], axis=1)
        X_test = np.concatenate([a * cls_test, b * patches_test], axis=1)
        fits.append(naive_ridge(X, X_test, Y, alphas, folds))
    chosen = np.argmin([loss for _, _, loss in fits], axis=0)
    expected = np.column_stack([fits[c][1][:, u] for u, c in enumerate(chosen)])
    np.testing.assert_allclose(encoder.shares_, shares[chosen], atol=1e-5)
    np.testing.assert_allclose(encoder.predict(kernels), expected, atol=5e-4)


def test_every_baseline_is_fitted_and_each_stream_predicts_its_own_units():
    tokens, train, test, targets = make_world(n_train=150, n_units=8)
    rows = fit_afresh(tokens, train, test, targets[train])
    assert list(rows) == ["ridge", "ridge (patches)", "banded ridge", "linear probe (CLS)"]

    def r2(name):
        residual = rows[name].values - targets[test]
        return 1 - residual.var(axis=0) / targets[test].var(axis=0)

    assert r2("linear probe (CLS)")[:4].min() > 0.6
    assert r2("linear probe (CLS)")[4:].max() < 0.2
    assert r2("ridge (patches)")[4:].min() > 0.5
    assert r2("ridge (patches)")[:4].max() < 0.2
    assert r2("banded ridge").mean() >= r2("ridge").mean() - 0.01
    shares = rows["banded ridge"].details["mean_share"]
    assert sum(shares) == pytest.approx(1.0, abs=1e-4)
    again = fit_afresh(tokens, train, test, targets[train])
    for name, row in rows.items():
        np.testing.assert_array_equal(row.values, again[name].values)


def test_the_same_kernels_serve_several_targets():
    tokens, train, test, targets = make_world()
    kernels = baseline_kernels(tokens, train, test)
    before = {name: (found.train.copy(), found.test.copy()) for name, found in kernels.items()}
    for shifted in (targets, 3 * targets[:, ::-1] + 10):
        found = fit_to_kernels(kernels, shifted[train], train)
        expected = fit_afresh(tokens, train, test, shifted[train])
        for name, row in expected.items():
            np.testing.assert_array_equal(found[name].values, row.values)
            assert found[name].details == row.details
    for name, (in_train, in_test) in before.items():
        np.testing.assert_array_equal(kernels[name].train, in_train)
        np.testing.assert_array_equal(kernels[name].test, in_test)


def test_every_cls_layer_gets_a_probe_of_its_own():
    tokens, train, test, targets = make_world(n_train=150, n_units=8)
    kernels = baseline_kernels(tokens, train, test, cls_layers=[3, 12])
    rows = fit_to_kernels(kernels, targets[train], train)
    probes = ["linear probe (CLS, layer 3)", "linear probe (CLS, layer 12)"]
    assert list(rows) == ["ridge", "ridge (patches)", "banded ridge", *probes]
    for index, name in enumerate(probes):
        alone = tokens | {"cls": tokens["cls"][:, index : index + 1]}
        expected = fit_afresh(alone, train, test, targets[train])["linear probe (CLS)"]
        np.testing.assert_array_equal(rows[name].values, expected.values)
        assert rows[name].n_parameters == 8 * (4 + 1)
    together = fit_afresh(tokens, train, test, targets[train])
    np.testing.assert_array_equal(rows["ridge"].values, together["ridge"].values)
    assert together["linear probe (CLS)"].n_parameters == 8 * (8 + 1)


def test_one_cls_layer_keeps_the_plain_name_and_a_wrong_number_is_refused():
    tokens, train, test, _ = make_world()
    one = tokens | {"cls": tokens["cls"][:, :1]}
    assert list(baseline_kernels(one, train, test, cls_layers=[12])) == ["cls", "patches"]
    with pytest.raises(DataError, match="2 CLS tokens per image, but 3 layers named"):
        baseline_kernels(tokens, train, test, cls_layers=[3, 6, 9])


def test_folds_keep_the_rows_of_an_image_together():
    groups = np.repeat(np.arange(23) * 7, 3)
    folds = image_folds(groups, 5, seed=1)
    held_out = np.concatenate([test for _, test in folds])
    np.testing.assert_array_equal(np.sort(held_out), np.arange(len(groups)))
    for train, test in folds:
        assert not set(groups[train]) & set(groups[test])
    assert len(image_folds(np.arange(3), 5, 0)) == 3
    with pytest.raises(DataError, match="at least 2"):
        image_folds(np.zeros(4, dtype=int), 5, 0)


def test_a_handful_of_images_still_fits():
    tokens, train, test, targets = make_world(n_train=20)
    rows = fit_afresh(tokens, train, test, targets[train])
    assert all(np.isfinite(row.values).all() for row in rows.values())


def test_bad_input_is_named():
    tokens, train, _, targets = make_world()
    Y = targets[train]
    kernels = {"cls": linear_kernels(tokens["cls"], train)}
    encoder = LinearEncoder(("cls",))
    with pytest.raises(DataError, match="NaN or infinite train responses"):
        encoder.fit(kernels, np.where(np.arange(6) == 2, np.nan, Y))
    with pytest.raises(DataError, match="one row of targets"):
        encoder.fit(kernels, Y[:-1])
    encoder.fit(kernels, Y)
    with pytest.raises(DataError, match="no test kernel"):
        encoder.predict(kernels)
    with pytest.raises(ConfigError, match="one column per feature space"):
        LinearEncoder(("cls",), shares=np.array([[0.5, 0.5]]))
    with pytest.raises(DataError, match="no feature varies"):
        linear_kernels(np.ones((len(targets), 4), np.float16), train)
    tokens["cls"][train[3], 0, 0] = np.inf
    with pytest.raises(DataError, match="extract again with --fresh"):
        linear_kernels(tokens["cls"], train)
