"""Files of the simulated tree, named and laid out as NSD's."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.io

from chasm.data.simulation.atlases import ATLASES
from chasm.data.simulation.betas import BetaMaps, write_nifti
from chasm.data.simulation.config import (
    BETA_SCALE,
    REPEATS,
    SimulationConfig,
    Stream,
    random_stream,
)
from chasm.data.simulation.cortex import Cortex, SmoothFields
from chasm.data.simulation.design import Design
from chasm.data.simulation.stimuli import Latents, draw_latents, render
from chasm.data.simulation.truth import truth_paths
from chasm.io import atomic_path, write_text
from chasm.progress import track

MAT_HEADER = b"MATLAB 5.0 MAT-file, simulated NSD design"
SPACE = "func1pt8mm"
SIDES = ("", "lh.", "rh.")
"""Prefixes of ROI volumes: both hemispheres, left, right."""
LABEL_TABLES = tuple(f"{atlas}.mgz.ctab" for atlas in ATLASES)


class Tree:
    """Paths of a tree in NSD's layout."""

    def __init__(self, root: Path, config: SimulationConfig) -> None:
        self.root = root
        self._config = config
        experiment = root / "nsddata" / "experiments" / "nsd"
        self.marker = root / "SIMULATED.json"
        self.stimuli = root / "nsddata_stimuli" / "stimuli" / "nsd" / "nsd_stimuli.hdf5"
        self.design = experiment / "nsd_expdesign.mat"
        self.stimulus_table = experiment / "nsd_stim_info_merged.csv"
        self.latents = root / "truth" / "stimuli.npz"

    def behaviour(self, subject: int) -> Path:
        """Trial table of a subject."""
        return self.root / f"nsddata/ppdata/subj{subject:02d}/behav/responses.tsv"

    def anatomy(self, subject: int) -> Path:
        """Folder of a subject's volumes."""
        return self.root / f"nsddata/ppdata/subj{subject:02d}/{SPACE}"

    def labels(self, brain: str) -> Path:
        """Folder of label tables; `brain` is subjXX or fsaverage."""
        return self.root / "nsddata" / "freesurfer" / brain / "label"

    def betas(self, subject: int) -> Path:
        """Folder of a subject's betas."""
        version = self._config.beta_version
        return self.root / f"nsddata_betas/ppdata/subj{subject:02d}/{SPACE}/{version}"

    def session(self, subject: int, session: int) -> Path:
        """Betas of one session, 1-based."""
        suffix = self._config.betas_format
        return self.betas(subject) / f"betas_session{session:02d}.{suffix}"

    def sessions(self, subject: int) -> list[Path]:
        """Betas of all sessions of a subject."""
        count = self._config.sessions[subject - 1]
        return [self.session(subject, session) for session in range(1, count + 1)]

    def common_files(self) -> list[Path]:
        """Every file that the subjects share."""
        tables = [self.labels("fsaverage") / name for name in LABEL_TABLES]
        return [self.stimuli, self.design, self.stimulus_table, self.latents, *tables]

    def subject_files(self, subject: int) -> list[Path]:
        """Every file of one subject."""
        anatomy, betas = self.anatomy(subject), self.betas(subject)
        return [
            *self.sessions(subject),
            *truth_paths(self.root, subject),
            *(anatomy / "roi" / f"{side}{atlas}.nii.gz" for atlas in ATLASES for side in SIDES),
            *(anatomy / f"{name}.nii.gz" for name in ("brainmask", "mean", "R2", "onoffbeta")),
            *(betas / f"{name}.nii.gz" for name in ("ncsnr", "meanbeta")),
            *(self.labels(f"subj{subject:02d}") / name for name in LABEL_TABLES),
            self.behaviour(subject),
        ]


def write_stimuli(path: Path, config: SimulationConfig, image_ids: np.ndarray) -> None:
    """Make sure that the stimulus file holds some images, beside those it holds already.

    `imgBrick` is (stimuli, size, size, 3) uint8 with one chunk per image; images that no
    written subject sees stay unallocated and read as zeros. Unlike NSD's, the file has an
    attribute `simulated`. It is written anew in
    order of the ids, so that its bytes do not depend on the order of the calls.
    """
    present = _rendered(path)
    missing = np.setdiff1d(image_ids, present)
    if not len(missing):
        return
    latents = draw_latents(config, missing)
    row_of = {int(image_id): row for row, image_id in enumerate(missing)}
    shape = (config.n_stimuli, config.image_size, config.image_size, 3)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["simulated"] = True
        brick = file.create_dataset("imgBrick", shape, np.uint8, chunks=(1, *shape[1:]))
        old = h5py.File(path, "r", locking=False) if len(present) else None
        try:
            for image_id in track(np.union1d(present, missing), "stimuli"):
                place = (int(image_id), 0, 0, 0)
                if int(image_id) in row_of:
                    pixels = render(config, latents, row_of[int(image_id)], int(image_id))
                    brick.id.write_direct_chunk(place, pixels.tobytes())
                elif old is not None:
                    brick.id.write_direct_chunk(
                        place, old["imgBrick"].id.read_direct_chunk(place)[1]
                    )
        finally:
            if old is not None:
                old.close()


