"""Commands that make data: simulate, prepare, extract."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chasm.commands.options import list_of, make_parser, show_path, take_flag
from chasm.errors import ConfigError

if TYPE_CHECKING:
    from chasm.data.simulation import SimulationConfig

VERSION, MASK = "betas_fithrf_GLMdenoise_RR", "nsdgeneral"


def simulation_options(parser: Any, prefix: str = "") -> None:
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
            parser.add_argument(flag, type=list_of(type(value[0])), help=f"demo: {text}", **shown)


def simulation_config(found: argparse.Namespace) -> SimulationConfig:
    """Make the configuration that the options describe."""
    from dataclasses import replace

    from chasm.data.simulation import SimulationConfig

    config = SimulationConfig()
    if found.size in ("toy", "full"):
        config = SimulationConfig.toy() if found.size == "toy" else SimulationConfig.full()
    return replace(config, **simulation_given(found))


def simulation_given(found: argparse.Namespace) -> dict[str, Any]:
    """Return the numbers of the simulation that were given."""
    prefix = "simulation_"
    options = {k.removeprefix(prefix): v for k, v in vars(found).items() if k.startswith(prefix)}
    return {name: value for name, value in options.items() if value is not None}


def source_options(parser: argparse.ArgumentParser) -> None:
    """Add where a subject comes from: an NSD tree, or a simulation and its numbers."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--nsd", type=Path, default=None, help="NSD tree to prepare the subject from"
    )
    source.add_argument("--simulate", action="store_true", help="simulate an NSD first")
    selection_options(parser)
    simulation_options(parser.add_argument_group("size of the simulation"), "sim-")


def source_of(found: argparse.Namespace, command: str) -> dict[str, Any]:
    """Give the arguments nsd, simulated, version and mask of `chasm.pipeline.prepare_recipe`.

    Raises
    ------
    ConfigError
        Options were given that have no effect.
    """
    if not found.simulate and (found.size or simulation_given(found)):
        raise ConfigError(command, "options of the simulation without one", "Add --simulate.")
    if not (found.simulate or found.nsd) and (found.version, found.mask) != (VERSION, MASK):
        raise ConfigError(command, "--version or --mask without --nsd", "Add --nsd.")
    return {
        "nsd": found.nsd,
        "simulated": simulation_config(found) if found.simulate else None,
        "version": found.version,
        "mask": found.mask,
    }


def simulate(args: list[str]) -> None:
    """``chasm simulate``."""
    parser = make_parser("simulate")
    parser.add_argument(
        "--out", type=Path, default=Path("data/simulated/nsd"), help="folder of the tree"
    )
    parser.add_argument(
        "--subjects", type=list_of(int), default=(1,), help="whose betas to write, e.g. 1,2"
    )
    simulation_options(parser)
    found = parser.parse_args(args)
    from chasm.data.simulation import simulate as write

    show_path(write(simulation_config(found), found.out, found.subjects))


def prepare(args: list[str]) -> None:
    """``chasm prepare``."""
    kinds: dict[str, Callable[[list[str]], None]] = {"nsd": _prepare_nsd, "arrays": _prepare_arrays}
    if not args or args[0] not in kinds:
        sys.stdout.write("usage: chasm prepare {nsd,arrays} [options]     (--help after either)\n")
        raise SystemExit(0 if args and args[0] in ("-h", "--help") else 2)
    kinds[args[0]](args[1:])


def selection_options(parser: argparse.ArgumentParser) -> None:
    """Add what is taken from an NSD tree."""
    parser.add_argument("--version", default=VERSION, help="beta version")
    parser.add_argument(
        "--mask", default=MASK, help="ROI atlas whose voxels are used (nsdgeneral: label 1)"
    )


def _prepare_nsd(args: list[str]) -> None:
    parser = make_parser("prepare nsd")
    parser.add_argument("--nsd", type=Path, required=True, help="root of the NSD tree")
    parser.add_argument("--subject", type=int, required=True, help="1 to 8")
    parser.add_argument(
        "--out", type=Path, default=None, help="store (default: data/<tree>/subjXX.h5)"
    )
    selection_options(parser)
    parser.add_argument(
        "--sessions", type=list_of(int), default=None, help="only these, e.g. 1,2,3"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a store of another source"
    )
    found = parser.parse_args(args)
    from chasm.data.prepare import prepare_nsd

    out = found.out or Path("data") / found.nsd.resolve().name / f"subj{found.subject:02d}.h5"
    show_path(
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
    parser = make_parser("prepare arrays")
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
    show_path(
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


def extract(args: list[str]) -> None:
    """``chasm extract``."""
    from chasm.pipeline import extract_tokens
    from chasm.training.recipes import Recipe

    args, fresh = take_flag(args, "--fresh")
    show_path(extract_tokens(Recipe(args).make_data(), fresh=fresh).folder)
