"""`chasm test`: the one reading of the test images, into one predictions file."""

from __future__ import annotations

import json
import logging
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import torch

from chasm.data.batches import EncodingDataset
from chasm.data.datamodule import NSDDataModule
from chasm.errors import ChasmError, DataError
from chasm.evaluation import evaluate
from chasm.evaluation.bootstrap import check_resamples
from chasm.evaluation.figures import Volume
from chasm.evaluation.predictions import (
    MAIN_TARGET,
    AlternativeTarget,
    Membership,
    PredictionFile,
    PredictionRow,
    RunInfo,
    Units,
)
from chasm.evaluation.tables import show
from chasm.io import sha256_of_file
from chasm.models.baselines import baseline_kernels, fit_to_kernels
from chasm.noise_ceiling import unit_ncsnr
from chasm.parcellation import Aggregation
from chasm.progress import track
from chasm.training.modules import Stage1Module
from chasm.training.recipes import Recipe
from chasm.training.runs import is_finished, load, read_provenance

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
    ConfigError
        `n_boot` is negative or between 1 and 99.
    """
    check_resamples(n_boot)
    if not is_finished(run):
        raise DataError(
            run, "this folder is no finished run", "Train it to its end with `chasm fit`."
        )
    predictions = run / "predictions.h5"
    checkpoint = sha256_of_file(run / "checkpoints" / "best.ckpt")
    model, data, recipe = load(run)
    assert isinstance(model, Stage1Module)
    _check_store(run, data)
    _check_same(run, "tokens", data.tokens.fingerprint)
    if not fresh and _made_by(predictions) == checkpoint:
        log.info("predictions are current: %s", predictions)
    else:
        data.setup("test")
        _note_reading(run, checkpoint)
        _predict(run, model, data, recipe, checkpoint).write(predictions)
    return _report(run, _volume(model, data), n_boot, fresh=False)


def report_run(run: Path, *, n_boot: int = 2000, fresh: bool = False) -> Path:
    """Make table and report from a run's predictions; show the table and the report's path.

    Files that are current are not made again, unless `fresh`. Where the run's store is no longer
    the one it was trained on, the report has no brain map and a warning says so.

    Raises
    ------
    DataError
        There are no predictions, or they cannot be read.
    ConfigError
        `n_boot` is negative or between 1 and 99.
    """
    if not (run / "predictions.h5").is_file():
        raise DataError(run / "predictions.h5", "no such file", "Run `chasm test` first.")
    return _report(run, _volume_of(run), n_boot, fresh)


def _report(run: Path, volume: Volume | None, n_boot: int, fresh: bool) -> Path:
    predictions = run / "predictions.h5"
    metrics = run / "metrics.csv"
    scores = evaluate(
        predictions,
        run / "report",
        n_boot=n_boot,
        metrics_csv=metrics if metrics.is_file() else None,
        provenance=read_provenance(run),
        volume=volume,
        fresh=fresh,
    )
    show(scores)
    log.info("report: %s", run / "report" / "report.html")
    return predictions


def _volume_of(run: Path) -> Volume | None:
    """Give a run's `_volume`, None with a warning when model or store cannot be used."""
    try:
        model, data, _ = load(run)
        _check_store(run, data)
    except ChasmError as error:
        log.warning("the report has no brain map: %s", error)
        return None
    assert isinstance(model, Stage1Module)
    return _volume(model, data)


def _volume(model: Stage1Module, data: NSDDataModule) -> Volume | None:
    """Give the function that puts one value per parcel into the subject's volume, if it has one."""
    store = data.store
    if store.volume_shape is None:
        return None
    parcellation = model.parcellation
    assert parcellation is not None

    def place(values: np.ndarray) -> nibabel.Nifti1Image:
        parcels = torch.from_numpy(np.asarray(values, np.float32))
        voxels = parcellation.expand(parcels, fill=math.nan).numpy()
        return nibabel.Nifti1Image(store.to_volume(voxels), store.affine)

    return place


def _made_by(predictions: Path) -> str | None:
    """Fingerprint of the checkpoint behind a predictions file, None without a readable one."""
    if not predictions.is_file():
        return None
    try:
        return PredictionFile.read(predictions).info.fingerprints.get("checkpoint")
    except DataError as error:
        log.warning("predicting again: %s", error)
        return None


def _check_store(run: Path, data: NSDDataModule) -> None:
    _check_same(run, "store", data.store.fingerprint)


def _check_same(run: Path, part: Literal["store", "tokens"], now: str) -> None:
    facts = read_provenance(run)[part]
    then = facts["fingerprint"]
    if then != now:
        raise DataError(
            facts["path"],
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
    kernels = baseline_kernels(
        {"cls": data.tokens.cls, "patches": data.tokens.patches}, train.image_ids, test.image_ids
    )

    def baselines(responses: np.ndarray, target: str) -> dict[str, PredictionRow]:
        fitted = fit_to_kernels(kernels, responses, train.image_ids, seed=recipe.seed)
        return {
            name: PredictionRow(found.values, "baseline", found.n_parameters, found.details, target)
            for name, found in fitted.items()
        }

    targets: dict[str, AlternativeTarget] = {}
    if model.target != "mean":
        own = _own_parcels(model, data, "train")
        targets[model.target] = AlternativeTarget(
            _own_parcels(model, data, "test"), own.mean(axis=0), rows=baselines(own, model.target)
        )
    return PredictionFile(
        image_id=test.image_ids,
        repeats=test.repeats,
        target=_parcels(model, test, "mean"),
        train_mean=mean_of.mean(axis=0),
        rows={"stage 1": _model_row(model, data), **baselines(mean_of, MAIN_TARGET)},
        units=_parcel_units(model, data),
        info=_info(run, model, data, recipe, checkpoint),
        membership=_membership(model, data),
        repeat_targets=_repeat_parcels(model, test),
        targets=targets,
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
    return model.parcels_of(torch.from_numpy(data.repeat_betas()), "mean").numpy()


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
        "mean share of the global stream": float(share.mean()),
        "sd over images": float(share.std()),
    }
    n = sum(p.numel() for p in model.parameters())
    trained_on = MAIN_TARGET if model.target == "mean" else model.target
    return PredictionRow(np.concatenate(parts), "model", n, details, trained_on)


def _own_parcels(
    model: Stage1Module, data: NSDDataModule, part: Literal["train", "test"]
) -> np.ndarray:
    """Values of the model's own target as training saw them, (images, parcels).

    A model that was trained on single trials has the target of every presentation, averaged
    here over repeats; one that was trained on image means has the target of the mean.
    """
    found = data.dataset(part, data.samples)
    values = _parcels(model, found, model.target)
    if data.samples == "image_means":
        return values
    images, index, counts = np.unique(found.image_ids, return_inverse=True, return_counts=True)
    sums = np.zeros((len(images), values.shape[1]))
    np.add.at(sums, index, values)
    return (sums / counts[:, None]).astype(np.float32)


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
