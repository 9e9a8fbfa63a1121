"""All benchmarks, one after the other, into docs/benchmarks.csv, .md and the figure (make bench).

    python benchmarks/run.py
    python benchmarks/run.py --only scan steps      # these anew, the others as they were
    python benchmarks/run.py --quick                # toy sizes, into runs/benchmarks-quick

Every part is a script of this folder and runs in a fresh process. The files are written after
each part, so that an interrupted run keeps what is finished. Rows of another machine are dropped.
"""

from __future__ import annotations

import argparse
import ast
import csv
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import length
import torch
from goals import met
from measure import (
    TEXTS,
    Row,
    apart,
    columns,
    digits,
    machine,
    peak_rates,
    ratios,
    read_rows,
)
from rich.console import Console

from chasm.errors import DataError
from chasm.io import atomic_path, write_text
from chasm.progress import console

HERE = Path(__file__).parent
PARTS = {
    "scan": "Selective scan, forward and backward",
    "steps": "A training step at paper size",
    "length": "Cost of Stage 1 by the number of tokens",
    "loading": "Data loading",
    "prepare": "Preparing a subject",
    "extract": "Extracting tokens",
    "ridge": "Ridge regression",
    "ablations": "The ablation runner",
}
"""Title of each part, in the order in which they run."""

FIGURE = "benchmarks_length.png"


@dataclass(frozen=True)
class Recorded:
    """A row, and when, where and by which revision it was measured."""

    row: Row
    date: str
    revision: str
    processor: str
    threads: int


def read_csv(path: Path) -> list[Recorded]:
    """Read what `write_csv` wrote; nothing where there is no such file.

    Raises
    ------
    DataError
        If it is something else.
    """
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        try:
            return [_recorded(line) for line in csv.DictReader(stream)]
        except (KeyError, ValueError) as error:
            raise DataError(path, f"is no table of benchmarks ({error})", "Delete it.") from error


def _recorded(line: dict[str, str]) -> Recorded:
    values: dict[str, Any] = {field.name: line[field.name] for field in fields(Row)}
    for name in ("seconds", "memory_mb", "bytes", "flops"):
        values[name] = float(values[name]) if values[name] else None
    values["reference"] = values["reference"] or None
    return Recorded(
        Row(**values), line["date"], line["revision"], line["processor"], int(line["threads"])
    )


def write_csv(found: Sequence[Recorded], path: Path) -> None:
    """Write rows with their ratios to the reference; missing values are empty."""
    relative = ratios([one.row for one in found])
    lines = []
    for one in found:
        row = one.row
        faster, smaller = relative[row.part, row.case, row.way]
        extra = {"times_faster": faster, "times_smaller": smaller}
        extra |= {k: v for k, v in asdict(one).items() if k != "row"}
        lines.append({k: "" if v is None else v for k, v in (asdict(row) | extra).items()})
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


# The page.


def page(found: Sequence[Recorded], here: dict[str, Any], quick: bool = False) -> str:
    """Write docs/benchmarks.md from the rows; nothing in it is typed by hand."""
    rows = [one.row for one in found]
    rates = {row.case: row for row in rows if row.part == "machine"}
    versions = ", ".join(f"{name} {value}" for name, value in here["versions"].items())
    lines = [
        "# Benchmarks" + " (QUICK: toy sizes, a test of the scripts)" * quick,
        "",
        "Written by `make bench` (`python benchmarks/run.py`); do not edit. The same figures are in"
        " [benchmarks.csv](benchmarks.csv), those of a GPU in [benchmarks_gpu.md](benchmarks_gpu.md"
        ").",
        "",
        f"- Machine: {here['processor']}, {here['cores']} cores, {here['memory_gb']} GB, "
        f"{here['system']}",
        f"- Versions: {versions}",
        *_rate_lines(rates),
        "",
        "Times are medians, ways taking turns; memory is the peak above what was there before. "
        "Ratios are to the way named beside them. The roofline bound is the longer of operations / "
        "matrix-product rate and bytes / copy rate, with the rates measured here; the column says "
        "how much of the time the bound explains.",
        "",
        "## Goals",
        "",
        *_goal_lines(rows),
    ]
    for part, title in PARTS.items():
        mine = [one for one in found if one.row.part == part]
        lines += ["", f"## {title}", ""]
        lines += _part_lines(part, mine, rates) if mine else ["Not measured yet."]
    return "\n".join(lines) + "\n"


def _rate_lines(rates: dict[str, Row]) -> list[str]:
    if not rates:
        return []
    flops, moved = rates["matrix product"], rates["copy"]
    assert flops.flops is not None
    assert moved.bytes is not None
    return [
        f"- Measured here: {flops.flops / flops.seconds / 1e9:.0f} GFLOP/s (float32 matrix product)"
        f", {moved.bytes / moved.seconds / 1e9:.1f} GB/s (copy, read and written)"
    ]


