"""What the benchmarks have to show, judged from their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from length import OURS, exponents
from measure import Row, digits, ratios

Found = tuple[str, bool]
"""What was found, and whether it is enough."""


@dataclass(frozen=True)
class Goal:
    """A goal and what was found; `met` is None where it was not measured."""

    text: str
    wanted: str
    found: str
    met: bool | None


class _Rows:
    """Rows by part, case and way; a KeyError where something was not measured."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.by_key = {(row.part, row.case, row.way): row for row in rows}
        self.ratios = ratios(self.rows)

    def case(self, part: str, start: str) -> str:
        """Name the case of a part that begins so."""
        found = [row.case for row in self.rows if row.part == part and row.case.startswith(start)]
        if not found:
            raise KeyError(part, start)
        return found[0]

    def faster(self, part: str, start: str, way: str, least: float) -> Found:
        """How many times faster than its reference."""
        ratio = self.ratios[part, self.case(part, start), way][0]
        if ratio is None:
            raise KeyError(way)
        return f"{digits(ratio)}x", ratio >= least

    def slower(self, part: str, start: str, way: str, than: str, most: float) -> Found:
        """How many times slower than another way."""
        case = self.case(part, start)
        ratio = self.by_key[part, case, way].seconds / self.by_key[part, case, than].seconds
        return f"{digits(ratio)}x", ratio <= most

    def memory(self, part: str, start: str, way: str, most: float) -> Found:
        """How much memory."""
        found = self.by_key[part, self.case(part, start), way].memory_mb
        if found is None:
            raise KeyError(way)
        return f"{found:.0f} MB", found <= most

    def error(self, part: str, start: str, way: str, most: float) -> Found:
        """Error that a row's note ends with."""
        found = self.by_key[part, self.case(part, start), way].note.split()
        if not found or not found[-1][:1].isdigit():
            raise KeyError(way)
        return found[-1], float(found[-1]) <= most

    def less_memory(self, part: str, start: str, way: str, than: str) -> Found:
        """How much memory, beside another way's."""
        case = self.case(part, start)
        found = self.by_key[part, case, way].memory_mb
        other = self.by_key[part, case, than].memory_mb
        if found is None or other is None:
            raise KeyError(way)
        return f"{found:.0f} of {other:.0f} MB", found <= other

    def flat(self, part: str, first: str, last: str, way: str, most: float) -> Found:
        """How much the memory of a way grows from a case to another."""
        few, many = (self.by_key[part, case, way].memory_mb for case in (first, last))
        if few is None or many is None:
            raise KeyError(way)
        return f"{digits(many / few)}x", many <= most * few

    def exponent(self, way: str, most: float) -> Found:
        """Power of the number of tokens with which time grows."""
        found = exponents([row for row in self.rows if row.part == "length"])[way]
        return f"tokens^{found:.2f}", found <= most


def met(rows: Sequence[Row]) -> list[Goal]:
    """Judge every goal from the rows of all parts."""
    r = _Rows(rows)
    goals: list[tuple[str, str, Callable[[], Found]]] = []
    for way, least in (("numba", 15.0), ("torch", 4.0)):
        goals += [
            (f"scan at paper size: {way} against the reference", f"at least {least:g}x",
             lambda way=way, least=least: r.faster("scan", "stage1", way, least)),
            (f"scan at paper size: extra memory of {way}", "at most 250 MB",
             lambda way=way: r.memory("scan", "stage1", way, 250)),
            (f"scan at paper size: gradients of {way} beside float64", "within 1e-05",
             lambda way=way: r.error("scan", "stage1", way, 1e-5)),
        ]  # fmt: skip
    for stage, least in ((1, 4.0), (2, 3.0)):
        case = f"stage {stage}"
        goals += [
            (f"step of Stage {stage} against the published way", f"at least {least:g}x",
             lambda case=case, least=least: r.faster("steps", case, "numba", least)),
            (f"step of Stage {stage} against the same with the scan removed", "at most 1.2x",
             lambda case=case: r.slower("steps", case, "numba", "scan removed", 1.2)),
            (f"step of Stage {stage}: memory beside the published way", "not more",
             lambda case=case: r.less_memory("steps", case, "numba", "published")),
        ]  # fmt: skip
    goals += [
        ("Stage 1 from 64 to 1024 tokens", "linear: at most tokens^1.1",
         lambda: r.exponent(OURS, 1.1)),
        ("prepare: peak memory of 8 sessions", "at most 1500 MB",
         lambda: r.memory("prepare", "8 sessions", "ours", 1500)),
        ("prepare: growth of the peak from 2 to 8 sessions", "flat: at most 1.1x",
         lambda: r.flat("prepare", "2 sessions", "8 sessions", "ours", 1.1)),
        ("prepare: time of a whole subject beside reading the needed bytes", "at most 1.5x",
         lambda: r.slower("prepare", "40 sessions", "ours", "needed bytes", 1.5)),
    ]  # fmt: skip
    return [_judge(*goal) for goal in goals]


def _judge(text: str, wanted: str, find: Callable[[], Found]) -> Goal:
    try:
        return Goal(text, wanted, *find())
    except KeyError:
        return Goal(text, wanted, "", None)
