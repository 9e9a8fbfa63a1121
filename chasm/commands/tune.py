"""The command that searches the settings of a recipe."""

from __future__ import annotations

import sys
from pathlib import Path

from chasm.commands.data import source_of, source_options
from chasm.commands.options import make_parser, show_path


def tune(args: list[str]) -> None:
    """``chasm tune``."""
    parser = make_parser(
        "tune",
        epilog="Other options belong to the recipe of the sweep, and are the same in all trials: "
        "--data.subject 1, any of its keys. The same command goes on with a sweep that was "
        "stopped; on other machines, with the same --storage and --study, it joins in.",
    )
    parser.add_argument(
        "-c", "--config", type=Path, required=True, metavar="FILE",
        help="sweep file, e.g. experiments/sweeps/stage1.yaml",
    )  # fmt: skip
    parser.add_argument(
        "--trials", type=int, default=None,
        help="finished trials that the study shall have, pruned ones included (default: the "
        "sweep's)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=None,
        help="trials at a time (default: one on each GPU, else one per thread, at most 4)",
    )  # fmt: skip
    parser.add_argument(
        "--storage", default=None,
        help="where the study is kept: *.db (SQLite), *.journal (for network file systems), or a "
        "database URL (default: study.db beside the results)",
    )  # fmt: skip
    parser.add_argument("--study", default=None, help="name (default: the sweep's)")
    parser.add_argument(
        "--timeout", type=float, default=None, metavar="SECONDS", help="begin no trial after them"
    )
    source_options(parser)
    found, rest = parser.parse_known_args(args)
    source = source_of(found, "chasm tune")
    from chasm.pipeline import prepare_recipe
    from chasm.training.search_space import read_sweep
    from chasm.training.space_checks import check_space
    from chasm.training.study import Storage
    from chasm.training.tune import tune as search
    from chasm.training.tune_report import show

    if found.storage:
        # What is started is noted with every run: without a password.
        shown = Storage.of(found.storage, Path()).name
        sys.argv[:] = [a.replace(found.storage, shown) for a in sys.argv]
    sweep = read_sweep(found.config)
    recipe = check_space(sweep, rest)
    if source["nsd"] is not None or source["simulated"] is not None:
        recipe = prepare_recipe(sweep.arguments(rest), **source)
    tuned = search(
        sweep,
        recipe,
        trials=found.trials,
        workers=found.workers,
        storage=found.storage,
        study=found.study,
        timeout=found.timeout,
    )
    if tuned.findings is not None:
        show(tuned.findings)
        show_path(tuned.folder / "best.yaml", "Best recipe: ")
        show_path(tuned.folder / "report.html", "Report: ")
