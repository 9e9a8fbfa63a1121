"""Recipes: YAML files whose schema is the signatures (LightningCLI / jsonargparse)."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Optional, Union

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from chasm.data.datamodule import NSDDataModule, subject_name
from chasm.data.subjects import SubjectsDataModule
from chasm.errors import ChasmError, ConfigError
from chasm.processes import PATIENCE
from chasm.training.base import EncodingModule

STAGE1_DATA = (
    "subject", "dataset_dir", "backbone", "split", "split_seed", "statistics", "parcels",
    "num_workers",
)  # fmt: skip
"""Data settings that a Stage 1 takes from the Stage 2 that it is trained for."""

SOURCE_DATA = tuple(key for key in STAGE1_DATA if key != "subject")
"""Data settings that a source takes from the adapter that it is trained for."""


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
        for key in ("stage1", "source"):
            if self.config[key] is not None:
                self.config[key] = _absolute(self.config[key], args)

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
        parser.add_argument(
            "--source",
            type=Optional[str],  # noqa: UP045 (read by jsonargparse)
            default=None,
            help="What an adapter starts from: a recipe (trained when needed on `subjects`), a "
            "run or a checkpoint of a Stage 1, found as `stage1` is.",
        )
        parser.add_argument(
            "--subjects",
            type=Optional[list[Union[int, str]]],  # noqa: UP007, UP045
            default=None,
            help="Subjects that one Stage 1 is trained on together, e.g. [1,2,5]: this recipe's, "
            "or with `source` the source's.",
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
        return self._path("stage1")

    @property
    def source(self) -> Path | None:
        """Recipe, run or checkpoint of the Stage 1 that an adapter starts from.

        Raises
        ------
        ConfigError
            It is not there. (A trained run needs it no more.)
        """
        return None if self.config["source"] is None else self._path("source")

    @property
    def subjects(self) -> list[str] | None:
        """Subjects trained on together, by the names of their stores; None: `data.subject` alone.

        Raises
        ------
        ConfigError
            None is named, or one twice.
        """
        if self.config["subjects"] is None:
            return None
        names = [subject_name(subject) for subject in self.config["subjects"]]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                "subjects", f"found {self.config['subjects']}", "Name every subject once."
            )
        return names

    @property
    def trains_together(self) -> bool:
        """Whether this recipe trains one backbone on several subjects, with a head for each."""
        return self.subjects is not None and self.config["source"] is None

    def _path(self, key: str) -> Path:
        path = Path(self.config[key])
        if not path.exists():
            what = "Name a recipe, a run or a checkpoint."
            raise ConfigError(key, f"{str(path)!r} is not there", what)
        return path

    def stage1_recipe(self) -> Recipe:
        """Give the recipe of Stage 1, on the same subject, tokens, split, parcels and seed.

        Its samples, batches and epochs are its own.
        """
        return Recipe(["-c", str(self.stage1), *self._handed_on(STAGE1_DATA)])

    def source_recipe(self) -> Recipe:
        """Give the recipe of the source, on `subjects` and the same tokens, split and seed.

        Raises
        ------
        ConfigError
            The recipe does not say on which subjects.
        """
        if self.subjects is None:
            what = "Name them, e.g. --subjects [1,2]."
            raise ConfigError("subjects", "the source's subjects are not named", what)
        subjects = json.dumps(self.config["subjects"])
        return Recipe(
            ["-c", str(self.source), "--subjects", subjects, *self._handed_on(SOURCE_DATA)]
        )

    def for_subject(self, subject: str) -> Recipe:
        """Give the recipe of one of the subjects trained together, as if it were trained alone."""
        settings = self.settings() | {"subjects": None}
        settings["data"]["subject"] = subject
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.yaml"
            path.write_text(yaml.safe_dump(settings), encoding="utf-8")
            return Recipe(["-c", str(path)])

    def _handed_on(self, keys: Sequence[str]) -> list[str]:
        settings = self.settings()
        args = ["--runs", self.runs, "--seed_everything", str(self.seed)]
        for key in keys:
            value = settings["data"][key]
            args += [f"--data.{key}", value if isinstance(value, str) else json.dumps(value)]
        for key in ("accelerator", "devices", "num_nodes", "strategy"):
            args += [f"--trainer.{key}", str(settings["trainer"][key])]
        return args

    @property
    def selection(self) -> Selection:
        """How validation selects."""
        return Selection(**vars(self.config["selection"]))

    def make_data(self) -> NSDDataModule:
        """Make the data module."""
        return self._instantiate("data")

    def make_subjects(self) -> SubjectsDataModule:
        """Make the data module of the subjects that are trained together."""
        assert self.subjects is not None
        return SubjectsDataModule(
            {name: self.for_subject(name).make_data() for name in self.subjects}
        )

    def make_model(self) -> EncodingModule:
        """Make the model (unbuilt: its sizes come from the data)."""
        if self.config["model"] is None:
            raise ConfigError("model", "the recipe names no model", "Add `model: class_path: ...`.")
        return self._instantiate("model")

    def make_trainer(self, **overrides: Any) -> L.Trainer:
        """Make the trainer; `overrides` win over the recipe.

        One device is used unless `devices` or `num_nodes` say otherwise: CUDA where there is one,
        else the CPU (metrics need float64, which MPS does not have). Several train by DDP, and
        `data.batch_size` is the number of images that all of them take in a step.
        """
        settings = self._instantiate("trainer")
        callbacks = list(settings.pop("callbacks", None) or []) + overrides.pop("callbacks", [])
        options = {**vars(settings), **overrides, "callbacks": callbacks}
        if options["devices"] == "auto":
            options["devices"] = 1
        if options["accelerator"] == "auto":
            options["accelerator"] = "cuda" if torch.cuda.is_available() else "cpu"
        if self.n_processes > 1 and options["strategy"] == "auto":
            # Static: parts that a recipe leaves out of the loss never have a gradient.
            options["strategy"] = DDPStrategy(static_graph=True, timeout=PATIENCE)
        if not options["plugins"] and _under_slurm():
            # A run that was stopped goes on by itself: Lightning is not to save and requeue, too.
            options["plugins"] = SLURMEnvironment(auto_requeue=False)
        # The data module's samplers know of processes, and repeat no image to fill a batch.
        options["use_distributed_sampler"] = False
        return L.Trainer(**options)

    @property
    def n_processes(self) -> int:
        """Processes that train together: devices times nodes.

        Raises
        ------
        ConfigError
            `trainer.devices` is no number and no list of devices.
        """
        trainer = self.config["trainer"]
        devices = trainer["devices"]
        if isinstance(devices, str):
            if devices not in ("auto", "1") and not re.fullmatch(r"[1-9]\d*|\d+(,\d+)+,?", devices):
                raise ConfigError(
                    "trainer.devices", f"found {devices!r}", "Give a number, or a list like [0,1]."
                )
            numbers = [int(d) for d in devices.split(",") if d.isdigit()]
            count = len(numbers) if "," in devices else (numbers or [1])[0]
        elif isinstance(devices, int):
            count = devices
        else:
            count = len(devices)
        if count < 1:
            raise ConfigError("trainer.devices", f"found {devices!r}", "Give 1 or more.")
        return count * int(trainer["num_nodes"])

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
        return self._resolved

    def settings(self) -> dict[str, Any]:
        """Every setting as plain types, the caller's own copy."""
        return deepcopy(self._settings)

    @cached_property
    def _resolved(self) -> str:
        return self.parser.dump(self.config, skip_none=False, skip_link_targets=True)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return yaml.safe_load(self._resolved)


def _under_slurm() -> bool:
    return SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()


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
