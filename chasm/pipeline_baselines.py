"""All baselines in one go: every recipe fitted, tested and costed, then compared in one table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chasm.data.simulation import SimulationConfig
from chasm.errors import ChasmError, ConfigError
from chasm.evaluation.bootstrap import check_resamples
from chasm.evaluation.comparison import compare
from chasm.evaluation.comparison_tables import Comparison
from chasm.evaluation.cost import cost_of_run
from chasm.evaluation.testing import predict_run
from chasm.pipeline import prepare_recipe
from chasm.training.recipes import Recipe
from chasm.training.runs import RunInterruptedError, fit

log = logging.getLogger(__name__)

DEFAULT_RECIPES = (
    "experiments/baselines/*.yaml",
    "experiments/stage1.yaml",
    "experiments/stage2.yaml",
)
"""Patterns of the recipes of the simulated demo."""

FOLDER = "baselines"
"""Where the comparison of a subject's runs is, beside them."""


class MissingRowsError(ChasmError):
    """Some recipes failed; the table was made of the others."""

    exit_status = 3


def find_recipes(places: Sequence[str] = DEFAULT_RECIPES) -> list[Path]:
    """List the recipes of files, folders and patterns, each once.

    Raises
    ------
    ConfigError
        One of them names no recipe.
    """
    found: dict[Path, None] = {}
    for place in places:
        path = Path(place)
        if path.is_dir():
            matches = sorted(path.glob("*.yaml"))
        else:
            matches = [path] if path.is_file() else sorted(Path().glob(place))
        if not matches:
            raise ConfigError("--recipes", f"{place} names no recipe", "Name a YAML file.")
        found |= dict.fromkeys(matches)
    return list(found)


def run_baselines(
    args: Sequence[str],
    recipes: Sequence[Path],
    *,
    nsd: Path | None = None,
    simulated: SimulationConfig | None = None,
    version: str = "betas_fithrf_GLMdenoise_RR",
    mask: str = "nsdgeneral",
    n_boot: int = 2000,
    fresh: bool = False,
) -> tuple[Path, Comparison]:
    """Fit, test and cost every recipe on one subject, and compare them.

    What is current is not made again. A recipe that fails is logged and named in the table, which
    is made of the others.

    Parameters
    ----------
    args
        Arguments of every recipe (``--data.subject 1 ...``), without ``-c``.
    recipes
        Recipes, at least one.
    nsd, simulated, version, mask
        See `chasm.pipeline.run_recipe`.
    n_boot
        Bootstrap resamples of the table.
    fresh
        Train and test again although a run is current.

    Returns
    -------
    folder : Path
        ``<runs>/<dataset>/<subject>/baselines``, see `chasm.evaluation.comparison.compare`.
    comparison : Comparison
        The tables.

    Raises
    ------
    ConfigError
        `n_boot` is negative or between 1 and 99, or there is no recipe.
    ChasmError
        The data cannot be prepared, or every recipe failed: the error of the first.
    RunInterruptedError
        Training was stopped by a signal.
    """
    check_resamples(n_boot)
    if not recipes:
        raise ConfigError("--recipes", "there is no recipe", "Name a YAML file.")
    args = list(args)
    source: dict[str, Any] = {}
    if nsd is not None or simulated is not None:
        source = {"nsd": nsd, "simulated": simulated, "version": version, "mask": mask}
    predictions: list[Path] = []
    failed: dict[str, ChasmError | RuntimeError | OSError] = {}
    for number, path in enumerate(recipes, start=1):
        log.info("recipe %d of %d: %s", number, len(recipes), path)
        try:
            recipe = prepare_recipe(["-c", str(path), *args], **source)
            if source:
                args += ["--data.dataset_dir", str(recipe.make_data().dataset_dir)]
                source = {}
            predictions.append(_finish(recipe, fresh))
        except RunInterruptedError:
            raise
        except (ChasmError, RuntimeError, OSError) as error:
            expected = isinstance(error, ChasmError)
            log.error("%s failed: %s", path, error, exc_info=not expected)
            failed[str(path)] = error
    if not predictions:
        raise next(iter(failed.values()))
    folder = predictions[0].parent.parent / FOLDER
    log.info("comparing %d runs", len(predictions))
    errors = {name: " ".join(str(error).split()) for name, error in failed.items()}
    return folder, compare(predictions, folder, n_boot=n_boot, failed=errors)


def _finish(recipe: Recipe, fresh: bool) -> Path:
    """Fit, test and cost a recipe; give its predictions file."""
    run = fit(recipe, fresh=fresh)
    predictions = predict_run(run, fresh=fresh)
    cost_of_run(run, fresh=fresh)
    return predictions
