"""Cells of one new subject and one source, computed once and kept, so that a curve can go on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chasm.data.datamodule import NSDDataModule
from chasm.data.splits import FewShot, few_shot
from chasm.errors import DataError
from chasm.evaluation.predicting import predict_rows, run_info
from chasm.evaluation.prediction_parts import RunInfo
from chasm.evaluation.reading import Reading, note_reading, open_run
from chasm.evaluation.transfer import Cell, Scorer
from chasm.evaluation.transfer_arms import FeatureTable, SolvedArms
from chasm.io import digest, sha256_of_file, write_json
from chasm.models.adapters import HEAD_SPACES
from chasm.training.base import EncodingModule
from chasm.training.recipes import Recipe
from chasm.training.run_files import read_provenance
from chasm.training.sources import HEAD_SHARES, source_features

log = logging.getLogger(__name__)

CELL_VERSION = 1
"""Raised when a change of the code changes a cell."""


class Shots(NamedTuple):
    """Images of the new subject that an arm is given.

    Attributes
    ----------
    n, draw
        How many, and which draw of them.
    image_ids
        (n,), sorted; validation included where it is taken from among them.
    n_train
        Those left when validation is taken from among them.
    few
        The setting of the data module; None: the whole split, with its own validation images.
    """

    n: int
    draw: int
    image_ids: NDArray[np.int64]
    n_train: int
    few: FewShot | None

    @property
    def args(self) -> list[str]:
        """Arguments of a recipe that is trained on these images."""
        if self.few is None:
            return []
        settings = vars(self.few) | {"n": self.n}
        return [x for key, v in settings.items() for x in (f"--data.few_shot.{key}", str(v))]


def draw_shots(data: NSDDataModule, few: FewShot | None) -> Shots:
    """Draw images of a subject whose data module has no few-shot setting.

    Raises
    ------
    ConfigError
        There are fewer train images than asked for.
    """
    split = data.full_split
    if few is None:
        return Shots(len(split.train), 0, split.train, len(split.train), None)
    found = few_shot(split, few, data.store.trials["image_id"].to_numpy())
    ids = np.sort(np.concatenate([found.train, found.validation]))
    return Shots(len(ids), few.draw, ids, len(found.train), few)


class Cells:
    """Cells of every arm on one subject, from one source, on one set of resamples.

    Parameters
    ----------
    recipe
        Of the adapter, without a few-shot setting.
    sources
        The trained Stage 1 of every source subject.
    prints
        Fingerprints of their checkpoints.
    folder
        Where cells are kept.
    n_boot
        Resamples of the test images.
    by
        Command that reads the test images.
    fresh
        Compute again what is kept.
    """

    def __init__(
        self,
        recipe: Recipe,
        sources: Sequence[EncodingModule],
        prints: Sequence[str],
        folder: Path,
        n_boot: int,
        by: str,
        *,
        fresh: bool = False,
    ) -> None:
        self.recipe, self.sources, self.folder = recipe, list(sources), folder
        self.n_boot, self.by, self.fresh = n_boot, by, fresh
        self.data = recipe.make_data()
        for stage in ("fit", "test"):
            self.data.setup(stage)
        self.print = digest(list(prints))

    @cached_property
    def reading(self) -> Reading:
        """The units of an adapter of this recipe, which need no weights."""
        model = self.recipe.make_model()
        model.take_source(self.sources)
        model.build(self.data.sizes, self.data.parcellation)
        return Reading(model, self.data)

    @cached_property
    def scorer(self) -> Scorer:
        """The test images, read when a cell is computed; the reading is noted in the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        note_reading(self.folder, self.print, self.by)
        return Scorer(self.reading, self.n_boot)

    @cached_property
    def features(self) -> FeatureTable:
        """What a ridge head reads, for all train and test images."""
        ids = np.union1d(self.scorer.train_ids, self.scorer.image_ids)
        spaces = source_features(self.sources, self.data, ids, HEAD_SPACES)
        return FeatureTable(ids, spaces)

    def solved(self, arms: Sequence[str], shots: Shots) -> list[Cell]:
        """Give the cells of solved arms on the same images."""
        found: list[Cell] = []
        fitted: SolvedArms | None = None
        for arm in arms:
            path = self._path(
                arm, shots, [self.recipe.seed, version("himalaya"), HEAD_SHARES.tolist()]
            )
            cell = None if self.fresh else Cell.read(path)
            if cell is None:
                if fitted is None:
                    fitted = self._solver(shots, with_features="ridge_head" in arms)
                values, n_weights = fitted.predict(arm)
                cell = self.scorer.score(arm, shots.n, shots.draw, n_weights, values)
                cell.write(path)
            found.append(cell)
        return found

    def _solver(self, shots: Shots, *, with_features: bool) -> SolvedArms:
        scorer, tokens = self.scorer, self.data.tokens
        return SolvedArms(
            {"cls": tokens.cls, "patches": tokens.patches},
            self.features if with_features else None,
            shots.image_ids,
            scorer.responses[np.searchsorted(scorer.train_ids, shots.image_ids)],
            scorer.image_ids,
            self.recipe.seed,
        )

    def trained(self, arm: str, shots: Shots, run: Path) -> Cell:
        """Give the cell of a trained arm from its finished run."""
        path = self._path(arm, shots, [run.name, sha256_of_file(run / "checkpoints" / "best.ckpt")])
        cell = None if self.fresh else Cell.read(path)
        if cell is None:
            model, data, recipe, checkpoint = open_run(run)
            note_reading(run, checkpoint, self.by)
            found = predict_rows(Reading(model, data), 0, recipe.seed)
            values = found.rows[model.row_name].values
            n_trained = int(read_provenance(run)["trained"]["n_trained"])
            cell = self.scorer.score(arm, shots.n, shots.draw, n_trained, values)
            cell.write(path)
        return cell

    def _path(self, arm: str, shots: Shots, facts: Sequence[Any]) -> Path:
        drawn = None if shots.few is None else vars(shots.few)
        key = digest([CELL_VERSION, self.n_boot, drawn, *facts], 8)
        return self.folder / "cells" / f"{arm}-{shots.n}-{shots.draw}-{key}.npz"

    def facts(self) -> dict[str, Any]:
        """Ceiling, variance and number of the test images, kept so that they are read once."""
        path = self.folder / f"test-{digest([CELL_VERSION, self.n_boot], 8)}.json"
        return _kept(path, self._facts, fresh=self.fresh)

    def _facts(self) -> dict[str, Any]:
        scorer = self.scorer
        return {
            "ceiling": scorer.ceiling(),
            "target_variance": scorer.target_variance,
            "n_images": len(scorer.image_ids),
            "seed": scorer.seed,
        }

    def info(self, name: str) -> RunInfo:
        """Say what the cells are about."""
        return run_info(
            self.reading.model, self.data, name, self.recipe.resolved(), {"source": self.print}
        )

    @property
    def source_names(self) -> tuple[str, ...]:
        """Subjects of the source.

        Raises
        ------
        DataError
            A checkpoint does not say on whom it was trained.
        """
        names = []
        for source in self.sources:
            if source.trained_on is None:
                raise DataError("source", "does not say its subject", "Train it again.")
            names.append(str(source.trained_on["subject"]))
        return tuple(names)


def _kept(path: Path, make: Callable[[], Mapping[str, Any]], *, fresh: bool) -> dict[str, Any]:
    if path.is_file() and not fresh:
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            log.warning("%s is damaged and made again", path)
    found = dict(make())
    write_json(path, found)
    return found
