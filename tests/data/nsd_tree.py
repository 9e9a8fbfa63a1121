"""A tiny tree in NSD's layout, written without any of chasm's own code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
from scipy.io import savemat

VERSION = "betas_fithrf_GLMdenoise_RR"
SHAPE = (7, 6, 5)
N_SHARED, N_OWN, SESSIONS, TRIALS = 14, 26, 4, 30
SPECIAL_SESSIONS = 3
AFFINE = np.array([[1.8, 0, 0, -6], [0, 1.8, 0, -5], [0, 0, 1.8, -4], [0, 0, 0, 1]])


@dataclass
class Tree:
    """What was written: 1-based ids as NSD has them, betas (sessions, X, Y, Z, trials)."""

    root: Path
    mask: np.ndarray
    streams: np.ndarray
    betas: np.ndarray
    ordering: np.ndarray
    subjectim: np.ndarray
    sharedix: np.ndarray
    pixels: np.ndarray

    def session(self, number: int, suffix: str = "hdf5") -> Path:
        return self.folder / f"betas_session{number:02d}.{suffix}"

    @property
    def folder(self) -> Path:
        return self.root / f"nsddata_betas/ppdata/subj01/func1pt8mm/{VERSION}"

    @property
    def roi_folder(self) -> Path:
        return self.root / "nsddata/ppdata/subj01/func1pt8mm/roi"

    @property
    def stimuli(self) -> Path:
        return self.root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"

    def masked(self, session: int) -> np.ndarray:
        """Betas of a session (1-based) in C order of the mask: (trials, voxels)."""
        return self.betas[session - 1][self.mask].T

    def image_ids(self, session: int) -> np.ndarray:
        """0-based image of each trial of subject 1, by a plain loop."""
        trials = range((session - 1) * TRIALS, session * TRIALS)
        return np.array([int(self.subjectim[0, int(self.ordering[t]) - 1]) - 1 for t in trials])


def write_volume(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, AFFINE), path)


def write_session(path: Path, betas: np.ndarray, layout: str = "voxel") -> None:
    """Write betas (X, Y, Z, trials) as .hdf5 (trials, Z, Y, X) or .nii.gz (X, Y, Z, trials)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if layout == "nii":
        return write_volume(path, betas)
    reverse = betas.transpose(3, 2, 1, 0)
    options = {
        "voxel": {"chunks": (len(reverse), 1, 1, 1)},
        "gzip": {"chunks": (len(reverse), 1, 1, 1), "compression": "gzip"},
        "trial": {"chunks": (1, *reverse.shape[1:]), "compression": "gzip"},
        "contiguous": {},
    }[layout]
    with h5py.File(path, "w") as file:
        file.create_dataset("betas", data=reverse, **options)


def write_tree(root: Path, layout: str = "voxel", seed: int = 0) -> Tree:
    """Write subject 1 of a design of two subjects."""
    rng = np.random.default_rng(seed)
    mask = rng.random(SHAPE) < 0.3
    streams = np.where(mask, rng.integers(0, 8, SHAPE), -1).astype(np.int16)
    n_ids = N_SHARED + N_OWN
    ordering = rng.permutation(np.repeat(np.arange(1, n_ids + 1), 3))
    images = rng.permutation(np.arange(1, N_SHARED + 2 * N_OWN + 1))
    sharedix = np.sort(images[:N_SHARED])
    own = images[N_SHARED:].reshape(2, N_OWN)
    subjectim = np.stack([np.concatenate([sharedix, own[s]]) for s in range(2)])
    pixels = rng.integers(0, 256, (len(images) + 3, 8, 8, 3)).astype(np.uint8)
    signal = rng.normal(size=(mask.sum(), n_ids))
    betas = np.zeros((SESSIONS, *SHAPE, TRIALS), dtype=np.int16)
    for s in range(SESSIONS):
        shown = ordering[s * TRIALS : (s + 1) * TRIALS] - 1
        noise = rng.normal(size=(mask.sum(), TRIALS))
        betas[s][mask] = np.round(300 * (signal[:, shown] + noise) + rng.normal(20, 5)).astype(int)
        write_session(
            root / f"nsddata_betas/ppdata/subj01/func1pt8mm/{VERSION}"
            f"/betas_session{s + 1:02d}.{'nii.gz' if layout == 'nii' else 'hdf5'}",
            betas[s],
            layout,
        )
    tree = Tree(root, mask, streams, betas, ordering, subjectim, sharedix, pixels)
    write_volume(tree.roi_folder / "nsdgeneral.nii.gz", np.where(mask, 1, -1).astype(np.int16))
    write_volume(tree.roi_folder / "streams.nii.gz", streams)
    write_volume(tree.roi_folder / "lh.streams.nii.gz", streams)
    write_design(tree)
    tree.stimuli.parent.mkdir(parents=True)
    with h5py.File(tree.stimuli, "w") as file:
        file.create_dataset("imgBrick", data=pixels, chunks=(1, 8, 8, 3))
    (root / "SIMULATED.json").write_text(
        json.dumps({"special_sessions": SPECIAL_SESSIONS, "trials_per_session": TRIALS})
    )
    return tree


def write_design(tree: Tree) -> None:
    path = tree.root / "nsddata/experiments/nsd/nsd_expdesign.mat"
    path.parent.mkdir(parents=True, exist_ok=True)
    pattern = np.zeros((SESSIONS, 2, 20), dtype=np.uint8)
    pattern[:, 0, :16], pattern[:, 1, :14] = 1, 1
    savemat(
        path,
        {
            "masterordering": tree.ordering[None].astype(np.uint16),
            "subjectim": tree.subjectim.astype(np.int32),
            "sharedix": tree.sharedix[None].astype(np.int32),
            "stimpattern": pattern,
        },
    )


def write_responses(tree: Tree, image_ids: np.ndarray) -> Path:
    """Write responses.tsv with 0-based `image_ids` of all trials."""
    path = tree.root / "nsddata/ppdata/subj01/behav/responses.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["SUBJECT\tSESSION\tRUN\tTRIAL\t73KID"]
    for trial, image in enumerate(image_ids):
        session = trial // TRIALS + 1
        lines.append(f"1\t{session}\t1\t{trial % TRIALS + 1}\t{image + 1}")
    path.write_text("\n".join(lines) + "\n")
    return path
