"""From a trained model and its data to a predictions file: the one reading of the test images."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chasm.data.batches import Batch
from chasm.data.datamodule import NSDDataModule
from chasm.evaluation.linear_rows import N_FOLDS, linear_key, linear_rows
from chasm.evaluation.predictions import (
    MAIN_TARGET,
    AlternativeTarget,
    Draws,
    FloatArray,
    PredictionFile,
    PredictionRow,
    RunInfo,
)
from chasm.evaluation.reading import Reading
from chasm.models.baselines import baseline_kernels, fit_to_kernels
from chasm.models.kernels import FeatureKernels
from chasm.progress import track
from chasm.training.base import EncodingModule
from chasm.training.recipes import Recipe

N_DRAWS = 20
"""Draws per image of a model that has a latent."""


def predict_test(
    run: Path,
    model: EncodingModule,
    data: NSDDataModule,
    recipe: Recipe,
    checkpoint: str,
    n_draws: int = N_DRAWS,
) -> PredictionFile:
    """Predict the test images, and let the linear baselines predict them, too.

    Units are parcels for a model of parcels; else the store's voxels in their order, and the
    baselines are fitted to every voxel. With few shots the baselines and the train mean are of
    all those images, validation included.

    Parameters
    ----------
    run
        The run's folder, for its resolved recipe.
    model, data, recipe
        From `chasm.training.runs.load`; the data are set up for testing.
    checkpoint
        Fingerprint of the weights.
    n_draws
        Draws per image where the model has a latent, seeded by the recipe's seed.
    """
    reading = Reading(model, data)
    train, test = data.dataset("given"), data.dataset("test")
    predicted = predict_rows(reading, n_draws, recipe.seed)
    responses = reading.responses(train, "mean")
    layers = data.tokens.manifest["backbone"]["cls_layers"]
    images = (train.image_ids, test.image_ids)

    @cache
    def kernels() -> dict[str, FeatureKernels]:
        spaces = {"cls": data.tokens.cls, "patches": data.tokens.patches}
        return baseline_kernels(spaces, *images, layers)

    def baselines(values: np.ndarray, target: str) -> dict[str, PredictionRow]:
        key = linear_key(data.tokens.fingerprint, images, values, recipe.seed, layers, N_FOLDS)
        fitted = linear_rows(
            run.parent / "linear",
            key,
            lambda: fit_to_kernels(
                kernels(), values, train.image_ids, n_folds=N_FOLDS, seed=recipe.seed
            ),
        )
        return {
            name: PredictionRow(found.values, "baseline", found.n_parameters, found.details, target)
            for name, found in fitted.items()
        }

    rows = predicted.rows | baselines(responses, MAIN_TARGET)
    train_mean = responses.mean(axis=0, dtype=np.float64)
    del responses
    targets: dict[str, AlternativeTarget] = {}
    if reading.own_target is not None:
        own = reading.own_responses("given")
        targets[reading.own_target] = AlternativeTarget(
            reading.own_responses("test"),
            own.mean(axis=0, dtype=np.float64),
            rows=baselines(own, reading.own_target),
        )
    return PredictionFile(
        image_id=test.image_ids,
        repeats=test.repeats,
        target=reading.responses(test, "mean"),
        train_mean=train_mean,
        rows=rows,
        units=reading.units(),
        info=_info(run, model, data, recipe, checkpoint),
        membership=reading.membership(),
        repeat_targets=reading.in_order(torch.from_numpy(test.repeat_betas()), "mean"),
        targets=targets,
        parcel_labels=reading.parcellation.labels.numpy(),
        gate=predicted.gate,
        draws=predicted.draws,
    )


class Predicted(NamedTuple):
    """What the model says of the test images."""

    rows: dict[str, PredictionRow]
    gate: FloatArray | None
    draws: Draws | None


@torch.inference_mode()
def predict_rows(reading: Reading, n_draws: int, seed: int) -> Predicted:
    """Predict the test images batch by batch: rows, gate and, from a latent, draws.

    Parameters
    ----------
    reading
        Model and data.
    n_draws, seed
        Draws per image where the model has a latent, and their seed.
    """
    model, data = reading.model, reading.data
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[Tensor]] = {}
    drawn: dict[str, list[Tensor]] = {}
    gates: list[Tensor] = []
    loader = data.test_dataloader()
    for batch in track(loader, "predict test images", len(loader)):
        moved: Any = {name: value.to(device) for name, value in batch.items()}
        moved = data.on_after_batch_transfer(moved, 0)
        for parts, found in (
            (rows, model.rows(moved)),
            (drawn, _draw(model, moved, n_draws, generator)),
        ):
            for name, values in found.items():
                ordered = reading.sorted_units(values.float().cpu())
                parts.setdefault(name, []).append(ordered)
        gate = model.gate_of(moved)
        if gate is not None:
            gates.append(gate.float().cpu())
    model.cpu()
    shares = torch.cat(gates).numpy() if gates else None
    return Predicted(
        _model_rows(
            model, {name: torch.cat(parts).numpy() for name, parts in rows.items()}, shares
        ),
        shares,
        Draws(n_draws, seed, **{k: torch.cat(v).numpy() for k, v in drawn.items()})
        if drawn
        else None,
    )


def draws_of(model: EncodingModule, asked: int) -> int:
    """Draws per image where so many are asked for: 0 below 2, or from a model without a latent."""
    latent = getattr(getattr(model, "decoder", None), "latent", None)
    return 0 if latent is None or asked < 2 else asked


def _draw(
    model: EncodingModule, batch: Batch, n: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Mean and variance over draws, each (images, units); nothing from a model without them."""
    if not draws_of(model, n):
        return {}
    variance, mean = torch.var_mean(model.draws(batch, n, generator).float(), dim=0)
    return {"mean": mean, "variance": variance}


