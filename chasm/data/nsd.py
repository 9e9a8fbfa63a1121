"""What the Natural Scenes Dataset's files say: paths, sessions, design, ids, ROI labels.

NSD's own ids are 1-based; everything that leaves this module is 0-based int64, except session
numbers, which are 1-based as in the file names.
Source: Allen et al. 2022 and the NSD data manual.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from chasm.data.nsd_facts import (
    ATLAS_LABELS,
    BETA_SCALE,
    BETA_VERSIONS,
    NSD_SUBJECTS,
    SPECIAL_SESSIONS,
    STREAM_GROUPS,
    TRIALS_PER_SESSION,
    SubjectFacts,
    from_nsd_ids,
    load_volume,
    read_ctab,
    read_responses,
    simulated_file,
    to_nsd_ids,
)
from chasm.errors import DataError

__all__ = [
    "ATLAS_LABELS",
    "BETA_SCALE",
    "BETA_VERSIONS",
    "NSD_SUBJECTS",
    "STREAM_GROUPS",
    "Design",
    "NSDTree",
    "RoiVolume",
    "SubjectFacts",
    "from_nsd_ids",
    "load_volume",
    "read_ctab",
    "to_nsd_ids",
]


@dataclass(frozen=True)
class Design:
    """The order of images, the same for all subjects; every id 0-based int64.

    Attributes
    ----------
    ordering
        (trials,) trial → 10k id.
    subject_images
        (subjects, 10k ids) → image id.
    shared
        (shared images,) image ids; their 10k ids are 0, 1, ….
    runs
        (sessions, runs) stimulus trials in each run, or None when the file does not say.
    """

    ordering: np.ndarray
    subject_images: np.ndarray
    shared: np.ndarray
    runs: np.ndarray | None

    @cached_property
    def repeats(self) -> np.ndarray:
        """(trials,) how often the trial's image was shown before: 0, 1, 2."""
        order = np.argsort(self.ordering, kind="stable")
        _, first, counts = np.unique(self.ordering[order], return_index=True, return_counts=True)
        result = np.empty_like(self.ordering)
        result[order] = np.arange(len(order)) - np.repeat(first, counts)
        return result


@dataclass(frozen=True)
class RoiVolume:
    """An ROI atlas in a subject's volume: labels (X, Y, Z) int16 −1/0/k, names, affine (4, 4)."""

    labels: np.ndarray
    names: dict[int, str]
    affine: np.ndarray


