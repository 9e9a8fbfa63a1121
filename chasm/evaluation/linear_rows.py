"""Linear baselines, fitted once for all runs on the same tokens, images and responses.

They depend on nothing that a recipe's model says, and fitting them to every voxel takes longer
than training many a model. Their predictions are kept beside the runs, in
``<runs>/<dataset>/<subject>/linear/<key>.h5``; the key is a digest of all that they depend on.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from chasm.io import atomic_path, digest
from chasm.models.baselines import BaselinePrediction, linear_baselines

log = logging.getLogger(__name__)

N_FOLDS = 5
"""Folds of the cross-validation over train images."""

FORMAT_VERSION = 1
"""Raised when a change of the code changes what the fits give."""


def linear_key(
    tokens: str,
    rows: tuple[np.ndarray, np.ndarray],
    responses: np.ndarray,
    seed: int,
    cls_layers: list[int],
    n_folds: int = N_FOLDS,
) -> str:
    """Digest of everything that the linear rows depend on.

    Parameters
    ----------
    tokens
        Fingerprint of the token cache.
    rows
        Train and test images.
    responses
        (train images, units), what is fitted.
    seed
        Of the folds.
    cls_layers
        Backbone layers of the CLS tokens.
    n_folds
        Of the cross-validation.
    """
    content = hashlib.sha256()
    for values in (*rows, responses):
        array = np.ascontiguousarray(values)
        content.update(f"{array.dtype.str}{array.shape}".encode())
        content.update(array.data)
    facts = [FORMAT_VERSION, version("himalaya"), tokens, seed, list(cls_layers), n_folds]
    searched = [
        [name, encoder.spaces, encoder.shares.tolist(), encoder.alphas.tolist()]
        for name, encoder in linear_baselines(n_folds, seed, cls_layers).items()
    ]
    return digest([*facts, searched, content.hexdigest()])


def linear_rows(
    folder: Path, key: str, fit: Callable[[], Mapping[str, BaselinePrediction]]
) -> dict[str, BaselinePrediction]:
    """Give the linear rows of this key: kept ones, or those of `fit`, which are then kept.

    A file that cannot be read is written again.

    Parameters
    ----------
    folder
        Where they are kept.
    key
        From `linear_key`.
    fit
        Called when there are none.
    """
    path = Path(folder) / f"{key}.h5"
    if path.is_file():
        try:
            found = _read(path)
        except (OSError, KeyError, ValueError, TypeError) as error:
            log.warning("fitting the linear baselines again: %s cannot be read (%s)", path, error)
        else:
            log.info("linear baselines are current: %s", path)
            return found
    fitted = dict(fit())
    _write(fitted, path)
    return fitted


def _write(rows: Mapping[str, BaselinePrediction], path: Path) -> None:
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["rows"] = json.dumps(list(rows))
        for index, row in enumerate(rows.values()):
            dataset = file.create_dataset(str(index), data=row.values)
            dataset.attrs["n_parameters"] = row.n_parameters
            dataset.attrs["details"] = json.dumps(row.details)


def _read(path: Path) -> dict[str, BaselinePrediction]:
    with h5py.File(path, "r") as file:
        rows: dict[str, Any] = {}
        for index, name in enumerate(json.loads(file.attrs["rows"])):
            dataset = file[str(index)]
            details = json.loads(dataset.attrs["details"])
            count = int(dataset.attrs["n_parameters"])
            rows[name] = BaselinePrediction(dataset[:], count, details)
    return rows
