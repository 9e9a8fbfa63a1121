"""What the suite must report in every variant, judged over finished runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ablations.claims import LEVEL, SCALES
from ablations.rows import EARLY_LESS_HIGHER
from ablations.worlds import EARLY, HIGHER
from ablations.worlds_null import NullWorlds

Runs = Sequence[Mapping[str, Any]]
POWER = 0.9
COVERAGE = (0.93, 0.97)
SETS = ("early", "higher")


@dataclass(frozen=True)
class Line:
    """One line of the calibration table.

    Attributes
    ----------
    variant, criterion
        What was counted.
    n
        Of how many.
    rate
        Share of them; NaN without any.
    wanted
        Bound that the rate must keep; empty where it is only told.
    passed
        None where it is only told.
    """

    variant: str
    criterion: str
    n: int
    rate: float
    wanted: str = ""
    passed: bool | None = None

    @property
    def two_se(self) -> float:
        """Two standard errors of the rate."""
        return 2 * float(np.sqrt(self.rate * (1 - self.rate) / self.n)) if self.n else np.nan


@dataclass(frozen=True)
class Calibration:
    """The calibration of all variants.

    Attributes
    ----------
    lines
        Criteria, variant by variant.
    coverage
        See `coverage`.
    """

    lines: Sequence[Line]
    coverage: Mapping[str, Mapping[str, Line]]

    @property
    def passed(self) -> bool:
        """Whether no criterion failed."""
        judged = [*self.lines, *self.coverage["all"].values()]
        return all(line.passed is not False for line in judged)


class Found:
    """Numbers of a run by quantity, region, scale and gate."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self._rows = {tuple(row[:4]): row[4:] for row in record["rows"]}

    def sign(self, quantity: str, region: str, scale: str = "ceiling", gate: str = "") -> int:
        """Sign of a number whose interval excludes 0, else 0."""
        _, low, high, _ = self._rows[quantity, region, scale, gate]
        return int(low > 0) - int(high < 0)

    def covers(
        self, quantity: str, region: str, scale: str = "ceiling", value: float | None = None
    ) -> bool | None:
        """Whether the interval holds the truth (or `value`); None without an interval or truth."""
        _, low, high, truth = self._rows.get((quantity, region, scale, ""), [np.nan] * 4)
        truth = truth if value is None else value
        return None if np.isnan([low, high, truth]).any() else bool(low <= truth <= high)


def share_of(marks: Iterable[bool | int | None]) -> tuple[int, float]:
    """How many marks there are, None left out, and the share of true ones."""
    known = [bool(mark) for mark in marks if mark is not None]
    return len(known), sum(known) / len(known) if known else math.nan


def told(variant: str, criterion: str, marks: Iterable[bool | int | None]) -> Line:
    """Make a line without a bound."""
    return Line(variant, criterion, *share_of(marks))


def at_least(variant: str, criterion: str, marks: Iterable[bool | int | None]) -> Line:
    """Make a line of power."""
    n, rate = share_of(marks)
    return Line(variant, criterion, n, rate, f">= {POWER:g}", rate >= POWER)


def at_most(variant: str, criterion: str, marks: Iterable[bool | int | None]) -> Line:
    """Make a line of false rejections: at most the level plus 2 SE of the level."""
    n, rate = share_of(marks)
    bound = LEVEL + 2 * math.sqrt(LEVEL * (1 - LEVEL) / max(1, n))
    return Line(variant, criterion, n, rate, f"<= {bound:.3f}", rate <= bound)


def within(variant: str, criterion: str, marks: Iterable[bool | int | None]) -> Line:
    """Make a line of coverage."""
    n, rate = share_of(marks)
    low, high = COVERAGE
    return Line(variant, criterion, n, rate, f"{low:g} to {high:g}", low <= rate <= high)


def null_of(runs: Runs) -> NullWorlds:
    """Put the null worlds of all runs with one pair of ceilings together."""
    level = np.array([x for one in runs for x in one["null"]["level"]])
    asymmetry = {s: np.array([x for one in runs for x in one["null"][s]]) for s in SCALES}
    return NullWorlds(level, asymmetry)


def rejections(runs: Runs, null: NullWorlds) -> dict[str, list[int | None]]:
    """Sign of what each rule claims in each run, 0 for nothing, None where it cannot be applied.

    "specified": the intervals of all scales; "primary": these and the p against null worlds on
    every scale; by scale: its interval alone, and its p alone.
    """
    found: dict[str, list[int | None]] = {"specified": [], "primary": []}
    for one in runs:
        p = null.p_values(one["level"], one["asymmetry"])
        numbers = Found(one)
        known = one["claim"] != "not estimable"
        largest = max(p.values()) if not np.isnan(list(p.values())).any() else np.nan
        found["specified"].append(one["sign"] if known else 0)
        found["primary"].append(
            None if np.isnan(largest) and one["sign"] else one["sign"] * int(largest <= LEVEL)
        )
        for scale in SCALES:
            interval = numbers.sign("asymmetry", EARLY_LESS_HIGHER, scale)
            found.setdefault(f"interval, {scale}", []).append(interval)
            significant = None if np.isnan(p[scale]) else int(p[scale] <= LEVEL)
            found.setdefault(f"null worlds, {scale}", []).append(significant)
    return found


def _claims(name: str, runs: Runs, null: NullWorlds, judge: Callable[..., Line]) -> Iterator[Line]:
    """Rejections by the specified and the primary rule, judged, and by their parts, told."""
    for rule, signs in rejections(runs, null).items():
        judged = rule in ("specified", "primary")
        title = f"asymmetry claimed, {rule} rule" if judged else f"I rejected by {rule}"
        yield (judge if judged else told)(name, title, signs)


