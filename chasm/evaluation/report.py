"""The report: scores.csv, table.md and one self-contained HTML page per predictions file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from chasm.evaluation import tables
from chasm.evaluation.bootstrap import check_resamples
from chasm.evaluation.brain_maps import Volume
from chasm.evaluation.gallery import Pixels
from chasm.evaluation.page import Surroundings, render
from chasm.evaluation.predictions import PredictionFile, RunInfo
from chasm.evaluation.scores import Scores, score
from chasm.io import atomic_path, digest, sha256_of_file, write_json, write_text

logger = logging.getLogger(__name__)

FILES = ("scores.csv", "table.md", "report.html", "scores.json")
"""What `evaluate` leaves in the report's folder; with ``draws.csv`` for a model that draws."""

REPORT_VERSION = 3
"""Part of a report's signature: raised when a change of the code changes what is written."""


def evaluate(
    predictions: Path,
    out_dir: Path,
    n_boot: int = 2000,
    seed: int = 0,
    *,
    metrics_csv: Path | None = None,
    provenance: Mapping[str, Any] | None = None,
    volume: Volume | None = None,
    background: Any = None,
    pixels: Pixels | None = None,
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
    metrics_csv, provenance, volume, background, pixels
        See `chasm.evaluation.page.Surroundings`.
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
    given = Surroundings(metrics_csv, provenance, volume, background, pixels)
    signature = _signature(predictions, n_boot, seed, given, draws=scores.spreads is not None)
    if not fresh and is_current(out_dir, signature):
        logger.info("the report is current: %s", out_dir / "report.html")
        return scores
    write_text(out_dir / "report.html", render(file, predictions, scores, given))
    write_text(out_dir / "table.md", tables.markdown(scores))
    write_csv(scores, out_dir / "scores.csv")
    if scores.spreads is None:
        (out_dir / "draws.csv").unlink(missing_ok=True)
    else:
        write_facts(scores.spreads, scores.info, out_dir / "draws.csv")
    write_json(out_dir / "scores.json", signature)
    logger.info("report written: %s", out_dir / "report.html")
    return scores


def is_current(out_dir: Path, signature: Mapping[str, Any]) -> bool:
    """Whether `evaluate` has already written everything from the inputs of this signature."""
    names = (*FILES, "draws.csv") if signature["draws"] else FILES
    if not all((out_dir / name).is_file() for name in names):
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
    given: Surroundings,
    *,
    draws: bool,
) -> dict[str, Any]:
    """Everything that the written files depend on, as JSON values."""
    curves = given.metrics_csv
    return {
        "predictions_sha256": sha256_of_file(predictions),
        "metrics_sha256": None if curves is None else sha256_of_file(curves),
        "provenance": digest(given.provenance),
        "maps": given.volume is not None,
        "pixels": given.pixels is not None,
        "draws": draws,
        "n_boot": n_boot,
        "seed": seed,
        "report": REPORT_VERSION,
        "chasm": metadata.version("chasm-fmri"),
    }


def write_csv(scores: Scores, path: Path) -> None:
    """Write the tidy score table, see `write_facts`.

    The differences between a model and its parts are lines of kind ``difference``.
    """
    gains = scores.gains
    lines = pd.DataFrame(
        {
            **{name: gains[name] for name in ("target", "metric", "level", "atlas", "region")},
            "row": gains["row"] + " − " + gains["other"],
            "kind": "difference",
            "value": gains["difference"],
            "low": gains["difference_low"],
            "high": gains["difference_high"],
        }
    )
    frame = scores.frame if gains.empty else pd.concat([scores.frame, lines], ignore_index=True)
    write_facts(frame, scores.info, path)


def write_facts(frame: pd.DataFrame, info: RunInfo, path: Path) -> None:
    """Write a table as CSV, six digits, with subject, data set and SIMULATED on every line."""
    frame = frame.copy()
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
    surroundings: Surroundings = Surroundings(),  # noqa: B008 (frozen)
) -> Path:
    """Write the page alone, which needs nothing beside it.

    Parameters
    ----------
    predictions
        The predictions file.
    out
        The page.
    scores
        Scores of that file, computed when None.
    surroundings
        What is known beside the predictions.

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
    write_text(out, render(file, predictions, scores, surroundings))
    logger.info("report written: %s", out)
    return Path(out)
