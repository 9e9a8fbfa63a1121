"""Commands that bring trained subjects to a new one: adapt, fewshot, transfer-table."""

from __future__ import annotations

import argparse
from typing import Any

from chasm.commands.data import source_of, source_options
from chasm.commands.options import list_of, make_parser, show_path, show_report
from chasm.errors import ConfigError

ROWS = "1>7;1,2>5;1,2>7;1,2,5>7;7"
"""Rows of the paper's table."""

RECIPE_OPTIONS = (
    "Other options belong to the adapter's recipe: -c experiments/adapt.yaml, --subjects [1,2] "
    "(the source's), --source a run's folder, --data.subject 7, any of its keys."
)


def adapt(args: list[str]) -> None:
    """``chasm adapt``."""
    parser = make_parser("adapt", epilog=RECIPE_OPTIONS)
    parser.add_argument(
        "--arm", default=None, help="ridge_head, head, lora or full, not the recipe's"
    )
    parser.add_argument(
        "--n", type=int, default=None, help="images of the new subject (default: all)"
    )
    parser.add_argument("--draw", type=int, default=0, help="which draw of them")
    _steps_option(parser)
    found, rest, origin = _parse(parser, args, n_boot=2000)
    from chasm.pipeline_transfer import adapt as run
    from chasm.training.run_files import read_provenance

    folder = run(
        rest, arm=found.arm, n=found.n, draw=found.draw, steps=found.steps,
        n_boot=found.n_boot, fresh=found.fresh, **origin,
    )  # fmt: skip
    trained = read_provenance(folder)["trained"]
    counts = f"{trained['n_trained']:,} of {trained['n_parameters']:,}"
    show_path(folder, f"Parameters fitted to the new subject: {counts}\nRun: ")
    show_report(folder)


def fewshot(args: list[str]) -> None:
    """``chasm fewshot``."""
    parser = make_parser(
        "fewshot",
        epilog=f"{RECIPE_OPTIONS} What is finished is kept: the same command goes on with the "
        "rest. An arm that fails is named in the table; the exit status is then 3.",
    )
    parser.add_argument("--numbers", type=_numbers, default=None, help="of images, e.g. 20,100,all")
    parser.add_argument(
        "--arms", type=list_of(str), default=None, help="some of them, e.g. ridge,head"
    )
    parser.add_argument("--draws", type=int, default=3, help="of the images, for solved arms")
    parser.add_argument("--trained-draws", type=int, default=1, help="for trained arms")
    parser.add_argument(
        "--trained-numbers",
        type=_numbers,
        default=None,
        help="where arms are trained (default: 20, 100, 300, 1500 and all, or --numbers)",
    )
    parser.add_argument(
        "--first-session", action="store_true", help="images in the order they were presented"
    )
    _steps_option(parser)
    _jobs_option(parser)
    found, rest, origin = _parse(parser, args, n_boot=1000)
    from chasm.evaluation.transfer_tables import show
    from chasm.pipeline_fewshot import Plan, few_shot_curve

    given = {"arms": found.arms} if found.arms else {}
    plan = Plan(
        found.numbers,
        draws=found.draws,
        trained_draws=found.trained_draws,
        trained_numbers=found.trained_numbers,
        order="presentation" if found.first_session else "random",
        steps=found.steps,
        **given,
    )
    folder, curve = few_shot_curve(
        rest, plan, n_boot=found.n_boot, jobs=found.jobs, fresh=found.fresh, **origin
    )
    show(curve)
    show_path(folder / "curve.png", "Figure: ")
    show_path(folder / "report.html", "Report: ")
    _complain(folder, curve.failed)


def transfer_table(args: list[str]) -> None:
    """``chasm transfer-table``."""
    parser = make_parser("transfer-table", epilog=RECIPE_OPTIONS.replace("--subjects [1,2] ", ""))
    parser.add_argument(
        "--rows", type=parse_rows, default=parse_rows(ROWS),
        help=f"source subjects > new subject; a subject alone: trained on itself (default: {ROWS})",
    )  # fmt: skip
    parser.add_argument("--arms", type=list_of(str), default=None, help="e.g. ridge_head,head,lora")
    _jobs_option(parser)
    found, rest, origin = _parse(parser, args, n_boot=2000)
    from chasm.evaluation.transfer_rows import show
    from chasm.pipeline_transfer import transfer_table as run

    given = {"arms": ("mean_pattern", *found.arms)} if found.arms else {}
    folder, table = run(
        rest, found.rows, n_boot=found.n_boot, jobs=found.jobs, fresh=found.fresh, **given, **origin
    )
    show(table)
    show_path(folder / "report.html", "Report: ")
    _complain(folder, table.failed)


def parse_rows(text: str) -> tuple[tuple[tuple[str, ...], str], ...]:
    """Parse ``1,2>7;7``: source subjects and new subject; alone, a subject is its own source."""
    rows = []
    for part in text.replace(" ", "").split(";"):
        sources, arrow, new = part.partition(">")
        names = tuple(sources.split(","))
        if not all((*names, new or not arrow)) or (not arrow and len(names) > 1):
            raise argparse.ArgumentTypeError(f"{part!r} is no row like 1,2>7")
        rows.append((names, new or names[0]))
    return tuple(rows)


def _numbers(text: str) -> tuple[int | None, ...]:
    """Parse ``20,100,all``; all is None."""
    try:
        return tuple(None if part == "all" else int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list like 20,100,all") from error


def _steps_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=int, default=80,
        help="least steps of training on few images, where the recipe's epochs give fewer",
    )  # fmt: skip


def _jobs_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs", type=int, default=None,
        help="arms trained at a time (default: one on a GPU, else one per thread, at most 4)",
    )  # fmt: skip


def _parse(
    parser: argparse.ArgumentParser, args: list[str], n_boot: int
) -> tuple[argparse.Namespace, list[str], dict[str, Any]]:
    """Add what all have in common; give options, recipe arguments and where the data come from."""
    source_options(parser)
    parser.add_argument("--n-boot", type=int, default=n_boot, help="bootstrap resamples")
    parser.add_argument("--fresh", action="store_true", help="train and test again")
    found, rest = parser.parse_known_args(args)
    if not {"-c", "--config"} & set(rest):
        raise ConfigError(parser.prog, "no recipe is named", "Add -c experiments/adapt.yaml.")
    return found, rest, source_of(found, parser.prog)


def _complain(folder: Any, failed: Any) -> None:
    """End with status 3 where something is missing."""
    if failed:
        from chasm.pipeline_baselines import MissingRowsError

        raise MissingRowsError(
            folder / "table.md",
            f"{len(failed)} failed: {', '.join(failed)}",
            "The table was made of the others; it says why.",
        )
