"""A simulated subject of NSD's full size in NSD's layout, made fast for measuring time and memory.

The grid, the mask of 15,724 voxels, the trials of a session, the chunks of the beta files and the
design are NSD's; the values are noise. Every session is a hard link to the same file.
"""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
from scipy.ndimage import binary_dilation

from chasm.data.nsd_facts import NSD_SUBJECTS, TRIALS_PER_SESSION
from chasm.data.simulation.betas import write_nifti
from chasm.data.simulation.config import BETA_SCALE, SimulationConfig
from chasm.data.simulation.cortex import Cortex, make_cortex
from chasm.data.simulation.design import make_design
from chasm.data.simulation.writer import Tree, write_behaviour, write_design, write_rois
from chasm.io import atomic_path, write_json
from chasm.progress import track

SUBJECT = 1
SESSIONS = 40
N_VOXELS = NSD_SUBJECTS[SUBJECT].nsdgeneral_voxels
_BLOCK = 4096


def make_tree(root: Path, quick: bool = False) -> Tree:
    """Write the tree, or keep the one that is there.

    Parameters
    ----------
    root
        A folder of its own, with 1.1 GB free.
    quick
        A grid of an eighth of the voxels and 75 trials, to try the benchmark.

    Returns
    -------
    Tree
        Paths; sessions 1 to `SESSIONS` of subject 1 exist as .hdf5.
    """
    changes = {"grids": ((41, 52, 42),) * 8, "trials_per_session": 75, "n_shared": 100}
    config = SimulationConfig.full(**(changes if quick else {}))
    tree = Tree(root, config)
    if tree.marker.is_file():
        return tree
    cortex = make_cortex(config, SUBJECT)
    design = make_design(config)
    write_design(tree.design, design)
    write_behaviour(tree.behaviour(SUBJECT), config, design, SUBJECT)
    write_rois(tree.anatomy(SUBJECT) / "roi", cortex)
    mask = _mask(cortex, N_VOXELS // (8 if quick else 1))
    labels = np.where(mask, 1, -1).astype(np.int16)
    write_nifti(tree.anatomy(SUBJECT) / "roi" / "nsdgeneral.nii.gz", labels, cortex.affine)
    tree.stimuli.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(tree.stimuli, "w") as file:
        shape = (config.n_stimuli, config.image_size, config.image_size, 3)
        file.create_dataset("imgBrick", shape, np.uint8, chunks=(1, *shape[1:]))
        file.attrs["simulated"] = True
    first, *others = [tree.session(SUBJECT, session) for session in range(1, SESSIONS + 1)]
    write_session(first, cortex, config.trials_per_session)
    for path in others:
        os.link(first, path)
    write_json(
        tree.marker,
        {
            "simulated": True,
            "special_sessions": config.special_sessions,
            "trials_per_session": config.trials_per_session,
        },
    )
    return tree


def _mask(cortex: Cortex, n_voxels: int) -> np.ndarray:
    """Grow or cut the visual cortex to so many voxels: (X, Y, Z) bool."""
    brain = cortex.volume(np.ones(len(cortex.brain)), 0, bool)
    mask = cortex.volume(cortex.area >= 0, 0, bool)
    while mask.sum() < n_voxels:
        border = np.flatnonzero(binary_dilation(mask) & brain & ~mask)
        mask.flat[border[: n_voxels - int(mask.sum())]] = True
    mask.flat[np.flatnonzero(mask)[n_voxels:]] = False
    return mask


def write_session(path: Path, cortex: Cortex, n_trials: int = TRIALS_PER_SESSION) -> None:
    """Write one session as NSD does: (trials, Z, Y, X) int16, a chunk of trials per voxel.

    Brain voxels hold normal noise of standard deviation 1 around .5 percent signal change; the
    chunks outside the brain hold zeros and are written as well.
    """
    inside = cortex.volume(np.ones(len(cortex.brain)), 0, bool).transpose(2, 1, 0)
    places = np.argwhere(np.ones_like(inside))
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["simulated"] = True
        shape = (n_trials, *inside.shape)
        betas = file.create_dataset("betas", shape, np.int16, chunks=(n_trials, 1, 1, 1))
        for start in track(range(0, len(places), _BLOCK), "writing a session"):
            block = places[start : start + _BLOCK]
            values = rng.standard_normal((len(block), n_trials), np.float32)
            values = np.rint(BETA_SCALE * (values + np.float32(0.5))).astype(np.int16)
            values[~inside[tuple(block.T)]] = 0
            for place, chunk in zip(block.tolist(), values, strict=True):
                betas.id.write_direct_chunk((0, *place), chunk.data)


def write_nifti_session(tree: Tree, out: Path) -> Path:
    """Write session 1 once more as betas_session01.nii.gz, (X, Y, Z, trials), into a folder."""
    import nibabel as nib

    with h5py.File(tree.session(SUBJECT, 1), "r") as file:
        values = file["betas"][:]
    path = out / "betas_session01.nii.gz"
    out.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values.transpose(3, 2, 1, 0), np.eye(4)), path)
    return path
