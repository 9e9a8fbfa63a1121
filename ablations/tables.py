"""Tables of the ablation beyond the regions', and all of them for Markdown and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from rich.console import Group
from rich.text import Text

from ablations.findings import PATTERN, Findings
from ablations.region_tables import (
    KEYS,
    Column,
    by_region,
    cells_at,
    change_grid,
    contrast_grid,
    extra_conditions,
    gate_grid,
    lookup,
    region_labels,
    scale_grid,
    specialisation_grid,
    value_grid,
)
from ablations.wording import (
    SCALE_NAMES,
    agreement,
    claim_sentences,
    limits,
    method,
    not_estimable,
    replication_sentences,
    scale_note,
)
from chasm.evaluation.grids import Grid, Line, cells_of, make_cell, markdown_grid, rich_grid

SETS = ("early", "higher", "early - higher")
"""Regions of the rows of D of the two sets, and of I."""

PUBLISHED_PATTERNS: Mapping[str, Mapping[str, str]] = {
    "full": {"Early": ".512", "Mid": ".589", "Higher": ".625", "all": ".585"},
    "patches only": {"Early": ".425", "Mid": ".461", "Higher": ".501", "all": ".467"},
    "swapped": {"Early": ".279", "Mid": ".326", "Higher": ".472", "all": ".381"},
    "CLS only": {"Early": ".273", "Mid": ".313", "Higher": ".446", "all": ".364"},
}
"""Pattern correlation over parcels of CHASMBrain's Stage 1 under ablation at inference."""

PUBLISHED_NOTE = (
    "Published: CHASMBrain (arXiv 2606.04772), Stage 1, pattern correlation over parcels of 30 "
    "voxels, top-p means as targets, session-z betas, NSD subjects 1, 2, 5, 7; one seed, no "
    "interval, best epoch selected on test. Other data and targets, never to be ranked against "
    "ours."
)


def headline(findings: Findings) -> str:
    """Title of every table: SIMULATED when it is so, subject, suite, units, images."""
    test = findings.test
    return (
        f"{findings.title} · suite {findings.suite} · {test.target.shape[1]} {test.unit}s · "
        f"{test.n_images} test images"
    )


def claim_grid(findings: Findings) -> Grid | None:
    """Lay out encoders by D of both sets and I, on every scale; None without the sets."""
    lines = []
    for encoder in findings.encoders:
        rows = set_rows(findings, encoder)
        for scale, name in SCALE_NAMES.items():
            part = rows[rows["scale"] == scale].set_index("region")
            cells = [
                make_cell(*part.loc[which, ["value", "low", "high"]].astype(float), signed=True)
                if which in part.index
                else "–"
                for which in SETS
            ]
            if len(part):
                lines.append(Line(f"{encoder}: {name}", encoder, tuple(cells)))
    if not lines:
        return None
    return Grid(
        f"{findings.mark}Early against higher regions",
        ("D early", "D higher", "I"),
        tuple(lines),
        "An asymmetry may be claimed where I has one sign, with intervals excluding 0, in units of "
        "the noise ceiling, in shares and SNR-matched, and is larger than in simulated null "
        "worlds (p at most .05).",
    )


def set_rows(findings: Findings, encoder: str, seed: str | None = None) -> pd.DataFrame:
    """Rows of D of both sets and of I that have a number; without `seed` those over all seeds."""
    rows = findings.rows(encoder, seed)
    return rows[
        (rows["level"] == "set")
        & rows["quantity"].isin(["specialisation", "asymmetry"])
        & (rows["gate"] != "held")
        & rows["value"].notna()
    ]


def pattern_grid(findings: Findings, encoder: str) -> Grid | None:
    """Conditions of the published ablation by group, each above its published row, if any."""
    part = findings.patterns[findings.patterns["encoder"] == encoder]
    regions = [name for name in ("Early", "Mid", "Higher", "all") if (part["region"] == name).any()]
    if regions in ([], ["all"]):
        return None
    lines = []
    for label, published in PUBLISHED_PATTERNS.items():
        mine = part[part["quantity"] == f"{PATTERN}:{label}"]
        if len(mine):
            lines.append(Line(f"{label}, {encoder}", "model", cells_of(mine, "region", regions)))
        texts = tuple(published[name] for name in regions)
        lines.append(Line(f"{label}, published", "reference", texts))
    test = findings.test
    ours = (
        f"Ours: pattern correlation over the {test.unit}s that lie mostly in the group, "
        f"{'simulated data set' if test.simulated else 'data set'} {test.dataset}, {test.subject}, "
        f"mean over {test.n_images} test images; streams are replaced as in the coalitions."
    )
    return Grid(
        f"{findings.mark}Pattern correlation under ablation: {encoder}",
        tuple(regions),
        tuple(lines),
        " ".join(filter(None, (ours, not_estimable(part), PUBLISHED_NOTE))),
    )