def _model_rows(
    model: EncodingModule, predictions: dict[str, np.ndarray], gate: np.ndarray | None
) -> dict[str, PredictionRow]:
    """Rows of the model, its own one first, and of its parts."""
    details: dict[str, Any] = {}
    if gate is not None:
        share = gate[..., 0].mean(axis=1, dtype=np.float64)
        details = {
            "mean share of the global stream": float(share.mean()),
            "sd over images": float(share.std()),
        }
    n_parameters = sum(p.numel() for p in model.parameters())
    trained_on = MAIN_TARGET if model.target == "mean" else model.target
    rows = {}
    for name, values in predictions.items():
        if name == model.row_name:
            rows[name] = PredictionRow(values, "model", n_parameters, details, trained_on)
        else:
            rows[name] = PredictionRow(values, "component", trained_on=trained_on)
    return rows


def _info(
    run: Path, model: EncodingModule, data: NSDDataModule, recipe: Recipe, checkpoint: str
) -> RunInfo:
    config = (run / "config.yaml").read_text(encoding="utf-8")
    return run_info(model, data, recipe.name, config, {"checkpoint": checkpoint})


def run_info(
    model: EncodingModule, data: NSDDataModule, name: str, config: str, made_by: dict[str, str]
) -> RunInfo:
    """Say where predictions come from.

    Parameters
    ----------
    model, data
        For units, subject, split and backbone.
    name, config
        Of the model, and its resolved recipe.
    made_by
        Further fingerprints than those of store and tokens.
    """
    store, tokens = data.store, data.tokens
    # Units of recordings brought as arrays may be neurons.
    unit = "unit" if store.source == "arrays" and model.unit == "voxel" else model.unit
    return RunInfo(
        subject=store.subject,
        dataset=store.dataset,
        simulated=store.simulated,
        unit=unit,
        split=data.data_split.name,
        weights_label=tokens.weights_label,
        model=name,
        backbone=data.backbone.model,
        config=config,
        fingerprints={"store": store.fingerprint, "tokens": tokens.fingerprint} | made_by,
    )
