"""Run suites on trained models: a tidy table of effects and a report.

``python -m ablations.run cls -c experiments/stage1.yaml --data.subject 1 --simulate`` prepares,
trains what is not trained, and runs ``ablations/suites/cls.yaml``; ``--run FOLDER ...`` takes runs
that are there (several seeds of a subject, several subjects).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ablations.effects import effects
from ablations.findings import Findings, planted_shares
from ablations.gather import GROUPS, check_run, gather, read_test_set
from ablations.null import subject_null
from ablations.report import show, write_report
from ablations.suite import Suite, read_suite
from ablations.values import TestSet
from ablations.worlds_null import NullWorlds, null_p, subject_sizes
from chasm.cli import set_up_logging
from chasm.commands.data import source_of, source_options
from chasm.commands.options import list_of, show_path
from chasm.data.simulation.truth import load_truth, truth_paths
from chasm.errors import ChasmError, ConfigError, DataError
from chasm.evaluation.bootstrap import check_resamples
from chasm.evaluation.page import Surroundings
from chasm.evaluation.reading import OpenedRun, note_reading, open_run
from chasm.evaluation.testing import volume_of
from chasm.io import digest, sha256_of_file, write_json
from chasm.pipeline import prepare_recipe
from chasm.training.launch import leave_to_first
from chasm.training.linear_module import LinearModule
from chasm.training.run_files import read_provenance
from chasm.training.runs import fit

log = logging.getLogger("chasm.ablations")

SUITES = Path(__file__).parent / "suites"
NULL_WORLDS = 60
"""Simulated null worlds that a claim of asymmetry is compared with."""


@dataclass(frozen=True)
class Options:
    """What holds for all suites and runs.

    Attributes
    ----------
    n_boot, null_worlds
        Resamples of the images, and simulated null worlds.
    groups
        Table of the user's unit groups.
    early, higher
        Regions of the asymmetry; None: as the suite says.
    linear
        Whether banded ridge on the same tokens is a second class of model.
    fresh
        Whether to do again what is current.
    """

    n_boot: int = 2000
    null_worlds: int = NULL_WORLDS
    groups: Path | None = None
    early: tuple[str, ...] | None = None
    higher: tuple[str, ...] | None = None
    linear: bool = True
    fresh: bool = False


def run_suite(suite: Suite, runs: Sequence[Path], out: Path, options: Options) -> Path:
    """Run one suite on runs of one or several subjects.

    Parameters
    ----------
    suite
        What is done.
    runs
        Folders of finished runs.
    out
        Folder of the report.
    options
        See the class.

    Returns
    -------
    Path
        ``report.html`` in `out`.

    Raises
    ------
    DataError
        A run is not finished, may have seen the test images, or runs of a subject differ in them.
    ConfigError
        A model lacks a site that the suite names, or an option cannot be used.
    """
    check_resamples(options.n_boot)
    suite = _with_sets(suite, options)
    signature = _signature(suite, runs, options)
    page = out / "report.html"
    if not options.fresh and _is_current(out, signature):
        log.info("the report is current: %s", page)
        sys.stdout.write((out / "table.md").read_text(encoding="utf-8"))
        return page
    opened = {run: open_run(run) for run in runs}
    for run, one in opened.items():
        check_run(run, one)
        one.data.setup()
        note_reading(run, one.checkpoint, f"ablation suite {suite.name}")
    subjects: dict[str, list[Path]] = {}
    for run, one in opened.items():
        subjects.setdefault(one.data.store.subject, []).append(run)
    found = [
        _findings(suite, {run: opened[run] for run in members}, options)
        for members in subjects.values()
    ]
    write_report(out, found)
    show(found)
    # Last, so that it stands for a whole report.
    write_json(out / "suite.json", signature)
    return page


def _with_sets(suite: Suite, options: Options) -> Suite:
    """Take the user's sets of regions, or none where the user's groups are in no set."""
    early, higher = options.early, options.higher
    if options.groups is not None:
        early, higher = (
            tuple(name if ":" in name else f"{GROUPS}:{name}" for name in names or ())
            for names in (early, higher)
        )
    if (early is None) != (higher is None):
        raise ConfigError("--early, --higher", "only one of them is given", "Give both.")
    return replace(
        suite,
        early=suite.early if early is None else early,
        higher=suite.higher if higher is None else higher,
    )


def _findings(suite: Suite, runs: Mapping[Path, OpenedRun], options: Options) -> Findings:
    """Everything about one subject."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (first, opened), *_ = runs.items()
    test = read_test_set(opened.model, opened.data, suite, options.groups, options.n_boot)
    values = []
    for run, one in runs.items():
        _check_same_images(first, opened, run, one)
        values.append(gather(one.model, one.data, suite, one.recipe.seed, device).values)
    if options.linear:
        linear = LinearModule(opened.model).solve(opened.data).eval()
        ridge = gather(linear, opened.data, suite, opened.recipe.seed, device)
        values.append(ridge.values)
        for name, why in ridge.left_out.items():
            log.info("%s: %s", name, why)
    found = effects(values, test)
    null = _null(test, opened, options, first.parent / "null_worlds")
    result = Findings(suite.name, found, values, recipe=suite.text)
    p = {name: null_p(null, result.rows(name)) for name in result.encoders} if null else {}
    tokens = opened.data.tokens
    return replace(
        result,
        null_p=p,
        planted=_planted(opened, options),
        weights=tokens.weights_label,
        surroundings=Surroundings(
            provenance=_provenance(runs, suite, options),
            volume=volume_of(opened.model, opened.data),
        ),
    )


