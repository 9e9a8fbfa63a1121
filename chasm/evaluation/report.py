"""The report: scores.csv, table.md and one self-contained HTML page per predictions file."""

from __future__ import annotations

import base64
import json
import logging
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from chasm.evaluation import figures, tables
from chasm.evaluation.bootstrap import check_resamples
from chasm.evaluation.catalogue import METRICS, ROI_METRICS, fill_unit
from chasm.evaluation.predictions import MAIN_TARGET, PredictionFile, PredictionRow
from chasm.evaluation.scores import Scores, score
from chasm.io import atomic_path, digest, sha256_of_file, write_json, write_text

logger = logging.getLogger(__name__)

FILES = ("scores.csv", "table.md", "report.html", "scores.json")
"""What `evaluate` leaves in the report's folder."""


def evaluate(
    predictions: Path,
    out_dir: Path,
    n_boot: int = 2000,
    seed: int = 0,
    *,
    metrics_csv: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    volume: figures.Volume | None = None,
    background: Any = None,
    fresh: bool = False,
) -> Scores:
    """Score a predictions file and write ``scores.csv``, ``table.md`` and ``report.html``.

    Files that were made from this very predictions file, with the same bootstrap, curves and
    provenance, stay as they are.

    Parameters
    ----------
    predictions
        File of `chasm.evaluation.predictions.PredictionFile`.
    out_dir
        Folder of the report.
    n_boot, seed
        Bootstrap over images.
    metrics_csv, provenance, volume, background
        See `write_report`.
    fresh
        Write the files again in any case.

    Returns
    -------
    Scores
        For `chasm.evaluation.tables.show`.

    Raises
    ------
    ConfigError
        If `n_boot` is negative or between 1 and 99.
    DataError
        If a file cannot be read.
    """
    check_resamples(n_boot)
    file = PredictionFile.read(predictions)
    scores = score(file, n_boot=n_boot, seed=seed)
    out_dir = Path(out_dir)
    signature = _signature(predictions, n_boot, seed, metrics_csv, provenance, volume is not None)
    if not fresh and is_current(out_dir, signature):
        logger.info("the report is current: %s", out_dir / "report.html")
        return scores
    write_report(
        predictions,
        out_dir / "report.html",
        scores=scores,
        metrics_csv=metrics_csv,
        provenance=provenance,
        volume=volume,
        background=background,
    )
    write_text(out_dir / "table.md", tables.markdown(scores))
    write_csv(scores, out_dir / "scores.csv")
    write_json(out_dir / "scores.json", signature)
    return scores


def is_current(out_dir: Path, signature: Mapping[str, Any]) -> bool:
    """Whether `evaluate` has already written everything from the inputs of this signature."""
    if not all((out_dir / name).is_file() for name in FILES):
        return False
    try:
        found = json.loads((out_dir / "scores.json").read_text(encoding="utf-8"))
    except ValueError:
        return False
    return bool(found == signature)


def _signature(
    predictions: Path,
    n_boot: int,
    seed: int,
    metrics_csv: Path | None,
    provenance: Mapping[str, Any] | None,
    with_maps: bool,
) -> dict[str, Any]:
    """Everything that the written files depend on, as JSON values."""
    return {
        "predictions_sha256": sha256_of_file(predictions),
        "metrics_sha256": None if metrics_csv is None else sha256_of_file(metrics_csv),
        "provenance": digest(provenance),
        "maps": with_maps,
        "n_boot": n_boot,
        "seed": seed,
        "chasm": metadata.version("chasm-fmri"),
    }


def write_csv(scores: Scores, path: Path) -> None:
    """Write the tidy score table, with subject, data set and SIMULATED on every line."""
    info = scores.info
    frame = scores.frame.copy()
    facts: dict[str, Any] = {
        "subject": info.subject,
        "dataset": info.dataset,
        "simulated": info.simulated,
        "unit": info.unit,
        "split": info.split,
        "weights": info.weights_label,
    }
    for position, (name, value) in enumerate(facts.items()):
        frame.insert(position, name, value)
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.6g")


