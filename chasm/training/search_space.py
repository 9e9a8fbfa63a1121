"""Sweep files: a recipe, the keys of it that are searched, and the ranges they are searched in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.distributions import distribution_to_json as as_json
from optuna.trial import BaseTrial

from chasm.errors import ConfigError

Value = bool | int | float | str | None

KINDS: dict[str, tuple[type, frozenset[str]]] = {
    "float": (FloatDistribution, frozenset({"low", "high", "step", "log"})),
    "int": (IntDistribution, frozenset({"low", "high", "step", "log"})),
    "categorical": (CategoricalDistribution, frozenset({"choices"})),
}
"""Types of a searched key, and what each is described by."""


@dataclass(frozen=True)
class Dimension:
    """One searched key of a recipe.

    Attributes
    ----------
    key
        As on the command line, e.g. ``model.init_args.learning_rate``.
    distribution
        Its range.
    when
        Other searched keys, and the values of each under which this one is searched at all;
        under others it stays as the recipe has it.
    """

    key: str
    distribution: FloatDistribution | IntDistribution | CategoricalDistribution
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)

    @property
    def ends(self) -> tuple[Value, ...]:
        """Both ends of a range, or every choice."""
        found = self.distribution
        if isinstance(found, CategoricalDistribution):
            return tuple(found.choices)
        return tuple(dict.fromkeys((found.low, found.high)))

    @property
    def values(self) -> tuple[Value, ...]:
        """Every choice or step; none for a range without steps."""
        found = self.distribution
        if isinstance(found, CategoricalDistribution):
            return tuple(found.choices)
        if found.step is None:
            return ()
        n = round((found.high - found.low) / found.step)
        kind = int if isinstance(found, IntDistribution) else float
        return tuple(kind(_tidy(found.low + i * found.step)) for i in range(n + 1))

    def active(self, values: Mapping[str, Value]) -> bool:
        """Whether this key is searched beside these values of the keys before it."""
        return all(key in values and values[key] in taken for key, taken in self.when.items())

    def contains(self, value: object) -> bool:
        """Whether a value is in the range, on a step."""
        found = self.distribution
        if isinstance(found, CategoricalDistribution):
            return value in found.choices
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        value = _tidy(value)
        steps = 0.0 if found.step is None else (value - found.low) / found.step
        return found.low <= value <= found.high and bool(np.isclose(steps, round(steps)))

    def suggest(self, trial: BaseTrial) -> Value:
        """Ask a trial for its value."""
        found = self.distribution
        if isinstance(found, CategoricalDistribution):
            return trial.suggest_categorical(self.key, found.choices)
        if isinstance(found, IntDistribution):
            return trial.suggest_int(
                self.key, found.low, found.high, step=found.step, log=found.log
            )
        value = trial.suggest_float(self.key, found.low, found.high, step=found.step, log=found.log)
        return _tidy(value)


@dataclass
class SamplerOptions:
    """How the next trial is chosen.

    Parameters
    ----------
    kind
        ``tpe``, ``random``, or ``grid``: every combination of choices and steps once.
    startup
        Trials at random before TPE has enough to go by.
    seed
        Of the draws.
    """

    kind: Literal["tpe", "random", "grid"] = "tpe"
    startup: int = 8
    seed: int = 0


@dataclass
class PrunerOptions:
    """Which trials are stopped early.

    Parameters
    ----------
    kind
        ``median``: those worse than the median of earlier trials at the same epoch;
        ``hyperband``; ``none``.
    startup
        Trials that end before the median counts.
    warmup
        Epochs that every trial may train.
    """

    kind: Literal["median", "hyperband", "none"] = "median"
    startup: int = 4
    warmup: int = 2


@dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    Attributes
    ----------
    path
        The file.
    recipe
        The recipe whose keys are searched.
    study
        Name of the study.
    trials
        Finished trials that are wanted, pruned ones included.
    sampler, pruner
        How trials are chosen and stopped.
    settings
        Keys of the recipe that are the same in all trials, other than in the recipe.
    space
        The searched keys; one that depends on another comes after it.
    """

    path: Path
    recipe: Path
    study: str
    trials: int
    sampler: SamplerOptions
    pruner: PrunerOptions
    settings: Mapping[str, Any]
    space: tuple[Dimension, ...]

    def arguments(self, more: Sequence[str] = ()) -> list[str]:
        """Arguments of the recipe as it is without search; later ones win."""
        return ["-c", str(self.recipe), *as_arguments(self.settings), *more]

    def suggest(self, trial: BaseTrial) -> dict[str, Value]:
        """Ask a trial for the values of all keys that it searches."""
        values: dict[str, Value] = {}
        for dimension in self.space:
            if dimension.active(values):
                values[dimension.key] = dimension.suggest(trial)
        return values

    def values_of(self, settings: Mapping[str, Any]) -> dict[str, Value] | None:
        """Give the searched keys' values in the settings of a recipe, None if one is outside."""
        values: dict[str, Value] = {}
        for dimension in self.space:
            if dimension.active(values):
                found = _at(settings, dimension.key)
                if not dimension.contains(found):
                    return None
                values[dimension.key] = found
        return values

    def grid(self) -> Iterator[dict[str, Value]]:
        """Give every combination of choices and steps.

        Raises
        ------
        ConfigError
            A range has no steps.
        """
        for dimension in self.space:
            if not dimension.values:
                raise ConfigError(
                    f"{self.path}: space.{dimension.key}",
                    "a grid needs steps",
                    "Give `step`, or take the sampler tpe or random.",
                )
        return self._combinations({}, self.space)

    def _combinations(
        self, values: dict[str, Value], left: Sequence[Dimension]
    ) -> Iterator[dict[str, Value]]:
        if not left:
            yield values
            return
        first, rest = left[0], left[1:]
        if not first.active(values):
            yield from self._combinations(values, rest)
            return
        for value in first.values:
            yield from self._combinations({**values, first.key: value}, rest)

    def described(self) -> dict[str, Any]:
        """Everything that tells this space from another one, as plain types."""
        return {
            d.key: {
                **json.loads(as_json(d.distribution)),
                "when": {key: list(values) for key, values in d.when.items()},
            }
            for d in self.space
        }


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """Write keys and values as arguments of a recipe."""
    arguments = []
    for key, value in values.items():
        outer, _, inner = key.rpartition(".init_args.")
        if value is None and ".init_args." in outer:
            # jsonargparse takes a null that deep for the text None.
            key, value = outer, {"init_args": {inner: None}}
        arguments += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return arguments


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Shorten keys to as many of their last parts as tell them apart."""
    shortened = {}
    for key in keys:
        parts = key.split(".")
        for n in range(1, len(parts) + 1):
            name = ".".join(parts[-n:])
            if sum(other == name or other.endswith(f".{name}") for other in keys) == 1:
                break
        shortened[key] = name
    return shortened


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Raises
    ------
    ConfigError
        The file is not there, is no YAML, or has a key or value that it should not have.
    """
    if not path.is_file():
        raise ConfigError(path, "is not there", "Name a file like experiments/sweeps/stage1.yaml.")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(path, f"is no YAML: {_line(error)}", "Correct it.") from error
    space = found.pop("space", None) if isinstance(found, dict) else None
    if not isinstance(space, dict) or not space:
        what = "Name a sweep file, and keys in it under `space`; see docs/sweeps.md."
        raise ConfigError(path, "has no search space", what)
    settings = found.pop("settings", None) or {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: settings", f"found {settings!r}", "Give keys and values.")
    options = _options(path, found)
    recipe = Path(os.path.normpath(path.parent / options.recipe))
    if not recipe.is_file():
        what = f"{options.recipe!r} is not there"
        raise ConfigError(f"{path}: recipe", what, "Name one relative to this file.")
    sampler, pruner = vars(options.sampler), vars(options.pruner)
    for part, key, least in (
        (vars(options), "trials", 1), (sampler, "seed", 0), (sampler, "startup", 0),
        (pruner, "startup", 0), (pruner, "warmup", 0),
    ):  # fmt: skip
        if part[key] < least:
            raise ConfigError(f"{path}: {key}", f"found {part[key]}", f"Give {least} or more.")
    return Sweep(
        path=path,
        recipe=recipe,
        study=options.study or path.stem,
        trials=options.trials,
        sampler=SamplerOptions(**sampler),
        pruner=PrunerOptions(**pruner),
        settings=settings,
        space=_space(path, space),
    )


def _options(path: Path, found: dict[str, Any]) -> Any:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", type=str, required=True)
    parser.add_argument("--study", type=str, default="")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_class_arguments(SamplerOptions, "sampler")
    parser.add_class_arguments(PrunerOptions, "pruner")
    try:
        return parser.parse_object(found)
    except ArgumentError as error:
        known = "Its keys are recipe, study, trials, sampler, pruner, settings and space."
        raise ConfigError(path, _line(error), known) from error


def _space(path: Path, found: Mapping[str, Any]) -> tuple[Dimension, ...]:
    space: dict[str, Dimension] = {}
    for key, options in found.items():
        where = f"{path}: space.{key}"
        if not isinstance(options, dict) or str(options.get("type")) not in KINDS:
            raise ConfigError(where, f"found {options!r}", f"Give `type`: {', '.join(KINDS)}.")
        given = dict(options)
        kind, known = KINDS[str(given.pop("type"))]
        when = given.pop("when", {})
        unknown = sorted(set(given) - known)
        if unknown:
            remedy = f"Use type, when, {', '.join(sorted(known))}."
            raise ConfigError(where, f"{unknown[0]!r} is no part of a {options['type']}", remedy)
        space[str(key)] = Dimension(str(key), _range(where, kind, given), _when(where, when, space))
    return tuple(space.values())


def _range(where: str, kind: type, given: dict[str, Any]) -> Any:
    if kind is CategoricalDistribution:
        choices = given.get("choices")
        if not isinstance(choices, list) or not choices:
            raise ConfigError(where, f"choices: found {choices!r}", "Give a list of values.")
        # Lists and mappings are kept as the text that the command line would have.
        for choice in choices:
            if not isinstance(choice, (str, int, float, list, dict, type(None))):
                raise ConfigError(where, f"choices: found {choice!r}", "Put it in quotes.")
        choices = [json.dumps(c) if isinstance(c, (list, dict)) else c for c in choices]
        if len({json.dumps(c) for c in choices}) < len(choices):
            raise ConfigError(where, f"a choice is there twice: {choices}", "Name each once.")
        return CategoricalDistribution(choices)
    number = int if kind is IntDistribution else float
    try:
        for name in {"low", "high", "step"} & given.keys():
            if isinstance(given[name], bool) or number(given[name]) != float(given[name]):
                raise ValueError(f"{name}: {given[name]!r} is no {number.__name__}")
            given[name] = number(given[name])
        if not isinstance(given.get("log", False), bool):
            raise ValueError(f"log: {given['log']!r} is neither true nor false")
        if missing := {"low", "high"} - given.keys():
            raise ValueError(f"{min(missing)} is missing")
        if given.get("step") and not np.isclose(
            steps := (given["high"] - given["low"]) / given["step"], round(steps)
        ):
            raise ValueError("`high` is not a whole number of steps above `low`")
        return kind(**given)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(where, _line(error), "Give low and high, and step or log.") from error


def _when(
    where: str, when: object, before: Mapping[str, Dimension]
) -> dict[str, tuple[Value, ...]]:
    if not isinstance(when, dict):
        raise ConfigError(where, f"when: found {when!r}", "Give a key and its values.")
    found: dict[str, tuple[Value, ...]] = {}
    for key, taken in when.items():
        if key not in before:
            raise ConfigError(
                where, f"when: {key!r} is not searched", "Name a key that stands before this one."
            )
        found[key] = tuple(taken if isinstance(taken, list) else [taken])
        for value in found[key]:
            if not before[key].contains(value):
                remedy = f"Use values of that key, e.g. {before[key].ends[0]!r}."
                raise ConfigError(where, f"when: {key} is never {value!r}", remedy)
    return found


def _at(settings: Mapping[str, Any], key: str) -> Any:
    found: Any = settings
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _tidy(value: float) -> float:
    """Write 0.1 + 2 * 0.1 as 0.3, as a recipe does."""
    return float(f"{value:.12g}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
