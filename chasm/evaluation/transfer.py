"""Scores of models fitted to few images of a subject: one cell per arm, number and draw.

Every cell is scored on the same test images, and on the same resamples of them, against the same
reference (the mean pattern of all train images), so that cells can be averaged and subtracted.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from chasm.evaluation.aggregate import (
    RegionTable,
    ScoredTarget,
    ceiling_tables,
    image_scores_of,
    point_table,
    unit_scores_of,
    unit_table,
)
from chasm.evaluation.bootstrap import (
    TargetSums,
    image_means,
    resample_counts,
    unit_scores,
)
from chasm.evaluation.prediction_parts import MAIN_TARGET
from chasm.evaluation.reading import Reading
from chasm.evaluation.regions import make_regions
from chasm.io import atomic_path
from chasm.noise_ceiling import noise_ceiling

log = logging.getLogger(__name__)

METRICS = (
    "noise_normalised_r2",
    "voxelwise_correlation_mean",
    "voxelwise_correlation_median",
    "pattern_correlation",
    "pattern_correlation_centred",
    "r2",
    "mse",
)
"""What is kept of every cell, over all units."""

FloatArray = NDArray[np.floating[Any]]

_BLOCK = 100
"""Resamples at a time."""


@dataclass(frozen=True)
class Cell:
    """Scores of one arm fitted to one set of images.

    Attributes
    ----------
    arm
        What was fitted, see `chasm.evaluation.transfer_arms.ARMS`.
    n
        Images of the subject that it was given, validation included.
    draw
        Number of the draw of these images.
    n_trained
        Weights fitted to the subject.
    points
        Metric to its value on the test images.
    samples
        Metric to its value in every resample, (resamples,).
    """

    arm: str
    n: int
    draw: int
    n_trained: int
    points: Mapping[str, float]
    samples: Mapping[str, FloatArray]

    def write(self, path: Path) -> None:
        """Write the cell, whole or not at all."""
        facts = {"arm": self.arm, "n": self.n, "draw": self.draw, "n_trained": self.n_trained}
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            np.savez(
                stream,
                facts=np.array(json.dumps(facts)),
                metrics=np.array(list(self.points)),
                points=np.array(list(self.points.values()), dtype=np.float64),
                samples=np.stack([self.samples[key] for key in self.points]),
            )

    @classmethod
    def read(cls, path: Path) -> Cell | None:
        """Read a cell; None where there is none, or, with a warning, where it is damaged."""
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as found:
                facts = json.loads(str(found["facts"]))
                keys = [str(key) for key in found["metrics"]]
                return cls(
                    **facts,
                    points=dict(zip(keys, found["points"].tolist(), strict=True)),
                    samples=dict(zip(keys, found["samples"], strict=True)),
                )
        except (OSError, KeyError, ValueError, TypeError, BadZipFile) as error:
            log.warning("%s is damaged and made again (%s)", path, error)
            return None


class Scorer:
    """Scores predictions for the test images of one subject.

    Parameters
    ----------
    reading
        Units and data; the data module has no few-shot setting, so that R² and the centred
        pattern correlation are against the mean of all train images at any number of shots.
    n_boot, seed
        Resamples of the test images; 0 for none.

    Attributes
    ----------
    target : what is scored against.
    image_ids : (test images,).
    responses : (train images, units), of `train_ids`.
    train_ids : (train images,).
    """

    def __init__(self, reading: Reading, n_boot: int, seed: int = 0) -> None:
        data = reading.data
        train, test = data.dataset("train"), data.dataset("test")
        self.train_ids, self.image_ids = train.image_ids, test.image_ids
        self.responses = reading.responses(train, "mean")
        units = reading.units()
        self.target = ScoredTarget(
            name=MAIN_TARGET,
            values=reading.responses(test, "mean"),
            train_mean=self.responses.mean(axis=0, dtype=np.float64),
            ceiling=noise_ceiling(units.ncsnr, test.repeats),
            repeats=test.repeats,
            repeat_targets=reading.in_order(torch.from_numpy(test.repeat_betas()), "mean"),
            regions=make_regions(units, {}),
            nc_threshold=0.0,
        )
        self._sums = TargetSums(self.target.values, self.target.train_mean)
        self.seed = seed
        self.counts = resample_counts(len(test), n_boot, seed)

    @property
    def target_variance(self) -> float:
        """Variance of the responses over test images, the mean over units."""
        values = np.asarray(self.target.values, dtype=np.float64)
        return float(np.average(values.var(axis=0), weights=self.target.regions[0].weights))

    def score(self, arm: str, n: int, draw: int, n_trained: int, prediction: FloatArray) -> Cell:
        """Score one prediction, (test images, units)."""
        images = image_scores_of(prediction, self.target)
        points = point_table(unit_scores_of(prediction, self.target), images, self.target)
        overall = {key: float(points[key][0, 0]) for key in METRICS}
        return Cell(arm, n, draw, n_trained, overall, self._resampled(prediction, images))

    def _resampled(self, prediction: FloatArray, images: RegionTable) -> dict[str, FloatArray]:
        """Every metric over all units in every resample, (resamples,)."""
        blocks = []
        for start in range(0, max(1, len(self.counts)), _BLOCK):
            counts = self.counts[start : start + _BLOCK]
            units = unit_table(unit_scores(prediction, self._sums, counts), self.target)
            blocks.append(units | {k: image_means(values, counts) for k, values in images.items()})
        return {key: np.concatenate([block[key][:, 0] for block in blocks]) for key in METRICS}

    def ceiling(self) -> dict[str, float]:
        """Score of the best possible prediction; NaN where it is not known."""
        points, _ = ceiling_tables(self.target, self.counts[:0])
        return {key: float(points[key][0, 0]) for key in METRICS}