def _rendered(path: Path) -> np.ndarray:
    """Rows of the stimulus file that hold an image, ascending."""
    if not path.is_file():
        return np.zeros(0, np.int64)
    rows: list[int] = []
    with h5py.File(path, "r", locking=False) as file:
        file["imgBrick"].id.chunk_iter(lambda chunk: rows.append(chunk.chunk_offset[0]))
    return np.sort(np.array(rows, np.int64))


def write_latents(path: Path, config: SimulationConfig) -> None:
    """Write what every image of the design shows, rendered or not."""
    latents = draw_latents(config, np.arange(config.n_stimuli))
    with atomic_path(path) as temporary:
        np.savez(temporary, **vars(latents))


def read_latents(path: Path) -> Latents:
    """Read the latents of all images."""
    with np.load(path) as file:
        return Latents(**{name: file[name] for name in file.files})


def write_design(path: Path, design: Design) -> None:
    """Write `nsd_expdesign.mat` (MATLAB 5) with NSD's fields, shapes and types."""
    fields = {
        "masterordering": design.masterordering[None].astype(np.uint16),
        "basiccnt": design.basiccnt.astype(np.uint16),
        "sharedix": design.sharedix[None].astype(np.int32),
        "stimpattern": design.stimpattern,
        "subjectim": design.subjectim.astype(np.int32),
    }
    with atomic_path(path) as temporary:
        scipy.io.savemat(temporary, fields, do_compression=True)
        # The header's text holds the time of writing; a fixed text keeps bytes repeatable.
        with temporary.open("r+b") as file:
            file.write(MAT_HEADER.ljust(116))


def write_stimulus_table(path: Path, config: SimulationConfig, design: Design) -> None:
    """Write `nsd_stim_info_merged.csv`: one row per stimulus, nsdId 0-based, trials 1-based."""
    rng = random_stream(config.seed, Stream.DESIGN, 1)
    n = config.n_stimuli
    shared = np.isin(np.arange(n), design.shared_images())
    columns: dict[str, np.ndarray] = {
        "cocoId": np.sort(rng.choice(600_000, n, replace=False)) + 1,
        "cocoSplit": np.where(rng.random(n) < 0.93, "train2017", "val2017"),
        "cropBox": rng.choice(["(0, 0, 0, 0)", "(0, 0, 0.125, 0.125)", "(0.1, 0.15, 0, 0)"], n),
        "loss": np.round(rng.uniform(0, 0.3, n), 4),
        "nsdId": np.arange(n),
        "flagged": np.zeros(n, bool),
        "BOLD5000": np.zeros(n, bool),
        "shared1000": shared,
    }
    trials = np.argsort(design.masterordering, kind="stable").reshape(-1, REPEATS) + 1
    repeats: dict[str, np.ndarray] = {}
    for subject in config.subjects:
        images = design.subject_images(subject)
        seen = np.zeros(n, np.int64)
        seen[images] = 1
        columns[f"subject{subject}"] = seen
        for repeat in range(REPEATS):
            trial = np.zeros(n, np.int64)
            trial[images] = trials[:, repeat]
            repeats[f"subject{subject}_rep{repeat}"] = trial
    with atomic_path(path) as temporary:
        pd.DataFrame(columns | repeats).to_csv(temporary, lineterminator="\n")


