"""A curve over the number of images of a new subject: every arm, draws, intervals, one page."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout

from chasm.data.splits import FewShot
from chasm.errors import ConfigError
from chasm.evaluation.bootstrap import check_resamples
from chasm.evaluation.figures import to_png, to_svg
from chasm.evaluation.report import write_facts
from chasm.evaluation.transfer import Cell
from chasm.evaluation.transfer_arms import ARMS, check_arms
from chasm.evaluation.transfer_cells import Cells, Shots, draw_shots
from chasm.evaluation.transfer_page import curve_figure, render_curve
from chasm.evaluation.transfer_tables import Curve, curve_frame, draws_frame, markdown
from chasm.io import atomic_path, write_text
from chasm.pipeline import prepare_recipe
from chasm.pipeline_transfer import (
    LEAST_STEPS,
    Target,
    TrainedArm,
    folder_of,
    open_target,
    train_arms,
    with_folder,
)
from chasm.training.launch import refuse_several
from chasm.training.recipes import Recipe
from chasm.training.runs import RECIPES, check_subjects, fit

log = logging.getLogger(__name__)

NUMBERS = (20, 100, 200, 300, 750, 1500, 3000)
"""Numbers of images of a curve; all train images come last."""

TRAINED_NUMBERS = (20, 100, 300, 1500)
"""Those of `NUMBERS` at which arms are trained, and all images."""

Order = Literal["random", "presentation"]


class Plan(NamedTuple):
    """What a curve is made of.

    Attributes
    ----------
    numbers
        Images, None for all; without any: those of `NUMBERS` that the data have, and all.
    arms
        See `chasm.evaluation.transfer_arms.ARMS`.
    draws, trained_draws
        Draws of the images for solved, and for trained arms; one where they are more than half of
        all, because such draws share most images.
    trained_numbers
        Numbers at which arms are trained, None for all images; without any: all `numbers` or,
        without these, `TRAINED_NUMBERS` and all images.
    order
        Of the images: ``random``, or ``presentation`` (one draw).
    steps
        Least steps of training of a trained arm, where the recipe's epochs give fewer.
    """

    numbers: Sequence[int | None] | None = None
    arms: Sequence[str] = tuple(ARMS)
    draws: int = 3
    trained_draws: int = 1
    trained_numbers: Sequence[int | None] | None = None
    order: Order = "random"
    steps: int = LEAST_STEPS


def few_shot_curve(
    args: Sequence[str],
    plan: Plan = Plan(),  # noqa: B008 (immutable)
    *,
    n_boot: int = 1000,
    jobs: int | None = None,
    fresh: bool = False,
    **origin: Any,
) -> tuple[Path, Curve]:
    """Score every arm at every number of images of a new subject.

    Every finished arm, number and draw is kept, so that the same call goes on with the rest.

    Parameters
    ----------
    args
        Recipe arguments of an adapter, without its arm and its images.
    plan
        Numbers, arms, draws.
    n_boot
        Bootstrap resamples of the test images.
    jobs
        Arms trained at a time; None for the default of `chasm.training.side_by_side`.
    fresh
        Train and test again what is kept.
    **origin
        See `chasm.pipeline_transfer.adapt`.

    Returns
    -------
    folder : Path
        ``<runs>/<dataset>/<subject>/fewshot-<digest>`` with ``curve.csv``, ``draws.csv``,
        ``table.md``, ``curve.png``, ``curve.svg`` and ``report.html``.
    curve : Curve
        What they were made from.

    Raises
    ------
    ConfigError
        An argument cannot be used, see
        `chasm.pipeline_transfer.adapt`; or another process makes this curve.
    """
    check_resamples(n_boot)
    arms = check_arms(plan.arms)
    if min(plan.draws, plan.trained_draws) < 1:
        raise ConfigError("--draws", "found less than 1", "Give 1 or more.")
    target, shots, to_train, left_out = _opened(args, plan, origin)
    folder = folder_of(target, "fewshot", plan.order)
    cells = Cells(
        target.recipe, target.sources, target.prints, folder, n_boot, "chasm fewshot", fresh=fresh
    )
    failed: dict[str, str] = {}
    with _only_one(folder):
        found: list[Cell] = []
        solved = [arm for arm in arms if not ARMS[arm].trained]
        for number, one in enumerate(shots, start=1):
            log.info("solved arms, images %d of %d: N = %d", number, len(shots), one.n)
            found += cells.solved(solved, one)
        wanted = {
            f"{ARMS[arm].label}, {one.n} images, draw {one.draw}": TrainedArm(target, arm, one)
            for one in to_train
            for arm in arms
            if ARMS[arm].trained
        }
        for name, run in train_arms(wanted, plan.steps, jobs, failed, fresh=fresh).items():
            found.append(cells.trained(wanted[name].arm, wanted[name].shots, run))
        curve = Curve(
            cells=tuple(found),
            **cells.facts(),
            info=cells.info("few-shot curve"),
            sources=cells.source_names,
            n_boot=n_boot,
            order=plan.order,
            left_out=left_out,
            failed=failed,
        )
        _write(curve, folder, {"source": ", ".join(target.prints)})
    return folder, curve


def _opened(
    args: Sequence[str], plan: Plan, origin: Mapping[str, Any]
) -> tuple[Target, list[Shots], list[Shots], tuple[int, ...]]:
    """Prepare the data, draw the images, and only then train the source."""
    recipe = Recipe(args)
    refuse_several(recipe, "chasm fewshot")
    if recipe.settings()["data"]["few_shot"] is not None:
        raise ConfigError("data.few_shot", "the curve sets it", "Use --numbers and --draws.")
    check_subjects(recipe)
    recipe = prepare_recipe(args, **origin)
    args = with_folder(args, recipe)
    data = recipe.make_data()
    available = len(data.full_split.train)
    wanted = [available if n is None else n for n in plan.numbers or (*NUMBERS, None)]
    numbers = sorted({n for n in wanted if plan.numbers or n <= available})
    draws = 1 if plan.order == "presentation" else plan.draws
    shots = [
        draw_shots(data, FewShot(n, draw, plan.order))
        for n in numbers
        for draw in range(draws if 2 * n <= available else 1)  # larger draws are much the same
    ]
    left_out = tuple(n for n in wanted if n > available)
    if left_out:
        log.info("left out, because there are %d train images: %s", available, left_out)
    trained = _trained_shots(shots, plan)
    return open_target(recipe, args, _trained_source(recipe)), shots, trained, left_out


def _trained_source(recipe: Recipe) -> Path:
    """Give the run or checkpoint of an adapter's source, trained where it is a recipe."""
    source = recipe.source
    if source is None:
        raise ConfigError("source", "the recipe starts from nothing", "Take experiments/adapt.yaml")
    if source.suffix in RECIPES:
        log.info("step: fit the source")
        source = fit(recipe.source_recipe())
    return source


