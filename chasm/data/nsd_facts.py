"""Published facts of the Natural Scenes Dataset: sizes, label tables, ids; its small files.

Verified against the NSD data manual and the authors' code (Allen et al. 2022).
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chasm.errors import DataError

BETA_VERSIONS = ("betas_assumehrf", "betas_fithrf", "betas_fithrf_GLMdenoise_RR")
BETA_SCALE = 300.0
"""Stored int16 / 300 = percent signal change."""
TRIALS_PER_SESSION = 750
SPECIAL_SESSIONS = 30
"""The smallest number of sessions of any subject: images shown three times within them were
seen three times by everyone (515 shared images)."""

_VISUAL = ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4")
_KASTNER = (
    *_VISUAL,
    *("VO1", "VO2", "PHC1", "PHC2", "TO2", "TO1", "LO2", "LO1", "V3B", "V3A"),
    *("IPS0", "IPS1", "IPS2", "IPS3", "IPS4", "IPS5", "SPL1", "FEF"),
)
ATLAS_LABELS: dict[str, tuple[str, ...]] = {
    "nsdgeneral": ("nsdgeneral",),
    "prf-visualrois": _VISUAL,
    "prf-eccrois": ("ecc0pt5", "ecc1", "ecc2", "ecc4", "ecc4+"),
    "floc-faces": ("OFA", "FFA-1", "FFA-2", "mTL-faces", "aTL-faces"),
    "floc-bodies": ("EBA", "FBA-1", "FBA-2", "mTL-bodies"),
    "floc-places": ("OPA", "PPA", "RSC"),
    "floc-words": ("OWFA", "VWFA-1", "VWFA-2", "mfs-words", "mTL-words"),
    "streams": (
        *("early", "midventral", "midlateral", "midparietal"),
        *("ventral", "lateral", "parietal"),
    ),
    "Kastner2015": _KASTNER,
}
"""Names of labels 1, 2, … of each atlas."""

STREAM_GROUPS: dict[str, tuple[str, ...]] = {
    "Early": ("early",),
    "Mid": ("midventral", "midlateral", "midparietal"),
    "Higher": ("ventral", "lateral", "parietal"),
}
"""Groups of labels of the `streams` atlas by which scores are reported."""


@dataclass(frozen=True)
class SubjectFacts:
    """NSD's published numbers of one subject: sessions, func1pt8mm grid, nsdgeneral voxels."""

    sessions: int
    volume_shape: tuple[int, int, int]
    nsdgeneral_voxels: int


NSD_SUBJECTS: dict[int, SubjectFacts] = {
    1: SubjectFacts(40, (81, 104, 83), 15724),
    2: SubjectFacts(40, (82, 106, 84), 14278),
    3: SubjectFacts(32, (81, 106, 82), 15226),
    4: SubjectFacts(30, (85, 99, 80), 13153),
    5: SubjectFacts(40, (79, 97, 78), 13039),
    6: SubjectFacts(32, (85, 113, 83), 17907),
    7: SubjectFacts(40, (78, 95, 81), 12682),
    8: SubjectFacts(30, (80, 103, 78), 14386),
}


def from_nsd_ids(ids: np.ndarray) -> np.ndarray:
    """Turn NSD's 1-based ids (73k or 10k) into 0-based int64.

    Raises
    ------
    ValueError
        If an id is below 1.
    """
    result = np.asarray(ids).astype(np.int64) - 1
    if (result < 0).any():
        raise ValueError("NSD's ids start at 1")
    return result


def to_nsd_ids(image_ids: np.ndarray) -> np.ndarray:
    """Turn 0-based image ids into NSD's 1-based 73k ids, int64."""
    return np.asarray(image_ids).astype(np.int64) + 1


def read_ctab(path: Path) -> dict[int, str]:
    """Read label names ≥ 1 from a FreeSurfer colour table: number, name, colours.

    Raises
    ------
    DataError
        If the file is no text.
    """
    names = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(
            path, f"not a readable label table ({error})", "Fetch it again, or remove it"
        ) from error
    for line in lines:
        parts = line.split()
        if len(parts) >= 2 and parts[0].isdecimal() and int(parts[0]) > 0:
            names[int(parts[0])] = parts[1]
    return names


def read_responses(path: Path) -> np.ndarray:
    """Read responses.tsv: (trials, 2) int64, the session and NSD's 1-based 73k id of each trial.

    Raises
    ------
    DataError
        If the file is no text, or a column is missing or holds no numbers.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            columns, *rows = list(csv.reader(stream, delimiter="\t")) or [[]]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(path, f"not a readable table ({error})", "Fetch it again") from error
    if not {"SESSION", "73KID"} <= set(columns):
        raise DataError(path, "has no columns SESSION and 73KID", "Fetch it again")
    session, image = columns.index("SESSION"), columns.index("73KID")
    try:
        pairs = [(int(float(row[session])), int(float(row[image]))) for row in rows if row]
    except (IndexError, ValueError, OverflowError) as error:
        raise DataError(path, f"holds no number ({error})", "Fetch it again") from error
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def simulated_file(paths: Iterable[Path]) -> Path | None:
    """Find the first file that says of itself that it is simulated.

    A design file says it in its header, an HDF5 file by its attribute ``simulated``. Files that
    are missing or damaged say nothing; whoever reads them names the damage.
    """
    import h5py

    for path in paths:
        try:
            if path.suffix == ".mat":
                with path.open("rb") as stream:
                    told = b"simulated" in stream.read(116)
            else:
                with h5py.File(path, "r", locking=False) as file:
                    told = bool(file.attrs.get("simulated", False))
        except OSError:
            continue
        if told:
            return path
    return None


def load_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a NIfTI volume: (X, Y, Z) float32 and its affine (4, 4).

    Raises
    ------
    DataError
        If the file is damaged or has another number of axes.
    """
    import nibabel as nib

    try:
        image: Any = nib.load(path)
        values = np.asarray(image.dataobj, dtype=np.float32)
    except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError) as error:
        raise DataError(path, f"not a readable NIfTI file ({error})", "Fetch it again") from error
    if values.ndim != 3:
        raise DataError(path, f"shape {values.shape} found, (X, Y, Z) expected", "Fetch it again")
    return values, np.asarray(image.affine, dtype=np.float64)