def write_report(
    predictions: Path,
    out: Path,
    *,
    scores: Scores | None = None,
    metrics_csv: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    volume: figures.Volume | None = None,
    background: Any = None,
) -> Path:
    """Write one HTML page that needs nothing beside it.

    Parameters
    ----------
    predictions
        The predictions file.
    out
        The page.
    scores
        Scores of that file, computed when None.
    metrics_csv
        Lightning's ``metrics.csv`` for the training curves.
    provenance
        Facts about the run (versions, seed, git revision, hardware), shown as they are.
    volume
        Puts one value per unit into the subject's volume as a NIfTI image, for the brain maps;
        without it the page has no map.
    background
        NIfTI image beneath the maps.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    DataError
        If a file cannot be read.
    """
    file = PredictionFile.read(predictions)
    scores = score(file) if scores is None else scores
    unit = file.info.unit
    roi_grids = [tables.region_grid(scores, metric) for metric in ROI_METRICS]
    context = {
        "headline": tables.headline(scores),
        "info": file.info,
        "summary": summary(scores),
        "grids": tables.grids(scores),
        "roi_grids": [grid for grid in roi_grids if grid is not None],
        "other_grids": [
            tables.target_grid(scores, target) for target in tables.alternative_targets(scores)
        ],
        "method": tables.method(scores),
        "region_figure": _svg(_region_figure(scores)),
        "ceiling_figure": _svg(figures.ceiling_figure(scores)),
        "training_figures": [
            figures.to_svg(figure)
            for figure in (figures.training_figures(metrics_csv) if metrics_csv else [])
        ],
        "maps": _maps(scores, volume, background) if volume is not None else [],
        "metrics": [
            {
                "label": fill_unit(facts.label, unit),
                "meaning": fill_unit(facts.meaning, unit),
                "null": fill_unit(facts.null, unit),
                "ceiling": fill_unit(facts.ceiling, unit),
            }
            for facts in METRICS.values()
        ],
        "published": tables.published_grid(),
        "rows": _row_facts(file),
        "provenance": _provenance(predictions, file, provenance),
        "config": file.info.config,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("chasm.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(out, environment.get_template("report.html.j2").render(context))
    logger.info("report written: %s", out)
    return Path(out)


def summary(scores: Scores) -> list[str]:
    """Say the main result in sentences: each model, the best baseline, their difference."""
    frame = scores.frame
    frame = frame[(frame["target"] == MAIN_TARGET) & (frame["level"] == "all")]
    normalised = frame[frame["metric"] == "noise_normalised_r2"]
    share = normalised["value"].notna().any()
    table = (normalised if share else frame[frame["metric"] == "r2"]).set_index("row")
    what = "explainable variance" if share else "variance (no noise ceiling is known)"
    best = table["best_baseline"].iloc[0]
    sentences = []
    for name, line in table[table["kind"] == "model"].iterrows():
        label = str(name)[:1].upper() + str(name)[1:]
        text = f"{label} explains {_percent(line['value'])} of the {what}"
        text += _percent_interval(line["low"], line["high"]) + "."
        text += f" The best baseline, {best}, explains {_percent(float(table['value'][best]))}"
        text += f"; the difference is {100 * line['difference']:+.1f} points"
        text += _verdict(line["difference_low"], line["difference_high"])
        sentences.append(text)
    return sentences


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _percent_interval(low: float, high: float) -> str:
    if not np.isfinite([low, high]).all():
        return ""
    return f" (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"


def _verdict(low: float, high: float) -> str:
    if not np.isfinite([low, high]).all():
        return "."
    interval = f" (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    if low > 0 or high < 0:
        return f"{interval}, which does not include 0."
    return f"{interval}, which includes 0: these test images do not tell the two apart."


def _region_figure(scores: Scores) -> Figure | None:
    found = figures.region_figure(scores)
    return found if found is not None else figures.region_figure(scores, "r2")


def _svg(figure: Figure | None) -> str | None:
    return None if figure is None else figures.to_svg(figure)


def _maps(scores: Scores, volume: figures.Volume, background: Any) -> list[dict[str, str]]:
    """Draw maps of R² for each model and of the noise ceiling, as data URIs."""
    rows = figures.compared_rows(scores)
    kinds = scores.frame.drop_duplicates("row").set_index("row")["kind"]
    wanted = {f"R² of {name}": scores.unit_r2[name] for name in rows if kinds[name] == "model"}
    if np.isfinite(scores.unit_ceiling).any():
        wanted["Noise ceiling (r²)"] = scores.unit_ceiling
    maps = []
    for title, values in wanted.items():
        figure = figures.brain_figure(values, volume, title, background=background)
        encoded = base64.b64encode(figures.to_png(figure)).decode("ascii")
        maps.append({"title": title, "source": f"data:image/png;base64,{encoded}"})
    return maps


def _row_facts(file: PredictionFile) -> list[dict[str, str]]:
    own = [item for other in file.targets.values() for item in other.rows.items()]
    return [_facts_of(name, row, file.info.unit) for name, row in [*file.rows.items(), *own]]


def _facts_of(name: str, row: PredictionRow, unit: str) -> dict[str, str]:
    return {
        "name": name,
        "kind": row.kind,
        "trained_on": tables.target_name(row.trained_on, unit),
        "parameters": "–" if row.n_parameters is None else f"{row.n_parameters:,}",
        "details": "; ".join(f"{key}: {_plain(value)}" for key, value in row.details.items()),
    }


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def _provenance(
    predictions: Path, file: PredictionFile, extra: Mapping[str, Any] | None
) -> dict[str, str]:
    info = file.info
    facts: dict[str, Any] = {
        "subject": f"{info.subject} ({info.dataset}{', simulated' if info.simulated else ''})",
        "split": info.split,
        "units": f"{file.n_units} {info.unit}s of {int(np.sum(file.units.size))} voxels",
        "test images": f"{file.n_images}, {_repeats(file)}",
        "model": info.model,
        "backbone": f"{info.backbone} (weights: {info.weights_label})",
        **{f"fingerprint of the {name}": value for name, value in info.fingerprints.items()},
        "predictions file": Path(predictions).name,
        "predictions sha256": sha256_of_file(predictions),
        "software": f"chasm {metadata.version('chasm-fmri')}, Python {platform.python_version()}",
    }
    facts |= _flatten(extra or {})
    return {name: str(value) for name, value in facts.items() if value not in ("", None)}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _repeats(file: PredictionFile) -> str:
    levels, counts = np.unique(file.repeats, return_counts=True)
    if len(levels) == 1:
        return f"{levels[0]} repeats each"
    return ", ".join(f"{n} with {k} repeats" for k, n in zip(levels, counts, strict=True))
