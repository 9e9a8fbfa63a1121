"""Write a simulated NSD, or extend one by further subjects."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from filelock import FileLock
from threadpoolctl import threadpool_limits

from chasm.data.simulation.betas import (
    beta_maps,
    make_scaling,
    session_betas,
    write_session,
)
from chasm.data.simulation.config import SimulationConfig
from chasm.data.simulation.cortex import make_cortex
from chasm.data.simulation.design import Design, make_design
from chasm.data.simulation.responses import (
    contrast_energy,
    gist_features,
    ideal_prediction,
    make_signal,
    make_tuning,
)
from chasm.data.simulation.truth import write_truth
from chasm.data.simulation.writer import (
    Tree,
    read_latents,
    write_behaviour,
    write_beta_maps,
    write_design,
    write_label_tables,
    write_latents,
    write_maps,
    write_rois,
    write_stimuli,
    write_stimulus_table,
)
from chasm.errors import ConfigError
from chasm.io import write_json
from chasm.progress import track

GENERATOR_VERSION = 2
"""Rises when the same config gives other bytes."""

logger = logging.getLogger(__name__)


def simulate(config: SimulationConfig, out: Path, subjects: Sequence[int]) -> Path:
    """Write subjects of a simulated NSD in NSD's own file layout.

    A second call with the same config adds the subjects that are missing, writes files again
    that were lost, and skips the rest; the files are the same as if all had been written at
    once. An interrupted call leaves whole files only and is continued by the next one.

    Parameters
    ----------
    config
        Sizes, planted truth and seed.
    out
        Root of the tree.
    subjects
        Subject numbers, 1-based, whose images, betas and volumes are written.

    Returns
    -------
    Path
        The root.

    Raises
    ------
    ConfigError
        When a subject is not part of the design, or `out` holds anything else than a tree
        of the same config.
    """
    wanted = sorted(set(subjects))
    unknown = [subject for subject in wanted if subject not in config.subjects]
    if unknown or not wanted:
        raise ConfigError(
            "simulate:subjects",
            f"found {unknown or 'none'}",
            f"Choose from 1 to {config.n_subjects}, the subjects of this design.",
        )
    tree = Tree(Path(out), config)
    _check_marker(tree, config)
    if not _unfinished(tree, wanted):
        return tree.root
    tree.root.mkdir(parents=True, exist_ok=True)
    # One BLAS thread: sums taken in another order would round single betas to other integers.
    with FileLock(tree.root / ".simulate.lock"), threadpool_limits(1, user_api="blas"):
        _check_marker(tree, config)
        _write_marker(tree, config, [])
        design = make_design(config)
        for subject in _unfinished(tree, wanted):
            logger.info("simulating subject %d in %s", subject, tree.root)
            _write_experiment(tree, config, design)
            _write_subject(tree, config, design, subject)
            _write_marker(tree, config, [subject])
    return tree.root


def _read_marker(tree: Tree) -> dict[str, Any]:
    if not tree.marker.is_file():
        return {}
    try:
        return dict(json.loads(tree.marker.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(
            tree.marker, f"is not JSON ({error})", "Remove the tree or choose another folder."
        ) from error


def _check_marker(tree: Tree, config: SimulationConfig) -> None:
    """Refuse a folder that holds something else than a tree of this config."""
    marker = _read_marker(tree)
    if not marker:
        if tree.root.exists() and (not tree.root.is_dir() or _occupied(tree.root)):
            raise ConfigError(
                tree.root,
                "is not empty and has no SIMULATED.json",
                "Choose an empty folder: real data is never mixed with simulated data.",
            )
        return
    if marker.get("generator_version") != GENERATOR_VERSION:
        raise ConfigError(
            f"{tree.marker}:generator_version",
            f"found {marker.get('generator_version')}, expected {GENERATOR_VERSION}",
            "Remove the tree or choose another folder.",
        )
    found, expected = marker.get("config", {}), config.to_dict()
    different = sorted(key for key in expected if found.get(key) != expected[key])
    if different or set(found) - set(expected):
        key = (different or sorted(set(found) - set(expected)))[0]
        raise ConfigError(
            f"{tree.marker}:config.{key}",
            f"the tree was made with {found.get(key)!r}, now {expected.get(key)!r} is asked for",
            "Use the tree's config, remove the tree, or choose another folder.",
        )


def _occupied(root: Path) -> bool:
    return any(entry.name != ".simulate.lock" for entry in root.iterdir())


def _write_marker(tree: Tree, config: SimulationConfig, finished: Iterable[int]) -> None:
    """Record the config and the subjects written so far."""
    marker = _read_marker(tree)
    written = sorted({*marker.get("subjects_written", []), *finished})
    if marker and written == marker["subjects_written"]:
        return
    write_json(
        tree.marker,
        {
            "simulated": True,
            "config": config.to_dict(),
            "special_sessions": config.special_sessions,
            "trials_per_session": config.trials_per_session,
            "sessions": {str(s): config.sessions[s - 1] for s in config.subjects},
            "subjects_written": written,
            "generator_version": GENERATOR_VERSION,
        },
    )


def _unfinished(tree: Tree, wanted: Sequence[int]) -> list[int]:
    """Subjects that are not recorded as written, or of whose files any is missing."""
    written = _read_marker(tree).get("subjects_written", [])
    if not all(path.is_file() for path in tree.common_files()):
        return list(wanted)
    return [
        subject
        for subject in wanted
        if subject not in written or not all(path.is_file() for path in tree.subject_files(subject))
    ]


def _write_experiment(tree: Tree, config: SimulationConfig, design: Design) -> None:
    """Write what all subjects share, as far as it is missing."""
    if not tree.design.is_file():
        write_design(tree.design, design)
    if not tree.stimulus_table.is_file():
        write_stimulus_table(tree.stimulus_table, config, design)
    if not tree.latents.is_file():
        write_latents(tree.latents, config)
    write_label_tables(tree.labels("fsaverage"))
    for subject in _read_marker(tree).get("subjects_written", []):  # should the file be lost
        write_stimuli(tree.stimuli, config, design.subject_images(subject))


def _write_subject(tree: Tree, config: SimulationConfig, design: Design, subject: int) -> None:
    image_ids = design.subject_images(subject)
    write_stimuli(tree.stimuli, config, image_ids)
    cortex = make_cortex(config, subject)
    write_rois(tree.anatomy(subject) / "roi", cortex)
    write_maps(tree, config, subject, cortex)
    write_label_tables(tree.labels(f"subj{subject:02d}"))
    write_behaviour(tree.behaviour(subject), config, design, subject)

    tuning = make_tuning(config, subject, cortex)
    energy = contrast_energy(track(_images(tree.stimuli, image_ids), "drives", len(image_ids)))
    gist = gist_features(read_latents(tree.latents).take(image_ids))
    signal = make_signal(energy, gist, tuning, config.interaction).values
    del energy
    shared = ideal_prediction(signal[: config.n_shared], tuning.q)
    write_truth(tree.root, config, subject, cortex, tuning, image_ids[: config.n_shared], shared)

    scaling = make_scaling(config, subject, cortex)
    paths = tree.sessions(subject)
    for session, path in enumerate(track(paths, f"betas of subject {subject}"), start=1):
        if path.is_file():
            continue
        on_trials = signal[design.session_positions(session)]
        write_session(
            path,
            config,
            cortex,
            session_betas(config, subject, session, cortex, on_trials, tuning.q, scaling),
        )
    write_beta_maps(tree, subject, cortex, beta_maps(paths, cortex, design))


def _images(path: Path, image_ids: np.ndarray) -> Iterator[np.ndarray]:
    """Read images one at a time from the stimulus file."""
    with h5py.File(path, "r", locking=False) as file:
        for image_id in image_ids:
            yield file["imgBrick"][int(image_id)]