def _trained_shots(shots: Sequence[Shots], plan: Plan) -> list[Shots]:
    """Give those on which arms are trained, too.

    Raises
    ------
    ConfigError
        A number is not of the curve.
    """
    numbers = sorted({one.n for one in shots})
    usual = [n for n in numbers if plan.numbers or n in (*TRAINED_NUMBERS, numbers[-1])]
    wanted = [numbers[-1] if n is None else n for n in plan.trained_numbers or usual]
    if unknown := sorted(set(wanted) - set(numbers)):
        raise ConfigError(
            "--trained-numbers", f"{unknown} are not of the curve", f"Use some of {numbers}."
        )
    return [one for one in shots if one.draw < plan.trained_draws and one.n in wanted]


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ConfigError(folder, "another process makes this curve", "Wait for it.") from error


def _write(curve: Curve, folder: Path, facts: Mapping[str, Any]) -> None:
    figure = curve_figure(curve)
    svg = to_svg(figure)
    write_facts(curve_frame(curve.cells), curve.info, folder / "curve.csv")
    write_facts(draws_frame(curve.cells), curve.info, folder / "draws.csv")
    write_text(folder / "table.md", markdown(curve))
    write_text(folder / "curve.svg", svg)
    with atomic_path(folder / "curve.png") as temporary:
        temporary.write_bytes(to_png(figure))
    write_text(folder / "report.html", render_curve(curve, svg, facts))
    log.info("curve written: %s", folder / "report.html")
