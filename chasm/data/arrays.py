"""From images and a response array to one subject store, for data that are not NSD.

Everything counts as one session; the repeats of an image become its trials.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chasm.data.images import StoredImages, open_images, read_npy
from chasm.data.splits import FRACTIONS, seeded_parts
from chasm.data.store_format import file_facts, is_current, signature
from chasm.data.store_writer import StoreWriter
from chasm.errors import ConfigError, DataError
from chasm.noise_ceiling import RepeatAccumulator, RunningMoments, ncsnr_from_variances
from chasm.progress import track

log = logging.getLogger(__name__)

_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class _Responses:
    """Checked responses: array (units, images, repeats), and which repeats are present."""

    path: Path
    values: np.ndarray
    present: np.ndarray

    def blocks(self, description: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield image ids and their values, (images, repeats, units) float32, NaN = missing."""
        units, images, repeats = self.values.shape
        step = max(1, _BLOCK_BYTES // (8 * units * repeats))
        starts = range(0, images, step)
        for start in track(starts, description) if len(starts) > 8 else starts:
            ids = np.arange(start, min(start + step, images))
            part = self.values[:, ids[0] : ids[-1] + 1]
            yield ids, np.ascontiguousarray(part.transpose(1, 2, 0), dtype=np.float32)


def prepare_arrays(
    images: Path,
    responses: Path,
    out: Path,
    *,
    name: str,
    dataset: str,
    rois: Path | None = None,
    coordinates: Path | None = None,
    split_seed: int = 0,
    fractions: Sequence[float] = FRACTIONS,
    overwrite: bool = False,
) -> Path:
    """Write a subject store from arrays.

    Parameters
    ----------
    images
        Folder or .zip of image files, or .npy uint8 (images, height, width, 3). The i-th image
        (file names sorted, digits read as numbers) is the i-th column of `responses`.
    responses
        .npy, (units, images), or (units, images, repeats) with NaN where a repeat is missing.
    out
        The store to write. Returns at once when it is current; one of the same name, dataset,
        images and responses is made anew when their content or the options have changed.
    name, dataset
        E.g. ``session_210325`` and ``macaque_v4``.
    rois
        .csv with columns unit (0-based), atlas, label; or .npy (units,) int with labels ≥ 1.
    coordinates
        .csv with columns x, y, z (and, if not in order, unit), or .npy (units, 3), in mm.
    split_seed, fractions
        Seeded split by image (train, validation, test); its train images give the statistics.
    overwrite
        Write the store even when it is current, or when something else stands at `out`.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    DataError
        If responses are not finite where they must be, lengths differ, or a file cannot be used.
    StoreError
        If the store at `out` is of another name, data set, image source or response file.
    """
    out = Path(out)
    source = open_images("auto", images)
    found = _load_responses(Path(responses), len(source))
    n_units = found.values.shape[0]
    rois, coordinates = (None if p is None else Path(p) for p in (rois, coordinates))
    for path in (rois, coordinates):
        if path is not None and not path.is_file():
            raise DataError(path, "no such file", "Give the right place, or leave it out")
    made_from = signature(
        {
            "name": name,
            "dataset": dataset,
            "responses": file_facts(found.path),
            "images": [str(source.path), source.fingerprint],
            "rois": rois and file_facts(rois),
            "coordinates": coordinates and file_facts(coordinates),
            "split": [split_seed, [float(f) for f in fractions]],
        }
    )
    identity = {
        "subject": name,
        "dataset": dataset,
        "source": "arrays",
        "beta_version": "",
        "source_path": str(found.path.resolve()),
    }
    held = identity | {"images/path": str(source.path)}
    if not overwrite and is_current(out, made_from, held):
        log.info("%s is current", out)
        return out
    atlases = _load_rois(rois, n_units) if rois else {}
    places = _load_coordinates(coordinates, n_units) if coordinates else None
    train = np.isin(np.arange(len(source)), seeded_parts(source.ids, split_seed, fractions)[0])
    if train.sum() < 2:
        raise ConfigError("fractions", f"leave {train.sum()} train images", "Give more to train")
    _write(
        found,
        source,
        train,
        atlases,
        places,
        out,
        {
            **identity,
            "source_signature": made_from,
            "split_seed": split_seed,
            "split_fractions": [float(f) for f in fractions],
        },
    )
    return out


def _load_responses(path: Path, n_images: int) -> _Responses:
    """Open the array by memory map and check every value."""
    if not path.is_file():
        raise DataError(path, "no such file", "Give a .npy of shape (units, images[, repeats])")
    values = read_npy(path, memory_map=True)
    if values.ndim not in (2, 3) or values.dtype.kind not in "iuf":
        raise DataError(
            path,
            f"{values.dtype} {values.shape} found, numbers (units, images[, repeats]) expected",
            "Save the responses in that form",
        )
    if values.shape[1] != n_images:
        hint = (
            "transpose it" if values.shape[0] == n_images else "give the images that belong to it"
        )
        raise DataError(
            path,
            f"shape {values.shape} means {values.shape[1]} images, but there are {n_images}",
            f"Responses are (units, images[, repeats]): {hint}",
        )
    with_repeats = values if values.ndim == 3 else values[:, :, None]
    responses = _Responses(path, with_repeats, np.ones(with_repeats.shape[1:], dtype=bool))
    missing = _count_missing(responses)
    n_units = len(with_repeats)
    if values.ndim == 2 and missing.any():
        raise DataError(
            path,
            f"{int(missing.sum())} responses of {int((missing[:, 0] > 0).sum())} images are NaN "
            "or infinite",
            "Leave those units or images out, or give repeats as a third axis with NaN for "
            "missing ones",
        )
    partly = np.argwhere((missing > 0) & (missing < n_units))
    present = missing == 0
    _check_units(responses)
    if len(partly):
        image, repeat = partly[0]
        raise DataError(
            path,
            f"repeat {repeat} of image {image} is NaN in {missing[image, repeat]} of {n_units} "
            f"units ({len(partly)} such repeats)",
            "A repeat is there for all units or for none: leave those units or repeats out",
        )
    empty = np.flatnonzero(~present.any(axis=1))
    if empty.size:
        raise DataError(
            path,
            f"{empty.size} of {n_images} images have no response (the first: image {empty[0]})",
            "Leave these images out of both files",
        )
    return _Responses(path, with_repeats, present)


def _count_missing(responses: _Responses) -> np.ndarray:
    """Count units that are not finite, per image and repeat: (images, repeats)."""
    missing = np.zeros(responses.present.shape, dtype=np.int64)
    for ids, values in responses.blocks("checking responses"):
        missing[ids] = (~np.isfinite(values)).sum(axis=2)
    return missing


def _check_units(responses: _Responses) -> None:
    """Refuse units without any response."""
    seen = np.zeros(len(responses.values), dtype=bool)
    for _, values in responses.blocks("checking units"):
        seen |= np.isfinite(values).any(axis=(0, 1))
    if not seen.all():
        silent = np.flatnonzero(~seen)
        raise DataError(
            responses.path,
            f"{silent.size} of {seen.size} units are NaN throughout (the first: unit {silent[0]})",
            "Leave these units out",
        )


def _load_rois(path: Path, n_units: int) -> dict[str, tuple[np.ndarray, dict[int, str]]]:
    """Read ROI labels: atlas → labels (units,) and their names."""
    if path.suffix == ".npy":
        labels = read_npy(path)
        if labels.shape != (n_units,) or labels.dtype.kind not in "iu":
            raise DataError(
                path,
                f"{labels.dtype} {labels.shape} found, integers ({n_units},) expected",
                "Save one label per unit",
            )
        return {path.stem: (labels, {int(k): str(k) for k in np.unique(labels) if k > 0})}
    rows = _read_csv(path, {"unit", "atlas", "label"})
    names: dict[str, list[str]] = {}
    for row in rows:
        names.setdefault(row["atlas"], []).append(row["label"])
    result = {
        atlas: (np.zeros(n_units, np.int16), dict(enumerate(sorted(set(labels)), start=1)))
        for atlas, labels in names.items()
    }
    for number, row in enumerate(rows, start=2):
        labels, table = result[row["atlas"]]
        labels[_unit(path, number, row["unit"], n_units)] = {v: k for k, v in table.items()}[
            row["label"]
        ]
    return result


def _load_coordinates(path: Path, n_units: int) -> np.ndarray:
    """Read places of units in mm: (units, 3)."""
    if path.suffix == ".npy":
        places = read_npy(path)
        if places.dtype.kind not in "iuf":
            raise DataError(path, f"{places.dtype} found, numbers expected", "Save x, y, z in mm")
    else:
        rows = _read_csv(path, {"x", "y", "z"})
        places = np.full((n_units, 3), np.nan)
        for number, row in enumerate(rows):
            unit = _unit(path, number + 2, row.get("unit", str(number)), n_units)
            try:
                places[unit] = [float(row[axis]) for axis in "xyz"]
            except ValueError as error:
                raise DataError(f"{path}:{number + 2}", str(error), "Write numbers") from error
    if places.shape != (n_units, 3) or not np.isfinite(places).all():
        raise DataError(
            path,
            f"shape {places.shape}, {int(np.isfinite(places).all(axis=-1).sum())} finite rows "
            f"found, ({n_units}, 3) finite numbers expected",
            "Give x, y, z of every unit",
        )
    return places


def _read_csv(path: Path, columns: set[str]) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            found, rows = reader.fieldnames, list(reader)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(
            path, f"not a readable CSV file ({error})", "Save it as CSV in UTF-8"
        ) from error
    if not columns <= set(found or ()):
        raise DataError(
            path,
            f"columns {found} found, {sorted(columns)} expected",
            "Write these names in the first line",
        )
    return [{k: (v or "").strip() for k, v in row.items() if k} for row in rows]


def _unit(path: Path, line: int, text: str, n_units: int) -> int:
    if not text.isdecimal() or int(text) >= n_units:
        raise DataError(
            f"{path}:{line}", f"unit '{text}' found, 0 to {n_units - 1} expected", "Count from 0"
        )
    return int(text)


def _varying(responses: _Responses, train: np.ndarray) -> np.ndarray:
    """Units that vary over the train trials: (units,) bool."""
    low = np.full(len(responses.values), np.inf, np.float32)
    high = -low
    for ids, values in responses.blocks("looking for constant units"):
        chosen = values[train[ids]]
        if len(chosen):
            low = np.fmin(low, np.nanmin(chosen, axis=(0, 1)))
            high = np.fmax(high, np.nanmax(chosen, axis=(0, 1)))
    return high > low


def _write(
    responses: _Responses,
    source: StoredImages,
    train: np.ndarray,
    atlases: dict[str, tuple[np.ndarray, dict[int, str]]],
    places: np.ndarray | None,
    out: Path,
    attributes: dict[str, Any],
) -> None:
    keep = _varying(responses, train)
    if not keep.any():
        raise DataError(responses.path, "no unit varies over the train images", "Check the array")
    if not keep.all():
        log.warning("%d of %d units are constant: kept out", (~keep).sum(), keep.size)
    n_trials, n_units = int(responses.present.sum()), int(keep.sum())
    moments = {"train": RunningMoments(n_units), "all": RunningMoments(n_units)}
    noise = RepeatAccumulator(n_units)
    with StoreWriter(
        out, n_trials=n_trials, n_voxels=n_units, dtype=np.float32, scale=1.0
    ) as writer:
        for ids, values in responses.blocks("writing the store"):
            present, values = responses.present[ids], values[:, :, keep]
            writer.append(values[present])
            moments["all"].update(values[present])
            moments["train"].update(values[train[ids]][present[train[ids]]])
            counts = present.sum(axis=1)
            for k in np.unique(counts):
                same = counts == k
                noise.update(values[same][present[same]].reshape(-1, k, n_units))
        image, repeat = np.nonzero(responses.present)
        one = np.ones(n_trials, dtype=np.int64)
        number = responses.present.cumsum(axis=1)[image, repeat] - 1
        writer.write_trials(session=one, run=one, image_id=image, repeat=number)
        for which, ids_used in (("train", np.flatnonzero(train)), ("all", None)):
            mean, std = moments[which].mean[None], np.sqrt(moments[which].variance)[None]
            writer.write_normalisation(which, mean, std, ids_used)
        columns = {"ncsnr": ncsnr_from_variances(noise.signal_variance, noise.noise_variance)}
        if places is not None:
            columns |= dict(zip("xyz", places[keep].T, strict=True))
        counts_of = {"n_mask": keep.size, "n_invalid": 0, "n_constant": int((~keep).sum())}
        counts_of |= {"ncsnr_images": noise.n_images, "ncsnr_repeats": 0}
        writer.write_voxels(counts_of, **columns)
        for atlas, (labels, names) in atlases.items():
            writer.write_roi(atlas, labels[keep], names)
        none = np.zeros(len(source), dtype=bool)
        writer.write_images(source.ids, none, none, source)
        writer.write_attributes(**attributes)
