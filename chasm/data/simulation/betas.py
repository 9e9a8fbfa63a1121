"""Single-trial betas: one session's values, its file, and maps computed from the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np

from chasm.data.simulation.config import (
    BETA_SCALE,
    REPEATS,
    VOXEL_SIZE_MM,
    SimulationConfig,
    Stream,
    random_stream,
)
from chasm.data.simulation.cortex import Cortex, SmoothFields
from chasm.data.simulation.design import Design
from chasm.data.simulation.responses import ideal_prediction
from chasm.io import atomic_path
from chasm.progress import track

TRIALS_AT_ONCE = 32
"""Noise volumes drawn together; part of what the random stream means."""
INVALID_SHARE = 0.0005
"""Share of white-matter voxels, at least one, that a session marks invalid by zeros."""
BLOCK_BYTES = 1 << 28
"""Memory for betas that maps are computed from at once."""


@dataclass(frozen=True)
class Scaling:
    """Percent signal change of a brain voxel: offset + gain · response.

    Parameters
    ----------
    gain, offset
        (voxels,) averages over sessions, in percent signal change.
    """

    gain: np.ndarray
    offset: np.ndarray


def make_scaling(config: SimulationConfig, subject: int, cortex: Cortex) -> Scaling:
    """Draw each brain voxel's average gain and offset."""
    rng = random_stream(config.seed, Stream.SCALING, subject)
    n = len(cortex.brain)
    return Scaling(gain=np.exp(rng.normal(np.log(1.5), 0.35, n)), offset=rng.normal(0.8, 0.6, n))


def session_betas(
    config: SimulationConfig,
    subject: int,
    session: int,
    cortex: Cortex,
    signal: np.ndarray,
    q: np.ndarray,
    scaling: Scaling,
) -> np.ndarray:
    """Draw the betas of one session.

    Parameters
    ----------
    config, subject, session
        Choose the random stream; `session` is 1-based.
    cortex
        The subject's brain.
    signal
        (trials, nsdgeneral voxels) noise-free signal of unit variance on each trial.
    q
        (nsdgeneral voxels,) ncsnr²; brain voxels outside nsdgeneral hold noise only.
    scaling
        Average gain and offset of the brain voxels.

    Returns
    -------
    ndarray
        (brain voxels, trials) int16, percent signal change × 300.
    """
    rng = random_stream(config.seed, Stream.NOISE, subject, session)
    n_trials, n_voxels = len(signal), len(cortex.brain)
    visual = cortex.visual
    noise_sd = np.ones(n_voxels, np.float32)
    noise_sd[visual] = np.sqrt(1 / (1 + q))
    drift = np.exp(rng.normal(0, config.session_gain_sd, n_voxels))
    gain = np.float32(BETA_SCALE * scaling.gain * drift)
    shift = rng.normal(0, config.session_offset_sd, n_voxels)
    offset = np.float32(BETA_SCALE * (scaling.offset + shift))

    fields = SmoothFields(cortex.shape, config.noise_length_mm)
    spatial_sd = np.float32(np.sqrt(1 - config.noise_global_share))
    global_sd = np.float32(np.sqrt(config.noise_global_share))
    betas = np.empty((n_voxels, n_trials), np.int16)
    for start in range(0, n_trials, TRIALS_AT_ONCE):
        trials = slice(start, min(start + TRIALS_AT_ONCE, n_trials))
        n = trials.stop - trials.start
        response = spatial_sd * fields.draw(rng, n)[:, *cortex.brain.T]
        response += global_sd * rng.standard_normal((n, 1), np.float32)
        response *= noise_sd
        response[:, visual] += ideal_prediction(signal[trials], q)
        response = np.rint(offset + gain * response)
        betas[:, trials] = np.clip(response, -32768, 32767).astype(np.int16).T
    outside = np.flatnonzero(~cortex.cortical)
    n_invalid = max(1, round(INVALID_SHARE * len(outside)))
    betas[rng.choice(outside, n_invalid, replace=False)] = 0
    return betas


def write_session(path: Path, config: SimulationConfig, cortex: Cortex, betas: np.ndarray) -> None:
    """Write (brain voxels, trials) int16 betas as NSD does; the file appears when whole.

    HDF5: `betas` (trials, Z, Y, X), chunks (trials, 1, 1, 1), no compression; unlike NSD's, the
    file has an attribute `simulated`. NIfTI:
    (X, Y, Z, trials). Zeros outside the brain.
    """
    with atomic_path(path) as temporary:
        if config.betas_format == "hdf5":
            _write_hdf5(temporary, cortex, betas, config.allocate_all_chunks)
        else:
            volume = np.zeros((*cortex.shape, betas.shape[1]), np.int16)
            volume[tuple(cortex.brain.T)] = betas
            write_nifti(temporary, volume, cortex.affine)


