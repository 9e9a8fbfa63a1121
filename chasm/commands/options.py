"""What commands share: parsers, kinds of values, lines for the user."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chasm.commands import COMMANDS


def make_parser(name: str, **options: Any) -> argparse.ArgumentParser:
    """Make the parser of a command, e.g. ``simulate`` or ``prepare nsd``."""
    return argparse.ArgumentParser(
        prog=f"chasm {name}",
        description=COMMANDS[name.split()[0]].purpose,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
        **options,
    )


def list_of(kind: type) -> Callable[[str], tuple[Any, ...]]:
    """Parse ``1,2,3``."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no list like 1,2,3") from error

    return parse


def take_flag(args: list[str], flag: str) -> tuple[list[str], bool]:
    """Take a flag out of arguments that another parser reads."""
    return [a for a in args if a != flag], flag in args


def show_path(path: Path, what: str = "") -> None:
    """Write a path on standard output, for people and for pipes."""
    sys.stdout.write(f"{what}{path}\n")


def show_report(run: Path) -> None:
    """Say where a run's report is."""
    show_path(run / "report" / "report.html", "Report: ")
