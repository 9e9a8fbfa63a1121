"""The report's sentences: what each number means, what can and what cannot be claimed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ablations.effects import MIN_SEEDS
from ablations.findings import Findings, set_regions
from chasm.evaluation.catalogue import MetricFacts

MEANINGS: tuple[MetricFacts, ...] = (
    MetricFacts(
        "v(∅), v(L), v(G), v(LG): value of a coalition",
        "v",
        "R² summed over the region's units, divided by their summed noise ceiling, when only the "
        "streams in brackets carry the image: L the local stream (patch tokens), G the global "
        "stream (CLS tokens). What the others deliver is replaced, by its mean over the train "
        "images unless the suite says otherwise. Without a noise ceiling: mean R².",
        "0 for the train mean.",
        "1 for v(LG).",
    ),
    MetricFacts(
        "Necessity N and sufficiency Q of a stream",
        "N, Q",
        "N: what is lost when the stream is taken away, v(LG) minus the value without it. Q: what "
        "it brings alone, its value minus v(∅).",
        "0.",
        "v(LG) − v(∅).",
    ),
    MetricFacts(
        "Shapley value φ of a stream",
        "φ",
        "Mean of N and Q, so that what both streams carry is shared equally. The two streams' φ "
        "sum to v(LG) − v(∅).",
        "0.",
        "v(LG) − v(∅).",
    ),
    MetricFacts(
        "Redundancy ρ",
        "ρ",
        "v(L) + v(G) − v(LG) − v(∅): above 0, the streams carry the same; below 0, there is "
        "synergy or suppression: both together predict more than the sum of each alone.",
        "0.",
        "v(LG) − v(∅) for two streams that carry the same.",
    ),
    MetricFacts(
        "Specialisation D",
        "D",
        "φ of the local stream minus φ of the global stream, which is v(L) − v(G). Above 0, more "
        "of the region's response is routed through the patches; below 0, through the CLS token. "
        "As a share: divided by v(LG) − v(∅). SNR-matched: on units weighed so that the early and "
        "the higher regions have the same noise ceilings.",
        "0.",
        "±(v(LG) − v(∅)); ±1 as a share.",
    ),
    MetricFacts(
        "Asymmetric specialisation I",
        "I",
        "Mean D of the early regions minus mean D of the higher regions. The two sets were fixed "
        "before any result.",
        "0.",
        "2 in shares.",
    ),
    MetricFacts(
        "Interchange T",
        "T",
        "Feeds the CLS token of one image with the patches of another and asks which of the two "
        "responses the region's prediction is closer to: above 0 that to the patches' image. "
        "Expected to equal D for a calibrated model that adds its streams.",
        "0.",
        "D, where the streams add.",
    ),
    MetricFacts(
        "Compensation",
        "Comp.",
        "Necessity with the gate held at its value for the intact image (direct) minus necessity "
        "with the gate free (total): what the gate makes up for.",
        "0.",
        "The direct effect.",
    ),
    MetricFacts(
        "q",
        "q",
        "False discovery rate of D by sign flips of the images' contributions, "
        "Benjamini–Hochberg over the regions and subjects on this page.",
        "Above .05 in 95 % of the pages whose regions have no specialisation.",
        "0.",
    ),
)


SCALE_NAMES: Mapping[str, str] = {
    "ceiling": "noise ceiling = 1",
    "share": "share of v(LG) − v(∅)",
    "matched": "SNR-matched",
    "r2": "mean R²",
}
"""What the scales are called in tables."""


def scale_note(findings: Findings) -> str:
    """Say what the numbers of the tables by region are in."""
    if findings.scale == "ceiling":
        return "In units of the noise ceiling: 1 is all that can be explained."
    return "Mean R²: no noise ceiling is known."


def method(findings: Findings) -> str:
    """Say how the intervals were made, and which seeds were trained."""
    test = findings.test
    trained = "; ".join(
        f"{encoder}: {', '.join(findings.seeds(encoder))}" for encoder in findings.encoders
    )
    seeds = f"Training seeds of {trained}."
    if test.n_boot == 0:
        return f"No intervals were computed. {seeds}"
    return (
        f"In brackets: 95 % intervals over images, {test.n_boot} bootstrap resamples shared by all "
        f"conditions, regions and encoders (seed {test.seed_of_bootstrap}). {seeds}"
    )


def claim_sentences(findings: Findings) -> list[str]:
    """Say what may be claimed, a sentence or more for each encoder."""
    return [
        findings.claims[encoder].sentence
        for encoder in findings.encoders
        if encoder in findings.claims
    ]


def replication_sentences(findings: Findings) -> list[str]:
    """Say in how many subjects the asymmetry has an interval that excludes 0, by encoder."""
    mark = "SIMULATED data, " if findings.test.simulated else ""
    sentences = []
    for name, count in findings.replications.items():
        text = count.sentence
        if not (count.positive or count.negative):
            n = len(count.subjects)
            whom = f"any of {n} subjects" if n > 1 else "the one subject"
            text = f"The interval of the asymmetry does not exclude 0 in {whom}."
        sentences.append(f"{mark}{name}: {text}")
    return sentences


def limits(findings: Findings) -> list[str]:
    """Say what the numbers of a subject do not show, the general first."""
    test = findings.test
    first = next(iter(findings.encoders))
    sentences = [
        "The interventions change the model, not the brain: D says through which stream this "
        "model predicts a region, not which information the region itself uses.",
        "The CLS token is computed from the patches, and the patches have seen the whole image: "
        "global and local name routes, not kinds of content.",
        "Redundant information is shared equally by φ, so D does not say which stream it would "
        "be learned from first.",
    ]
    if findings.test.simulated:
        sentences.insert(
            0,
            "The responses are SIMULATED: the numbers test the method and say nothing of a brain.",
        )
    sets = set_regions(test)
    if not all(sets.values()):
        sentences.append(
            "There is no set of early, or none of higher regions, so nothing is said of an "
            "asymmetry between them: D stands for each region alone."
        )
    else:
        sentences.append(
            f"Early is {', '.join(sets['early'])}; higher is {', '.join(sets['higher'])}. "
            "Another choice of regions is another question."
        )
    if all(sets.values()):
        sentences.append(calibration(findings))
    if findings.scale != "ceiling":
        sentences.append(
            "No noise ceiling is known, so values are mean R²: regions with noisier responses have "
            "smaller ones, and differences between regions may be differences in noise."
        )
    models = [name for name, kind in findings.encoders.items() if kind == "model"]
    few = [name for name in models if len(findings.seeds(name)) < MIN_SEEDS]
    if few:
        sentences.append(
            f"Fewer than {MIN_SEEDS} seeds of {', '.join(few)} were trained: intervals cover the "
            "test images, and hardly the training of another network."
        )
    if "linear" not in findings.encoders.values():
        sentences.append(
            f"No second model class was run beside {first}, so that a property of this kind of "
            "model cannot be told from one of the data."
        )
    if test.n_boot == 0:
        sentences.append("No intervals were computed, so that nothing here is tested.")
    return sentences


def calibration(findings: Findings) -> str:
    """Say whether the asymmetry was compared with simulated worlds that have none."""
    told = [
        f"p = {findings.null_p[name]:.2g} for {name}"
        for name in findings.encoders
        if findings.null_p.get(name) is not None
    ]
    missing = [name for name in findings.encoders if findings.null_p.get(name) is None]
    text = ""
    if told:
        text = (
            "The asymmetry was compared with simulated null worlds, which have these noise "
            f"ceilings and one local share everywhere: {', '.join(told)}. The worlds are those of "
            "the simulation, predicted by banded ridge. "
        )
    if missing:
        text += (
            f"The asymmetry of {', '.join(missing)} was not compared with simulated null worlds: "
            "it is uncalibrated, hence exploratory, for intervals over images do not say how "
            "large an asymmetry noise and unequal streams alone would give."
        )
    return text.rstrip()


def agreement(parts: Mapping[str, pd.DataFrame], first: str, second: str) -> str:
    """Say in how many ROIs two encoders' D have the same sign, and how they correlate.

    Parameters
    ----------
    parts
        Encoder to its rows of D on one scale, by level, atlas and region.
    first, second
        Which two.
    """
    both = parts[first].merge(parts[second], left_index=True, right_index=True).reset_index()
    both = both[both["level"] == "roi"].dropna(subset=["value_x", "value_y"])
    if both.empty:
        return f"D of {first} and {second} cannot be compared: no ROI has both."
    x, y = both["value_x"], both["value_y"]
    same = int((np.sign(x) == np.sign(y)).sum())
    text = f"D of {first} and {second} have the same sign in {same} of {len(both)} ROIs"
    if len(both) > 2 and x.std() > 0 and y.std() > 0:
        text += f"; over ROIs they correlate with r = {np.corrcoef(x, y)[0, 1]:.2f}"
    opposed = ((both["low_x"] > 0) & (both["high_y"] < 0)) | (
        (both["high_x"] < 0) & (both["low_y"] > 0)
    )
    if opposed.any():
        names = ", ".join(both.loc[opposed, "region"])
        text += f"; opposed, with both intervals excluding 0: {names}"
    return f"{text}."


def not_estimable(part: pd.DataFrame) -> str:
    """Say why numbers of some regions are missing, each reason once; empty where none is."""
    missing = part[part["status"].str.startswith("not estimable")]
    reasons = missing["status"].str.removeprefix("not estimable").str.lstrip(": ")
    groups = missing.groupby(reasons, sort=False)["region"].unique()
    texts = [f"{', '.join(regions)} ({reason})" for reason, regions in groups.items()]
    return f"Not estimable: {'; '.join(texts)}." if texts else ""


def remarks(part: pd.DataFrame) -> str:
    """Repeat what the status of estimable rows adds, e.g. that there are two seeds only."""
    told = part.loc[part["status"].str.startswith("ok:"), "status"]
    texts = told.str.removeprefix("ok:").str.strip().unique()
    return f"Note: {'; '.join(texts)}." if len(texts) else ""
