"""`chasm test`: the one reading of the test images, into one predictions file."""

from __future__ import annotations

import json
import logging
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from chasm.data.batches import EncodingDataset
from chasm.data.datamodule import NSDDataModule
from chasm.errors import DataError
from chasm.evaluation import evaluate
from chasm.evaluation.figures import Volume
from chasm.evaluation.predictions import (
    AlternativeTarget,
    Membership,
    PredictionFile,
    PredictionRow,
    RunInfo,
    Units,
)
from chasm.evaluation.tables import show
from chasm.io import sha256_of_file
from chasm.models.baselines import fit_baselines
from chasm.noise_ceiling import unit_ncsnr
from chasm.parcellation import Aggregation
from chasm.progress import track
from chasm.training.modules import Stage1Module
from chasm.training.recipes import Recipe
from chasm.training.runs import load, read_provenance

log = logging.getLogger(__name__)

BLOCK = 256
"""Images whose voxels are in memory at once while parcels are computed."""


def score_run(run: Path, *, n_boot: int = 2000, fresh: bool = False) -> Path:
    """Score a finished run on its test images and write predictions, tables and report.

    The reading is noted in the run's ``test_readings.jsonl``. When predictions of the same
    checkpoint are there, nothing is read again and only the table is shown.

    Parameters
    ----------
    run
        Folder of a finished run.
    n_boot
        Bootstrap resamples of the intervals.
    fresh
        Predict again in any case.

    Returns
    -------
    Path
        ``predictions.h5`` in the run's folder.

    Raises
    ------
    DataError
        The folder is no finished run, or its data changed since it was trained.
    """
    predictions = run / "predictions.h5"
    checkpoint = sha256_of_file(_checkpoint(run))
    if not fresh and predictions.is_file() and _made_by(predictions) == checkpoint:
        log.info("predictions are current: %s", predictions)
        return report_run(run, n_boot=n_boot)
    model, data, recipe = load(run)
    assert isinstance(model, Stage1Module)
    _check_same_data(run, data)
    data.setup("test")
    _note_reading(run, checkpoint)
    _predict(run, model, data, recipe, checkpoint).write(predictions)
    return report_run(run, n_boot=n_boot)


def report_run(run: Path, *, n_boot: int = 2000, fresh: bool = False) -> Path:
    """Make table and report from a run's predictions; show the table and the report's path.

    Files that are current are not made again, unless `fresh`.
    """
    predictions = run / "predictions.h5"
    metrics = run / "metrics.csv"
    scores = evaluate(
        predictions,
        run / "report",
        n_boot=n_boot,
        metrics_csv=metrics if metrics.is_file() else None,
        provenance=read_provenance(run),
        volume=_volume(run),
        fresh=fresh,
    )
    show(scores)
    log.info("report: %s", run / "report" / "report.html")
    return predictions


def _volume(run: Path) -> Volume | None:
    """Give the function that puts one value per parcel into the subject's volume, if it has one."""
    model, data, _ = load(run)
    store = data.store
    if store.volume_shape is None:
        return None
    assert isinstance(model, Stage1Module)
    parcellation = model.parcellation
    assert parcellation is not None

    def place(values: np.ndarray) -> nibabel.Nifti1Image:
        parcels = torch.from_numpy(np.asarray(values, np.float32))
        voxels = parcellation.expand(parcels, fill=math.nan).numpy()
        return nibabel.Nifti1Image(store.to_volume(voxels), store.affine)

    return place


def _checkpoint(run: Path) -> Path:
    path = run / "checkpoints" / "best.ckpt"
    if not path.is_file():
        raise DataError(
            path, "is missing: this folder is no finished run", "Train it with `chasm fit`."
        )
    return path


def _made_by(predictions: Path) -> str | None:
    return PredictionFile.read(predictions).info.fingerprints.get("checkpoint")


def _check_same_data(run: Path, data: NSDDataModule) -> None:
    facts = read_provenance(run)
    for name, now in (("store", data.store.fingerprint), ("tokens", data.tokens.fingerprint)):
        then = facts[name]["fingerprint"]
        if then != now:
            raise DataError(
                facts[name]["path"],
                f"its fingerprint is {now[:12]}, the run was trained on {then[:12]}",
                "Train again on these data, or bring back the ones it was trained on.",
            )


def _note_reading(run: Path, checkpoint: str) -> None:
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": "chasm test",
        "checkpoint": checkpoint,
    }
    with (run / "test_readings.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")