def write_behaviour(path: Path, config: SimulationConfig, design: Design, subject: int) -> None:
    """Write `responses.tsv`: one row per trial in the order of the betas, ids 1-based."""
    rng = random_stream(config.seed, Stream.BEHAVIOUR, subject)
    sessions = config.sessions[subject - 1]
    per_session = config.trials_per_session
    position = design.trial_positions(sessions)
    n = len(position)
    runs = np.tile(design.runs(), sessions)
    session = np.repeat(np.arange(1, sessions + 1), per_session)
    recent, first, current = _memory(position, session)
    old = ~np.isnan(recent)
    correct = rng.random(n) < 0.85
    pressed = np.where(old == correct, 2, 1)
    trial = np.concatenate([np.arange(1, c + 1) for c in np.bincount(design.runs())[1:]])
    table = pd.DataFrame(
        {
            "SUBJECT": subject,
            "SESSION": session,
            "RUN": runs,
            "TRIAL": np.tile(trial, sessions),
            "73KID": design.subject_images(subject)[position] + 1,
            "10KID": position + 1,
            "TIME": np.round(737000 + 7.0 * session + np.arange(n) % per_session * 5e-5, 6),
            "ISOLD": old.astype(int),
            "ISCORRECT": correct.astype(int),
            "RT": np.round(np.exp(rng.normal(6.8, 0.25, n)), 2),
            "CHANGEMIND": (rng.random(n) < 0.03).astype(int),
            "MEMORYRECENT": recent,
            "MEMORYFIRST": first,
            "ISOLDCURRENT": current.astype(int),
            "ISCORRECTCURRENT": (current == (pressed == 2)).astype(int),
            "TOTAL1": (pressed == 1).astype(int),
            "TOTAL2": (pressed == 2).astype(int),
            "BUTTON": pressed,
            "MISSINGDATA": 0,
        }
    )
    with atomic_path(path) as temporary:
        table.to_csv(temporary, sep="\t", index=False, na_rep="NaN", lineterminator="\n")


def _memory(position: np.ndarray, session: np.ndarray) -> tuple[np.ndarray, ...]:
    """Say for each trial what a perfect memory would know of its image.

    Returns the number of trials since its last and since its first showing (NaN: none), and
    whether it was shown in this session already.
    """
    recent, first = np.full((2, len(position)), np.nan)
    current = np.zeros(len(position), bool)
    shown: dict[int, tuple[int, int]] = {}
    for trial, image in enumerate(position.tolist()):
        if image in shown:
            start, last = shown[image]
            recent[trial], first[trial] = trial - last - 1, trial - start - 1
            current[trial] = session[last] == session[trial]
            shown[image] = (start, trial)
        else:
            shown[image] = (trial, trial)
    return recent, first, current


def write_label_tables(folder: Path) -> None:
    """Write `<atlas>.mgz.ctab` files: label and name, one per line."""
    for table, names in zip(LABEL_TABLES, ATLASES.values(), strict=True):
        lines = ["0 Unknown", *(f"{label} {name}" for label, name in names.items())]
        write_text(folder / table, "\n".join(lines) + "\n")


def write_rois(folder: Path, cortex: Cortex) -> None:
    """Write every atlas for both hemispheres together and each alone (−1/0/k, int16)."""
    both = np.ones(len(cortex.right), bool)
    sides = dict(zip(SIDES, (both, ~cortex.right, cortex.right), strict=True))
    for atlas in ATLASES:
        labels = cortex.labels(atlas)
        for prefix, here in sides.items():
            volume = cortex.volume(np.where(here, labels, -1), -1, np.int16)
            with atomic_path(folder / f"{prefix}{atlas}.nii.gz") as temporary:
                write_nifti(temporary, volume, cortex.affine)


def write_maps(tree: Tree, config: SimulationConfig, subject: int, cortex: Cortex) -> None:
    """Write the brain mask and the mean functional volume."""
    rng = random_stream(config.seed, Stream.CORTEX, subject, 1)
    bias = SmoothFields(cortex.shape, 40.0).draw(rng, 1)[0]
    brain = cortex.volume(np.ones(len(cortex.brain)), 0, np.int16)
    mean = np.where(brain == 1, 1000 * np.exp(0.15 * bias), 40).astype(np.float32)
    for name, volume in {"brainmask": brain, "mean": mean}.items():
        with atomic_path(tree.anatomy(subject) / f"{name}.nii.gz") as temporary:
            write_nifti(temporary, volume, cortex.affine)


def write_beta_maps(tree: Tree, subject: int, cortex: Cortex, maps: BetaMaps) -> None:
    """Write the maps that NSD computes from betas.

    ncsnr (NaN invalid) and meanbeta (float32, still × 300) lie beside the betas; R2 (percent
    of single-trial variance that repeats) and onoffbeta lie with the other volumes.
    """
    repeated = 100 * maps.ncsnr**2 / (1 + maps.ncsnr**2)
    volumes = {
        tree.betas(subject) / "ncsnr.nii.gz": (maps.ncsnr, np.nan),
        tree.betas(subject) / "meanbeta.nii.gz": (maps.mean * BETA_SCALE, 0),
        tree.anatomy(subject) / "R2.nii.gz": (repeated, np.nan),
        tree.anatomy(subject) / "onoffbeta.nii.gz": (maps.mean, 0),
    }
    for path, (values, outside) in volumes.items():
        with atomic_path(path) as temporary:
            write_nifti(temporary, cortex.volume(values, outside, np.float32), cortex.affine)
