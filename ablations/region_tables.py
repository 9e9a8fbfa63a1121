"""Tables with a line per region: values of the coalitions, contrasts, specialisation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ablations.findings import Findings
from ablations.wording import not_estimable, remarks, scale_note
from chasm.evaluation.grids import Cell, Grid, Line, make_cell, number
from chasm.evaluation.tables import voxels_name

KEYS = ["level", "atlas", "region"]
"""Columns that name a region."""

Key = tuple[str, ...]
"""Level, atlas and name of a region."""


@dataclass(frozen=True)
class Column:
    """A column of a table by region.

    Attributes
    ----------
    heading
        What stands above it.
    quantity
        Quantity of the rows.
    scale
        Scale of the rows; empty for the findings' main scale.
    signed
        Whether the numbers carry a sign.
    part
        ``value``, with its interval, or ``q``.
    held
        Whether the gate is held at its value for the intact image.
    """

    heading: str
    quantity: str
    scale: str = ""
    signed: bool = True
    part: str = "value"
    held: bool = False


VALUES = (
    Column("v(∅)", "v_none", signed=False),
    Column("v(L)", "v_local", signed=False),
    Column("v(G)", "v_global", signed=False),
    Column("v(LG)", "v_both", signed=False),
)
SPECIALISATION = (
    Column("φ local", "shapley_local"),
    Column("φ global", "shapley_global"),
    Column("ρ", "redundancy"),
    Column("D", "specialisation"),
    Column("q of D", "specialisation", part="q"),
)
CONTRASTS = (
    Column("N local", "necessity_local"),
    Column("Q local", "sufficiency_local"),
    Column("N global", "necessity_global"),
    Column("Q global", "sufficiency_global"),
    Column("T", "interchange"),
    Column("T − D", "interchange - specialisation"),
)
GATE = (
    Column("N local, direct", "necessity_local", held=True),
    Column("N local, total", "necessity_local"),
    Column("Comp. local", "compensation_local"),
    Column("N global, direct", "necessity_global", held=True),
    Column("N global, total", "necessity_global"),
    Column("Comp. global", "compensation_global"),
)
SCALES = (
    Column("D, noise ceiling = 1", "specialisation", "ceiling"),
    Column("D, share", "specialisation", "share"),
    Column("D, SNR-matched", "specialisation", "matched"),
    Column("D, mean R²", "specialisation", "r2"),
)


def value_grid(findings: Findings, encoder: str) -> Grid:
    """Regions by the values of the four coalitions, with what is known of the regions."""
    rows = by_region(findings.rows(encoder))
    rows = rows[rows["scale"] == findings.scale]
    parcels = findings.test.unit == "parcel"
    counts = ["n_voxels", *(["n_units"] if parcels else [])]
    facts = {
        tuple(line[KEYS]): (
            *(str(int(line[name])) for name in counts),
            number(float(line["mean_ceiling"])),
        )
        for _, line in rows.drop_duplicates(KEYS).iterrows()
    }
    names = (voxels_name(findings.test.unit), *(["Parcels"] if parcels else []), "Mean ceiling")
    return _effect_grid(findings, encoder, "Value of each coalition", VALUES, before=(names, facts))


def specialisation_grid(findings: Findings, encoder: str) -> Grid:
    """Regions by φ, ρ, D and its q."""
    title = "Contribution of each stream, specialisation D"
    return _effect_grid(findings, encoder, title, SPECIALISATION)


def contrast_grid(findings: Findings, encoder: str) -> Grid:
    """Regions by necessity and sufficiency, and by the interchange T where it was run."""
    title = "Necessity N and sufficiency Q of each stream"
    return _effect_grid(findings, encoder, title, CONTRASTS)


def gate_grid(findings: Findings, encoder: str) -> Grid | None:
    """Regions by direct and total necessity; None for an encoder without a gate."""
    if not (findings.rows(encoder)["gate"] == "held").any():
        return None
    title = "Necessity with the gate held (direct) and free (total)"
    return _effect_grid(findings, encoder, title, GATE)


def scale_grid(findings: Findings, encoder: str) -> Grid:
    """Regions by D on every scale, with the planted D where it is known."""
    after = None
    if findings.planted:
        regions = by_region(findings.rows(encoder)).drop_duplicates(KEYS)[KEYS]
        planted = {
            key: 2 * findings.planted_share(key[1], key[2]) - 1
            for key in regions.itertuples(index=False, name=None)
        }
        texts = {key: "–" if np.isnan(d) else f"{d:+.2f}" for key, d in planted.items()}
        after = (("Planted D, share",), {key: (text,) for key, text in texts.items()})
    title = "Specialisation D on every scale"
    return _effect_grid(findings, encoder, title, SCALES, after=after)


def change_grid(findings: Findings, encoder: str) -> Grid | None:
    """Regions by the change under each further condition; None without any."""
    columns = [Column(name, f"change:{name}") for name in extra_conditions(findings, encoder)]
    if not columns:
        return None
    return _effect_grid(findings, encoder, "Change of v under each condition", columns)


def extra_conditions(findings: Findings, encoder: str) -> list[str]:
    """Names of the conditions beside the coalitions."""
    found = findings.rows(encoder)["quantity"].unique()
    return [str(name)[2:] for name in found if str(name).startswith("v:")]


Texts = tuple[Sequence[str], Mapping[Key, Sequence[str]]]
"""Headings of further columns, and their texts by region."""


def _effect_grid(
    findings: Findings,
    encoder: str,
    title: str,
    columns: Sequence[Column],
    *,
    before: Texts | None = None,
    after: Texts | None = None,
) -> Grid:
    """Lay out regions by columns, those without any number left out."""
    rows = by_region(findings.rows(encoder))
    tables = {column: lookup(rows, column, findings.scale) for column in columns}
    tables = {column: table for column, table in tables.items() if table["value"].notna().any()}
    regions = rows.drop_duplicates(KEYS)
    keys = list(regions[KEYS].itertuples(index=False, name=None))
    cells = [cells_at(table, keys, column) for column, table in tables.items()]
    lines = []
    for index, (label, key) in enumerate(zip(region_labels(regions), keys, strict=True)):
        texts = [tuple(given[1][key]) if given else () for given in (before, after)]
        numbers = tuple(column[index] for column in cells)
        lines.append(Line(label, " ".join(key[:2]), texts[0] + numbers + texts[1]))
    scales = {column.scale or findings.scale for column in tables}
    quantities = {column.quantity for column in tables}
    shown = rows[rows["quantity"].isin(quantities) & rows["scale"].isin(scales)]
    heads = [tuple(given[0]) if given else () for given in (before, after)]
    return Grid(
        f"{findings.mark}{title}: {encoder}",
        heads[0] + tuple(column.heading for column in tables) + heads[1],
        tuple(lines),
        " ".join(filter(None, (scale_note(findings), not_estimable(shown), remarks(shown)))),
    )


def by_region(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of single regions: all units, groups, ROIs."""
    return rows[rows["level"].isin(["all", "group", "roi"])]


