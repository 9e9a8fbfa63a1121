"""All baselines in one go: every recipe fitted, tested and costed, then compared in one table."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chasm.data.simulation import SimulationConfig
from chasm.errors import ChasmError, ConfigError, TrainingError
from chasm.evaluation.bootstrap import check_resamples
from chasm.evaluation.comparison import compare
from chasm.evaluation.comparison_tables import Comparison
from chasm.evaluation.cost import cost_of_run
from chasm.evaluation.testing import predict_run
from chasm.pipeline import prepare_recipe
from chasm.training.recipes import Recipe
from chasm.training.runs import RunInterruptedError, run_folder
from chasm.training.side_by_side import Fitted, default_jobs, fit_side_by_side

log = logging.getLogger(__name__)

DEFAULT_RECIPES = (
    "experiments/baselines/*.yaml",
    "experiments/stage1.yaml",
    "experiments/stage2.yaml",
)
"""Patterns of the recipes of the simulated demo."""

PROTOCOL = ("subject", "backbone", "split", "split_seed", "statistics")
"""Data settings that all recipes of one table share."""

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
    jobs: int | None = None,
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
    jobs
        Recipes trained at a time, see `chasm.training.side_by_side`; None for its default.

    Returns
    -------
    folder : Path
        ``<runs>/<dataset>/<subject>/baselines``, see `chasm.evaluation.comparison.compare`.
    comparison : Comparison
        The tables.

    Raises
    ------
    ConfigError
        `n_boot` is negative or between 1 and 99, there is no recipe, or recipes differ in split,
        statistics or tokens.
    TrainingError
        Every recipe failed: the error of the first.
    RunInterruptedError
        Training was stopped by a signal.
    """
    check_resamples(n_boot)
    if not recipes:
        raise ConfigError("--recipes", "there is no recipe", "Name a YAML file.")
    _check_protocol(args, recipes)
    failed: dict[str, str] = {}
    prepared = _prepare(
        args,
        recipes,
        {"nsd": nsd, "simulated": simulated, "version": version, "mask": mask},
        failed,
    )
    runs = _train(prepared, default_jobs() if jobs is None else jobs, fresh, failed)
    predictions: list[Path] = []
    for number, (name, run) in enumerate(runs.items(), start=1):
        log.info("testing run %d of %d: %s", number, len(runs), name)
        with _noted(name, failed):
            predictions.append(predict_run(run, fresh=fresh, by="chasm baselines"))
            cost_of_run(run, fresh=fresh)
    if not predictions:
        name, error = next(iter(failed.items()))
        raise TrainingError(name, error, "No recipe is left to compare.")
    folder = predictions[0].parent.parent / FOLDER
    log.info("comparing %d runs", len(predictions))
    return folder, compare(predictions, folder, n_boot=n_boot, failed=failed)


def _check_protocol(args: Sequence[str], paths: Sequence[Path]) -> None:
    """Refuse recipes that cannot stand in one table; one that does not parse is named later."""
    first: tuple[Path, dict[str, Any]] | None = None
    for path in paths:
        try:
            data = Recipe(["-c", str(path), *args]).settings()["data"]
        except ChasmError:
            continue
        first = first or (path, data)
        for key in PROTOCOL:
            if data[key] != first[1][key]:
                raise ConfigError(
                    path,
                    f"data.{key} is {data[key]}, but {first[1][key]} in {first[0]}",
                    "Compare recipes of one protocol, or give that key to all of them.",
                )


def _prepare(
    args: Sequence[str], paths: Sequence[Path], source: dict[str, Any], failed: dict[str, str]
) -> dict[str, Recipe]:
    """Parse every recipe and make the data that it needs; the source is read once."""
    if source["nsd"] is None and source["simulated"] is None:
        source = {}
    prepared: dict[str, Recipe] = {}
    for number, path in enumerate(paths, start=1):
        log.info("recipe %d of %d: %s", number, len(paths), path)
        with _noted(str(path), failed):
            recipe = prepare_recipe(["-c", str(path), *args], **source)
            prepared[str(path)] = recipe
            if source:
                args = [*args, "--data.dataset_dir", str(recipe.make_data().dataset_dir)]
                source = {}
    return prepared


def _train(
    recipes: Mapping[str, Recipe], jobs: int, fresh: bool, failed: dict[str, str]
) -> dict[str, Path]:
    """Train every recipe; those that build on another one after it. Give their runs."""
    first: dict[str, Recipe] = {}
    labels: dict[Path, str] = {}
    same: dict[str, str] = {}
    for name, recipe in recipes.items():
        with _noted(name, failed):
            for label, needed in _first(name, recipe).items():
                folder = run_folder(needed, needed.make_data())
                if folder not in labels:
                    labels[folder] = label
                    first[label] = needed
                elif label == name:
                    same[name] = labels[folder]  # trained already, for a recipe that builds on it
    found = fit_side_by_side(first, jobs, fresh=fresh)
    second = {
        name: recipe
        for name, recipe in recipes.items()
        if recipe.stage1 is not None and name not in failed
    }
    found |= fit_side_by_side(second, jobs, fresh=fresh)
    found |= {name: found[label] for name, label in same.items()}
    failed |= {
        name: fitted.error
        for name, fitted in found.items()
        if fitted.run is None and name in recipes
    }
    return {name: run for name in recipes if (run := found.get(name, Fitted(None)).run) is not None}


def _first(name: str, recipe: Recipe) -> dict[str, Recipe]:
    """Give what can be trained at once: the recipe itself, or the recipe that it builds on."""
    if recipe.stage1 is None:
        return {name: recipe}
    if recipe.stage1.suffix in (".yaml", ".yml"):
        return {str(recipe.stage1): recipe.stage1_recipe()}
    return {}


@contextmanager
def _noted(name: str, failed: dict[str, str]) -> Iterator[None]:
    """Note an error under a name, and go on; a stop from outside is none."""
    try:
        yield
    except RunInterruptedError:
        raise
    except (ChasmError, RuntimeError, OSError) as error:
        expected = isinstance(error, ChasmError)
        log.error("%s failed: %s", name, error, exc_info=not expected)
        failed[name] = " ".join(str(error).split())
