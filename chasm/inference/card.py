"""The model card: what a model was trained on, how well it does, and what it is not for."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from chasm.errors import DataError
from chasm.evaluation.catalogue import METRICS, label_of
from chasm.evaluation.predictions import MAIN_TARGET, PredictionFile
from chasm.inference.trained import UNKNOWN, TrainedModel
from chasm.io import sha256_of_file

log = logging.getLogger(__name__)

SHOWN = (
    "noise_normalised_r2", "pattern_correlation", "voxelwise_correlation_mean", "r2", "mse",
)  # fmt: skip
"""Columns of the card's table; a run's report has them all."""

SIMULATED = (
    "**SIMULATED.** The responses this model was trained on were made by `chasm simulate`, not "
    "measured. It says nothing about any brain."
)
UNTRAINED = "**UNTRAINED backbone.** Its image features come from random weights."

USE = """\
Predicting the responses of this one subject to natural images, for research: comparing
encoding models, choosing stimuli, generating hypotheses about regions. Predictions are means
expected over repeats, in z-scored units; their variance over images is smaller than that of
measured responses. They are not measurements, do not transfer to other people, and are no basis
for any clinical or personal decision. Images unlike the training images are extrapolation."""

NSD_TERMS = """\
The code is Apache-2.0. The weights were estimated from the Natural Scenes Dataset (Allen et al.
2022), whose terms ask every user to agree to them, restrict use to research and forbid
redistribution of the data. This folder holds no images and no responses, but per-voxel
statistics (places, ncsnr, ROI labels) of one participant and a model of that participant's
responses: hand it on only within what those terms allow, and cite the data set."""
SIMULATED_TERMS = "Code and weights are Apache-2.0; no measured data stand behind them."
OTHER_TERMS = """\
The code is Apache-2.0. The weights were estimated from the data set named above; whoever hands
this folder on has to make sure that the terms of that data set allow it."""


def model_card(trained: TrainedModel) -> str:
    """Write the card of a model in Markdown."""
    facts = trained.facts
    parts = [_front_matter(facts), f"# {trained.title}", *_warnings(trained)]
    parts += ["## What it was trained on", _table(_training_facts(trained))]
    parts += ["## Scores", _scores(trained)]
    parts += ["## Use", USE, f"```python\n{_EXAMPLE}\n```"]
    parts += ["## Licence", _terms(facts)]
    parts += ["## Provenance", _table(_provenance(facts))]
    return "\n\n".join(parts) + "\n"


_EXAMPLE = """\
from chasm.inference import Encoder

encoder = Encoder.from_checkpoint("this/folder")
found = encoder.predict("folder/of/images", parcels=True)
found.voxels        # (images, voxels), z-scored
found.voxel_table   # where each voxel is: i, j, k, ncsnr, roi:<atlas>"""


def _front_matter(facts: Mapping[str, Any]) -> str:
    tags = ["fmri", "encoding-model", "vision", *(["simulated"] if facts.get("simulated") else [])]
    licence = "apache-2.0" if facts.get("simulated") else "other"
    return "\n".join(
        [
            "---",
            "library_name: chasm-fmri",
            f"license: {licence}",
            f"tags: [{', '.join(tags)}]",
            "---",
        ]
    )


def _warnings(trained: TrainedModel) -> list[str]:
    found = [str(note) for note in trained.facts.get("notes", ())]
    if trained.facts.get("simulated"):
        found.append(SIMULATED)
    if trained.facts.get("weights") == "UNTRAINED":
        found.append(UNTRAINED)
    if not trained.space.known:
        found.append(
            "**The voxels are unknown**: `voxels.csv` has no places, no ncsnr and no ROI labels, "
            "so no maps can be drawn."
        )
    return found


def _training_facts(trained: TrainedModel) -> dict[str, Any]:
    facts, sizes = trained.facts, trained.module.sizes
    split = facts.get("split") or {}
    assert sizes is not None
    return {
        "Model": f"{facts['model']} (recipe {facts.get('recipe') or UNKNOWN})",
        "Data set": f"{facts['dataset']}{', simulated' if facts.get('simulated') else ''}",
        "Subject": facts["subject"],
        "Betas": facts.get("beta_version") or None,
        "Responses": _responses(facts),
        "Outputs": f"{sizes.n_voxels} voxels, {sizes.n_parcels} parcels; predicts each "
        f"{facts.get('unit') or UNKNOWN}",
        "Split": split.get("name"),
        "Images": f"{split['train']} to train, {split['validation']} to select the checkpoint, "
        f"{split['test']} held out to test" if "train" in split else None,
        "Backbone": f"{trained.backbone.model}, frozen",
        "Its weights": facts.get("weights"),
        "Parameters": sum(p.numel() for p in trained.module.parameters()),
    }  # fmt: skip


