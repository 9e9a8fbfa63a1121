"""The planted truth of one simulated subject: its file, and reading it back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from chasm.data.simulation.atlases import AREAS, ATLASES
from chasm.data.simulation.config import SimulationConfig
from chasm.data.simulation.cortex import AREA_NAMES, Cortex
from chasm.data.simulation.responses import GIST_NAMES, Tuning, noise_ceiling
from chasm.errors import DataError
from chasm.io import atomic_path, write_json

COALITIONS = ("none", "local", "global", "both")
"""Sets of streams whose information a prediction may use: ∅, L, G, LG."""
GROUPS = ("Early", "Mid", "Higher")
_ARRAYS = (
    "i",
    "j",
    "k",
    "area",
    "w",
    "interaction",
    "q",
    "ncsnr_true",
    "NC3",
    "prf_x",
    "prf_y",
    "prf_sigma",
    "exponent",
    "local_tuning",
    "gist_tuning",
    "ideal_image_id",
    "ideal",
)


@dataclass(frozen=True)
class Truth:
    """What was planted in the nsdgeneral voxels of one subject.

    Voxels are in C-order of the (X, Y, Z) mask, as `np.nonzero(mask)` gives them.

    Parameters
    ----------
    subject
        Subject number.
    i, j, k
        (voxels,) volume indices.
    area
        (voxels,) index into `area_names`.
    w, interaction
        (voxels,) local share of the additive signal variance, and share of signal variance
        of the product of the drives.
    q, ncsnr_true, NC3
        (voxels,) signal / noise variance of a trial, its square root, and the ceiling of
        the mean of three repeats in r² units.
    prf_x, prf_y, prf_sigma
        (voxels,) pRF centre (right, up) and standard deviation, degrees of visual angle.
    exponent
        (voxels,) compressive exponent of the local drive.
    local_tuning, gist_tuning
        (voxels, 12) on energy channels, (voxels, 14) on `gist_names`.
    ideal_image_id
        (images,) rows of the stimulus file, 0-based, ascending: all shared images.
    ideal
        (images, voxels) float32 expected z-scored betas: the best possible prediction.
    area_names, gist_names
        Names of the areas and of the gist features.
    rois
        atlas → name → {"voxels", "local_share", "NC3_median", "coalitions"}; the groups
        Early, Mid, Higher are under "groups", all voxels under "nsdgeneral". Coalition
        values are Σ R² / Σ NC of an observer who knows only that part of the signal.
    """

    subject: int
    i: np.ndarray
    j: np.ndarray
    k: np.ndarray
    area: np.ndarray
    w: np.ndarray
    interaction: np.ndarray
    q: np.ndarray
    ncsnr_true: np.ndarray
    NC3: np.ndarray
    prf_x: np.ndarray
    prf_y: np.ndarray
    prf_sigma: np.ndarray
    exponent: np.ndarray
    local_tuning: np.ndarray
    gist_tuning: np.ndarray
    ideal_image_id: np.ndarray
    ideal: np.ndarray
    area_names: tuple[str, ...]
    gist_names: tuple[str, ...]
    rois: dict[str, dict[str, dict[str, Any]]]


def truth_paths(root: Path, subject: int) -> tuple[Path, Path]:
    """Paths of a subject's truth: (JSON summary, NPZ arrays)."""
    folder = Path(root) / "truth"
    return folder / f"subj{subject:02d}.json", folder / f"subj{subject:02d}.npz"


def write_truth(
    root: Path,
    config: SimulationConfig,
    subject: int,
    cortex: Cortex,
    tuning: Tuning,
    ideal_image_id: np.ndarray,
    ideal: np.ndarray,
) -> None:
    """Write what was planted; `ideal` is (shared images, voxels)."""
    visual = cortex.visual
    i, j, k = cortex.brain[visual].T
    values = {
        "i": i,
        "j": j,
        "k": k,
        "area": cortex.area[visual].astype(np.int64),
        "w": tuning.w,
        "interaction": np.full(len(visual), config.interaction),
        "q": tuning.q,
        "ncsnr_true": np.sqrt(tuning.q),
        "NC3": noise_ceiling(tuning.q),
        "prf_x": tuning.x,
        "prf_y": tuning.y,
        "prf_sigma": tuning.sigma,
        "exponent": tuning.exponent,
        "local_tuning": tuning.local,
        "gist_tuning": tuning.gist,
        "ideal_image_id": ideal_image_id,
        "ideal": ideal,
    }
    summary = {
        "simulated": True,
        "subject": subject,
        "n_voxels": len(visual),
        "area_names": list(AREA_NAMES),
        "gist_names": list(GIST_NAMES),
        "coalitions": "sum of R2 over sum of NC, of an observer who knows the named drives",
        "rois": _roi_table(cortex, values),
    }
    json_path, npz_path = truth_paths(root, subject)
    with atomic_path(npz_path) as temporary:
        np.savez(temporary, **values)
    write_json(json_path, summary)


def _roi_table(cortex: Cortex, values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Summarise every label of every atlas, and the Early / Mid / Higher groups."""
    visual = cortex.visual
    table: dict[str, Any] = {}
    for atlas, names in ATLASES.items():
        labels = cortex.labels(atlas)[visual]
        table[atlas] = {name: _summary(labels == k, values) for k, name in names.items()}
    tiers = np.array([AREAS[name].tier for name in AREA_NAMES])[cortex.area[visual]]
    streamed = cortex.labels("streams")[visual] > 0
    table["groups"] = {
        name: _summary((tiers == tier) & streamed, values) for tier, name in enumerate(GROUPS)
    }
    return table


def _summary(here: np.ndarray, values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Voxels, mean local share, median ceiling and coalition values of one ROI.

    A predictor of the local part alone leaves the rest of the signal as error, so its R² is
    (1−ι)·w·NC; the parts are uncorrelated, so their R² add up to NC.
    """
    if not here.any():
        return {"voxels": 0}
    w, interaction, ceiling = (values[key][here] for key in ("w", "interaction", "NC3"))
    parts = ((1 - interaction) * w, (1 - interaction) * (1 - w))
    local, global_ = (float((part * ceiling).sum() / ceiling.sum()) for part in parts)
    return {
        "voxels": int(here.sum()),
        "local_share": float(w.mean()),
        "NC3_median": float(np.median(ceiling)),
        "coalitions": dict(zip(COALITIONS, (0.0, local, global_, 1.0), strict=True)),
    }


def load_truth(root: Path, subject: int) -> Truth:
    """Read what was planted in a subject of a simulated tree.

    Raises
    ------
    DataError
        When the tree holds no truth for the subject, or it is incomplete.
    """
    json_path, npz_path = truth_paths(Path(root), subject)
    for path in (json_path, npz_path):
        if not path.is_file():
            raise DataError(
                path,
                f"no truth for subject {subject}",
                "Only simulated trees have a truth: write the subject with `chasm simulate`.",
            )
    summary = json.loads(json_path.read_text(encoding="utf-8"))
    with np.load(npz_path) as file:
        missing = set(_ARRAYS) - set(file.files)
        if missing:
            raise DataError(
                npz_path, f"lacks {sorted(missing)}", "Remove the tree and simulate it again."
            )
        arrays = {name: file[name] for name in _ARRAYS}
    return Truth(
        subject=summary["subject"],
        area_names=tuple(summary["area_names"]),
        gist_names=tuple(summary["gist_names"]),
        rois=summary["rois"],
        **arrays,
    )
