"""Reading the test images of a run: whether it may be done, the note of it, and the units."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chasm.data.batches import EncodingDataset
from chasm.data.datamodule import NSDDataModule
from chasm.errors import DataError
from chasm.evaluation.prediction_parts import Membership, Units, voxel_membership
from chasm.io import sha256_of_file
from chasm.noise_ceiling import unit_ncsnr
from chasm.parcellation import Aggregation, Parcellation
from chasm.training.base import EncodingModule
from chasm.training.recipes import Recipe
from chasm.training.run_files import is_finished, read_provenance
from chasm.training.runs import load

BLOCK = 256
"""Images, or trials, whose voxels are in memory at once."""


class OpenedRun(NamedTuple):
    """A finished run whose data are those it was trained on."""

    model: EncodingModule
    data: NSDDataModule
    recipe: Recipe
    checkpoint: str
    """Fingerprint of the weights."""


def open_run(run: Path) -> OpenedRun:
    """Load a finished run and make sure that its data have not changed.

    Raises
    ------
    DataError
        The folder is no finished run, or its store or tokens are not those it was trained on.
    """
    if not is_finished(run):
        raise DataError(
            run, "this folder is no finished run", "Train it to its end with `chasm fit`."
        )
    checkpoint = sha256_of_file(run / "checkpoints" / "best.ckpt")
    model, data, recipe = load(run)
    check_same(run, "store", data.store.fingerprint)
    check_same(run, "tokens", data.tokens.fingerprint)
    return OpenedRun(model, data, recipe, checkpoint)


def check_same(run: Path, part: Literal["store", "tokens"], now: str) -> None:
    """Refuse data with another fingerprint than the run was trained on.

    Raises
    ------
    DataError
        They differ.
    """
    facts = read_provenance(run)[part]
    then = facts["fingerprint"]
    if then != now:
        raise DataError(
            facts["path"],
            f"its fingerprint is {now[:12]}, the run was trained on {then[:12]}",
            "Train again on these data, or bring back the ones it was trained on.",
        )


def note_reading(run: Path, checkpoint: str, by: str) -> None:
    """Note in the run's ``test_readings.jsonl`` that a command reads the test images."""
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "by": by,
        "checkpoint": checkpoint,
    }
    with (run / "test_readings.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")


class Reading:
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

    def own_responses(self, part: Literal["train", "given", "test"]) -> np.ndarray:
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
