"""AdamW: fused where that may be, the same numbers, and resumable from what was not fused."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from chasm.training.optimisation import make_optimizer
from chasm.training.recipes import Recipe
from chasm.training.runs import RunInterruptedError, fit


def optimizer_of(network, precision="32-true"):
    options = ({}, 10, 1e-2, 0.05, 0.0, "constant", precision)
    return make_optimizer(network.named_parameters(), *options)["optimizer"]


def train(network, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.randn(8, 6, generator=generator)).square().mean().backward()
        optimizer.step()


def fused(optimizer):
    return [group["fused"] for group in optimizer.param_groups]


@pytest.fixture
def network():
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))


def test_it_is_fused_except_where_gradients_are_scaled(network):
    assert fused(optimizer_of(network)) == [True, True]
    assert fused(optimizer_of(network, "bf16-true")) == [True, True]
    assert fused(optimizer_of(network, "bf16-mixed")) == [False, False]
    assert fused(optimizer_of(network, "16-mixed")) == [False, False]
    assert fused(optimizer_of(network.to("meta"))) == [False, False]


@pytest.mark.parametrize(("before", "after"), [("16-mixed", "32-true"), ("32-true", "16-mixed")])
def test_a_state_goes_on_in_the_other_form(network, before, after):
    first = optimizer_of(network, before)
    train(network, first, 3, seed=1)
    saved = copy.deepcopy(first.state_dict())
    other = copy.deepcopy(network)
    second = optimizer_of(other, after)
    second.load_state_dict(saved)
    assert fused(second) == [after == "32-true"] * 2
    for model, optimizer in ((network, first), (other, second)):
        train(model, optimizer, 3, seed=2)
    for a, b in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-6)


def test_mixed_precision_with_clipping_trains_and_stays_finite(tiny_recipe):
    mixed = ["--trainer.precision", "bf16-mixed", "--trainer.gradient_clip_val", "0.5",
             "--model.init_args.encoder.init_args.full_precision", "false",
             "--model.init_args.loss.init_args.std_weight", "0.2"]  # fmt: skip
    run = fit(Recipe([*tiny_recipe, *mixed]))
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    curves = pd.read_csv(run / "metrics.csv")
    assert len(curves) == 3
    assert np.isfinite(curves[["train/loss", "val/mse", "val/loss"]]).all(axis=None)
    assert curves["train/loss"].iloc[-1] < curves["train/loss"].iloc[0]


def test_a_run_goes_on_from_a_checkpoint_that_was_not_fused(tiny_recipe, monkeypatch):
    from chasm.training import base, runs
    from chasm.training.callbacks import SeededSteps

    class StopInEpoch2(SeededSteps):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if trainer.current_epoch == 2:
                raise KeyboardInterrupt

    def unfused(*arguments):
        return make_optimizer(*arguments[:-1], "16-mixed")

    def last(run):
        return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)

    unbroken = last(fit(Recipe([*tiny_recipe, "--runs", f"{tiny_recipe[-1]}-unbroken"])))
    with monkeypatch.context() as patch:
        patch.setattr(runs, "SeededSteps", StopInEpoch2)
        patch.setattr(base, "make_optimizer", unfused)
        with pytest.raises(RunInterruptedError) as stopped:
            fit(Recipe(tiny_recipe))
    assert stopped.value.exit_status == 130
    resumed = last(fit(Recipe(tiny_recipe)))
    groups = resumed["optimizer_states"][0]["param_groups"]
    assert all(group["fused"] for group in groups)
    for key, value in unbroken["state_dict"].items():
        torch.testing.assert_close(resumed["state_dict"][key], value, rtol=0, atol=1e-5)
