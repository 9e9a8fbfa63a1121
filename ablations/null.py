"""The null worlds of a subject: simulated over several processes, and kept for other suites."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
import torch

from ablations.claims import SCALES
from ablations.values import TestSet, region_key
from ablations.worlds import Sizes
from ablations.worlds_null import NullWorlds, null_worlds
from chasm.errors import DataError
from chasm.io import digest, write_json
from chasm.progress import track

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Raised when a change of the worlds or the effects changes what a null world gives."""

CHUNK = 4
"""Worlds simulated at a time by a process."""


def subject_null(
    test: TestSet, sizes: Sizes, n: int, folder: Path, seed: int = 0
) -> NullWorlds | None:
    """Simulate a subject's null worlds, or read them where they were simulated before.

    Parameters
    ----------
    test
        The subject.
    sizes
        See `ablations.worlds_null.subject_sizes`.
    n
        Worlds; 0 for none.
    folder
        Where they are kept.
    seed
        Of all of them.

    Returns
    -------
    NullWorlds or None
        None where the subject has no two sets of regions with noise ceilings: then nothing can
        be claimed anyway.
    """
    if n == 0 or not np.isfinite(test.ceiling).any() or not (test.early and test.higher):
        return None
    bare = replace(test, target=test.target[:1], n_boot=0)
    path = folder / f"{_key(bare, sizes, n, seed)}.json"
    if path.is_file():
        log.info("null worlds are there: %s", path)
        return _read(path)
    chunks = [(bare, sizes, min(CHUNK, n - k), seed * 100_003 + k) for k in range(0, n, CHUNK)]
    try:
        found = dict(track(_simulated(chunks), "null worlds", len(chunks)))
    except DataError as error:
        log.warning("no null worlds: %s", error)
        return None
    parts = [found[index] for index in range(len(chunks))]
    null = NullWorlds(
        np.concatenate([part.level for part in parts]),
        {scale: np.concatenate([part.asymmetry[scale] for part in parts]) for scale in SCALES},
    )
    scales = {scale: _plain(values) for scale, values in null.asymmetry.items()}
    write_json(path, {"level": _plain(null.level)} | scales)
    return null


def _simulated(chunks: list[tuple[Any, ...]]) -> Iterator[tuple[int, NullWorlds]]:
    """Simulate chunks over the cores; each by its place."""
    context = multiprocessing.get_context("spawn")
    jobs = max(1, min(len(chunks), torch.get_num_threads()))
    with ProcessPoolExecutor(jobs, context, _begin) as pool:
        waiting = {pool.submit(null_worlds, *chunk): place for place, chunk in enumerate(chunks)}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin() -> None:
    threadpoolctl.threadpool_limits(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def _key(test: TestSet, sizes: Sizes, n: int, seed: int) -> str:
    """Digest of all that the worlds depend on."""
    kept = {*test.early, *test.higher}
    regions = {region_key(r): r.weights.tolist() for r in test.regions if region_key(r) in kept}
    facts = [FORMAT_VERSION, asdict(sizes), n, seed, test.early, test.higher, test.nc_threshold]
    return digest([facts, regions, test.ceiling.tolist()], 16)


def _plain(values: Any) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _read(path: Path) -> NullWorlds:
    raw = json.loads(path.read_text(encoding="utf-8"))
    arrays = {name: np.array(values, dtype=float) for name, values in raw.items()}
    return NullWorlds(arrays.pop("level"), arrays)