def _dissociation(name: str, runs: Runs, null: NullWorlds, sign: int) -> Iterator[Line]:
    numbers = [Found(one) for one in runs]
    for key, expected in (("early", sign), ("higher", -sign)):
        marks = [one.sign("specialisation", key) == expected for one in numbers]
        yield at_least(name, f"D_{key} {'>' if expected > 0 else '<'} 0", marks)
    signs = rejections(runs, null)
    kinds = [one["claim"] == "double dissociation" for one in runs]
    for rule in ("specified", "primary"):
        marks = [s is not None and s == sign and k for s, k in zip(signs[rule], kinds, strict=True)]
        yield at_least(name, f"double dissociation claimed, {rule} rule", marks)
    for rule, values in signs.items():
        if rule not in ("specified", "primary"):
            yield told(name, f"I rejected by {rule}", values)


def _main_effect(name: str, runs: Runs, null: NullWorlds) -> Iterator[Line]:
    numbers = [Found(one) for one in runs]
    everywhere = [
        one.sign("specialisation", roi) > 0 for one in numbers for roi in (*EARLY, *HIGHER)
    ]
    yield at_least(name, "D > 0, over ROIs and runs", everywhere)
    yield from _claims(name, runs, null, at_most)


def _redundant(name: str, runs: Runs, null: NullWorlds) -> Iterator[Line]:
    numbers = [Found(one) for one in runs]
    for stream in ("local", "global"):
        marks = [one.covers(f"shapley_{stream}", key) for one in numbers for key in SETS]
        yield within(name, f"interval of phi_{stream} holds the encoder's own", marks)
    marks = [one.sign("redundancy", key) > 0 for one in numbers for key in SETS]
    yield at_least(name, "redundancy > 0", marks)
    yield from _claims(name, runs, null, told)


def _interaction(name: str, runs: Runs, null: NullWorlds) -> Iterator[Line]:
    numbers = [Found(one) for one in runs]
    marks = [one.sign("interchange - specialisation", k) != 0 for one in numbers for k in SETS]
    yield at_least(name, "T differs from D", marks)
    marks = [one.sign("redundancy", key) < 0 for one in numbers for key in SETS]
    yield at_least(name, "synergy (redundancy < 0)", marks)


def _noise(name: str, runs: Runs, null: NullWorlds) -> Iterator[Line]:
    numbers = [Found(one) for one in runs]
    scores = ("v_local", "v_global", "v_both")
    for quantity in scores:
        signs = [one.sign(quantity, key, "r2") for one in numbers for key in SETS]
        yield at_most(name, f"{quantity} (r2) is not 0, specified rule", signs)
        yield told(name, f"{quantity} (r2) is above 0", [sign > 0 for sign in signs])
    for quantity in (*scores, "specialisation"):
        # What is below 0 was fitted to noise; D has a value where something is predicted.
        marks = [
            one.sign(quantity, key, "r2") and one.sign("v_both", key, "r2") > 0
            for one in numbers
            for key in SETS
        ]
        yield at_most(name, f"{quantity} (r2) is not 0 and v_both above 0, primary rule", marks)
    yield at_most(name, "asymmetry claimed", [one["sign"] for one in runs])


def _gate(name: str, runs: Runs, null: NullWorlds) -> Iterator[Line]:
    numbers = [Found(one) for one in runs]
    for stream, make in (("global", at_least), ("local", told)):
        marks = [one.sign(f"compensation_{stream}", key) > 0 for one in numbers for key in SETS]
        yield make(name, f"{stream} stream: direct > total", marks)


CRITERIA: Mapping[str, Callable[[str, Runs, NullWorlds], Iterator[Line]]] = {
    "planted": partial(_dissociation, sign=1),
    "reversed": partial(_dissociation, sign=-1),
    "null": partial(_claims, judge=at_most),
    "SNR-confounded null": partial(_claims, judge=at_most),
    "main effect only": _main_effect,
    "redundant": _redundant,
    "interaction": _interaction,
    "interaction (gain)": _interaction,
    "pure noise": _noise,
    "gate-compensated": _gate,
}
"""By variant: from its name, its runs and the null worlds of its ceilings to the lines."""


IDEAL_KEY = ("v:ideal observer", "ceiling")

_COVERED = {
    **{f"I, {scale}": ("asymmetry", scale) for scale in (*SCALES, "r2")},
    **{f"D, {scale}": ("specialisation", scale) for scale in (*SCALES, "r2")},
    "ideal observer": IDEAL_KEY,
}
"""Columns of the coverage table: quantity and scale."""


def coverage(runs: Mapping[str, Runs]) -> dict[str, dict[str, Line]]:
    """How often intervals hold the frozen encoder's population value, or 1 (ideal observer).

    Returns
    -------
    dict
        Variant, or "all" of them, whose lines are judged -> column -> line.
    """
    marks: dict[str, dict[str, list[bool | None]]] = {}
    for name, some in runs.items():
        if name == "pure noise":
            continue
        numbers = [Found(one) for one in some]
        marks[name] = {column: list(_marks(numbers, *key)) for column, key in _COVERED.items()}
    pooled = {column: [m for one in marks.values() for m in one[column]] for column in _COVERED}
    table = {
        name: {column: told(name, column, some) for column, some in columns.items()}
        for name, columns in marks.items()
    }
    table["all"] = {
        column: within("all", f"coverage: {column}", some) for column, some in pooled.items()
    }
    return table


def _marks(numbers: Sequence[Found], quantity: str, scale: str) -> Iterator[bool | None]:
    places = (EARLY_LESS_HIGHER,) if quantity == "asymmetry" else SETS
    value = 1.0 if (quantity, scale) == IDEAL_KEY else None
    for one in numbers:
        for place in places:
            yield one.covers(quantity, place, scale, value)
