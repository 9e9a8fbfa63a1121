"""Recipes: YAML files whose schema is the signatures (LightningCLI / jsonargparse)."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Optional

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from chasm.data.datamodule import NSDDataModule
from chasm.errors import ChasmError, ConfigError
from chasm.training.base import EncodingModule

STAGE1_DATA = (
    "subject", "dataset_dir", "backbone", "split", "split_seed", "statistics", "parcels",
    "num_workers",
)  # fmt: skip
"""Data settings that a Stage 1 takes from the Stage 2 that it is trained for."""


@dataclass
class Selection:
    """How validation selects the checkpoint.

    Parameters
    ----------
    monitor
        Logged validation value.
    mode
        Whether it should be small or large.
    patience
        Epochs without improvement after which training ends; null trains to the end.
    """

    monitor: str = "val/mse"
    mode: Literal["min", "max"] = "min"
    patience: int | None = None


class Recipe(LightningCLI):
    """A parsed recipe. Nothing is instantiated until it is asked for.

    Parameters
    ----------
    args
        Command-line arguments, e.g. ``["-c", "experiments/stage1.yaml", "--data.subject", "1"]``.
        Later ones win.

    Raises
    ------
    ConfigError
        An unknown key, a value of a wrong type, or a missing file, in one line.
    """

    def __init__(self, args: Sequence[str]) -> None:
        try:
            with warnings.catch_warnings():
                # Lightning warns that sys.argv is not read; it is not meant to be.
                warnings.filterwarnings("ignore", "LightningCLI's args parameter")
                self._parse(args)
        except ArgumentError as error:
            raise _one_line(error, args) from error
        if self.config["stage1"] is not None:
            self.config["stage1"] = _absolute(self.config["stage1"], args)

    def _parse(self, args: Sequence[str]) -> None:
        super().__init__(
            EncodingModule,
            NSDDataModule,
            subclass_mode_model=True,
            run=False,
            args=list(args),
            seed_everything_default=0,
            save_config_callback=None,
            auto_configure_optimizers=False,
            parser_kwargs={
                "exit_on_error": False,
                "allow_abbrev": False,
                "default_env": False,
                "description": "Parts of a recipe; see experiments/README.md.",
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the selection; let one seed fix everything."""
        parser.add_argument("--name", type=str, default="run", help="Name of the recipe.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--stage1",
            type=Optional[str],  # noqa: UP045 (read by jsonargparse)
            default=None,
            help="What a Stage 2 builds on: a recipe (trained when needed), a run or a checkpoint; "
            "relative to the working folder or to the recipe that names it.",
        )
        parser.add_class_arguments(Selection, "selection")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)

    def instantiate_classes(self) -> None:
        """Nothing yet: `make_data`, `make_model` and `make_trainer` do it."""

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed_everything"])

    @property
    def name(self) -> str:
        """Name of the recipe."""
        return str(self.config["name"])

    @property
    def runs(self) -> str:
        """Folder of all runs."""
        return str(self.config["runs"])

    @property
    def stage1(self) -> Path | None:
        """Recipe, run or checkpoint of the Stage 1 that a Stage 2 builds on.

        Raises
        ------
        ConfigError
            It is not there. (A trained run needs it no more.)
        """
        if self.config["stage1"] is None:
            return None
        path = Path(self.config["stage1"])
        if not path.exists():
            what = "Name a recipe, a run or a checkpoint."
            raise ConfigError("stage1", f"{str(path)!r} is not there", what)
        return path

    def stage1_recipe(self) -> Recipe:
        """Give the recipe of Stage 1, on the same subject, tokens, split, parcels and seed.

        Its samples, batches and epochs are its own.
        """
        settings = self.settings()
        data = settings["data"]
        args = ["-c", str(self.stage1), "--runs", self.runs, "--seed_everything", str(self.seed)]
        for key in STAGE1_DATA:
            value = data[key]
            args += [f"--data.{key}", value if isinstance(value, str) else json.dumps(value)]
        args += ["--trainer.accelerator", settings["trainer"]["accelerator"]]
        return Recipe(args)

    @property
    def selection(self) -> Selection:
        """How validation selects."""
        return Selection(**vars(self.config["selection"]))

    def make_data(self) -> NSDDataModule:
        """Make the data module."""
        return self._instantiate("data")

    def make_model(self) -> EncodingModule:
        """Make the model (unbuilt: its sizes come from the data)."""
        if self.config["model"] is None:
            raise ConfigError("model", "the recipe names no model", "Add `model: class_path: ...`.")
        return self._instantiate("model")

    def make_trainer(self, **overrides: Any) -> L.Trainer:
        """Make the trainer; `overrides` win over the recipe.

        One device is used, CUDA where there is one, else the CPU (metrics need float64, which
        MPS does not have).

        Raises
        ------
        ConfigError
            The recipe asks for several devices or nodes.
        """
        settings = self._instantiate("trainer")
        callbacks = list(settings.pop("callbacks", None) or []) + overrides.pop("callbacks", [])
        options = {**vars(settings), **overrides, "callbacks": callbacks}
        for key in ("devices", "num_nodes"):
            if options[key] not in ("auto", 1, "1", [0]):
                raise ConfigError(
                    f"trainer.{key}", f"{options[key]!r}: training runs on one device", "Use 1."
                )
        options["devices"] = 1
        if options["accelerator"] == "auto":
            options["accelerator"] = "cuda" if torch.cuda.is_available() else "cpu"
        return L.Trainer(**options)

    def _only(self, part: str) -> Any:
        config = self.config.clone()
        for other in {"model", "data", "trainer"} - {part}:
            config.pop(other, None)
        return config

    def _instantiate(self, part: str) -> Any:
        try:
            return self.parser.instantiate(self._only(part))[part]
        except ValueError as error:
            # jsonargparse wraps what a class says of its own arguments.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, ChasmError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise cause from None

    def resolved(self) -> str:
        """Return every setting, defaults included, as YAML that gives this recipe again."""
        return self.parser.dump(self.config, skip_none=False, skip_link_targets=True)

    def settings(self) -> dict[str, Any]:
        """Every setting as plain types."""
        return yaml.safe_load(self.resolved())


def _absolute(name: str, args: Sequence[str]) -> str:
    """Resolve a path that is relative to the working folder or to a recipe among the arguments."""
    configs = [Path(a) for flag, a in pairwise(args) if flag in ("-c", "--config")]
    for folder in (Path.cwd(), *(config.parent for config in reversed(configs))):
        if (folder / name).exists():
            return str((folder / name).resolve())
    return name


def _one_line(error: ArgumentError, args: Sequence[str]) -> ConfigError:
    text = re.sub(r"\s+", " ", str(error)).strip()
    where = next(
        (a for flag, a in pairwise(args) if flag in ("-c", "--config")),
        "arguments",
    )
    return ConfigError(
        where, text, "See `chasm fit --help` and experiments/README.md for the keys there are."
    )
