"""Commands that train and score: fit, test, report, run."""

from __future__ import annotations

from pathlib import Path

from chasm.commands.data import (
    MASK,
    VERSION,
    selection_options,
    simulation_config,
    simulation_given,
    simulation_options,
)
from chasm.commands.options import make_parser, show_path, show_report, take_flag
from chasm.errors import ConfigError


def fit(args: list[str]) -> None:
    """``chasm fit``."""
    from chasm.training.recipes import Recipe
    from chasm.training.runs import fit as train

    args, fresh = take_flag(args, "--fresh")
    show_path(train(Recipe(args), fresh=fresh))


def test(args: list[str]) -> None:
    """``chasm test``."""
    parser = make_parser("test")
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--n-boot", type=int, default=2000, help="bootstrap resamples")
    parser.add_argument("--fresh", action="store_true", help="test again although it is current")
    found = parser.parse_args(args)
    from chasm.evaluation.testing import score_run

    score_run(found.run, n_boot=found.n_boot, fresh=found.fresh)
    show_report(found.run)


def report(args: list[str]) -> None:
    """``chasm report``."""
    parser = make_parser("report")
    parser.add_argument("run", type=Path, help="folder of a tested run")
    parser.add_argument("--n-boot", type=int, default=2000, help="bootstrap resamples")
    found = parser.parse_args(args)
    from chasm.evaluation.testing import report_run

    report_run(found.run, n_boot=found.n_boot, fresh=True)
    show_report(found.run)


def run(args: list[str]) -> None:
    """``chasm run``."""
    parser = make_parser(
        "run",
        epilog="Other options belong to the recipe: -c FILE, --data.subject 1, any of its keys.",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--nsd", type=Path, default=None, help="NSD tree to prepare the subject from"
    )
    source.add_argument("--simulate", action="store_true", help="simulate an NSD first")
    selection_options(parser)
    parser.add_argument("--n-boot", type=int, default=2000, help="bootstrap resamples of the table")
    parser.add_argument("--fresh", action="store_true", help="train and test again")
    simulation_options(parser.add_argument_group("size of the simulation"), "sim-")
    found, rest = parser.parse_known_args(args)
    if not found.simulate and (found.size or simulation_given(found)):
        raise ConfigError("chasm run", "options of the simulation without one", "Add --simulate.")
    if not (found.simulate or found.nsd) and (found.version, found.mask) != (VERSION, MASK):
        raise ConfigError("chasm run", "--version or --mask without --nsd", "Add --nsd.")
    from chasm.pipeline import run_recipe

    folder = run_recipe(
        rest,
        nsd=found.nsd,
        simulated=simulation_config(found) if found.simulate else None,
        version=found.version,
        mask=found.mask,
        n_boot=found.n_boot,
        fresh=found.fresh,
    )
    show_report(folder)
