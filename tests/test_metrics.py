"""Metrics against SciPy and naive loops; streaming against whole."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from chasm.metrics import (
    EncodingMetrics,
    centred_pattern_correlation,
    identification,
    mse,
    pattern_correlation,
    r2,
    voxelwise_correlation,
)


@pytest.fixture
def pair():
    rng = np.random.default_rng(1)
    target = rng.normal(size=(23, 11))
    return 0.4 * target + rng.normal(size=(23, 11)), target


def tensors(pair, dtype=torch.float64):
    return [torch.tensor(values, dtype=dtype) for values in pair]


def rows_r(x, y):
    return [pearsonr(a, b).statistic for a, b in zip(x, y, strict=True)]


def test_pattern_correlation(pair):
    np.testing.assert_allclose(pattern_correlation(*tensors(pair)), rows_r(*pair), rtol=1e-12)


def test_centred_pattern_correlation(pair):
    mean = np.random.default_rng(2).normal(size=11)
    expected = rows_r(pair[0] - mean, pair[1] - mean)
    found = centred_pattern_correlation(*tensors(pair), torch.tensor(mean))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    image_blind = torch.tensor(mean).expand(23, -1)
    blind = centred_pattern_correlation(image_blind, tensors(pair)[1], torch.tensor(mean))
    assert blind.isnan().all()


def test_voxelwise_correlation(pair):
    found = voxelwise_correlation(*tensors(pair))
    np.testing.assert_allclose(found, rows_r(pair[0].T, pair[1].T), rtol=1e-12)


def test_r2(pair):
    mean = np.linspace(-0.2, 0.2, 11)
    prediction, target = pair
    expected = [
        1 - ((target[:, v] - prediction[:, v]) ** 2).sum() / ((target[:, v] - mean[v]) ** 2).sum()
        for v in range(11)
    ]
    np.testing.assert_allclose(r2(*tensors(pair), torch.tensor(mean)), expected, rtol=1e-12)
    zero = r2(torch.tensor(mean).expand(23, -1), tensors(pair)[1], torch.tensor(mean))
    assert zero.abs().max() == 0


def test_mse_of_float32_is_summed_in_float64(pair):
    found = mse(*tensors(pair, torch.float32))
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(np.mean((pair[0] - pair[1]) ** 2), rel=1e-6)


def test_constant_rows_and_columns_are_nan(pair):
    prediction, target = tensors(pair)
    prediction[3] = 0.1
    target[:, 5] = 0.1
    assert pattern_correlation(prediction, target).isnan().nonzero().tolist() == [[3]]
    assert voxelwise_correlation(prediction, target).isnan().nonzero().tolist() == [[5]]
    assert r2(prediction, target, 0.1).isnan().nonzero().tolist() == [[5]]


def naive_identification(prediction, target):
    n = len(target)
    r = np.array([[pearsonr(t, p).statistic for p in prediction] for t in target])
    ranks = [(r[i] > r[i, i]).sum() for i in range(n)]
    wins = [r[i, i] > r[i, j] for i in range(n) for j in range(n) if i != j]
    top = {f"top{k}": np.mean([rank < k for rank in ranks]) for k in (1, 5)}
    return {**top, "two_way": np.mean(wins), "excluded": 0.0}


def test_identification(pair):
    assert identification(*tensors(pair)) == pytest.approx(naive_identification(*pair))


def test_identification_of_an_image_blind_prediction_is_chance(pair):
    prediction, target = tensors(pair)
    scores = identification(prediction[:1].expand(23, -1), target)
    expected = {"top1": 1 / 23, "top5": 5 / 23, "two_way": 0.5, "excluded": 0.0}
    assert scores == pytest.approx(expected)


def test_identification_leaves_constant_patterns_out(pair):
    prediction, target = tensors(pair)
    target[4] = 0.0
    scores = identification(prediction, target)
    keep = [i for i in range(23) if i != 4]
    assert scores == pytest.approx(
        {**identification(prediction[keep], target[keep]), "excluded": 1}
    )
    assert math.isnan(identification(prediction[:1], target[:1])["top1"])


@pytest.mark.parametrize("cuts", [[0, 23], [0, 1, 2, 9, 23], [0, 12, 23]])
@pytest.mark.parametrize("n_units", [1, 11])
def test_streaming_equals_whole(pair, cuts, n_units):
    prediction, target = (values[:, :n_units] for values in tensors(pair, torch.float32))
    if n_units > 1:
        prediction[2] = 0.3
        target[:, 4] = 0.1
    metrics = EncodingMetrics(n_units, prefix="val/")
    metrics.update(prediction.flip(0), target)
    metrics.reset()
    for first, last in pairwise(cuts):
        metrics.update(prediction[first:last], target[first:last])
    found = metrics.compute()
    units = voxelwise_correlation(prediction, target)
    expected = {
        "val/pattern_correlation": pattern_correlation(prediction, target).nanmean().item(),
        "val/voxelwise_correlation_mean": units.nanmean().item(),
        "val/voxelwise_correlation_median": np.nanmedian(units.numpy()),
        "val/mse": mse(prediction, target).item(),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-6, nan_ok=True), name


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 3\) and target \(3, 2\)"):
        pattern_correlation(torch.zeros(2, 3), torch.zeros(3, 2))
