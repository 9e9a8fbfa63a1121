"""Published values of the systems that the comparison has rows for (CHASMBrain's tables)."""

from __future__ import annotations

from collections.abc import Mapping

PUBLISHED_VOXELS: Mapping[str, str] = {
    "ridge": ".368 · .371",
    "linear probe (CLS)": ".407 · .357",
    "linear probe (CLS, layer 12)": ".407 · .357",
    "MLP": ".231 · .533",
    "GRU": ".237 · .461",
    "LSTM": ".232 · .468",
    "stage 2 (MLP)": ".391 · .535",
    "stage 2 (without VAE)": ".406 · .399",
    "stage 2": ".429 · .261",
}
"""Pattern correlation and mean squared error, by the name of the row here."""

PUBLISHED_PARCELS: Mapping[str, str] = {
    "one-stream Mamba": ".481",
    "Transformer": ".452",
    "stage 1": ".585",
}
"""Pattern correlation over parcels, by the name of the row here."""

PUBLISHED_TRANSFER: Mapping[tuple[str, str], str] = {
    ("subj01", "subj07"): ".436 · .294",
    ("subj01+subj02", "subj05"): ".457 · .260",
    ("subj01+subj02", "subj07"): ".448 · .269",
    ("subj01+subj02+subj05", "subj07"): ".448 · .271",
    ("subj07", "subj07"): ".451 · .239",
}
"""Pattern correlation and mean squared error by (source subjects, new subject)."""

TRANSFER_NOTE = (
    "Published, on other data: pattern correlation · mean squared error of CHASMBrain (arXiv "
    "2606.04772), frozen backbone with a new trained head, and its model of the subject itself: "
    "session-z betas, 3-repeat mean, volume; best epoch selected on test, rows of different data "
    "sizes. Never to be ranked against ours."
)
"""The sentence that marks the metric and data of `PUBLISHED_TRANSFER`."""

VOXELS_NOTE = (
    "Published, on other data: pattern correlation · mean squared error of the system of this "
    "name in CHASMBrain (arXiv 2606.04772): session-z betas, 3-repeat mean, volume, subjects 1, "
    "2, 5, 7 (trained rows: best epoch selected on test). Stage 2: MLP, without VAE and, there "
    ".413 · .386, with VAE are its ablation table. Never to be ranked against ours."
)

PARCELS_NOTE = (
    "Published, on other data: pattern correlation over parcels of 30 voxels of the system of "
    "this name in CHASMBrain (arXiv 2606.04772): top-p means of the same trials as targets "
    "(trained rows: best epoch selected on test). Never to be ranked against ours."
)


def published_value(row: str, unit: str) -> str:
    """Return the published value of a row's system at this kind of unit, ``–`` without one."""
    return (PUBLISHED_PARCELS if unit == "parcel" else PUBLISHED_VOXELS).get(row, "–")


def published_heading(unit: str) -> str:
    """Return the heading of the column, with the metric."""
    return "Published: pattern r" if unit == "parcel" else "Published: pattern r · MSE"


def published_note(unit: str) -> str:
    """Return the sentence that marks the column's metric and data."""
    return PARCELS_NOTE if unit == "parcel" else VOXELS_NOTE
