"""The report's sentences and lists of facts: main result, rows, provenance."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from chasm.evaluation import tables
from chasm.evaluation.catalogue import METRICS, fill_unit
from chasm.evaluation.prediction_parts import MAIN_TARGET, PredictionRow
from chasm.evaluation.predictions import PredictionFile
from chasm.evaluation.scores import Scores
from chasm.io import sha256_of_file


def summary(scores: Scores) -> list[str]:
    """Say the main result in sentences: each model, the best baseline, their difference.

    Then, for each part of the model that is scored alone, what the whole model adds to it.
    """
    frame = scores.frame
    frame = frame[(frame["target"] == MAIN_TARGET) & (frame["level"] == "all")]
    normalised = frame[frame["metric"] == "noise_normalised_r2"]
    share = normalised["value"].notna().any()
    table = (normalised if share else frame[frame["metric"] == "r2"]).set_index("row")
    what = "explainable variance" if share else "variance (no noise ceiling is known)"
    best = table["best_baseline"].iloc[0]
    sentences = []
    for name, line in table[table["kind"] == "model"].iterrows():
        label = str(name)[:1].upper() + str(name)[1:]
        text = f"{label} explains {_percent(line['value'])} of the {what}"
        text += _percent_interval(line["low"], line["high"]) + "."
        text += f" The best baseline, {best}, explains {_percent(float(table['value'][best]))}"
        text += f"; the difference is {100 * line['difference']:+.1f} points"
        text += _verdict(line["difference_low"], line["difference_high"])
        sentences.append(text)
    gains = scores.gains
    gains = gains[(gains["target"] == MAIN_TARGET) & (gains["level"] == "all")]
    gains = gains[gains["metric"] == ("noise_normalised_r2" if share else "r2")]
    return sentences + [_gain_sentence(line) for _, line in gains.iterrows()]


def _gain_sentence(line: pd.Series) -> str:
    name = str(line["row"])
    text = f"{name[:1].upper()}{name[1:]} minus {line['other']}: {100 * line['difference']:+.1f} "
    return text + "points" + _verdict(line["difference_low"], line["difference_high"])


def metric_facts(unit: str) -> list[dict[str, str]]:
    """List every metric with its meaning, its null and its ceiling, for this kind of unit."""
    parts = ("label", "meaning", "null", "ceiling")
    return [
        {part: fill_unit(getattr(facts, part), unit) for part in parts}
        for facts in METRICS.values()
    ]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _percent_interval(low: float, high: float) -> str:
    if not np.isfinite([low, high]).all():
        return ""
    return f" (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"


def _verdict(low: float, high: float) -> str:
    if not np.isfinite([low, high]).all():
        return "."
    interval = f" (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
    if low > 0 or high < 0:
        return f"{interval}, which does not include 0."
    return f"{interval}, which includes 0: these test images do not tell the two apart."


def row_facts(file: PredictionFile) -> list[dict[str, str]]:
    """List every row with what is known of its making."""
    own = [item for other in file.targets.values() for item in other.rows.items()]
    return [_facts_of(name, row, file.info.unit) for name, row in [*file.rows.items(), *own]]


def _facts_of(name: str, row: PredictionRow, unit: str) -> dict[str, str]:
    return {
        "name": name,
        "kind": row.kind,
        "trained_on": tables.target_name(row.trained_on, unit),
        "parameters": "–" if row.n_parameters is None else f"{row.n_parameters:,}",
        "details": "; ".join(f"{key}: {_plain(value)}" for key, value in row.details.items()),
    }


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return str(value)


def provenance_facts(
    predictions: Path, file: PredictionFile, extra: Mapping[str, Any] | None
) -> dict[str, str]:
    """List where the numbers come from; `extra` is shown as it is, nested names with a dot."""
    info = file.info
    facts: dict[str, Any] = {
        "subject": f"{info.subject} ({info.dataset}{', simulated' if info.simulated else ''})",
        "split": info.split,
        "units": _units(file),
        "test images": f"{file.n_images}, {_repeats(file)}",
        "model": info.model,
        "backbone": f"{info.backbone} (weights: {info.weights_label})",
        **{f"fingerprint of the {name}": value for name, value in info.fingerprints.items()},
        "predictions file": Path(predictions).name,
        "predictions sha256": sha256_of_file(predictions),
        "software": f"chasm {metadata.version('chasm-fmri')}, Python {platform.python_version()}",
    }
    facts |= flatten(extra or {})
    return {name: str(value) for name, value in facts.items() if value not in ("", None)}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give nested facts as one level, their names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _repeats(file: PredictionFile) -> str:
    levels, counts = np.unique(file.repeats, return_counts=True)
    if len(levels) == 1:
        return f"{levels[0]} repeats each"
    return ", ".join(f"{n} with {k} repeats" for k, n in zip(levels, counts, strict=True))


def _units(file: PredictionFile) -> str:
    unit = file.info.unit
    of = f" of {int(np.sum(file.units.size))} voxels" if unit == "parcel" else ""
    return f"{file.n_units} {unit}s{of}"
