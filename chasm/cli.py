"""The `chasm` command. Start-up is light: every command imports what it needs."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chasm.errors import ChasmError, ConfigError

if TYPE_CHECKING:
    from chasm.data.simulation import SimulationConfig

COMMANDS = {
    "simulate": "write a simulated NSD, in NSD's own layout",
    "prepare": "NSD tree, or arrays -> subject store",
    "extract": "frozen backbone over a subject's images -> token cache",
    "fit": "train a recipe; validation selects",
    "test": "read the test images once: predictions, table, report",
    "report": "make table and report again from a run's predictions",
    "run": "all of the above for one recipe, skipping what is current",
}
HELP = """usage: chasm COMMAND [options]     (chasm COMMAND --help tells a command's options)

{commands}

examples
  chasm run -c experiments/stage1.yaml --data.subject 1 --simulate
  chasm run -c experiments/nsd/stage1.yaml --data.subject 1 --nsd /path/to/nsd
  chasm fit -c experiments/stage1.yaml --data.subject 1 --model.init_args.learning_rate 1e-4
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input ends in one line on standard error and exit status 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = "\n".join(f"  {name:<{width}}  {what}" for name, what in COMMANDS.items())
        sys.stdout.write(HELP.format(commands=lines))
        return 0 if args else 2
    if args[0] == "--version":
        from importlib.metadata import version

        sys.stdout.write(version("chasm-fmri") + "\n")
        return 0
    handler = HANDLERS.get(args[0])
    if handler is None:
        return _fail(f"chasm: no command {args[0]!r}. Commands: {', '.join(COMMANDS)}.")
    _set_up_logging()
    try:
        handler(args[1:])
    except ChasmError as error:
        return _fail(str(error), error.exit_status)
    except OSError as error:
        return _fail(f"{error.filename or 'file system'}: {error.strerror or error}.")
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _fail(message: str, status: int = 2) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return status


def _set_up_logging() -> None:
    import warnings

    from rich.logging import RichHandler

    from chasm.progress import console

    handler = RichHandler(
        console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S"
    )
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("chasm")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # Set on the modules that speak: importing lightning resets the level of its root loggers.
    for package in ("pytorch", "fabric"):
        for module in ("rank_zero", "seed"):
            name = f"lightning.{package}.utilities.{module}"
            logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning's advice on worker counts and logging intervals does not fit memory maps.
    warnings.filterwarnings("ignore", module=r"lightning\..*")


def _show_path(path: Path, what: str = "") -> None:
    sys.stdout.write(f"{what}{path}\n")


def _show_report(run: Path) -> None:
    _show_path(run / "report" / "report.html", "Report: ")


def _parser(name: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"chasm {name}",
        description=COMMANDS[name.split()[0]],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def _simulation_options(parser: Any, prefix: str = "") -> None:
    """Add the numbers of a `SimulationConfig`; what is not given comes from the preset."""
    from chasm.data.simulation import SimulationConfig

    parser.add_argument("--size", choices=("demo", "toy", "full"), default=None, help="preset")
    for name, value in vars(SimulationConfig()).items():
        flag = f"--{prefix}{name.replace('_', '-')}"
        shown: dict[str, Any] = {"dest": f"simulation_{name}", "default": None}
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **shown)
        elif isinstance(value, (int, float, str)):
            parser.add_argument(flag, type=type(value), help=f"demo: {value}", **shown)
        elif isinstance(value, tuple) and not isinstance(value[0], tuple):
            text = ",".join(map(str, value))
            parser.add_argument(flag, type=_list_of(type(value[0])), help=f"demo: {text}", **shown)


def _list_of(kind: type) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no list like 1,2,3") from error

    return parse


def _simulation_config(found: argparse.Namespace) -> SimulationConfig:
    from dataclasses import replace

    from chasm.data.simulation import SimulationConfig

    config = SimulationConfig()
    if found.size in ("toy", "full"):
        config = SimulationConfig.toy() if found.size == "toy" else SimulationConfig.full()
    return replace(config, **_given(found))


def _given(found: argparse.Namespace) -> dict[str, Any]:
    prefix = "simulation_"
    options = {k.removeprefix(prefix): v for k, v in vars(found).items() if k.startswith(prefix)}
    return {name: value for name, value in options.items() if value is not None}


def _simulate(args: list[str]) -> None:
    parser = _parser("simulate")
    parser.add_argument(
        "--out", type=Path, default=Path("data/simulated/nsd"), help="folder of the tree"
    )
    parser.add_argument(
        "--subjects", type=_list_of(int), default=(1,), help="whose betas to write, e.g. 1,2"
    )
    _simulation_options(parser)
    found = parser.parse_args(args)
    from chasm.data.simulation import simulate

    _show_path(simulate(_simulation_config(found), found.out, found.subjects))


def _prepare(args: list[str]) -> None:
    kinds: dict[str, Callable[[list[str]], None]] = {"nsd": _prepare_nsd, "arrays": _prepare_arrays}
    if not args or args[0] not in kinds:
        sys.stdout.write("usage: chasm prepare {nsd,arrays} [options]     (--help after either)\n")
        raise SystemExit(0 if args and args[0] in ("-h", "--help") else 2)
    kinds[args[0]](args[1:])


VERSION, MASK = "betas_fithrf_GLMdenoise_RR", "nsdgeneral"


def _selection_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", default=VERSION, help="beta version")
    parser.add_argument(
        "--mask", default=MASK, help="ROI atlas whose voxels are used (nsdgeneral: label 1)"
    )


def _prepare_nsd(args: list[str]) -> None:
    parser = _parser("prepare nsd")
    parser.add_argument("--nsd", type=Path, required=True, help="root of the NSD tree")
    parser.add_argument("--subject", type=int, required=True, help="1 to 8")
    parser.add_argument(
        "--out", type=Path, default=None, help="store (default: data/<tree>/subjXX.h5)"
    )
    _selection_options(parser)
    parser.add_argument(
        "--sessions", type=_list_of(int), default=None, help="only these, e.g. 1,2,3"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a store of another source"
    )
    found = parser.parse_args(args)
    from chasm.data.prepare import prepare_nsd

    out = found.out or Path("data") / found.nsd.resolve().name / f"subj{found.subject:02d}.h5"
    _show_path(
        prepare_nsd(
            found.nsd,
            found.subject,
            out,
            version=found.version,
            mask=found.mask,
            sessions=found.sessions,
            overwrite=found.overwrite,
        )
    )


def _prepare_arrays(args: list[str]) -> None:
    parser = _parser("prepare arrays")
    parser.add_argument("--images", type=Path, required=True, help="folder, .zip or .npy, in order")
    parser.add_argument(
        "--responses",
        type=Path,
        required=True,
        help=".npy (units, images) or (units, images, repeats); NaN = missing repeat",
    )
    parser.add_argument("--name", required=True, help="name of the subject or session")
    parser.add_argument("--dataset", required=True, help="name of the dataset")
    parser.add_argument("--rois", type=Path, default=None, help="csv with unit, atlas, label")
    parser.add_argument(
        "--coordinates", type=Path, default=None, help="csv or npy (units, 3) in mm"
    )
    parser.add_argument("--split-seed", type=int, default=0, help="seed of the split by image")
    parser.add_argument(
        "--out", type=Path, default=None, help="store (default: data/<dataset>/<name>.h5)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a store of another source"
    )
    found = parser.parse_args(args)
    from chasm.data.arrays import prepare_arrays

    out = found.out or Path("data") / found.dataset / f"{found.name}.h5"
    _show_path(
        prepare_arrays(
            found.images,
            found.responses,
            out,
            name=found.name,
            dataset=found.dataset,
            rois=found.rois,
            coordinates=found.coordinates,
            split_seed=found.split_seed,
            overwrite=found.overwrite,
        )
    )


def _extract(args: list[str]) -> None:
    from chasm.pipeline import extract_tokens
    from chasm.training.recipes import Recipe

    args, fresh = _take_flag(args, "--fresh")
    _show_path(extract_tokens(Recipe(args).make_data(), fresh=fresh).folder)


def _fit(args: list[str]) -> None:
    from chasm.training.recipes import Recipe
    from chasm.training.runs import fit

    args, fresh = _take_flag(args, "--fresh")
    _show_path(fit(Recipe(args), fresh=fresh))


def _take_flag(args: list[str], flag: str) -> tuple[list[str], bool]:
    return [a for a in args if a != flag], flag in args


def _test(args: list[str]) -> None:
    parser = _parser("test")
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--n-boot", type=int, default=2000, help="bootstrap resamples")
    parser.add_argument("--fresh", action="store_true", help="test again although it is current")
    found = parser.parse_args(args)
    from chasm.evaluation.testing import score_run

    score_run(found.run, n_boot=found.n_boot, fresh=found.fresh)
    _show_report(found.run)


def _report(args: list[str]) -> None:
    parser = _parser("report")
    parser.add_argument("run", type=Path, help="folder of a tested run")
    parser.add_argument("--n-boot", type=int, default=2000, help="bootstrap resamples")
    found = parser.parse_args(args)
    from chasm.evaluation.testing import report_run

    report_run(found.run, n_boot=found.n_boot, fresh=True)
    _show_report(found.run)


def _run(args: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="chasm run", description=COMMANDS["run"], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Other options belong to the recipe: -c FILE, --data.subject 1, any of its keys.",
    )  # fmt: skip
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--nsd", type=Path, default=None, help="NSD tree to prepare the subject from"
    )
    source.add_argument("--simulate", action="store_true", help="simulate an NSD first")
    _selection_options(parser)
    parser.add_argument("--n-boot", type=int, default=2000, help="bootstrap resamples of the table")
    parser.add_argument("--fresh", action="store_true", help="train and test again")
    _simulation_options(parser.add_argument_group("size of the simulation"), "sim-")
    found, rest = parser.parse_known_args(args)
    if not found.simulate and (found.size or _given(found)):
        raise ConfigError("chasm run", "options of the simulation without one", "Add --simulate.")
    if not (found.simulate or found.nsd) and (found.version, found.mask) != (VERSION, MASK):
        raise ConfigError("chasm run", "--version or --mask without --nsd", "Add --nsd.")
    from chasm.pipeline import run_recipe

    run = run_recipe(
        rest,
        nsd=found.nsd,
        simulated=_simulation_config(found) if found.simulate else None,
        version=found.version,
        mask=found.mask,
        n_boot=found.n_boot,
        fresh=found.fresh,
    )
    _show_report(run)


HANDLERS: dict[str, Callable[[list[str]], None]] = {
    "simulate": _simulate,
    "prepare": _prepare,
    "extract": _extract,
    "fit": _fit,
    "test": _test,
    "report": _report,
    "run": _run,
}

if __name__ == "__main__":
    sys.exit(main())
