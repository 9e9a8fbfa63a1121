"""From trained subjects to a new one: an adapter, and the paper's transfer table."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from chasm.data.datamodule import NSDDataModule, subject_name
from chasm.data.splits import FewShot
from chasm.errors import ConfigError, TrainingError
from chasm.evaluation.bootstrap import check_resamples
from chasm.evaluation.report import write_facts
from chasm.evaluation.testing import score_run
from chasm.evaluation.transfer_arms import ARMS, check_arms
from chasm.evaluation.transfer_cells import Cells, Shots, draw_shots
from chasm.evaluation.transfer_rows import (
    WITHIN,
    TransferRow,
    TransferTable,
    markdown,
    render,
    transfer_frame,
)
from chasm.io import digest, sha256_of_file, write_text
from chasm.pipeline import prepare_recipe
from chasm.training.base import EncodingModule
from chasm.training.checkpoints import load_module
from chasm.training.launch import leave_to_first, refuse_several
from chasm.training.recipes import Recipe
from chasm.training.runs import (
    RECIPES,
    check_subjects,
    fit,
    run_folder,
    source_checkpoints,
    training_data,
)
from chasm.training.side_by_side import default_jobs, fit_side_by_side
from chasm.training.sources import check_sources

log = logging.getLogger(__name__)

LEAST_STEPS = 80
"""Of training over few images: on validation, more made trained arms no better."""


class Target(NamedTuple):
    """A new subject with its source, both there."""

    recipe: Recipe
    """Of the adapter, its source named by a run or a checkpoint."""
    args: list[str]
    """Arguments that give this recipe."""
    data: NSDDataModule
    sources: list[EncodingModule]
    prints: list[str]
    """Fingerprints of the source's checkpoints."""
    within: Path | None = None
    """The source's run where it is of the new subject itself."""


class TrainedArm(NamedTuple):
    """An arm that is trained on some images of a new subject."""

    target: Target
    arm: str
    shots: Shots


def adapt(
    args: Sequence[str],
    *,
    arm: str | None = None,
    n: int | None = None,
    draw: int = 0,
    steps: int | None = None,
    n_boot: int = 2000,
    fresh: bool = False,
    **origin: Any,
) -> Path:
    """Adapt a source to a new subject, and test.

    What is missing is made first: stores, tokens, the source.

    Parameters
    ----------
    args
        Recipe arguments of an adapter (``-c experiments/adapt.yaml --subjects [1,2] ...``).
    arm
        Instead of the recipe's.
    n, draw
        Images of the new subject, and which draw of them. None: all, with the split's own
        validation images.
    steps
        Least steps of training on `n` images, where the recipe's epochs give fewer; None:
        `LEAST_STEPS`.
    n_boot
        Bootstrap resamples of the table.
    fresh
        Adapt and test again although the run is current.
    **origin
        ``nsd``, ``simulated``, ``version``, ``mask`` of `chasm.pipeline.prepare_recipe`.

    Returns
    -------
    Path
        The run's folder.

    Raises
    ------
    ConfigError
        An argument cannot be used: the arm is unknown, there are fewer images than `n`, the new
        subject is one of the source's.
    """
    check_resamples(n_boot)
    args = [*args, *arm_args(arm)]
    check_subjects(Recipe(args))
    recipe = prepare_recipe(args, **origin)
    args = with_folder(args, recipe)
    if n is not None:
        shots = draw_shots(recipe.make_data(), FewShot(n, draw))
        args += [*shots.args, *epochs_of(recipe, shots, steps or LEAST_STEPS)]
        recipe = Recipe(args)
    log.info("step: fit")
    run = fit(recipe, fresh=fresh)
    leave_to_first(recipe)
    log.info("step: test")
    score_run(run, n_boot=n_boot, fresh=fresh, by="chasm adapt")
    return run


