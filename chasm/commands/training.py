"""Commands that train and score: fit, test, report, run."""

from __future__ import annotations

from pathlib import Path

from chasm.commands.data import source_of, source_options
from chasm.commands.options import make_parser, show_path, show_report, take_flag


def fit(args: list[str]) -> None:
    """``chasm fit``."""
    from chasm.training.launch import leave_to_first
    from chasm.training.recipes import Recipe
    from chasm.training.runs import fit as train

    args, fresh = take_flag(args, "--fresh")
    recipe = Recipe(args)
    run = train(recipe, fresh=fresh)
    leave_to_first(recipe)
    show_path(run)


def test(args: list[str]) -> None:
    """``chasm test``."""
    parser = make_parser("test")
    parser.add_argument(
        "run", type=Path, help="folder of a finished run, of one subject or of several"
    )
    parser.add_argument("--n-boot", type=int, default=2000, help="bootstrap resamples")
    parser.add_argument("--fresh", action="store_true", help="test again although it is current")
    found = parser.parse_args(args)
    from chasm.evaluation.testing import score_run
    from chasm.training.joint import subject_runs

    for one in subject_runs(found.run) or [found.run]:
        score_run(one, n_boot=found.n_boot, fresh=found.fresh)
        show_report(one)


def report(args: list[str]) -> None:
    """``chasm report``."""
    parser = make_parser("report")
    parser.add_argument("run", type=Path, help="folder of a tested run")
    parser.add_argument("--n-boot", type=int, default=2000, help="bootstrap resamples")
    found = parser.parse_args(args)
    from chasm.evaluation.testing import report_run
    from chasm.training.joint import subject_runs

    for one in subject_runs(found.run) or [found.run]:
        report_run(one, n_boot=found.n_boot, fresh=True)
        show_report(one)


def run(args: list[str]) -> None:
    """``chasm run``."""
    parser = make_parser(
        "run",
        epilog="Other options belong to the recipe: -c FILE, --data.subject 1, any of its keys.",
    )
    source_options(parser)
    parser.add_argument("--n-boot", type=int, default=2000, help="bootstrap resamples of the table")
    parser.add_argument("--fresh", action="store_true", help="train and test again")
    found, rest = parser.parse_known_args(args)
    source = source_of(found, "chasm run")
    from chasm.pipeline import run_recipe

    folder = run_recipe(
        rest,
        **source,
        n_boot=found.n_boot,
        fresh=found.fresh,
    )
    show_report(folder)