class NSDTree:
    """A folder laid out as the bucket `natural-scenes-dataset`, complete or in part.

    Parameters
    ----------
    root
        The folder that holds ``nsddata`` and ``nsddata_betas``.

    Raises
    ------
    DataError
        If `root` is not such a folder, or is simulated and has lost its SIMULATED.json.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        if not (self.root / "nsddata").is_dir():
            raise DataError(
                self.root,
                "has no folder 'nsddata'",
                "Give the folder that holds nsddata, nsddata_betas and nsddata_stimuli",
            )
        told = None if self._marker_path.is_file() else simulated_file(self._files_that_tell())
        if told is not None:
            raise DataError(
                self._marker_path,
                f"no such file, but {told} says that this tree is simulated",
                "Put SIMULATED.json back, or simulate again into an empty folder",
            )

    @property
    def _marker_path(self) -> Path:
        return self.root / "SIMULATED.json"

    def _files_that_tell(self) -> list[Path]:
        """Files that say whether they are simulated: design, stimuli, some betas."""
        betas = self.root.glob("nsddata_betas/ppdata/*/func1pt8mm/*/betas_session01.hdf5")
        return [self.design_path, self.stimuli_path, *sorted(betas)]

    @property
    def design_path(self) -> Path:
        """The file nsd_expdesign.mat."""
        return self.root / "nsddata/experiments/nsd/nsd_expdesign.mat"

    @property
    def stimuli_path(self) -> Path:
        """The stimulus file; dataset ``imgBrick``, row = image id."""
        return self.root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"

    def responses_path(self, subject: int) -> Path:
        """Return the subject's responses.tsv."""
        return self.root / f"nsddata/ppdata/subj{subject:02d}/behav/responses.tsv"

    def roi_folder(self, subject: int) -> Path:
        """Return the folder of the subject's ROI volumes."""
        return self.root / f"nsddata/ppdata/subj{subject:02d}/func1pt8mm/roi"

    def betas_folder(self, subject: int, version: str) -> Path:
        """Return the folder of the subject's betas of one version."""
        return self.root / f"nsddata_betas/ppdata/subj{subject:02d}/func1pt8mm/{version}"

    @cached_property
    def marker(self) -> dict[str, Any] | None:
        """What SIMULATED.json says; None for NSD's own tree."""
        path = self._marker_path
        if not path.is_file():
            return None
        try:
            marker = json.loads(path.read_text(encoding="utf-8"))
            return {
                **marker,
                "special_sessions": int(marker["special_sessions"]),
                "trials_per_session": int(marker["trials_per_session"]),
            }
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                path, f"not the marker of a simulated tree ({error!r})", "Simulate the tree again"
            ) from error

    @property
    def is_simulated(self) -> bool:
        """Whether the tree was made by `chasm simulate`."""
        return self.marker is not None

    @property
    def special_sessions(self) -> int:
        """The smallest number of sessions of any subject of the design."""
        return self.marker["special_sessions"] if self.marker else SPECIAL_SESSIONS

    @property
    def trials_per_session(self) -> int:
        """Stimulus trials of a session."""
        return self.marker["trials_per_session"] if self.marker else TRIALS_PER_SESSION

    def subjects(self) -> list[int]:
        """Subjects that have a folder of betas."""
        folders = (self.root / "nsddata_betas/ppdata").glob("subj[0-9][0-9]")
        return sorted(int(p.name[4:]) for p in folders)

    def check_subject(self, subject: int) -> None:
        """Raise a `DataError` that lists the subjects present when this one is not."""
        if subject not in (present := self.subjects()):
            names = ", ".join(f"subj{s:02d}" for s in present) or "none"
            raise DataError(
                self.root / f"nsddata_betas/ppdata/subj{subject:02d}",
                f"subject {subject} is not in this tree, which has {names}",
                "Choose one of them, or fetch (or simulate) this subject",
            )

    def session_files(self, subject: int, version: str) -> dict[int, Path]:
        """Session number → beta file; .hdf5 is preferred where .nii.gz is there as well.

        Raises
        ------
        DataError
            If the subject, the version or every session is missing.
        """
        self.check_subject(subject)
        folder = self.betas_folder(subject, version)
        if not folder.is_dir():
            present = sorted(p.name for p in folder.parent.glob("betas_*") if p.is_dir())
            raise DataError(
                folder,
                f"no betas of version '{version}'; there are {', '.join(present) or 'none'}",
                "Choose one of them, or fetch this version",
            )
        files: dict[int, Path] = {}
        for suffix in ("nii.gz", "hdf5"):
            for path in folder.glob(f"betas_session[0-9][0-9].{suffix}"):
                found = re.search(r"session(\d\d)\.", path.name)
                if found:
                    files[int(found[1])] = path
        if not files:
            raise DataError(
                folder, "no betas_sessionYY.hdf5 or .nii.gz", "Fetch at least one session"
            )
        return dict(sorted(files.items()))

    def sessions(self, subject: int, version: str = BETA_VERSIONS[-1]) -> list[int]:
        """Numbers (1-based) of the sessions whose betas are present."""
        return list(self.session_files(subject, version))

    def design(self) -> Design:
        """Read nsd_expdesign.mat.

        Raises
        ------
        DataError
            If it is missing, unreadable, or a field is missing or has another form.
        """
        return self._design

    @cached_property
    def _design(self) -> Design:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError

        path = self.design_path
        if not path.is_file():
            raise DataError(path, "no such file", "Fetch nsd_expdesign.mat")
        try:
            raw = loadmat(path)
        except (MatReadError, ValueError, OSError, TypeError, NotImplementedError) as error:
            raise DataError(
                path, f"not a readable MATLAB 5 file ({error})", "Fetch it again"
            ) from error
        for field in ("masterordering", "subjectim", "sharedix"):
            if field not in raw or raw[field].ndim != 2 or raw[field].dtype.kind not in "iuf":
                raise DataError(f"{path}:{field}", "is missing or not a matrix", "Fetch it again")
        try:
            ordering = from_nsd_ids(raw["masterordering"].ravel())
            images = from_nsd_ids(raw["subjectim"])
            shared = from_nsd_ids(raw["sharedix"].ravel())
        except ValueError as error:
            raise DataError(path, f"holds an id below 1 ({error})", "Fetch it again") from error
        if ordering.max() >= images.shape[1] or (images[:, : len(shared)] != shared).any():
            raise DataError(
                f"{path}:subjectim",
                "does not go with masterordering and sharedix",
                "Fetch nsd_expdesign.mat again",
            )
        pattern = raw.get("stimpattern")
        runs = None if pattern is None or pattern.ndim != 3 else pattern.astype(np.int64).sum(2)
        return Design(ordering, images, shared, runs)

    def trial_indices(self, sessions: Sequence[int]) -> np.ndarray:
        """Global 0-based trial numbers of whole sessions, in the order given: int64."""
        n = self.trials_per_session
        return np.concatenate([np.arange((s - 1) * n, s * n, dtype=np.int64) for s in sessions])

    def trial_image_ids(self, subject: int, sessions: Sequence[int]) -> np.ndarray:
        """Image shown in each trial of the sessions: (trials,) int64, 0-based.

        Raises
        ------
        DataError
            If the design does not know the subject or a session, or if the subject's
            responses.tsv is present and names another image for a trial.
        """
        design = self.design()
        trials = self.trial_indices(sessions)
        if subject > len(design.subject_images) or trials.max() >= len(design.ordering):
            raise DataError(
                self.design_path,
                f"covers {len(design.subject_images)} subjects and "
                f"{len(design.ordering) // self.trials_per_session} sessions; subject {subject}, "
                f"session {max(sessions)} asked for",
                "Use the design file that belongs to these betas",
            )
        ids = design.subject_images[subject - 1, design.ordering[trials]]
        self._check_responses(subject, sessions, ids)
        return ids

    def trial_runs(self, sessions: Sequence[int]) -> np.ndarray:
        """Run (1-based) of each trial of the sessions, 0 where the design does not say."""
        runs, n = self.design().runs, self.trials_per_session
        parts = []
        for session in sessions:
            counts = None if runs is None or session > len(runs) else runs[session - 1]
            if counts is None or counts.sum() != n:
                parts.append(np.zeros(n, dtype=np.int64))
            else:
                parts.append(np.repeat(np.arange(1, len(counts) + 1), counts))
        return np.concatenate(parts)

    def special_images(self) -> np.ndarray:
        """Shared images whose repeats all lie in the first `special_sessions` sessions.

        Returns
        -------
        np.ndarray
            Sorted image ids; 515 in NSD.
        """
        design = self.design()
        last = np.zeros(design.subject_images.shape[1], dtype=np.int64)
        np.maximum.at(last, design.ordering, np.arange(len(design.ordering)))
        shown = np.bincount(design.ordering, minlength=len(last)) >= 3
        early = last < self.special_sessions * self.trials_per_session
        return np.sort(design.shared[(shown & early)[: len(design.shared)]])

    def atlases(self, subject: int) -> list[str]:
        """Names of the subject's ROI volumes that cover both hemispheres."""
        names = (p.name.removesuffix(".nii.gz") for p in self.roi_folder(subject).glob("*.nii.gz"))
        return sorted(n for n in names if not n.startswith(("lh.", "rh.", ".")))

    def roi(self, subject: int, atlas: str) -> RoiVolume:
        """Read one ROI volume and the names of its labels.

        Raises
        ------
        DataError
            If the volume is missing (the message lists those present) or unreadable.
        """
        path = self.roi_folder(subject) / f"{atlas}.nii.gz"
        if not path.is_file():
            present = ", ".join(self.atlases(subject)) or "none"
            raise DataError(
                path, f"no ROI atlas '{atlas}'; there are {present}", "Choose one of them"
            )
        values, affine = load_volume(path)
        labels = np.nan_to_num(values, nan=-1).round().astype(np.int16)
        return RoiVolume(labels, self.label_names(subject, atlas, labels), affine)

    def label_names(self, subject: int, atlas: str, labels: np.ndarray) -> dict[int, str]:
        """Names of an atlas' labels: its .ctab file, else NSD's published tables, else numbers."""
        names = dict(enumerate(ATLAS_LABELS.get(atlas, ()), start=1))
        for folder in (f"subj{subject:02d}", "fsaverage"):
            path = self.root / f"nsddata/freesurfer/{folder}/label/{atlas}.mgz.ctab"
            if path.is_file():
                names |= read_ctab(path)
                break
        used = np.unique(labels[labels > 0]).tolist()
        return {k: f"{atlas}-{k}" for k in used} | names

    def _check_responses(self, subject: int, sessions: Sequence[int], ids: np.ndarray) -> None:
        """Compare the design's image ids with responses.tsv, when that file is there."""
        path = self.responses_path(subject)
        if not path.is_file():
            return
        table = read_responses(path)
        n = self.trials_per_session
        for place, session in enumerate(sessions):
            told = table[table[:, 0] == session, 1] - 1
            expected = ids[place * n : (place + 1) * n]
            if told.size and not np.array_equal(told, expected):
                where = f"{path}:73KID"
                problem = f"differs from nsd_expdesign.mat in session {session}"
                raise DataError(where, problem, "Fetch both files again, from the same release")
