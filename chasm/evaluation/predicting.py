"""From a trained model and its data to a predictions file: the one reading of the test images."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chasm.data.batches import Batch, EncodingDataset
from chasm.data.datamodule import NSDDataModule
from chasm.evaluation.linear_rows import N_FOLDS, linear_key, linear_rows
from chasm.evaluation.predictions import (
    MAIN_TARGET,
    AlternativeTarget,
    Draws,
    FloatArray,
    Membership,
    PredictionFile,
    PredictionRow,
    RunInfo,
    Units,
    voxel_membership,
)
from chasm.models.baselines import baseline_kernels, fit_to_kernels
from chasm.models.kernels import FeatureKernels
from chasm.noise_ceiling import unit_ncsnr
from chasm.parcellation import Aggregation, Parcellation
from chasm.progress import track
from chasm.training.base import EncodingModule
from chasm.training.recipes import Recipe

BLOCK = 256
"""Images, or trials, whose voxels are in memory at once."""

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
    baselines are fitted to every voxel.

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
    reading = _Reading(model, data)
    train, test = data.dataset("train"), data.dataset("test")
    predicted = _predict(reading, n_draws, recipe.seed)
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
        own = reading.own_responses("train")
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


class _Reading:
    """A model's units, read off the voxels of a store.

    A model of single voxels may have them in another order than the store; here they always
    are in the store's, so that files of different models agree.
    """

    def __init__(self, model: EncodingModule, data: NSDDataModule) -> None:
        assert model.parcellation is not None
        self.model, self.data = model, data
        self.parcellation: Parcellation = model.parcellation
        self.parcels = model.unit == "parcel"
        self.own_target: Aggregation | None = None
        if self.parcels and model.target != "mean":
            self.own_target = model.target
        self._columns: np.ndarray | None = None
        if not self.parcels:
            n_voxels = data.store.n_voxels
            voxel_of = model.units_of(torch.arange(n_voxels).double()[None], "mean")[0].numpy()
            if not np.array_equal(voxel_of, np.arange(n_voxels)):
                self._columns = np.argsort(voxel_of)

    def sorted_units(self, values: Tensor) -> Tensor:
        """Put the model's (..., units) into the order of the file."""
        return values if self._columns is None else values[..., self._columns]

    def in_order(self, betas: Tensor, how: Aggregation) -> np.ndarray:
        """Responses of the units, in the order of the file: (..., voxels) -> (..., units)."""
        return self.sorted_units(self.model.units_of(betas, how)).numpy()

    def responses(self, data: EncodingDataset, how: Aggregation) -> np.ndarray:
        """Responses to a dataset's items, (items, units) float32, in one array."""
        found: np.ndarray | None = None
        for start in range(0, len(data), BLOCK):
            rows = range(start, min(start + BLOCK, len(data)))
            part = self.in_order(torch.from_numpy(data.betas(rows)), how)
            if found is None:
                found = np.empty((len(data), part.shape[1]), np.float32)
            found[rows.start : rows.stop] = part
        assert found is not None
        return found

    def own_responses(self, part: Literal["train", "test"]) -> np.ndarray:
        """Values of the model's own target as training saw them, (images, units).

        A model that was trained on single trials has the target of every presentation, averaged
        here over repeats; one that was trained on image means has the target of the mean.
        """
        found = self.data.dataset(part, self.data.samples)
        values = self.responses(found, self.model.target)
        if self.data.samples == "image_means":
            return values
        images, index, counts = np.unique(found.image_ids, return_inverse=True, return_counts=True)
        sums = np.zeros((len(images), values.shape[1]))
        np.add.at(sums, index, values)
        return (sums / counts[:, None]).astype(np.float32)

    def units(self) -> Units:
        """Sizes, noise-ceiling SNR and places of the units."""
        store = self.data.store
        n_units = self.parcellation.n_parcels if self.parcels else store.n_voxels
        position = np.full((n_units, 3), np.nan, np.float32)
        coordinates = store.coordinates()
        if coordinates is not None:
            axes = torch.from_numpy(np.array(coordinates.T, dtype=np.float32))
            position = self.in_order(axes, "mean").T
        if self.parcels:
            return Units(self.parcellation.sizes.numpy(), self._parcel_ncsnr(), position)
        ncsnr = store.voxels["ncsnr"].to_numpy(np.float32)
        return Units(np.ones(n_units, np.int64), ncsnr, position)

    def _parcel_ncsnr(self) -> np.ndarray:
        """Noise-ceiling SNR of the parcel means, from the repeats of every image of the subject."""
        mean, std = self.data.normalisation
        store = self.data.store
        parts = []
        for start in range(0, store.n_trials, BLOCK):
            trials = np.arange(start, min(start + BLOCK, store.n_trials))
            betas = torch.from_numpy(store.zscore(trials, mean, std))
            parts.append(self.in_order(betas, "mean"))
        return unit_ncsnr(np.concatenate(parts), store.trials["image_id"].to_numpy())

    def membership(self) -> dict[str, Membership]:
        """Voxels of every unit in the ROIs of each atlas that has any."""
        found = {}
        for atlas, roi in self.data.store.rois.items():
            names = {key: name for key, name in sorted(roi.names.items()) if key >= 1}
            if not names:
                continue
            if self.parcels:
                counts = self.parcellation.roi_weights(roi.labels, names).numpy()
                found[atlas] = Membership(counts.astype(np.int64), tuple(names.values()))
            else:
                found[atlas] = voxel_membership(roi.labels, names)
        return found


class _Predicted(NamedTuple):
    """What the model says of the test images."""

    rows: dict[str, PredictionRow]
    gate: FloatArray | None
    draws: Draws | None


@torch.inference_mode()
def _predict(reading: _Reading, n_draws: int, seed: int) -> _Predicted:
    """Predict the test images batch by batch: rows, gate and, from a latent, draws."""
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
    return _Predicted(
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
    store, tokens = data.store, data.tokens
    # Units of recordings brought as arrays may be neurons.
    name = "unit" if store.source == "arrays" and model.unit == "voxel" else model.unit
    return RunInfo(
        subject=store.subject,
        dataset=store.dataset,
        simulated=store.simulated,
        unit=name,
        split=data.data_split.name,
        weights_label=tokens.weights_label,
        model=recipe.name,
        backbone=data.backbone.model,
        config=(run / "config.yaml").read_text(encoding="utf-8"),
        fingerprints={
            "store": store.fingerprint,
            "tokens": tokens.fingerprint,
            "checkpoint": checkpoint,
        },
    )
