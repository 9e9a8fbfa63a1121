"""The one sentence that may be claimed of early and higher regions, and the rule behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from ablations.effects import MIN_SEEDS, POOLED, Effects, pooled
from ablations.rows import EARLY_LESS_HIGHER, NOT_ESTIMABLE
from chasm.errors import ConfigError

Kind = Literal["double dissociation", "asymmetric (ordinal)", "none", "not estimable"]

SCALES = {
    "ceiling": "noise-ceiling units",
    "share": "share units",
    "matched": "noise-ceiling units of voxels matched for noise ceiling",
}
"""Scales that must agree, and how a sentence names them."""

LEVEL = 0.05
"""Largest p against the simulated null under which an asymmetry may be claimed."""


@dataclass(frozen=True)
class Claim:
    """What may be said of a subject.

    Attributes
    ----------
    sentence
        Complete: names data (SIMULATED where they are), subject, encoder and numbers.
    kind
        The rule that it passed.
    sign
        1 where early regions lean more on local information than higher ones do, −1 where
        less, 0 where nothing is claimed.
    """

    sentence: str
    kind: Kind
    sign: int


@dataclass(frozen=True)
class Replication:
    """Subjects by the sign of the asymmetry in noise-ceiling units.

    Attributes
    ----------
    positive, negative
        Subjects whose interval is above, or below, 0.
    subjects
        All of them.
    """

    positive: tuple[str, ...]
    negative: tuple[str, ...]
    subjects: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """Say how many replicate the commoner sign, and what their number can show."""
        n = len(self.subjects)
        more = len(self.positive) >= len(self.negative)
        k = len(self.positive if more else self.negative)
        start = (
            f"Early regions are {'more' if more else 'less'} local than higher ones, the interval "
            f"excluding 0, in {k} of {n} subjects"
        )
        if n == 1:
            return f"{start}; one subject says nothing of others."
        return f"{start}; {n} subjects cannot give p < {2.0 ** (1 - n):g} by sign flips."


def combine(frames: Sequence[pd.DataFrame], encoder: str | None = None) -> Replication:
    """Count the subjects whose asymmetry has an interval that excludes 0.

    Parameters
    ----------
    frames
        `ablations.effects.Effects.frame`, one per subject.
    encoder
        Which; by default the first model of each frame, or else its first encoder.

    Raises
    ------
    ConfigError
        A frame does not have that encoder, or a subject is given twice.
    """
    signs: dict[str, int] = {}
    for frame in frames:
        subject = str(frame["subject"].iloc[0])
        if subject in signs:
            raise ConfigError(f"effects of {subject}", "given twice", "Give every subject once.")
        rows = _rows_of(frame, encoder)
        signs[subject] = _find(rows, "asymmetry", EARLY_LESS_HIGHER, "ceiling").sign
    return Replication(
        tuple(name for name, sign in signs.items() if sign > 0),
        tuple(name for name, sign in signs.items() if sign < 0),
        tuple(signs),
    )


def claim(
    effects: Effects,
    *,
    encoder: str | None = None,
    null_p: float | None = None,
    replication: Replication | None = None,
) -> Claim:
    """Say what may be claimed of an encoder's early and higher regions.

    An asymmetry is claimed where I, the mean D of the early regions less that of the higher
    ones, has the same sign in all of `SCALES`, every interval excluding 0, and `null_p` is at
    most `LEVEL`. It is a double dissociation where moreover D is above 0 in one set and below
    0 in the other, in noise-ceiling units, both intervals excluding 0; otherwise ordinal.

    Parameters
    ----------
    effects
        Of one subject.
    encoder
        Which; by default the first model, or else the first encoder.
    null_p
        p of I against simulated null worlds with this subject's noise ceilings; where it is not
        known, the claim says that it is uncalibrated.
    replication
        Over subjects; said at the end.

    Raises
    ------
    ConfigError
        There is no such encoder, or `null_p` is not between 0 and 1.
    """
    if null_p is not None and not 0 <= null_p <= 1:
        raise ConfigError("null_p", f"{null_p} is no probability", "Give None where unknown.")
    rows = _rows_of(effects.frame, encoder)
    asymmetry = {scale: _find(rows, "asymmetry", EARLY_LESS_HIGHER, scale) for scale in SCALES}
    kind, sign, text = _judge(rows, asymmetry, null_p)
    sentences = [f"{_subject(rows)}: {text}.", *_left_out(asymmetry["ceiling"])]
    sentences += _second_class(effects.frame, rows, asymmetry["ceiling"].sign)
    if replication is not None:
        sentences.append(replication.sentence)
    return Claim(" ".join(sentences), kind, sign)


class _Number(NamedTuple):
    """A number of the table; without an estimate, why."""

    value: float
    low: float
    high: float
    status: str

    @property
    def reason(self) -> str:
        """Why there is no interval; empty where there is one."""
        if self.status.startswith(NOT_ESTIMABLE):
            return self.status.removeprefix(NOT_ESTIMABLE)
        return "" if np.isfinite([self.low, self.high]).all() else "no resamples were drawn"

    @property
    def sign(self) -> int:
        """Sign of the interval, 0 where it holds 0 or there is none."""
        return int(self.low > 0) - int(self.high < 0)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _judge(
    rows: pd.DataFrame, asymmetry: dict[str, _Number], null_p: float | None
) -> tuple[Kind, int, str]:
    """Apply the rule: the kind, the sign, and the claim in words."""
    primary = asymmetry["ceiling"]
    if primary.reason:
        return "not estimable", 0, f"asymmetry not estimable: {primary.reason}"
    known = {scale: number for scale, number in asymmetry.items() if not number.reason}
    unclear = [scale for scale, number in known.items() if number.sign == 0]
    nothing = "no asymmetry can be claimed"
    if unclear:
        numbers = ", ".join(f"{known[scale]} in {SCALES[scale]}" for scale in unclear)
        verb = "includes" if len(unclear) == 1 else "include"
        return "none", 0, f"{nothing}, I = {numbers} {verb} 0"
    if len({number.sign for number in known.values()}) > 1:
        numbers = ", ".join(f"{number} in {SCALES[scale]}" for scale, number in known.items())
        return "none", 0, f"{nothing}, the scales disagree in sign: I = {numbers}"
    if null_p is not None and null_p > LEVEL:
        text = f"{nothing}, I = {primary} is within what simulated null worlds with these noise "
        return "none", 0, f"{text}ceilings give (p = {null_p:.2g})"
    for scale, number in asymmetry.items():
        if number.reason:
            text = f"asymmetry not estimable in {SCALES[scale]}: {number.reason}"
            return "not estimable", 0, text
    early, higher = (_find(rows, "specialisation", name, "ceiling") for name in ("early", "higher"))
    against = ", not compared with simulated null worlds (uncalibrated)"
    if null_p is not None:
        against = f", and p = {null_p:.2g} against simulated null worlds"
    numbers = (
        f"I = {primary} in noise-ceiling units (early D = {early}, higher D = {higher}), the "
        f"same sign in share units and matched for noise ceiling{against}"
    )
    if early.sign * higher.sign < 0:
        streams = ("local", "global")[:: primary.sign]
        text = (
            f"double dissociation, early regions lean on the {streams[0]} stream and higher "
            f"regions on the {streams[1]} stream: {numbers}"
        )
        return "double dissociation", primary.sign, text
    more = "more" if primary.sign > 0 else "less"
    text = f"asymmetric (ordinal), early regions are {more} local than higher regions: {numbers}"
    return "asymmetric (ordinal)", primary.sign, text


def _rows_of(frame: pd.DataFrame, encoder: str | None) -> pd.DataFrame:
    """Rows of an encoder pooled over its seeds, the gate free."""
    names = frame.drop_duplicates("encoder").set_index("encoder")["model_class"]
    if encoder is None:
        models = names[names == "model"].index
        encoder = str((models if len(models) else names.index)[0])
    if encoder not in names.index:
        raise ConfigError(
            f"encoder {encoder}", "it has no effects", f"Choose one of {', '.join(names.index)}."
        )
    rows = pooled(frame[frame["encoder"] == encoder])
    seeds = frame.loc[frame["encoder"] == encoder, "seed"]
    n_seeds = seeds[seeds != POOLED].nunique()
    return rows[rows["gate"] != "held"].assign(n_seeds=n_seeds)


def _find(rows: pd.DataFrame, quantity: str, region: str, scale: str) -> _Number:
    chosen = (
        (rows["quantity"] == quantity)
        & (rows["level"] == "set")
        & (rows["region"] == region)
        & (rows["scale"] == scale)
    )
    row = rows.loc[chosen].iloc[0]
    return _Number(float(row["value"]), float(row["low"]), float(row["high"]), str(row["status"]))


def _subject(rows: pd.DataFrame) -> str:
    """Say whose effects these are: data, subject, encoder, seeds."""
    first = rows.iloc[0]
    simulated = "SIMULATED data, " if first["simulated"] else ""
    return f"{simulated}{first['subject']} ({first['dataset']}), {first['encoder']}{_seeds(first)}"


def _seeds(row: pd.Series) -> str:
    """Say how often a model was trained; a linear encoder has nothing to draw."""
    n = int(row["n_seeds"])
    if row["model_class"] == "linear":
        return ""
    few = ", too few to generalise over training" if n < MIN_SEEDS else ""
    return f" ({n} seed{'s' if n > 1 else ''}{few})"


def _left_out(number: _Number) -> list[str]:
    _, found, keys = number.status.partition("without ")
    return [f"The sets are without {keys}."] if found else []


def _second_class(frame: pd.DataFrame, rows: pd.DataFrame, sign: int) -> list[str]:
    """Say what encoders of another class give for the asymmetry in noise-ceiling units."""
    own = rows["model_class"].iloc[0]
    sentences = []
    for name in frame.loc[frame["model_class"] != own, "encoder"].unique():
        other = _find(_rows_of(frame, str(name)), "asymmetry", EARLY_LESS_HIGHER, "ceiling")
        if other.reason:
            continue
        if other.sign == 0:
            sentences.append(f"In {name}, I = {other} includes 0.")
        elif other.sign == sign:
            sentences.append(f"In {name}, I = {other} agrees.")
        elif sign:
            sentences.append(f"But in {name}, I = {other} has the opposite sign.")
        else:
            sentences.append(f"In {name}, I = {other} excludes 0.")
    return sentences
