"""A suite: which streams are removed how, and what else is done to the model; read from YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml
from torch import nn

from chasm.errors import ConfigError
from chasm.interventions import OPERATIONS, Intervention, on_stream
from chasm.models.sites import Stream, sites_of

Stage = Literal["any", "stage2"]
EARLY = ("streams:early",)
HIGHER = ("streams:ventral", "streams:lateral", "streams:parietal")
_SUITE = (
    *("title", "stage", "operation", "local", "global", "donors", "interchange"),
    *("early", "higher", "conditions"),
)
_CONSTANTS = ("mean", "zero", "optimal")
_CONDITION = ("name", "stream", "operation", "interventions", "repeats", "each_token")


@dataclass(frozen=True)
class Condition:
    """One further thing that is done to the model.

    Attributes
    ----------
    name
        Of its rows.
    stream
        Stream whose sites all get `operation`; None where `interventions` are given.
    operation
        See `chasm.interventions.OPERATIONS`.
    interventions
        What is done, site by site.
    repeats
        Times that it is done, with other donors or another seed; the predictions are averaged.
    each_token
        Whether it is done for every CLS token (backbone layer) by itself.
    """

    name: str
    stream: Stream | None = None
    operation: str = "mean"
    interventions: tuple[Intervention, ...] = ()
    repeats: int = 1
    each_token: bool = False

    def on(self, module: nn.Module) -> tuple[Intervention, ...]:
        """Say what is done to this model."""
        if self.stream is None:
            return self.interventions
        return on_stream(module, self.stream, self.operation)


@dataclass(frozen=True)
class Suite:
    """What the runner does to every model.

    Attributes
    ----------
    name, title
        Of the file, and in words.
    text
        The file itself.
    stage
        ``stage2`` for a suite that only a Stage 2 has the sites of.
    operation
        What replaces a stream outside a coalition.
    sites
        Stream to the sites that are replaced; empty: all sites that the model declares for it.
    donors
        Donors of every image, for interchange.
    interchange
        Whether streams of different images are combined.
    early, higher
        Regions ``atlas:name`` whose specialisation is compared.
    conditions
        What else is done.
    """

    name: str
    title: str
    text: str
    stage: Stage = "any"
    operation: str = "mean"
    sites: Mapping[Stream, tuple[str, ...]] = field(default_factory=dict)
    donors: int = 20
    interchange: bool = False
    early: tuple[str, ...] = EARLY
    higher: tuple[str, ...] = HIGHER
    conditions: tuple[Condition, ...] = ()

    def removal(self, module: nn.Module, stream: Stream) -> tuple[Intervention, ...]:
        """Say how a stream is removed from this model.

        Raises
        ------
        ConfigError
            The model has no separate streams, and the suite names no sites.
        """
        if self.sites:
            return tuple(Intervention(site, self.operation) for site in self.sites[stream])
        if not getattr(module, "separable", False):
            raise ConfigError(
                f"suite {self.name}",
                f"{getattr(module, 'row_name', 'this model')} has no separate streams "
                f"(its sites: {', '.join(sites_of(module))})",
                "Use ablations/suites/inputs.yaml, which replaces the tokens themselves.",
            )
        return on_stream(module, stream, self.operation)


def read_suite(path: Path) -> Suite:
    """Read a suite.

    Raises
    ------
    ConfigError
        The file is no suite: its path, the key and the remedy are named.
    """
    try:
        text = path.read_text(encoding="utf-8")
        raw = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        known = ", ".join(sorted(p.stem for p in (Path(__file__).parent / "suites").glob("*.yaml")))
        raise ConfigError(
            path, f"cannot be read ({' '.join(str(error).split())})", f"Suites here: {known}."
        ) from error
    raw = _mapping(raw, str(path), _SUITE)
    if not isinstance(raw.get("title"), str):
        raise ConfigError(f"{path}:title", "it is missing or no text", "Give a short text.")
    stage = _one_of(raw.get("stage", "any"), get_args(Stage), f"{path}:stage")
    operation = _one_of(raw.get("operation", "mean"), _CONSTANTS, f"{path}:operation")
    streams: tuple[Stream, ...] = ("local", "global")
    given = {stream: _names(raw[stream], f"{path}:{stream}") for stream in streams if stream in raw}
    if len(given) == 1:
        raise ConfigError(f"{path}:local, global", "only one of them is given", "Give both.")
    conditions = raw.get("conditions", [])
    if not isinstance(conditions, list):
        raise ConfigError(f"{path}:conditions", "it is no list", "Give a list of conditions.")
    made = tuple(_condition(one, f"{path}:conditions[{i}]") for i, one in enumerate(conditions))
    twice = {one.name for one in made if [other.name for other in made].count(one.name) > 1}
    if twice:
        raise ConfigError(f"{path}:conditions", f"{min(twice)!r} is there twice", "Rename one.")
    return Suite(
        name=path.stem,
        title=raw["title"],
        text=text,
        stage=cast(Stage, stage),
        operation=operation,
        sites=given,
        donors=_count(raw.get("donors", 20), f"{path}:donors"),
        interchange=_flag(raw.get("interchange", False), f"{path}:interchange"),
        early=_names(raw.get("early", list(EARLY)), f"{path}:early"),
        higher=_names(raw.get("higher", list(HIGHER)), f"{path}:higher"),
        conditions=made,
    )


def _condition(raw: Any, where: str) -> Condition:
    raw = _mapping(raw, where, _CONDITION)
    if not isinstance(raw.get("name"), str):
        raise ConfigError(f"{where}.name", "it is missing or no text", "Give a short name.")
    if ("stream" in raw) == ("interventions" in raw):
        raise ConfigError(
            where, "it has both or none of stream and interventions", "Give one of them."
        )
    listed = raw.get("interventions", [])
    if not isinstance(listed, list):
        raise ConfigError(f"{where}.interventions", "it is no list", "Give a list.")
    stream = None
    if "stream" in raw:
        stream = cast(Stream, _one_of(raw["stream"], get_args(Stream), f"{where}.stream"))
    return Condition(
        name=raw["name"],
        stream=stream,
        operation=_one_of(raw.get("operation", "mean"), tuple(OPERATIONS), f"{where}.operation"),
        interventions=tuple(
            Intervention.from_dict(one, f"{where}.interventions[{i}]")
            for i, one in enumerate(listed)
        ),
        repeats=_count(raw.get("repeats", 1), f"{where}.repeats"),
        each_token=_flag(raw.get("each_token", False), f"{where}.each_token"),
    )


def _mapping(raw: Any, where: str, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ConfigError(where, "it is no mapping", f"Give keys out of {', '.join(keys)}.")
    for key in raw:
        if key not in keys:
            raise ConfigError(
                f"{where}:{key}", "no such key", f"Use keys out of {', '.join(keys)}."
            )
    return raw


def _names(raw: Any, where: str) -> tuple[str, ...]:
    if not isinstance(raw, list) or not all(isinstance(name, str) for name in raw):
        raise ConfigError(where, f"found {raw!r}", "Give a list of names.")
    return tuple(raw)


def _one_of(raw: Any, allowed: tuple[str, ...], where: str) -> str:
    if raw not in allowed:
        raise ConfigError(where, f"found {raw!r}", f"Use one of {', '.join(allowed)}.")
    return str(raw)


def _count(raw: Any, where: str) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or raw < 1:
        raise ConfigError(where, f"found {raw!r}", "Use a whole number above 0.")
    return raw


def _flag(raw: Any, where: str) -> bool:
    if not isinstance(raw, bool):
        raise ConfigError(where, f"found {raw!r}", "Use true or false.")
    return raw
