"""Loss terms against NumPy and SciPy."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import pearsonr

from chasm.errors import ConfigError
from chasm.losses import (
    Stage1Loss,
    info_nce,
    mse,
    peak_focused_mse,
    pearson_loss,
    std_matching,
)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    target = rng.normal(size=(6, 9))
    return 0.5 * target + rng.normal(size=(6, 9)), target


def tensors(pair):
    return [torch.tensor(values) for values in pair]


def test_mse(pair):
    assert mse(*tensors(pair)).item() == pytest.approx(np.mean((pair[0] - pair[1]) ** 2))


def test_peak_focused_mse(pair):
    prediction, target = pair
    total = weights = 0.0
    for p, t in zip(prediction.flat, target.flat, strict=True):
        weight = 1 + 0.8 * (abs(t) - 0.4) if abs(t) > 0.4 else 1.0
        total += weight * (p - t) ** 2
        weights += weight
    assert peak_focused_mse(*tensors(pair), 0.8, 0.4).item() == pytest.approx(total / weights)
    assert peak_focused_mse(*tensors(pair), alpha=0).item() == pytest.approx(
        mse(*tensors(pair)).item()
    )


def test_pearson_loss(pair):
    r = [pearsonr(p, t).statistic for p, t in zip(*pair, strict=True)]
    assert pearson_loss(*tensors(pair)).item() == pytest.approx(1 - np.mean(r))


def test_std_matching(pair):
    expected = np.mean((pair[0].std(1) - pair[1].std(1)) ** 2)
    assert std_matching(*tensors(pair)).item() == pytest.approx(expected, rel=1e-6)


def test_info_nce(pair):
    a, b = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in pair)
    logits = a @ b.T / 0.15
    own = np.diag(logits)
    expected = (np.mean(logsumexp(logits, 1) - own) + np.mean(logsumexp(logits, 0) - own)) / 2
    assert info_nce(*tensors(pair)).item() == pytest.approx(expected)


def test_info_nce_does_not_push_repeats_of_an_image_apart(pair):
    ids = torch.tensor([4, 1, 4, 2, 3, 5])
    a, b = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in pair)
    logits = a @ b.T / 0.15
    logits[0, 2] = logits[2, 0] = -np.inf
    own = np.diag(logits)
    expected = (np.mean(logsumexp(logits, 1) - own) + np.mean(logsumexp(logits, 0) - own)) / 2
    assert info_nce(*tensors(pair), image_ids=ids).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [mse, peak_focused_mse, pearson_loss, std_matching])
def test_gradients(loss, pair):
    prediction, target = tensors(pair)
    assert torch.autograd.gradcheck(lambda p: loss(p, target), prediction.requires_grad_())


@pytest.mark.parametrize("loss", [pearson_loss, std_matching])
def test_constant_prediction_has_finite_gradient(loss):
    prediction = torch.zeros(2, 5, requires_grad=True)
    loss(prediction, torch.randn(2, 5)).backward()
    assert prediction.grad.isfinite().all()


def test_stage1_loss_is_the_weighted_sum(pair):
    prediction, target = tensors(pair)
    visual, response = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    loss = Stage1Loss("peak", 1.0, 0.3, 0.2, 0.2)
    terms = loss(prediction, target, visual, response)
    expected = {
        "error": peak_focused_mse(prediction, target),
        "pearson": pearson_loss(prediction, target),
        "std": std_matching(prediction, target),
        "contrastive": info_nce(visual, response),
    }
    assert list(terms) == [*expected, "total"]
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item())
    total = sum(w * expected[n].item() for n, w in loss.weights.items())
    assert terms["total"].item() == pytest.approx(total)


def test_terms_without_weight_are_absent(pair):
    terms = Stage1Loss(pearson_weight=0.5)(*tensors(pair))
    assert list(terms) == ["error", "pearson", "total"]
    assert terms["error"].item() == pytest.approx(mse(*tensors(pair)).item())


def test_bad_settings(pair):
    with pytest.raises(ConfigError, match="error"):
        Stage1Loss("huber")
    with pytest.raises(ConfigError, match="std_weight"):
        Stage1Loss(std_weight=-1)
    with pytest.raises(ConfigError, match="both embeddings"):
        Stage1Loss(contrastive_weight=1)(*tensors(pair))
    with pytest.raises(ConfigError, match="temperature"):
        info_nce(*tensors(pair), temperature=0)
