"""From one predictions file to scores, intervals, tables, figures and the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chasm.evaluation.report import evaluate as evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    """Import `evaluate`, and the plotting libraries with it, when it is first used."""
    if name == "evaluate":
        from chasm.evaluation.report import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
