"""Loss terms against NumPy and SciPy."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import pearsonr

from chasm.errors import ConfigError
from chasm.losses import (
    Stage1Loss,
    Stage2Loss,
    info_nce,
    kl_divergence,
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
    total = 0.0
    for i, k in np.ndindex(target.shape):
        distance = abs(target[i, k] - target[:, k].mean())
        weight = 1 + 0.8 * (distance - 0.4) if distance > 0.4 else 1.0
        total += weight * (prediction[i, k] - target[i, k]) ** 2
    assert peak_focused_mse(*tensors(pair), 0.8, 0.4).item() == pytest.approx(total / target.size)
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


def test_kl_divergence():
    normal = torch.distributions.Normal
    mean, log_variance = torch.randn(6, 4).double(), 3 * torch.randn(6, 4).double()
    given = normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(given, normal(0.0, 1.0))
    assert kl_divergence(mean, log_variance).item() == pytest.approx(expected.mean().item())
    assert kl_divergence(torch.zeros(3, 2), torch.zeros(3, 2)).item() == 0
    tiny = torch.full((1, 1), 1e-4)
    assert kl_divergence(0 * tiny, tiny).item() == pytest.approx(2.5e-9, rel=1e-2)
    inputs = mean.requires_grad_(), log_variance.requires_grad_()
    assert torch.autograd.gradcheck(kl_divergence, inputs)


def test_stage2_loss_is_the_weighted_sum(pair):
    prediction, target = tensors(pair)
    mean, log_variance = torch.randn(6, 4).double(), torch.randn(6, 4).double()
    loss = Stage2Loss(2.0, 0.3, 0.2, 1e-3)
    terms = loss(prediction, target, mean, log_variance)
    expected = {
        "error": mse(prediction, target),
        "pearson": pearson_loss(prediction, target),
        "std": std_matching(prediction, target),
        "kl": kl_divergence(mean, log_variance),
    }
    assert list(terms) == [*expected, "total"]
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item())
    total = sum(w * expected[n].item() for n, w in loss.weights.items())
    assert terms["total"].item() == pytest.approx(total)


def test_stage2_terms_that_are_absent(pair):
    latent = torch.randn(6, 4), torch.randn(6, 4)
    assert list(Stage2Loss()(*tensors(pair), *latent)) == ["error", "kl", "total"]
    assert Stage2Loss().weights["kl"] == 1e-3
    assert list(Stage2Loss()(*tensors(pair))) == ["error", "total"]
    assert list(Stage2Loss(kl_weight=0)(*tensors(pair), *latent)) == ["error", "total"]
    assert list(Stage2Loss(error_weight=0, std_weight=1)(*tensors(pair))) == ["std", "total"]
    with pytest.raises(ConfigError, match="kl_weight"):
        Stage2Loss(kl_weight=-1)