def condition_grid(findings: Findings, encoder: str) -> Grid | None:
    """Further conditions by all units and groups: value, and change; None without any."""
    names = extra_conditions(findings, encoder)
    if not names:
        return None
    rows = by_region(findings.rows(encoder))
    groups = rows[rows["level"] != "roi"].drop_duplicates(KEYS)
    keys = list(groups[KEYS].itertuples(index=False, name=None))
    lines = []
    for label, *quantities in (
        ("intact", "v_both", ""),
        *((name, f"v:{name}", f"change:{name}") for name in names),
    ):
        value, change = (
            Column("", quantity, signed=signed)
            for quantity, signed in zip(quantities, (False, True), strict=True)
        )
        cells = [
            cell
            for column in (value, change)
            for cell in cells_at(lookup(rows, column, findings.scale), keys, column)
        ]
        lines.append(Line(label, "model" if label == "intact" else "", tuple(cells)))
    return Grid(
        f"{findings.mark}Conditions: {encoder}",
        (*(f"v, {key[2]}" for key in keys), *(f"change, {key[2]}" for key in keys)),
        tuple(lines),
        f"{scale_note(findings)} Change: against the intact model, on the same resamples.",
    )


def agreement_grid(findings: Findings) -> Grid | None:
    """Regions by D of every encoder, with a sentence; None for one encoder."""
    encoders = list(findings.encoders)
    if len(encoders) < 2:
        return None
    parts = {name: _specialisation(findings, name) for name in encoders}
    note = " ".join(agreement(parts, encoders[0], other) for other in encoders[1:])
    return _side_by_side(f"{findings.mark}D in each encoder", parts, note)


def seed_grid(findings: Findings, encoder: str) -> Grid | None:
    """Regions by D of every training seed; None for a single seed."""
    seeds = findings.seeds(encoder)
    if len(seeds) < 2:
        return None
    parts = {f"seed {seed}": _specialisation(findings, encoder, seed) for seed in seeds}
    return _side_by_side(f"{findings.mark}D with each training seed: {encoder}", parts, "")


def _specialisation(findings: Findings, encoder: str, seed: str | None = None) -> pd.DataFrame:
    """D of every region on the main scale."""
    rows = by_region(findings.rows(encoder, seed))
    return lookup(rows, Column("D", "specialisation"), findings.scale)


def _side_by_side(title: str, parts: Mapping[str, pd.DataFrame], note: str) -> Grid:
    """Regions by the numbers of several tables."""
    column = Column("", "")
    regions = pd.concat([part.reset_index() for part in parts.values()]).drop_duplicates(KEYS)
    keys = list(regions[KEYS].itertuples(index=False, name=None))
    columns = [cells_at(part, keys, column) for part in parts.values()]
    lines = [
        Line(label, " ".join(key[:2]), tuple(cells))
        for label, key, *cells in zip(region_labels(regions), keys, *columns, strict=True)
    ]
    return Grid(title, tuple(parts), tuple(lines), note)


def encoder_grids(findings: Findings, encoder: str) -> list[Grid]:
    """All tables of one encoder."""
    found = [
        value_grid(findings, encoder),
        specialisation_grid(findings, encoder),
        pattern_grid(findings, encoder),
        contrast_grid(findings, encoder),
        gate_grid(findings, encoder),
        scale_grid(findings, encoder),
        condition_grid(findings, encoder),
        change_grid(findings, encoder),
        seed_grid(findings, encoder),
    ]
    return [grid for grid in found if grid is not None]


def markdown(found: Sequence[Findings]) -> str:
    """Return every table of every subject as Markdown, after what may be claimed."""
    parts = []
    for findings in found:
        parts += [f"# {headline(findings)}", *claim_sentences(findings), method(findings)]
        shared = [claim_grid(findings), agreement_grid(findings)]
        parts += [markdown_grid(grid) for grid in shared if grid is not None]
        for encoder in findings.encoders:
            parts += [markdown_grid(g) for g in encoder_grids(findings, encoder)]
        parts += ["## What the numbers do not show"]
        parts.append("\n".join(f"- {sentence}" for sentence in limits(findings)))
    parts += ["# Replication", *(replication_sentences(found[0]) or ["No asymmetry to replicate."])]
    return "\n\n".join(parts) + "\n"


def terminal(findings: Findings) -> Group:
    """Return a subject's tables by region, and what may be claimed, for a terminal."""
    style = "bold yellow" if findings.test.simulated else "bold"
    shown = [
        grid(findings, encoder)
        for encoder in findings.encoders
        for grid in (value_grid, specialisation_grid)
    ]
    sets = claim_grid(findings)
    shown += [] if sets is None else [sets]
    return Group(
        Text(headline(findings), style=style),
        *(rich_grid(grid) for grid in shown),
        Text(method(findings)),
        *(Text(sentence, style="bold") for sentence in claim_sentences(findings)),
    )