def _goal_lines(rows: Sequence[Row]) -> list[str]:
    lines = ["| goal | wanted | found | |", "|---|---|---|---|"]
    for goal in met(rows):
        verdict = {True: "met", False: "**not met**", None: "not measured"}[goal.met]
        lines.append(f"| {goal.text} | {goal.wanted} | {goal.found} | {verdict} |")
    return lines


def _part_lines(part: str, found: Sequence[Recorded], rates: dict[str, Row]) -> list[str]:
    rows = [one.row for one in found]
    first = found[0]
    shown = columns(rows)
    note = shown.pop("note", None)
    work = {
        "GFLOP": [_scaled(row.flops) for row in rows],
        "GB": [_scaled(row.bytes) for row in rows],
        "of roofline": [_share(row, rates) for row in rows],
    }
    shown |= {name: cells for name, cells in work.items() if any(cells)}
    shown |= {"note": note} if note else {}
    lines = [
        f"`python benchmarks/{part}.py`, {first.threads} threads, revision {first.revision}, "
        f"{first.date}.",
        "",
        *explained(part),
        "",
        "| " + " | ".join(shown) + " |",
        "|" + "".join("---|" if n in TEXTS else "---:|" for n in shown),
    ]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*shown.values(), strict=True)]
    if part == "length":
        slopes = [f"{way} {slope:.2f}" for way, slope in length.exponents(rows).items()]
        lines += ["", f"Time grows as tokens to the power of: {', '.join(slopes)}.", ""]
        lines += [f"![Time of a forward and backward pass over tokens]({FIGURE})"]
    return lines


def explained(part: str) -> list[str]:
    """Give what a script's docstring says after its first line, commands left out."""
    text = ast.get_docstring(ast.parse((HERE / f"{part}.py").read_text(encoding="utf-8"))) or ""
    paragraphs = text.split("\n\n")[1:]
    said = [" ".join(one.split()) for one in paragraphs if not one.startswith("    ")]
    return "\n\n".join(said).split("\n")


def _scaled(value: float | None) -> str:
    return "" if value is None else digits(value / 1e9)


def _share(row: Row, rates: dict[str, Row]) -> str:
    """Say which share of a row's time its roofline bound is."""
    bounds = []
    for name, work in (("matrix product", row.flops), ("copy", row.bytes)):
        rate = rates.get(name)
        if work is not None and rate is not None:
            bounds.append(work / ((rate.flops or rate.bytes or 0) / rate.seconds))
    return f"{100 * max(bounds) / row.seconds:.0f} %" if bounds and row.seconds > 0 else ""


# Running.


def rate_rows(threads: int, quick: bool) -> list[Row]:
    """Measure the rates of the roofline, as rows of the part "machine"."""
    rates = peak_rates(threads, *((256, 4) if quick else ()))
    return [
        Row("machine", "matrix product", "float32", 1e9 / rates["flops"], flops=1e9),
        Row("machine", "copy", "float32", 1e9 / rates["bytes"], bytes=1e9),
    ]


def run_part(part: str, given: argparse.Namespace) -> list[Row]:
    """Run a script in a fresh process and give its rows."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        arguments = ["--json", out, "--threads", given.threads, *["--quick"] * given.quick]
        apart(HERE / f"{part}.py", *arguments, answer=False)
        return read_rows(out)


def save(
    found: Sequence[Recorded], folder: Path, here: dict[str, Any], quick: bool = False
) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(found, folder / "benchmarks.csv")
    rows = [one.row for one in found if one.row.part == "length"]
    if rows:
        length.draw(rows, folder / FIGURE)
    write_text(folder / "benchmarks.md", page(found, here, quick))


def main() -> int:
    """Run the parts, write the files, show the goals."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--quick", action="store_true", help="toy sizes: a test of the scripts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where to write (docs)")
    given = parser.parse_args()
    folder = given.folder or (
        Path("runs/benchmarks-quick") if given.quick else HERE.parent / "docs"
    )
    here = machine()
    stamp = (here["date"], here["revision"] or "", here["processor"], given.threads)
    found = [one for one in read_csv(folder / "benchmarks.csv") if one.processor == stamp[2]]

    def replace(part: str, rows: list[Row]) -> None:
        found[:] = [one for one in found if one.row.part != part]
        found.extend(Recorded(row, *stamp) for row in rows)
        found.sort(key=lambda one: ["machine", *PARTS].index(one.row.part))
        save(found, folder, here, given.quick)

    replace("machine", rate_rows(given.threads, given.quick))
    failed = []
    for number, part in enumerate(given.only, 1):
        console.print(f"{number} of {len(given.only)}: {PARTS[part]}", markup=False)
        try:
            replace(part, run_part(part, given))
        except RuntimeError as error:
            failed.append(part)
            console.print(f"{part} failed: {error}", markup=False)
    for line in _goal_lines([one.row for one in found])[2:]:
        Console().print(line.strip("| "), markup=False, soft_wrap=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
