"""The page of a suite: figures, tables and texts of every subject in one HTML document."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ablations import figures, tables, wording
from ablations.findings import Findings
from chasm.evaluation.brain_maps import InteractiveMap, colour_limits
from chasm.evaluation.figures import to_svg
from chasm.evaluation.grids import Grid
from chasm.evaluation.page import clickable_map, fill, static_map
from chasm.evaluation.prediction_parts import FloatArray
from chasm.evaluation.wording import flatten

TEMPLATES = Path(__file__).with_name("templates")

OPEN_TABLES = 3
"""How many tables of an encoder are shown without a click."""


def render(found: Sequence[Findings]) -> str:
    """Make the page, which needs nothing beside it.

    Parameters
    ----------
    found
        What was found in each subject, judged (`ablations.findings.judged`).
    """
    first = found[0]
    untrained = any(one.weights == "UNTRAINED" for one in found)
    context = {
        "headline": "; ".join(tables.headline(one) for one in found),
        "info": {
            "simulated": any(one.test.simulated for one in found),
            "weights_label": "UNTRAINED" if untrained else first.weights,
        },
        "suite": first.suite,
        "replications": wording.replication_sentences(first),
        "subjects": [_subject(one) for one in found],
        "metrics": wording.MEANINGS,
        "recipe": first.recipe,
    }
    return fill("ablation.html.j2", context, TEMPLATES)


def _subject(findings: Findings) -> dict[str, Any]:
    """Gather everything that the page says of a subject."""
    shares = figures.specialisation_figure(findings, "share") if findings.planted else None
    return {
        "name": findings.test.subject,
        "title": findings.title,
        "headline": tables.headline(findings),
        "claims": wording.claim_sentences(findings),
        "limits": wording.limits(findings),
        "method": wording.method(findings),
        "sets": tables.claim_grid(findings),
        "agreement": tables.agreement_grid(findings),
        "figures": _figures(
            {
                "Specialisation D of each region": figures.specialisation_figure(findings),
                "D as a share, beside the planted D": shares,
                "Early against higher regions": figures.plane_figure(findings),
            },
            findings,
        ),
        "encoders": [_encoder(findings, name) for name in findings.encoders],
        "provenance": {
            name: ", ".join(map(str, value)) if isinstance(value, list) else value
            for name, value in flatten(findings.surroundings.provenance or {}).items()
        },
    }


def _encoder(findings: Findings, encoder: str) -> dict[str, Any]:
    """Gather the tables, figure and maps of an encoder."""
    grids: list[Grid] = tables.encoder_grids(findings, encoder)
    contribution = figures.contribution_figure(findings, encoder)
    title = "Shapley value φ and necessity N of each stream"
    static, interactive = _maps(findings, encoder)
    return {
        "name": encoder,
        "grids": grids[:OPEN_TABLES],
        "further": grids[OPEN_TABLES:],
        "figures": _figures({title: contribution}, findings),
        "map": static,
        "interactive": interactive,
    }


def _figures(drawn: dict[str, Figure | None], findings: Findings) -> list[dict[str, str]]:
    """Give title and SVG of those figures that there are."""
    return [
        {"title": f"{findings.mark}{title}", "svg": to_svg(figure)}
        for title, figure in drawn.items()
        if figure is not None
    ]


def _maps(findings: Findings, encoder: str) -> tuple[dict[str, str] | None, list[InteractiveMap]]:
    """Map D of every unit, once as slices and once to click through; nothing without a volume."""
    given = findings.surroundings
    if given.volume is None:
        return None, []
    unit = findings.effects.unit_r2[encoder]
    values: FloatArray = np.asarray(unit["local"] - unit["global"])
    title = f"{findings.mark}D of {encoder}, R²"
    limits = colour_limits(given.volume(values), symmetric=True)
    static = static_map(title, values, given, limits=limits, colours="coolwarm")
    return static, [clickable_map(title, values, given, symmetric=True)]
