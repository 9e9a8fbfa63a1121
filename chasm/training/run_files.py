"""What a run's folder says of itself: metrics, provenance, whether it is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from chasm.errors import DataError
from chasm.io import atomic_path


def merge_metrics(run: Path) -> None:
    """Join the logs of all attempts of a run into ``metrics.csv``, the later one wins."""
    tables = []
    for path in sorted(
        run.glob("logs/attempt-*/metrics.csv"), key=lambda p: int(p.parent.name.split("-")[1])
    ):
        try:
            table = pd.read_csv(path)
        except pd.errors.EmptyDataError:
            continue
        if "epoch" in table:  # an attempt that failed in its first step has none
            tables.append(table)
    if not tables:
        return
    joined = tables[0]
    for table in tables[1:]:
        joined = pd.concat([joined[joined["epoch"] < table["epoch"].min()], table])
    merged = joined.groupby("epoch", as_index=False).last()
    with atomic_path(run / "metrics.csv") as temporary:
        merged.to_csv(temporary, index=False)


def is_finished(run: Path) -> bool:
    """Whether training ended as its recipe says."""
    path = run / "provenance.json"
    if not path.is_file() or not (run / "checkpoints" / "best.ckpt").is_file():
        return False
    return read_provenance(run).get("status") == "finished"


def read_provenance(run: Path) -> dict[str, Any]:
    """Read a run's provenance.json."""
    path = run / "provenance.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise DataError(
            path, f"is not a run's provenance ({error})", "Train again with --fresh."
        ) from error