def _predict(
    run: Path, model: Stage1Module, data: NSDDataModule, recipe: Recipe, checkpoint: str
) -> PredictionFile:
    train, test = data.dataset("train"), data.dataset("test")
    mean_of = _parcels(model, train, "mean")
    target = _parcels(model, test, "mean")
    repeats = _repeat_parcels(model, test)
    rows = {"stage 1": _model_row(model, data)}
    baselines = fit_baselines(
        {"cls": data.tokens.cls, "patches": data.tokens.patches},
        train.image_ids, test.image_ids, mean_of, seed=recipe.seed,
    )  # fmt: skip
    for name, found in baselines.items():
        rows[name] = PredictionRow(found.values, "baseline", found.n_parameters, found.details)
    return PredictionFile(
        image_id=test.image_ids,
        repeats=test.repeats,
        target=target,
        train_mean=mean_of.mean(axis=0),
        rows=rows,
        units=_parcel_units(model, data),
        info=_info(run, model, data, recipe, checkpoint),
        membership=_membership(model, data),
        repeat_targets=repeats,
        targets=_own_targets(model, train, test),
        gate=None,
    )


def _parcels(model: Stage1Module, data: EncodingDataset, how: Aggregation) -> np.ndarray:
    """Parcel values of a dataset's items, (items, parcels) float32."""
    parts = []
    for start in range(0, len(data), BLOCK):
        betas = torch.from_numpy(data.betas(range(start, min(start + BLOCK, len(data)))))
        parts.append(model.parcels_of(betas, how).numpy())
    return np.concatenate(parts)


def _repeat_parcels(model: Stage1Module, data: EncodingDataset) -> np.ndarray:
    """Parcel means of every presentation, (items, repeats, parcels), NaN where there is none."""
    assert model.sizes is not None
    shape = (len(data), int(data.repeats.max()), model.sizes.n_parcels)
    result = np.full(shape, np.nan, np.float32)
    for row, trials in enumerate(data.trials):
        betas = torch.from_numpy(data.store.zscore(trials, data.mean, data.std))
        result[row, : len(trials)] = model.parcels_of(betas, "mean").numpy()
    return result


@torch.inference_mode()
def _model_row(model: Stage1Module, data: NSDDataModule) -> PredictionRow:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    parts, gates = [], []
    loader = data.test_dataloader()
    for batch in track(loader, "predict test images", len(loader)):
        moved: Any = {name: value.to(device) for name, value in batch.items()}
        output = model(data.on_after_batch_transfer(moved, 0))
        parts.append(output.parcels.float().cpu().numpy())
        gates.append(output.gate[..., 0].mean(1).float().cpu().numpy())
    model.cpu()
    share = np.concatenate(gates)
    details = {
        "trained on": f"{model.target} of voxels",
        "mean share of the global stream": float(share.mean()),
        "sd over images": float(share.std()),
    }
    n = sum(p.numel() for p in model.parameters())
    return PredictionRow(np.concatenate(parts), "model", n, details)


def _own_targets(
    model: Stage1Module, train: EncodingDataset, test: EncodingDataset
) -> dict[str, AlternativeTarget]:
    if model.target == "mean":
        return {}
    values = _parcels(model, test, model.target)
    return {
        model.target: AlternativeTarget(values, _parcels(model, train, model.target).mean(axis=0))
    }


def _parcel_units(model: Stage1Module, data: NSDDataModule) -> Units:
    parcellation, store = model.parcellation, data.store
    assert parcellation is not None
    coordinates = store.coordinates()
    position = np.full((parcellation.n_parcels, 3), np.nan, np.float32)
    if coordinates is not None:
        axes = torch.from_numpy(np.array(coordinates.T, dtype=np.float32))
        position = parcellation.aggregate(axes).T.numpy()
    return Units(parcellation.sizes.numpy(), _parcel_ncsnr(model, data), position)


def _parcel_ncsnr(model: Stage1Module, data: NSDDataModule) -> np.ndarray:
    """Noise-ceiling SNR of the parcel means, from the repeats of every image of the subject."""
    mean, std = data.normalisation
    store = data.store
    parts = []
    for start in range(0, store.n_trials, BLOCK):
        trials = np.arange(start, min(start + BLOCK, store.n_trials))
        betas = torch.from_numpy(store.zscore(trials, mean, std))
        parts.append(model.parcels_of(betas, "mean").numpy())
    return unit_ncsnr(np.concatenate(parts), store.trials["image_id"].to_numpy())


def _membership(model: Stage1Module, data: NSDDataModule) -> dict[str, Membership]:
    assert model.parcellation is not None
    found = {}
    for atlas, roi in data.store.rois.items():
        names = {key: name for key, name in sorted(roi.names.items()) if key >= 1}
        if names:
            counts = model.parcellation.roi_weights(roi.labels, names)
            found[atlas] = Membership(counts.numpy().astype(np.int64), tuple(names.values()))
    return found


def _info(
    run: Path, model: Stage1Module, data: NSDDataModule, recipe: Recipe, checkpoint: str
) -> RunInfo:
    store, tokens = data.store, data.tokens
    return RunInfo(
        subject=store.subject,
        dataset=store.dataset,
        simulated=store.simulated,
        unit="parcel",
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