def _write_hdf5(path: Path, cortex: Cortex, betas: np.ndarray, all_chunks: bool) -> None:
    n_trials = betas.shape[1]
    row_of = np.full(cortex.shape, -1)
    row_of[tuple(cortex.brain.T)] = np.arange(len(betas))
    row_of = row_of.transpose(2, 1, 0)
    empty = np.zeros(n_trials, np.int16).tobytes()
    with h5py.File(path, "w") as file:
        file.attrs["simulated"] = True
        dataset = file.create_dataset(
            "betas", (n_trials, *row_of.shape), np.int16, chunks=(n_trials, 1, 1, 1)
        )
        for z, y, x in np.argwhere(np.ones_like(row_of) if all_chunks else row_of >= 0):
            row = row_of[z, y, x]
            chunk = betas[row].tobytes() if row >= 0 else empty
            dataset.id.write_direct_chunk((0, int(z), int(y), int(x)), chunk)


def read_voxels(path: Path, cortex: Cortex, rows: np.ndarray) -> np.ndarray:
    """Read the betas of some brain voxels from a session file, (rows, trials) int16."""
    voxels = cortex.brain[rows]
    if path.suffix == ".hdf5":
        with h5py.File(path, "r", locking=False) as file:
            dataset = file["betas"]
            raw = [
                dataset.id.read_direct_chunk((0, int(z), int(y), int(x)))[1] for x, y, z in voxels
            ]
        return np.frombuffer(b"".join(raw), np.int16).reshape(len(rows), -1)
    volume = np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)
    return volume[tuple(voxels.T)]


def write_nifti(path: Path, volume: np.ndarray, affine: np.ndarray) -> None:
    """Write a volume with 1.8 mm voxels and no intensity scaling."""
    image = nib.Nifti1Image(volume, affine, dtype=volume.dtype)
    image.header.set_zooms((VOXEL_SIZE_MM,) * 3 + (1.0,) * (volume.ndim - 3))
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


@dataclass(frozen=True)
class BetaMaps:
    """Maps over the brain voxels, computed from session files as NSD does.

    Parameters
    ----------
    ncsnr
        (voxels,) noise-ceiling signal-to-noise ratio; NaN where a session is invalid, or
        everywhere when no image has three trials.
    mean
        (voxels,) mean over all trials, percent signal change.
    """

    ncsnr: np.ndarray
    mean: np.ndarray


def beta_maps(paths: list[Path], cortex: Cortex, design: Design) -> BetaMaps:
    """Compute maps from a subject's session files, in blocks of voxels.

    ncsnr: z-score each voxel within each session; noise variance is the mean, over images
    with exactly three trials, of the unbiased variance across the trials; signal variance
    is what it lacks to 1.
    """
    positions = design.trial_positions(len(paths))
    order = np.argsort(positions, kind="stable")
    counts = np.bincount(positions)
    triples = order[np.repeat(counts, counts) == REPEATS].reshape(-1, REPEATS)
    ncsnr = np.full(len(cortex.brain), np.nan)
    mean = np.zeros(len(cortex.brain))
    step = max(1, BLOCK_BYTES // (12 * len(positions)))
    blocks = np.split(np.arange(len(ncsnr)), np.arange(step, len(ncsnr), step))
    for rows in track(blocks, "noise ceiling") if len(blocks) > 1 else blocks:
        sessions = [read_voxels(path, cortex, rows).astype(np.float32) for path in paths]
        mean[rows] = np.mean([session.mean(axis=1) for session in sessions], axis=0) / BETA_SCALE
        valid = np.all([session.std(axis=1) > 0 for session in sessions], axis=0)
        for session in sessions:
            session -= session.mean(axis=1, keepdims=True)
            session /= np.where(valid, session.std(axis=1, ddof=1), 1)[:, None]
        if not len(triples):
            continue
        scored = np.concatenate(sessions, axis=1)
        noise = scored[:, triples].var(axis=2, ddof=1).mean(axis=1, dtype=np.float64)
        ratio = np.sqrt(np.maximum(0, 1 - noise) / np.maximum(noise, 1e-12))
        ncsnr[rows] = np.where(valid, ratio, np.nan)
    return BetaMaps(ncsnr.astype(np.float32), mean.astype(np.float32))