def _responses(facts: Mapping[str, Any]) -> str:
    how = {"train": "of the train images", "all": "of all images, test images included"}
    samples = {"image_means": ", repeats averaged", "trials": ", single trials"}
    statistics = how.get(str(facts.get("statistics")), UNKNOWN)
    return f"z-scored per session with statistics {statistics}" + samples.get(
        str(facts.get("samples")), ""
    )


def _provenance(facts: Mapping[str, Any]) -> dict[str, Any]:
    trained = facts.get("trained") or {}
    flat = {
        "Seed": facts.get("seed"),
        "Trained": facts.get("finished"),
        "Epochs": trained.get("epochs"),
        "Selected by": trained.get("selected_by"),
        "Code": facts.get("git_revision"),
    }
    versions = facts.get("versions") or {}
    flat["Versions"] = ", ".join(f"{name} {number}" for name, number in versions.items()) or None
    for name, value in (facts.get("fingerprints") or {}).items():
        flat[f"Fingerprint of the {name}"] = f"`{value}`"
    return flat


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {_plain(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _plain(value: Any) -> str:
    return UNKNOWN if value is None else str(value).replace("|", "\\|")


def _terms(facts: Mapping[str, Any]) -> str:
    if facts.get("simulated"):
        return SIMULATED_TERMS
    return NSD_TERMS if facts.get("source") == "nsd" else OTHER_TERMS


# Scores.


def _scores(trained: TrainedModel) -> str:
    frame = None if trained.run is None else _score_frame(trained.run, trained.facts)
    if frame is None:
        return "Not tested: no scores on held-out images were there when this card was written."
    unit = str(frame["unit"].iloc[0])
    known = set(frame.loc[frame["value"].notna(), "metric"]) & METRICS.keys()
    metrics = [metric for metric in SHOWN if metric in known]
    header = " | ".join(label_of(metric, unit, short=True) for metric in metrics)
    lines = [f"| | {header} |", "|---|" + "--:|" * len(metrics)]
    for name, part in frame.groupby("row", sort=False):
        shown = f"**{name!s}**" if part["kind"].iloc[0] == "model" else str(name)
        lines_of = _by_metric(part)
        cells = [_cell(lines_of[m], "value", "low", "high") for m in metrics]
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_differences(frame, unit), "", _METHOD.format(unit=unit)])


_METHOD = (
    "On the test images, over all {unit}s, repeats averaged; in brackets 95 % bootstrap intervals "
    "over images. The mean pattern ignores the image; the noise ceiling is the most that the "
    "noise of the measurements allows. Baselines see the same image features."
)


def _differences(frame: pd.DataFrame, unit: str) -> list[str]:
    """One sentence per model: its difference to the best baseline, on the same resamples.

    It is in noise-normalised R², or in R² where no noise ceiling is known, as the best baseline.
    """
    found = []
    for name, part in frame[frame["kind"] == "model"].groupby("row", sort=False):
        lines = _by_metric(part)
        for metric in ("noise_normalised_r2", "r2"):
            line = lines.get(metric)
            if line is not None and pd.notna(line["difference"]):
                cell = _cell(line, "difference", "difference_low", "difference_high")
                label = label_of(metric, unit, short=True)
                found.append(f"{name} − {line['best_baseline']} (best baseline), {label}: {cell}.")
                break
    return found


def _by_metric(part: pd.DataFrame) -> dict[str, Mapping[str, Any]]:
    lines: Any = part.to_dict("records")
    return {str(line["metric"]): line for line in lines}


def _cell(line: Mapping[str, Any], value: str, low: str, high: str) -> str:
    if pd.isna(line[value]):
        return "–"
    text = f"{line[value]:.3f}"
    return text if pd.isna(line[low]) else f"{text} [{line[low]:.3f}, {line[high]:.3f}]"


def _score_frame(run: Path, facts: Mapping[str, Any]) -> pd.DataFrame | None:
    """Scores over all units against the main target, if they are this checkpoint's."""
    scores, predictions = run / "report" / "scores.csv", run / "predictions.h5"
    if not scores.is_file() or not predictions.is_file():
        return None
    try:
        made_by = PredictionFile.read(predictions).info.fingerprints.get("checkpoint")
        signature = json.loads((run / "report" / "scores.json").read_text(encoding="utf-8"))
        current = signature["predictions_sha256"] == sha256_of_file(predictions)
        frame = pd.read_csv(scores, keep_default_na=True)
        frame = frame[(frame["target"] == MAIN_TARGET) & (frame["level"] == "all")]
    except (DataError, OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the card has no scores: %s", error)
        return None
    if made_by != facts["fingerprints"]["checkpoint"] or not current or frame.empty:
        log.warning("the card has no scores: those in %s are not of this checkpoint", run)
        return None
    return frame
