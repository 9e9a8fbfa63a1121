"""A small gated Stage 1 trained on a simulated brain with whole streams left out at random.

Its gate learns to lean on the stream that is there, so that replacing a stream costs less with
the gate free (total effect) than with the gate held (direct effect): compensation is planted.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import mse_loss

from ablations.values import CoalitionValues
from ablations.worlds import World
from ablations.worlds_encoders import COALITIONS, FloatArray
from chasm.interventions import Intervention, collect, intervene, record
from chasm.models.stage1 import DualStreamEncoder

SITES = ("local.out", "global.out")

STEPS, BATCH, LEARNING_RATE = 300, 64, 3e-3
DROPPED = 0.25
"""Probability that a training image is shown without its local, and without its global, stream."""


def fit_gated(world: World, rng: np.random.Generator) -> CoalitionValues:
    """Train on the train images and predict the test images under every coalition.

    Parameters
    ----------
    world
        To fit.
    rng
        Of the weights and the order of images.

    Returns
    -------
    CoalitionValues
        With the gate free and held.
    """
    seed = int(rng.integers(2**31))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _train(world)
    tokens = _streams(model, world, world.train)
    reference = collect(model, [tokens], SITES, model.from_streams)
    test = _streams(model, world, world.test)
    with torch.no_grad(), record(model, ["gate"]) as seen:
        model.from_streams(test)
        clean = {"gate": seen["gate"]}
    hold = [Intervention("gate", "clean")]
    free: dict[str, FloatArray] = {}
    held: dict[str, FloatArray] = {}
    for name, (local, global_) in COALITIONS.items():
        kept = (local, global_)
        cut = [Intervention(s, "mean") for s, k in zip(SITES, kept, strict=True) if not k]
        for table, more in ((free, []), (held, hold)):
            with torch.no_grad(), intervene(model, [*cut, *more], reference, clean=clean):
                table[name] = _scaled_back(model.from_streams(test).parcels, world)
    return CoalitionValues("stage 1", "model", 0, free, held)


def _train(world: World) -> DualStreamEncoder:
    """Fit by Adam to the standardised mean responses of the train images."""
    n_units = world.trials.shape[1]
    _, n_cls, cls_width = world.cls.shape
    _, n_patches, patch_width = world.patches.shape
    model = DualStreamEncoder(
        *(cls_width, n_cls, patch_width, n_patches, n_units),
        d_model=32, global_blocks=1, local_blocks=1, d_state=4, expand=1, token_noise=0.0,
        readout="spatial", d_gate=32, d_contrast=8, d_embedding=8,
    )  # fmt: skip
    response = world.mean_response(world.train)
    target = torch.from_numpy((response - response.mean(axis=0)) / response.std(axis=0)).float()
    cls, patches = _tokens(world, world.train)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(target), (BATCH,))
        streams = _drop_streams(model.streams(cls[rows], patches[rows]))
        loss = mse_loss(model.from_streams(streams).parcels, target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _drop_streams(streams: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace one stream of some images by its mean over the batch."""
    draw = torch.rand(len(streams["local.out"]))
    gone = {"local.out": draw < DROPPED, "global.out": draw > 1 - DROPPED}
    return {
        name: torch.where(gone[name].view(-1, *[1] * (value.ndim - 1)), value.mean(0), value)
        for name, value in streams.items()
    }


def _tokens(world: World, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(world.cls[rows]), torch.from_numpy(world.patches[rows])


def _streams(model: DualStreamEncoder, world: World, rows: NDArray[np.int64]) -> dict[str, Tensor]:
    with torch.no_grad():
        return model.streams(*_tokens(world, rows))


def _scaled_back(predicted: Tensor, world: World) -> FloatArray:
    """Undo the standardisation of the training targets."""
    response = world.mean_response(world.train)
    values: FloatArray = predicted.numpy() * response.std(axis=0) + response.mean(axis=0)
    return values