def _check_same_images(first: Path, one: OpenedRun, run: Path, other: OpenedRun) -> None:
    same = np.array_equal(one.data.data_split.test, other.data.data_split.test)
    if not same or one.model.unit != other.model.unit or one.model.n_units != other.model.n_units:
        raise DataError(
            run,
            f"other test images or units than {first}",
            "Give runs of one recipe that differ in seed.",
        )


def _null(test: TestSet, opened: OpenedRun, options: Options, folder: Path) -> NullWorlds | None:
    data = opened.data
    counts = data.store.trials["image_id"].value_counts()
    repeats = int(np.median(data.dataset("test").repeats))
    split = data.data_split
    sizes = subject_sizes(len(split.train), len(split.test), int((counts > 1).sum()), repeats)
    return subject_null(test, sizes, options.null_worlds, folder)


def _planted(opened: OpenedRun, options: Options) -> dict[str, float] | None:
    """Local shares that were planted in a simulated subject whose truth is at hand."""
    data = opened.data
    subject = data.store.subject.removeprefix("subj")
    root = data.dataset_dir / "nsd"
    if not data.store.simulated or options.groups is not None or not subject.isdigit():
        return None
    if not all(path.is_file() for path in truth_paths(root, int(subject))):
        return None
    return planted_shares(load_truth(root, int(subject)).rois)


def _provenance(runs: Mapping[Path, OpenedRun], suite: Suite, options: Options) -> dict[str, Any]:
    return {
        "runs": [str(run) for run in runs],
        "checkpoints": {str(run): one.checkpoint for run, one in runs.items()},
        "training": {str(run): read_provenance(run) for run in runs},
        "suite": suite.name,
        "options": {name: str(value) for name, value in vars(options).items()},
        "chasm": metadata.version("chasm-fmri"),
    }


def _signature(suite: Suite, runs: Sequence[Path], options: Options) -> dict[str, str]:
    """Everything that a report depends on, in short."""
    checkpoints = [sha256_of_file(run / "checkpoints" / "best.ckpt") for run in runs]
    groups = None if options.groups is None else sha256_of_file(options.groups)
    code = [sha256_of_file(path) for path in sorted(Path(__file__).parent.rglob("*.py"))]
    facts = [suite.text, suite.early, suite.higher, checkpoints, groups, code]
    return {"digest": digest([*facts, str(replace(options, fresh=False))])}


def _is_current(out: Path, signature: dict[str, str]) -> bool:
    try:
        found = json.loads((out / "suite.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    names = ("report.html", "table.md", "effects.csv")
    return found == signature and all((out / name).is_file() for name in names)


def run_of(place: Path) -> Path:
    """Find the run of a folder, or of a checkpoint in it.

    Raises
    ------
    DataError
        There is none.
    """
    run = place.parent.parent if place.suffix == ".ckpt" else place
    for path in (run / "config.yaml", run / "checkpoints" / "best.ckpt"):
        if not path.is_file():
            raise DataError(
                place, f"is no finished run ({path.name} is missing)", "Name the folder of a run."
            )
    if place.suffix == ".ckpt" and place.name != "best.ckpt":
        raise DataError(place, "is not the selected checkpoint", f"Use {run}.")
    return run


def find_suite(name: str) -> Path:
    """Find a suite by its path, or by its name among those that come with the project."""
    return Path(name) if Path(name).suffix in (".yaml", ".yml") else SUITES / f"{name}.yaml"


def main(args: Sequence[str] | None = None) -> int:
    """``python -m ablations.run``."""
    set_up_logging()
    parser = argparse.ArgumentParser(
        prog="python -m ablations.run",
        description=__doc__.splitlines()[0] if __doc__ else None,
        epilog="Other options belong to the recipe: -c FILE, --data.subject 1, any of its keys.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("suites", nargs="+", help="names of ablations/suites, or files")
    add("--run", type=Path, nargs="+", default=None, help="runs or their best.ckpt, instead of -c")
    add("--out", type=Path, default=None, help="folder of the reports (default: in the run)")
    add("--n-boot", type=int, default=2000, help="bootstrap resamples of the images")
    add(
        "--null-worlds",
        type=int,
        default=NULL_WORLDS,
        help="simulated null worlds; 0: claims are uncalibrated",
    )
    add("--groups", type=Path, default=None, help="CSV of unit, group: in place of the atlases")
    add("--early", type=list_of(str), default=None, help="regions atlas:name of the early set")
    add("--higher", type=list_of(str), default=None, help="regions atlas:name of the higher set")
    add("--no-linear", action="store_true", help="without banded ridge as second class of model")
    add("--fresh", action="store_true", help="run again although the report is current")
    source_options(parser)
    found, rest = parser.parse_known_args(args)
    try:
        _run(found, rest)
    except ChasmError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return error.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        return 130
    return 0


def _run(found: argparse.Namespace, rest: list[str]) -> None:
    source = source_of(found, "ablations.run")
    suites = [read_suite(find_suite(name)) for name in found.suites]
    if found.null_worlds < 0:
        raise ConfigError("--null-worlds", f"found {found.null_worlds}", "Use 0 or more.")
    options = Options(
        found.n_boot, found.null_worlds, found.groups, found.early, found.higher,
        not found.no_linear, found.fresh,
    )  # fmt: skip
    check_resamples(options.n_boot)
    if found.run is None:
        recipe = prepare_recipe(rest, **source)
        runs = [fit(recipe)]
        leave_to_first(recipe)
    else:
        if rest:
            raise ConfigError(f"ablations.run {rest[0]}", "unknown beside --run", "Leave it out.")
        runs = [run_of(place) for place in found.run]
    home = runs[0] if len(runs) == 1 else runs[0].parent
    for suite in suites:
        out = (found.out or home / "ablations") / suite.name
        show_path(run_suite(suite, runs, out, options), "Report: ")


if __name__ == "__main__":
    sys.exit(main())