def transfer_table(
    args: Sequence[str],
    rows: Sequence[tuple[Sequence[str], str]],
    *,
    arms: Sequence[str] = ("mean_pattern", "ridge", "ridge_head", "head"),
    n_boot: int = 2000,
    jobs: int | None = None,
    fresh: bool = False,
    **origin: Any,
) -> tuple[Path, TransferTable]:
    """Score arms on all train images of new subjects, published values beside.

    Parameters
    ----------
    args
        Recipe arguments of an adapter, without subjects; its source is a recipe.
    rows
        Source subjects and new subject; the subject itself as its only source stands for a
        model that is trained on it by the source's recipe.
    arms
        See `chasm.evaluation.transfer_arms.ARMS`.
    n_boot
        Bootstrap resamples of the test images.
    jobs
        Recipes trained at a time; None for the default of `chasm.training.side_by_side`.
    fresh
        Train the arms and test again.
    **origin
        See `adapt`.

    Returns
    -------
    folder : Path
        ``<runs>/<dataset>/transfer-table`` with ``scores.csv``, ``table.md``, ``report.html``.
    table : TransferTable
        What they were made from.

    Raises
    ------
    ConfigError
        An argument cannot be used.
    TrainingError
        No row could be made.
    """
    check_resamples(n_boot)
    arms, failed = check_arms(arms), dict[str, str]()
    targets = _targets(args, rows, jobs, origin, failed)
    if not targets:
        raise TrainingError(*next(iter(failed.items())), "No row of the table is left.")
    wanted = {
        f"{name}: {ARMS[arm].label}": TrainedArm(target, arm, draw_shots(target.data, None))
        for name, target in targets.items()
        for arm in arms
        if ARMS[arm].trained and target.within is None
    }
    runs = train_arms(wanted, LEAST_STEPS, jobs, failed, fresh=fresh)
    found = []
    for target in targets.values():
        own = {
            place.arm: runs[name]
            for name, place in wanted.items()
            if place.target is target and name in runs
        }
        found.append(_row(target, arms, own, n_boot, fresh=fresh))
    table = TransferTable(tuple(found), n_boot, failed)
    folder = beside(next(iter(targets.values()))).parent / "transfer-table"
    write_facts(transfer_frame(table), found[0].info, folder / "scores.csv")
    write_text(folder / "table.md", markdown(table))
    write_text(folder / "report.html", render(table))
    log.info("table written: %s", folder / "report.html")
    return folder, table


def _targets(
    args: Sequence[str],
    rows: Sequence[tuple[Sequence[str], str]],
    jobs: int | None,
    origin: Mapping[str, Any],
    failed: dict[str, str],
) -> dict[str, Target]:
    """Prepare every subject, train the sources side by side, and open those that worked."""
    own_args = [
        [*args, "--subjects", f"[{','.join(sources)}]", "--data.subject", new]
        for sources, new in rows
    ]
    for (sources, new), own in zip(rows, own_args, strict=True):
        recipe = Recipe(own)
        refuse_several(recipe, "chasm transfer-table")
        if list(sources) != [new]:
            check_subjects(recipe)
        if recipe.settings()["data"]["few_shot"] is not None:
            raise ConfigError("data.few_shot", "the table is of all images", "Use chasm fewshot.")
        if recipe.source is None or recipe.source.suffix not in RECIPES:
            raise ConfigError("source", "is no recipe", "The table trains one for every row.")
    prepared: dict[str, tuple[list[str], Recipe, Path]] = {}
    first: dict[Path, Recipe] = {}
    for (sources, new), own in zip(rows, own_args, strict=True):
        recipe = prepare_recipe(own, **origin)
        source = _source_of(recipe)
        run = run_folder(source, training_data(source))
        first.setdefault(run, source)
        prepared[f"{', '.join(sources)} → {new}"] = (with_folder(own, recipe), recipe, run)
    named = {f"source {run.parent.name}/{run.name}": recipe for run, recipe in first.items()}
    done = fit_side_by_side(named, default_jobs() if jobs is None else jobs)
    targets = {}
    for name, (own, recipe, run) in prepared.items():
        fitted = done[f"source {run.parent.name}/{run.name}"]
        if fitted.run is None:
            failed[name] = fitted.error
        elif _source_of(recipe).subjects is None:
            targets[name] = _target(recipe, own, fitted.run)._replace(within=fitted.run)
        else:
            targets[name] = open_target(recipe, own, fitted.run)
    return targets


def _source_of(recipe: Recipe) -> Recipe:
    """Give the recipe of a row's source: of several subjects, or of the new one alone."""
    source = recipe.source_recipe()
    own = subject_name(recipe.make_data().subject)
    return source.for_subject(own) if source.subjects == [own] else source


