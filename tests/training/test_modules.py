"""Stage1Module: targets, optimiser, learning."""

import numpy as np
import pytest
import torch

from chasm.data.datamodule import DataSizes
from chasm.errors import ConfigError
from chasm.losses import Stage1Loss
from chasm.models.stage1 import DualStreamEncoder
from chasm.parcellation import sequential
from chasm.training.modules import Stage1Module
from chasm.training.optimisation import LearningRate, decays

SIZES = DataSizes(n_cls=2, cls_width=6, n_patches=4, patch_width=5, n_voxels=21, n_parcels=4)


def small(*sizes):
    return DualStreamEncoder(*sizes, d_model=8, global_blocks=1, local_blocks=1, d_head=8, d_gate=8,
                             d_contrast=8, d_embedding=8)  # fmt: skip


def module(**options):
    torch.manual_seed(0)
    made = Stage1Module(small, **options)
    made.build(SIZES, sequential(21, 5))
    return made


def batch(n=12):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return torch.from_numpy(rng.standard_normal(shape)).float()

    return {
        "cls": normal(n, 2, 6), "patches": normal(n, 4, 5), "betas": normal(n, 21),
        "image_id": torch.arange(n), "trial": torch.arange(n),
    }  # fmt: skip


def test_targets_are_means_or_the_mean_of_the_largest():
    data = batch(3)["betas"]
    plain = module().units_of(data)
    np.testing.assert_allclose(plain[:, 1], data[:, 5:10].mean(1), rtol=1e-6)
    top = module(target="top_p", top_p=0.6).units_of(data)
    np.testing.assert_allclose(top[:, 1], data[:, 5:10].sort(1).values[:, -3:].mean(1), rtol=1e-6)


def test_a_fraction_outside_0_to_1_is_refused():
    with pytest.raises(ConfigError, match="top_p"):
        Stage1Module(small, top_p=1.5)


def test_training_lowers_the_loss():
    made = module(loss=Stage1Loss(pearson_weight=0.3, contrastive_weight=0.1))
    optimizer = torch.optim.AdamW(made.parameters(), lr=5e-3)
    data = batch()
    losses = []
    for _ in range(60):
        _, terms = made.terms(data)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        losses.append(terms["total"].item())
    assert losses[-1] < 0.5 * losses[0]


def test_every_parameter_gets_a_gradient():
    made = module(loss=Stage1Loss(contrastive_weight=0.1))
    _, terms = made.terms(batch())
    terms["total"].backward()
    without = [n for n, p in made.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert without == []


def test_state_space_constants_norms_and_biases_do_not_decay():
    parameters = dict(module().named_parameters())
    kept = {n.rsplit(".", 1)[-1] for n, p in parameters.items() if not decays(n, p)}
    assert {"bias", "A_log", "D", "position"} <= kept
    decaying = {n for n, p in parameters.items() if decays(n, p)}
    assert any(n.endswith("in_proj.weight") for n in decaying)
    assert not any(n.endswith(("A_log", ".D", "bias", "position")) for n in decaying)


def test_the_rate_rises_then_falls_to_zero():
    rate = LearningRate(100, 0.1, "cosine")
    values = [rate(step) for step in range(101)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == pytest.approx(1.0)
    assert max(values) <= 1.0
    assert values[100] == pytest.approx(0.0, abs=1e-12)
    assert values[55] == pytest.approx(0.5, abs=0.01)
    assert LearningRate(100, 0.0, "constant")(80) == 1.0


def test_token_statistics_standardise_the_input():
    made = module()
    from chasm.data.datamodule import TokenStatistics

    data = batch()
    cls, patches = data["cls"].numpy(), data["patches"].numpy()
    made.scale_tokens(
        TokenStatistics(cls.mean(0), cls.std(0), patches.mean((0, 1)), patches.std((0, 1)))
    )
    scaled = made.encoder.patch_scaler(data["patches"])
    np.testing.assert_allclose(scaled.mean((0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std((0, 1), correction=0), 1, rtol=1e-4)
