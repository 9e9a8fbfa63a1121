"""The command that runs and compares all baselines."""

from __future__ import annotations

from chasm.commands.data import source_of, source_options
from chasm.commands.options import make_parser, show_path
from chasm.errors import ConfigError


def baselines(args: list[str]) -> None:
    """``chasm baselines``."""
    parser = make_parser(
        "baselines",
        epilog="Other options belong to every recipe: --data.subject 1, any of their keys. A "
        "recipe that fails is named and left out of the table; the exit status is then 3.",
    )
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=None,
        metavar="PATH",
        help="recipes, folders of them or patterns (default: experiments/baselines, stage1.yaml "
        "and stage2.yaml of experiments)",
    )
    source_options(parser)
    parser.add_argument("--n-boot", type=int, default=2000, help="bootstrap resamples of the table")
    parser.add_argument("--fresh", action="store_true", help="train and test again")
    parser.add_argument(
        "--jobs",
        type=int,
        default=None,
        help="recipes trained at a time (default: one on a GPU, else one per thread, at most 4)",
    )
    found, rest = parser.parse_known_args(args)
    source = source_of(found, "chasm baselines")
    if {"-c", "--config"} & set(rest):
        raise ConfigError("chasm baselines", "-c names one recipe", "Name recipes by --recipes.")
    from chasm.evaluation.comparison_tables import show
    from chasm.pipeline_baselines import (
        DEFAULT_RECIPES,
        MissingRowsError,
        find_recipes,
        run_baselines,
    )

    folder, comparison = run_baselines(
        rest,
        find_recipes(found.recipes or DEFAULT_RECIPES),
        **source,
        n_boot=found.n_boot,
        fresh=found.fresh,
        jobs=found.jobs,
    )
    show(comparison)
    show_path(folder / "report.html", "Report: ")
    if comparison.failed:
        raise MissingRowsError(
            folder / "table.md",
            f"{len(comparison.failed)} recipe(s) failed: {', '.join(comparison.failed)}",
            "The table was made of the others; its last lines say why.",
        )
