"""The quantities: what each is, as a weighted sum of values under conditions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ablations.values import COALITIONS

COALITION_QUANTITIES: Mapping[str, Mapping[str, float]] = {
    **{f"v_{name}": {name: 1.0} for name in COALITIONS},
    "necessity_local": {"both": 1, "global": -1},
    "necessity_global": {"both": 1, "local": -1},
    "sufficiency_local": {"local": 1, "none": -1},
    "sufficiency_global": {"global": 1, "none": -1},
    "shapley_local": {"both": 0.5, "global": -0.5, "local": 0.5, "none": -0.5},
    "shapley_global": {"both": 0.5, "local": -0.5, "global": 0.5, "none": -0.5},
    "redundancy": {"local": 1, "global": 1, "both": -1, "none": -1},
    "specialisation": {"local": 1, "global": -1},
}
"""Quantity to coalition to coefficient. Negative redundancy is synergy or
suppression; specialisation is the Shapley value of local less that of global."""

TESTED = ("necessity_local", "necessity_global", "specialisation", "asymmetry")
"""Quantities that are given a p."""

INTERCHANGE = "interchange"


class Condition(NamedTuple):
    """What was done to the model.

    Attributes
    ----------
    gate
        ``free`` or ``held``; empty where there is no gate.
    name
        A coalition, `INTERCHANGE`, or the name of a further condition.
    kind
        ``coalition``, `INTERCHANGE` or ``extra``: names may coincide.
    """

    gate: str
    name: str
    kind: str = "coalition"


class Quantity(NamedTuple):
    """A weighted sum of conditions.

    Attributes
    ----------
    name
        Name in the table.
    gate
        ``free`` or ``held``; empty where there is no gate, or both states enter.
    parts
        Condition to coefficient.
    """

    name: str
    gate: str
    parts: Mapping[Condition, float]


def quantities_of(conditions: Iterable[Condition]) -> list[Quantity]:
    """List what can be computed from these conditions, in the order of the table."""
    known = list(conditions)
    free = _free_gate(known)
    clean = Condition(free, "both")
    found = [_of_gate(name, free) for name in COALITION_QUANTITIES]
    if Condition("held", "both") in known:
        found += [_of_gate(name, "held") for name in COALITION_QUANTITIES]
        found += [_compensation(stream, free) for stream in ("local", "global")]
    for one in known:
        if one.kind == INTERCHANGE:
            found += [
                Quantity(INTERCHANGE, free, {one: 1}),
                Quantity(
                    f"{INTERCHANGE} - specialisation",
                    free,
                    {one: 1, Condition(free, "local"): -1, Condition(free, "global"): 1},
                ),
            ]
        if one.kind == "extra":
            found += [
                Quantity(f"v:{one.name}", free, {one: 1}),
                Quantity(f"change:{one.name}", free, {one: 1, clean: -1}),
            ]
    return found


def predicted(conditions: Iterable[Condition]) -> Quantity:
    """Give what both streams predict, v_both − v_none with the gate free: the unit of shares."""
    free = _free_gate(conditions)
    return Quantity("predicted", free, {Condition(free, "both"): 1, Condition(free, "none"): -1})


def _free_gate(conditions: Iterable[Condition]) -> str:
    """Say how the state of the gate is written where it is not held."""
    return next(one.gate for one in conditions if one.gate != "held")


def _of_gate(name: str, gate: str) -> Quantity:
    parts = COALITION_QUANTITIES[name]
    return Quantity(name, gate, {Condition(gate, part): value for part, value in parts.items()})


def _compensation(stream: str, free: str) -> Quantity:
    """Necessity with the gate held (direct) less that with the gate free (total)."""
    name = f"necessity_{stream}"
    held, total = _of_gate(name, "held").parts, _of_gate(name, free).parts
    less = {condition: -value for condition, value in total.items()}
    return Quantity(f"compensation_{stream}", "", {**held, **less})