def region_labels(regions: pd.DataFrame) -> list[str]:
    """Name every region, with its atlas where another atlas has the name, too."""
    twice = regions["region"].duplicated(keep=False)
    return [
        f"{name} ({atlas})" if several and atlas else str(name)
        for name, atlas, several in zip(regions["region"], regions["atlas"], twice, strict=True)
    ]


def lookup(rows: pd.DataFrame, column: Column, scale: str) -> pd.DataFrame:
    """Rows of a column, by region; `scale` is the main one."""
    return rows[
        (rows["quantity"] == column.quantity)
        & (rows["scale"] == (column.scale or scale))
        & ((rows["gate"] == "held") == column.held)
    ].set_index(KEYS)


def cells_at(table: pd.DataFrame, keys: Iterable[Key], column: Column) -> list[Cell | str]:
    """Make the cells of regions, ``–`` where one has no row or no number."""
    names = ["q"] if column.part == "q" else ["value", "low", "high"]
    numbers = dict(zip(table.index, table[names].to_numpy(np.float64), strict=True))
    cells: list[Cell | str] = []
    for key in keys:
        if key not in numbers:
            cells.append("–")
        elif column.part == "q":
            cells.append(probability(float(numbers[key][0])))
        else:
            cells.append(make_cell(*numbers[key], signed=column.signed))
    return cells


def probability(value: float) -> str:
    """Write a p or q with three decimals, ``–`` for NaN."""
    return "–" if np.isnan(value) else "< .001" if value < 0.001 else f"{value:.3f}"
