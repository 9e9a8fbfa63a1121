"""The report's page: every section's figures, tables and texts, put into one HTML document."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from chasm.evaluation import brain_maps, figures, gates, sampling, tables, wording
from chasm.evaluation.brain_maps import InteractiveMap, Volume
from chasm.evaluation.catalogue import ROI_METRICS
from chasm.evaluation.gallery import Pixels, make_gallery
from chasm.evaluation.prediction_parts import FloatArray
from chasm.evaluation.predictions import PredictionFile
from chasm.evaluation.scores import Scores


@dataclass(frozen=True)
class Surroundings:
    """What is known of a run beside its predictions; each part may be absent.

    Attributes
    ----------
    metrics_csv
        Lightning's ``metrics.csv``, for the training curves.
    provenance
        Facts about the run (versions, seed, git revision, hardware), shown as they are.
    volume
        Puts one value per unit into the subject's volume as a NIfTI image, for the brain maps.
    background
        NIfTI image beneath the maps.
    pixels
        Reads the images, for the best and the worst.
    """

    metrics_csv: Path | None = None
    provenance: Mapping[str, Any] | None = None
    volume: Volume | None = None
    background: Any = None
    pixels: Pixels | None = None


def render(file: PredictionFile, predictions: Path, scores: Scores, given: Surroundings) -> str:
    """Make the page, which needs nothing beside it.

    Parameters
    ----------
    file, predictions
        The predictions, and where they are.
    scores
        Their scores.
    given
        What is known beside them.

    Raises
    ------
    DataError
        If the training curves cannot be read.
    """
    roi_grids = [tables.region_grid(scores, metric) for metric in ROI_METRICS]
    curves = figures.training_figures(given.metrics_csv) if given.metrics_csv else []
    context = {
        "headline": tables.headline(scores),
        "info": file.info,
        "summary": wording.summary(scores),
        "grids": tables.grids(scores),
        "roi_grids": [grid for grid in roi_grids if grid is not None],
        "other_grids": [
            tables.target_grid(scores, target) for target in tables.alternative_targets(scores)
        ],
        "method": tables.method(scores),
        "region_figure": _svg(_region_figure(scores)),
        "ceiling_figure": _svg(figures.ceiling_figure(scores)),
        "maps": _maps(scores, given),
        "interactive": _interactive(scores, given),
        "gallery": make_gallery(file, given.volume, given.pixels),
        "draws": _draws(file, scores),
        "gate": _gate(file, scores, given),
        "training_figures": [figures.to_svg(figure) for figure in curves],
        "metrics": wording.metric_facts(file.info.unit),
        "published": tables.published_grid(),
        "rows": wording.row_facts(file),
        "provenance": wording.provenance_facts(predictions, file, given.provenance),
        "config": file.info.config,
    }
    return fill("report.html.j2", context)


def fill(template: str, context: Mapping[str, Any], *folders: Path) -> str:
    """Fill a page's template, which may use those of this package by their names.

    Parameters
    ----------
    template
        Name of the template.
    context
        Its variables; all that it asks for must be there.
    folders
        Where templates of other packages lie.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).with_name("templates")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context)


def _region_figure(scores: Scores) -> Figure | None:
    found = figures.region_figure(scores)
    return found if found is not None else figures.region_figure(scores, "r2")


def _svg(figure: Figure | None) -> str | None:
    return None if figure is None else figures.to_svg(figure)


def static_map(
    title: str, values: FloatArray, given: Surroundings, **options: Any
) -> dict[str, str]:
    """Draw a map of one value per unit, (units,), as title and data URI; needs a volume."""
    assert given.volume is not None
    figure = brain_maps.brain_figure(
        values, given.volume, title, background=given.background, **options
    )
    encoded = base64.b64encode(figures.to_png(figure)).decode("ascii")
    return {"title": title, "source": f"data:image/png;base64,{encoded}"}


def _models(scores: Scores) -> list[str]:
    kinds = scores.frame.drop_duplicates("row").set_index("row")["kind"]
    return [name for name in figures.compared_rows(scores) if kinds[name] == "model"]


def _maps(scores: Scores, given: Surroundings) -> list[dict[str, str]]:
    """Draw maps of R² for each model and of the noise ceiling."""
    if given.volume is None:
        return []
    wanted = {f"R² of {name}": scores.unit_r2[name] for name in _models(scores)}
    if np.isfinite(scores.unit_ceiling).any():
        wanted["Noise ceiling (r²)"] = scores.unit_ceiling
    return [static_map(title, values, given) for title, values in wanted.items()]


def _interactive(scores: Scores, given: Surroundings) -> list[InteractiveMap]:
    """Make maps to click through: R² of each model, its lead on the best baseline, the ceiling."""
    if given.volume is None:
        return []
    best = str(scores.frame["best_baseline"].iloc[0])
    maps = []
    for name in _models(scores):
        values = scores.unit_r2[name]
        maps.append(clickable_map(f"R² of {name}", values, given))
        lead = values - scores.unit_r2[best]
        if np.nanmax(np.abs(lead)) > 0:
            title = f"R² of {name} minus that of the best baseline, {best}"
            maps.append(clickable_map(title, lead, given, symmetric=True))
    if np.isfinite(scores.unit_ceiling).any():
        maps.append(clickable_map("Noise ceiling (r²)", scores.unit_ceiling, given))
    return maps


def clickable_map(
    title: str, values: FloatArray, given: Surroundings, *, symmetric: bool = False
) -> InteractiveMap:
    """Make a map of one value per unit, (units,), to click through; needs a volume."""
    assert given.volume is not None
    return brain_maps.interactive_map(
        values,
        given.volume,
        title,
        background=given.background,
        limits=brain_maps.colour_limits(given.volume(values), symmetric=symmetric),
        colours="coolwarm" if symmetric else "viridis",  # no white: the background is
    )


def _draws(file: PredictionFile, scores: Scores) -> dict[str, Any] | None:
    """Draws against repeats: text, table, figure of the units."""
    grid = tables.draws_grid(scores)
    if grid is None or scores.spreads is None:
        return None
    drawn, repeated = sampling.unit_variances(file)
    figure = figures.spread_figure(drawn, repeated, file.info.unit)
    text = f"{sampling.finding(scores.spreads)} {sampling.MEANING}"
    return {"grid": replace(grid, note=""), "figure": _svg(figure), "text": text}


def _gate(file: PredictionFile, scores: Scores, given: Surroundings) -> dict[str, Any] | None:
    """Shares of the two streams: table, distribution over images, areas, map."""
    frame, shares = gates.gate_table(file, scores.regions), gates.image_shares(file)
    if frame is None or shares is None:
        return None
    by_unit = gates.unit_shares(file)
    found: dict[str, Any] = {
        "grid": gates.gate_grid(frame, file.info.unit),
        "images": _svg(gates.image_figure(shares)),
        "regions": _svg(gates.region_figure(frame)),
        "map": None,
    }
    if by_unit is not None and given.volume is not None:
        mean = by_unit.mean(axis=0, dtype=np.float64)
        found["map"] = static_map(
            "Share of the global stream", mean, given, limits=(0.0, 1.0), colours="PuOr"
        )
    return found
