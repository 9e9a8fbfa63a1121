"""`chasm test` and `chasm report`: what a run's folder holds of its test images."""

from __future__ import annotations

import logging
from pathlib import Path

import nibabel
import numpy as np
import torch

from chasm.data.datamodule import NSDDataModule
from chasm.errors import ChasmError, DataError
from chasm.evaluation import evaluate
from chasm.evaluation.bootstrap import check_resamples
from chasm.evaluation.brain_maps import Volume
from chasm.evaluation.gallery import Pixels
from chasm.evaluation.predicting import N_DRAWS, draws_of, predict_test
from chasm.evaluation.predictions import PredictionFile
from chasm.evaluation.reading import check_same, note_reading, open_run
from chasm.evaluation.tables import show
from chasm.training.base import EncodingModule
from chasm.training.run_files import read_provenance
from chasm.training.runs import load

log = logging.getLogger(__name__)

TEST = "chasm test"
"""Who reads the test images unless another command says that it does."""


def score_run(
    run: Path,
    *,
    n_boot: int = 2000,
    fresh: bool = False,
    n_draws: int = N_DRAWS,
    by: str = TEST,
) -> Path:
    """Score a finished run on its test images and write predictions, tables and report.

    The reading is noted in the run's ``test_readings.jsonl``. When predictions of the same
    checkpoint, with as many draws, are there, nothing is read again and only the table is shown.

    Parameters
    ----------
    run
        Folder of a finished run.
    n_boot
        Bootstrap resamples of the intervals.
    fresh
        Predict again in any case.
    n_draws
        Draws per image of a model that has a latent; below 2: none.
    by
        Command that asks, for the note of the reading.

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
    model, data = _predicted(run, fresh, n_draws, by)
    return _report(run, volume_of(model, data), _pixels(data), n_boot, fresh=False)


def predict_run(run: Path, *, fresh: bool = False, n_draws: int = N_DRAWS, by: str = TEST) -> Path:
    """Write a finished run's predictions as `score_run` does, without tables and report."""
    _predicted(run, fresh, n_draws, by)
    return run / "predictions.h5"


def _predicted(
    run: Path, fresh: bool, n_draws: int, by: str
) -> tuple[EncodingModule, NSDDataModule]:
    """Give a run's model and data once its predictions are there and current."""
    model, data, recipe, checkpoint = open_run(run)
    predictions = run / "predictions.h5"
    if not fresh and _made_by(predictions) == (checkpoint, draws_of(model, n_draws)):
        log.info("predictions are current: %s", predictions)
    else:
        data.setup("test")
        note_reading(run, checkpoint, by)
        predict_test(run, model, data, recipe, checkpoint, n_draws).write(predictions)
    return model, data


def report_run(run: Path, *, n_boot: int = 2000, fresh: bool = False) -> Path:
    """Make table and report from a run's predictions; show the table and the report's path.

    Files that are current are not made again, unless `fresh`. Where the run's store is no longer
    the one it was trained on, the report has no brain map and no pixels, and a warning says so.

    Raises
    ------
    DataError
        There are no predictions, or they cannot be read.
    ConfigError
        `n_boot` is negative or between 1 and 99.
    """
    if not (run / "predictions.h5").is_file():
        raise DataError(run / "predictions.h5", "no such file", "Run `chasm test` first.")
    volume, pixels = _store_views(run)
    return _report(run, volume, pixels, n_boot, fresh)


def _report(
    run: Path, volume: Volume | None, pixels: Pixels | None, n_boot: int, fresh: bool
) -> Path:
    predictions = run / "predictions.h5"
    metrics = run / "metrics.csv"
    scores = evaluate(
        predictions,
        run / "report",
        n_boot=n_boot,
        metrics_csv=metrics if metrics.is_file() else None,
        provenance=read_provenance(run),
        volume=volume,
        pixels=pixels,
        fresh=fresh,
    )
    show(scores)
    log.info("report: %s", run / "report" / "report.html")
    return predictions


def _store_views(run: Path) -> tuple[Volume | None, Pixels | None]:
    """Give a run's `volume_of` and `_pixels`; none, with a warning, without model and store."""
    try:
        model, data, _ = load(run)
        check_same(run, "store", data.store.fingerprint)
    except ChasmError as error:
        log.warning("the report has no brain map and no pixels: %s", error)
        return None, None
    return volume_of(model, data), _pixels(data)


def volume_of(model: EncodingModule, data: NSDDataModule) -> Volume | None:
    """Give the function that puts one value per unit into the subject's volume, if it has one."""
    store = data.store
    if store.volume_shape is None:
        return None
    parcellation = model.parcellation
    assert parcellation is not None

    def place(values: np.ndarray) -> nibabel.Nifti1Image:
        voxels = np.asarray(values, np.float32)
        if model.unit == "parcel":
            voxels = parcellation.expand(torch.from_numpy(voxels), fill=np.nan).numpy()
        return nibabel.Nifti1Image(store.to_volume(voxels), store.affine)

    return place


def _pixels(data: NSDDataModule) -> Pixels:
    """Give the function that reads images of the store by id."""

    def read(image_ids: np.ndarray) -> list[np.ndarray]:
        return data.store.open_images().read(image_ids)

    return read


def _made_by(predictions: Path) -> tuple[str, int] | None:
    """Checkpoint's fingerprint and draws per image of a predictions file, None without one."""
    if not predictions.is_file():
        return None
    try:
        file = PredictionFile.read(predictions)
    except DataError as error:
        log.warning("predicting again: %s", error)
        return None
    n_draws = 0 if file.draws is None else file.draws.n
    return file.info.fingerprints.get("checkpoint", ""), n_draws
