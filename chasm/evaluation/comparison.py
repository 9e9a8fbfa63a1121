"""All baselines in one comparison: runs joined, scored on the same resamples, costed, written."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from chasm.evaluation.bootstrap import check_resamples
from chasm.evaluation.comparison_page import render
from chasm.evaluation.comparison_tables import Comparison, Level, cost_frame, markdown
from chasm.evaluation.cost import Cost, linear_cost, read_cost
from chasm.evaluation.joining import join_parcels, join_voxels, read_runs
from chasm.evaluation.predictions import PredictionFile
from chasm.evaluation.report import write_csv, write_facts
from chasm.evaluation.scores import score
from chasm.io import write_text

logger = logging.getLogger(__name__)


def compare(
    predictions: Sequence[Path],
    out_dir: Path,
    *,
    n_boot: int = 2000,
    seed: int = 0,
    failed: Mapping[str, str] | None = None,
) -> Comparison:
    """Join runs, score them together and write the table, the scores and the report.

    ``out_dir`` receives ``predictions.h5``, ``scores.csv`` and ``costs.csv`` at voxels, the same
    ending in ``_parcels`` at parcels, and ``table.md`` and ``report.html`` of both. Without a run
    of voxels, or of parcels, that level is left out, and its files of an earlier comparison go.

    Parameters
    ----------
    predictions
        Predictions files of runs on the same test images. A ``cost.json`` beside one is its
        model's cost.
    out_dir
        Folder of the comparison.
    n_boot, seed
        Bootstrap over images, the same resamples for all rows of a level.
    failed
        Recipes that are missing from the table, to be named in it, with their errors.

    Raises
    ------
    ConfigError
        If `n_boot` is negative or between 1 and 99.
    DataError
        If a file cannot be read or is not about the same test images.
    """
    check_resamples(n_boot)
    runs = read_runs(list(dict.fromkeys(map(Path, predictions))))
    paths = {run.label: run.path.parent / "cost.json" for run in runs}
    trained = {label: read_cost(path) for label, path in paths.items() if path.is_file()}
    joined = [file for file in (join_voxels(runs), join_parcels(runs)) if file is not None]
    levels = []
    for file in joined:
        scores = score(file, n_boot=n_boot, seed=seed)
        levels.append(Level(file, scores, {**_linear_costs(file), **trained}))
    comparison = Comparison(tuple(levels), dict(failed or {}))
    out_dir = Path(out_dir)
    for level in levels:
        level.file.write(out_dir / f"predictions{level.suffix}.h5")
        write_csv(level.scores, out_dir / f"scores{level.suffix}.csv")
        write_facts(cost_frame(level), level.scores.info, out_dir / f"costs{level.suffix}.csv")
    for suffix in {"", "_parcels"} - {level.suffix for level in levels}:
        for name in (f"predictions{suffix}.h5", f"scores{suffix}.csv", f"costs{suffix}.csv"):
            (out_dir / name).unlink(missing_ok=True)
    write_text(out_dir / "table.md", markdown(comparison))
    write_text(out_dir / "report.html", render(comparison))
    logger.info("comparison written: %s", out_dir / "report.html")
    return comparison


def _linear_costs(file: PredictionFile) -> dict[str, Cost]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        name: linear_cost(row.n_parameters, file.n_units, device)
        for name, row in file.rows.items()
        if row.kind == "baseline" and row.n_parameters is not None
    }