def _row(
    target: Target, arms: Sequence[str], runs: Mapping[str, Path], n_boot: int, *, fresh: bool
) -> TransferRow:
    folder = folder_of(target, "transfer")
    by = "chasm transfer-table"
    cells = Cells(target.recipe, target.sources, target.prints, folder, n_boot, by, fresh=fresh)
    shots = draw_shots(target.data, None)
    solved = [arm for arm in arms if not ARMS[arm].trained]
    if target.within is not None:
        solved = [arm for arm in solved if ARMS[arm].kind != "adapter"]
        runs = {WITHIN: target.within}
    found = {cell.arm: cell for cell in cells.solved(solved, shots)}
    found |= {arm: cells.trained(arm, shots, run) for arm, run in runs.items()}
    facts = cells.facts()
    return TransferRow(
        sources=cells.source_names,
        target=subject_name(target.data.subject),
        cells=found,
        ceiling=facts["ceiling"],
        target_variance=facts["target_variance"],
        n_images=facts["n_images"],
        info=cells.info("transfer table"),
    )


def open_target(recipe: Recipe, args: Sequence[str], source: Path) -> Target:
    """Load the source of an adapter, a run or a checkpoint, and check that it may be used."""
    target = _target(recipe, args, source)
    check_sources(target.sources, target.data)
    return target


def _target(recipe: Recipe, args: Sequence[str], source: Path) -> Target:
    args = [*args, "--source", str(source.resolve())]
    paths = source_checkpoints(Recipe(args))
    prints = [sha256_of_file(path) for path in paths]
    return Target(Recipe(args), args, recipe.make_data(), [load_module(p) for p in paths], prints)


def train_arms(
    arms: Mapping[str, TrainedArm],
    steps: int,
    jobs: int | None,
    failed: dict[str, str],
    *,
    fresh: bool,
) -> dict[str, Path]:
    """Train arms side by side and give their runs by name; note those that failed."""
    recipes = {}
    for name, (target, arm, shots) in arms.items():
        more = epochs_of(target.recipe, shots, steps)
        recipes[name] = Recipe([*target.args, *arm_args(arm), *shots.args, *more])
    if recipes:
        log.info("training %d arms", len(recipes))
    jobs = default_jobs() if jobs is None else jobs
    fitted = fit_side_by_side(recipes, jobs, fresh=fresh)
    failed |= {name: found.error for name, found in fitted.items() if found.run is None}
    return {name: found.run for name, found in fitted.items() if found.run is not None}


def epochs_of(recipe: Recipe, shots: Shots, steps: int) -> list[str]:
    """Give the recipe's epochs or, over few images, as many as take some steps.

    Parameters
    ----------
    recipe
        Of the adapter.
    shots
        Images.
    steps
        Least steps of training.
    """
    settings = recipe.settings()
    epochs, size = settings["trainer"]["max_epochs"], settings["data"]["batch_size"]
    if shots.few is None or not epochs or epochs < 0:
        return []
    return ["--trainer.max_epochs", str(max(epochs, ceil(steps / ceil(shots.n_train / size))))]


def folder_of(target: Target, name: str, order: str = "random") -> Path:
    """Folder of what is made of one new subject and one source."""
    settings = target.recipe.settings()["data"]
    settings.pop("dataset_dir")
    facts = [target.prints, target.data.store.fingerprint, target.data.tokens.fingerprint]
    key = digest([facts, settings, target.recipe.seed, order], 8)
    return beside(target) / f"{name}-{key}"


def beside(target: Target) -> Path:
    """Folder of the new subject's runs."""
    return run_folder(target.recipe, target.data).parent


def arm_args(arm: str | None) -> list[str]:
    """Give the argument that chooses an adapter.

    Raises
    ------
    ConfigError
        There is no such adapter.
    """
    if arm is None:
        return []
    adapters = [name for name, facts in ARMS.items() if facts.kind == "adapter"]
    if arm not in adapters:
        raise ConfigError("--arm", f"there is no {arm!r}", f"Use one of {', '.join(adapters)}.")
    return ["--model.init_args.arm", arm]


def with_folder(args: Sequence[str], recipe: Recipe) -> list[str]:
    """Add to a recipe's arguments the folder that its data were prepared in."""
    return [*args, "--data.dataset_dir", str(recipe.make_data().dataset_dir)]
