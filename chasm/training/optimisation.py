"""AdamW with a per-step schedule, as every module uses it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn


def make_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    rate_factors: Mapping[str, float],
    total_steps: int,
    learning_rate: float,
    weight_decay: float,
    warmup: float,
    schedule: str,
    precision: str = "32-true",
) -> OptimizerLRSchedulerConfig:
    """Make AdamW over the trained ones of named parameters, and its schedule.

    Parameters
    ----------
    parameters
        (name, parameter); those without gradient are left out.
    rate_factors
        Factor on the learning rate by the beginning of a parameter's name.
    total_steps
        Steps of the whole training.
    learning_rate, weight_decay, warmup, schedule
        See `chasm.training.base.EncodingModule`.
    precision
        Of the trainer. With "16-mixed" and "bf16-mixed" the step is not fused: a fused one can
        undo the scaling of gradients, and Lightning then refuses to clip them.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            factor = next((f for start, f in rate_factors.items() if name.startswith(start)), 1.0)
            groups.setdefault((factor, decays(name, parameter)), []).append(parameter)
    options = [
        {
            "params": members,
            "lr": factor * learning_rate,
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (factor, decayed), members in groups.items()
    ]
    trained = [parameter for members in groups.values() for parameter in members]
    fused = not precision.endswith("mixed") and all(
        parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")
        for parameter in trained
    )
    optimizer = torch.optim.AdamW(options, lr=learning_rate, fused=fused)

    def keep_fused(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        # A checkpoint may be of a run on another device or of another precision.
        return state | {"param_groups": [g | {"fused": fused} for g in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(keep_fused)
    rate = LearningRate(max(1, total_steps), warmup, schedule)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
    }


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to state-space constants or learned tokens."""
    return parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in ("A_log", "position", "queries")


class LearningRate:
    """Factor of the learning rate at a step: linear warm-up, then cosine or constant."""

    def __init__(self, total: int, warmup: float, schedule: str) -> None:
        self.total, self.schedule = total, schedule
        self.rise = max(1, round(total * warmup))

    def __call__(self, step: int) -> float:
        """Return the factor at a step."""
        if step < self.rise:
            return (step + 1) / self.rise
        if self.schedule == "constant":
            return 1.0
        done = (step - self.rise) / max(1, self.total - self.rise)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
