"""What a suite found in one subject, and the tidy rows that tables and figures are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch

from ablations.claims import Claim, Replication, claim, combine
from ablations.effects import POOLED, Effects, pooled
from ablations.significance import adjust
from ablations.values import CoalitionValues, FloatArray, TestSet, region_key
from chasm.errors import ConfigError
from chasm.evaluation.bootstrap import image_means, interval, resample_counts
from chasm.evaluation.page import Surroundings
from chasm.evaluation.regions import MIN_PATTERN_UNITS, Region
from chasm.metrics import pattern_correlation

PAPER_CONDITIONS: Mapping[str, str] = {
    "full": "both",
    "patches only": "local",
    "swapped": "swapped",
    "CLS only": "global",
}
"""Rows of the published ablation, by the coalition or further condition that repeats them."""

PATTERN = "pattern_correlation"
"""Scale of the rows of `pattern_frame`; their quantities begin with it."""

GROUP_ATLAS = "streams"
"""Atlas that Early, Mid and Higher are sums of."""


@dataclass(frozen=True)
class Findings:
    """What a suite found in the encoders of one subject.

    Attributes
    ----------
    suite
        Its name.
    effects
        Effects of every encoder, with the test images.
    values
        What they were computed from, for the pattern correlations; may be empty.
    null_p
        Encoder to p of its asymmetry against simulated null worlds
        (`ablations.worlds_null.null_p`); None or absent where it was not compared with any.
    claims, replications
        Encoder to what may be claimed of it, and to the subjects that show the same; made by
        `judged`.
    planted
        Local share that was planted, by region (``atlas:name``); None where it is not known.
    recipe
        The suite as YAML.
    weights
        Label of the backbone's weights, e.g. ``UNTRAINED``; empty where it is not known.
    surroundings
        Volume and background of the brain maps, provenance; see the class.
    """

    suite: str
    effects: Effects
    values: Sequence[CoalitionValues] = ()
    null_p: Mapping[str, float | None] = field(default_factory=dict)
    claims: Mapping[str, Claim] = field(default_factory=dict)
    replications: Mapping[str, Replication] = field(default_factory=dict)
    planted: Mapping[str, float] | None = None
    recipe: str = ""
    weights: str = ""
    surroundings: Surroundings = Surroundings()  # noqa: RUF009 (frozen)

    @property
    def test(self) -> TestSet:
        """The test images."""
        return self.effects.test

    @property
    def encoders(self) -> dict[str, str]:
        """Encoder to its model class, the models first."""
        frame = self.effects.frame.drop_duplicates("encoder")
        names = dict(zip(frame["encoder"], frame["model_class"], strict=True))
        return dict(sorted(names.items(), key=lambda item: item[1] != "model"))

    @property
    def scale(self) -> str:
        """``ceiling`` where anything could be divided by a noise ceiling, else ``r2``."""
        frame = self.effects.frame
        known = frame.loc[frame["scale"] == "ceiling", "value"].notna().any()
        return "ceiling" if known else "r2"

    @property
    def title(self) -> str:
        """SIMULATED where it is so, the subject and the data: begins titles and headlines."""
        return f"{self.mark}{self.test.subject} ({self.test.dataset})"

    @property
    def mark(self) -> str:
        """``SIMULATED · `` or nothing: stands before the title of every table and figure."""
        return "SIMULATED · " if self.test.simulated else ""

    def seeds(self, encoder: str) -> list[str]:
        """Training seeds of an encoder."""
        frame = self.effects.frame
        found = frame.loc[frame["encoder"] == encoder, "seed"].unique()
        return [seed for seed in found if seed != POOLED]

    def rows(self, encoder: str, seed: str | None = None) -> pd.DataFrame:
        """Rows of an encoder with one seed; without `seed` those pooled over all of its seeds."""
        frame = self.effects.frame
        frame = self._pooled if seed is None else frame[frame["seed"] == seed]
        return frame[frame["encoder"] == encoder]

    @cached_property
    def _pooled(self) -> pd.DataFrame:
        return pooled(self.effects.frame)

    @cached_property
    def patterns(self) -> pd.DataFrame:
        """See `pattern_frame`."""
        return pattern_frame(self)

    def planted_share(self, atlas: str, region: str) -> float:
        """Local share planted in a region; NaN where it is not known."""
        return float((self.planted or {}).get(f"{atlas}:{region}", np.nan))


def judged(found: Sequence[Findings]) -> list[Findings]:
    """Give the findings of several subjects with q over all of them, and with their claims.

    Raises
    ------
    ConfigError
        A subject is given twice, or a `null_p` is not between 0 and 1.
    """
    names = [one.test.subject for one in found]
    if len(set(names)) < len(names):
        raise ConfigError(
            "report", f"a subject is given twice: {', '.join(names)}", "Give every subject once."
        )
    whole = adjust([one.effects.frame for one in found])
    encoders = dict.fromkeys(name for one in found for name in one.encoders)
    counted = {name: _replication(found, name) for name in encoders}
    replications = {name: count for name, count in counted.items() if count is not None}
    result = []
    for one in found:
        frame = whole[whole["subject"] == one.test.subject].reset_index(drop=True)
        effects = replace(one.effects, frame=frame)
        claims = {
            name: claim(effects, encoder=name, null_p=one.null_p.get(name)) for name in one.encoders
        }
        result.append(replace(one, effects=effects, claims=claims, replications=replications))
    return result


def _replication(found: Sequence[Findings], encoder: str) -> Replication | None:
    """Count over subjects that have the encoder; None where none has an asymmetry."""
    frames = [one.effects.frame for one in found if encoder in one.encoders]
    known = any(
        frame.loc[frame["quantity"] == "asymmetry", "low"].notna().any() for frame in frames
    )
    return combine(frames, encoder) if known else None


def planted_shares(rois: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """Give the local share of every region from the planted truth of a simulated subject.

    Parameters
    ----------
    rois
        ``rois`` of `chasm.data.simulation.Truth`: atlas to name to ``{"local_share": ...}``.
    """
    atlases = {"groups": GROUP_ATLAS}
    shares = {
        f"{atlases.get(atlas, atlas)}:{name}": float(facts["local_share"])
        for atlas, regions in rois.items()
        for name, facts in regions.items()
        if "local_share" in facts
    }
    whole = rois.get("nsdgeneral", {})
    for facts in whole.values():
        shares[":all"] = float(facts["local_share"])
    return shares


def pattern_frame(findings: Findings) -> pd.DataFrame:
    """Pattern correlation of the published ablation's conditions, in all units and the groups.

    Returns
    -------
    DataFrame
        Columns of `ablations.effects.Effects.frame`; the quantity is
        ``pattern_correlation:<condition>``, the mean over images (and seeds), with a percentile
        interval over images.
    """
    test = findings.test
    regions = [region for region in test.regions if region.level in ("all", "group")]
    counts = resample_counts(test.n_images, test.n_boot, test.seed_of_bootstrap)
    lines = []
    for encoder, model_class in findings.encoders.items():
        mine = [one for one in findings.values if one.encoder == encoder]
        if not mine:
            continue
        seed = findings.rows(encoder)["seed"].iloc[0]
        for label, name in PAPER_CONDITIONS.items():
            given = [table[name] for one in mine if name in (table := _conditions(one))]
            if not given:
                continue
            for region in regions:
                line = _facts(findings, encoder, model_class, seed, region)
                line |= _pattern_line(given, region, test, counts)
                lines.append(line | {"quantity": f"{PATTERN}:{label}"})
    return pd.DataFrame(lines, columns=findings.effects.frame.columns)


def _conditions(one: CoalitionValues) -> dict[str, FloatArray]:
    return {**one.predictions, **one.extra}


def _facts(
    findings: Findings, encoder: str, model_class: str, seed: Any, region: Region
) -> dict[str, Any]:
    test = findings.test
    return {
        "subject": test.subject,
        "dataset": test.dataset,
        "simulated": test.simulated,
        "encoder": encoder,
        "model_class": model_class,
        "seed": seed,
        "level": region.level,
        "atlas": region.atlas,
        "region": region.name,
        "n_units": len(region.members),
        "n_voxels": region.n_voxels,
        "gate": "free",
        "scale": PATTERN,
    }


def _pattern_line(
    predictions: Sequence[FloatArray], region: Region, test: TestSet, counts: FloatArray
) -> dict[str, Any]:
    """Mean over seeds and images, interval and status of a region's pattern correlation."""
    nothing = {"value": np.nan, "low": np.nan, "high": np.nan}
    if len(region.members) < MIN_PATTERN_UNITS:
        reason = f"fewer than {MIN_PATTERN_UNITS} {test.unit}s lie mostly in the region"
        return nothing | {"status": f"not estimable: {reason}"}
    true = torch.from_numpy(np.asarray(test.target[:, region.members], np.float64))
    scores = np.mean(
        [
            pattern_correlation(
                torch.from_numpy(np.asarray(prediction[:, region.members], np.float64)), true
            ).numpy()
            for prediction in predictions
        ],
        axis=0,
    )
    value = float(image_means(scores, np.ones((1, len(scores))))[0])
    if np.isnan(value):
        return nothing | {"status": "not estimable: the prediction or the target is constant"}
    low, high = (float(end) for end in interval(image_means(scores, counts)))
    return {"value": value, "low": low, "high": high, "status": "ok"}


def set_regions(test: TestSet) -> dict[str, list[str]]:
    """Names of the regions in the sets ``early`` and ``higher``, those without voxels left out."""
    names = {region_key(region): region.name for region in test.regions}
    return {
        which: [names[key] for key in keys if key in names]
        for which, keys in (("early", test.early), ("higher", test.higher))
    }
