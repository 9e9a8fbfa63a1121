"""From runs to what the effects are computed from: coalitions, interchange, further conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from ablations.passes import Passes
from ablations.suite import Condition, Suite
from ablations.values import COALITIONS, CoalitionValues, FloatArray, TestSet
from chasm.data.datamodule import NSDDataModule
from chasm.errors import ConfigError, DataError
from chasm.evaluation.prediction_parts import Membership, voxel_membership
from chasm.evaluation.reading import OpenedRun, Reading
from chasm.evaluation.regions import make_regions
from chasm.interventions import Intervention, derangements
from chasm.models.sites import Stream, sites_of
from chasm.noise_ceiling import noise_ceiling
from chasm.progress import track
from chasm.training.base import EncodingModule
from chasm.training.linear_module import LinearModule

GROUPS = "groups"
"""Atlas of the groups that a user defines."""


def read_test_set(
    model: EncodingModule, data: NSDDataModule, suite: Suite, groups: Path | None, n_boot: int
) -> TestSet:
    """Read the test responses, their ceilings and where they are scored.

    Parameters
    ----------
    model, data
        Of the run; the data are set up for testing.
    suite
        Of which the two sets of regions are taken.
    groups
        Table (CSV) with columns ``unit`` and ``group``, see `read_groups`; None for the atlases.
    n_boot
        Resamples.

    Raises
    ------
    DataError
        The table of groups cannot be used.
    """
    reading = Reading(model, data)
    train, test = data.dataset("train"), data.dataset("test")
    units = reading.units()
    membership = reading.membership()
    if groups is not None:
        membership = {GROUPS: _membership(reading, read_groups(groups, data.store.n_voxels))}
    name = "unit" if data.store.source == "arrays" and model.unit == "voxel" else model.unit
    return TestSet(
        subject=data.store.subject,
        dataset=data.store.dataset,
        simulated=data.store.simulated,
        unit=name,
        target=reading.responses(test, "mean"),
        train_mean=reading.responses(train, "mean").mean(axis=0, dtype=np.float64),
        ceiling=noise_ceiling(units.ncsnr, test.repeats),
        regions=make_regions(units, membership),
        early=suite.early,
        higher=suite.higher,
        seed_of_bootstrap=0,
        n_boot=n_boot,
    )


def read_groups(path: Path, n_units: int) -> tuple[np.ndarray, dict[int, str]]:
    """Read which group every unit of a store belongs to.

    Parameters
    ----------
    path
        CSV with the columns ``unit`` (0-based, in the store's order) and ``group`` (a name);
        units that are not listed are in none.
    n_units
        Units of the store.

    Returns
    -------
    labels : ndarray
        (units,), 0 in no group, k in group k.
    names : dict
        k to name.

    Raises
    ------
    DataError
        The file cannot be read, lacks a column, or names a unit twice or out of range.
    """
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise DataError(path, f"cannot be read ({error})", "Give a CSV file.") from error
    if not {"unit", "group"} <= set(table.columns):
        have = ", ".join(map(str, table.columns))
        raise DataError(path, f"has columns {have}", "Give the columns unit and group.")
    found = pd.to_numeric(table["unit"], errors="coerce")
    wrong = table["unit"][~((found >= 0) & (found < n_units) & (found % 1 == 0))]
    if len(wrong) or found.duplicated().any() or table["group"].isna().any():
        what = wrong.iloc[0] if len(wrong) else "one twice, or one without a group"
        raise DataError(
            f"{path}:unit", f"names {what}", f"List different units from 0 to {n_units - 1}."
        )
    names = {k: str(name) for k, name in enumerate(pd.unique(table["group"]), start=1)}
    keys = {name: k for k, name in names.items()}
    labels = np.zeros(n_units, np.int64)
    labels[found.to_numpy(np.int64)] = [keys[str(name)] for name in table["group"]]
    return labels, names


def _membership(reading: Reading, groups: tuple[np.ndarray, dict[int, str]]) -> Membership:
    labels, names = groups
    if not reading.parcels:
        return voxel_membership(labels, names)
    counts = reading.parcellation.roi_weights(labels, names).numpy()
    return Membership(counts.astype(np.int64), tuple(names.values()))


def check_run(run: Path, opened: OpenedRun) -> None:
    """Refuse a checkpoint that may have seen the test images.

    Raises
    ------
    DataError
        It does not say which images it was selected on, or they are test images.
    """
    facts = opened.model.trained_on
    where = run / "checkpoints" / "best.ckpt"
    if facts is None or not len(facts["validation"]):
        raise DataError(
            where,
            "it names no validation images, so it may have been selected on the test images",
            "Train it with `chasm fit`.",
        )
    test = torch.from_numpy(opened.data.data_split.test.astype("int64"))
    for part in ("train", "validation"):
        n = int(torch.isin(facts[part], test).sum())
        if n:
            raise DataError(
                where, f"{n} of its {part} images are test images", "Train it on this split."
            )


@dataclass(frozen=True)
class Gathered:
    """What one model gives, and what could not be done to it."""

    values: CoalitionValues
    left_out: Mapping[str, str]


def gather(
    model: EncodingModule, data: NSDDataModule, suite: Suite, seed: int, device: torch.device
) -> Gathered:
    """Predict the test images under everything that a suite says.

    Parameters
    ----------
    model, data
        Of a run; the data are set up.
    suite
        What is done.
    seed
        Of the training.
    device
        Where to compute.

    Raises
    ------
    ConfigError
        The model lacks a site that the suite names (its sites are listed). A linear encoder
        has fewer; what it lacks is left out.
    """
    linear = isinstance(model, LinearModule)
    if suite.stage == "stage2" and not linear and not model.needs_stage1:
        raise ConfigError(
            f"suite {suite.name}",
            f"it is made for a Stage 2, {model.row_name} is none",
            "Name a run of a Stage 2.",
        )
    removal = {stream: suite.removal(model, stream) for stream in _STREAMS}
    conditions, left_out = _conditions(model, suite.conditions, linear)
    passes = Passes(model, data, Reading(model, data).sorted_units, device)
    passes.prepare(
        [one for part in removal.values() for one in part]
        + [one for done, _ in conditions.values() for one in done]
    )
    held = None
    clean_gate = (Intervention("gate", "clean"),) if "gate" in sites_of(model) else ()
    predictions = _coalitions(passes, removal, ())
    if clean_gate:
        held = _coalitions(passes, removal, clean_gate)
    extra = {
        name: _repeated(passes, done, repeats)
        for name, (done, repeats) in track(
            conditions.items(), f"conditions of {model.row_name}", len(conditions)
        )
    }
    kind: Literal["model", "linear"] = "linear" if linear else "model"
    interchange = _interchange(passes, removal["global"], suite) if suite.interchange else None
    model.cpu()
    found = CoalitionValues(model.row_name, kind, seed, predictions, held, interchange, extra)
    return Gathered(found, left_out)


_STREAMS: tuple[Stream, ...] = ("local", "global")


def _coalitions(
    passes: Passes,
    removal: Mapping[Stream, Sequence[Intervention]],
    always: Sequence[Intervention],
) -> dict[str, FloatArray]:
    """Predictions with the streams of every coalition intact, the others removed."""
    found = {}
    for coalition in COALITIONS:
        intact = _STREAMS if coalition == "both" else (coalition,)
        gone = [one for stream in _STREAMS if stream not in intact for one in removal[stream]]
        found[coalition] = passes.predict([*gone, *always])
    return found


def _interchange(
    passes: Passes, of_global: Sequence[Intervention], suite: Suite
) -> tuple[FloatArray, np.ndarray] | None:
    """Predictions from the global stream of one image and the local stream of another."""
    n = min(suite.donors, passes.n_images - 1)
    if n < 1:
        return None
    donor = derangements(passes.n_images, n).numpy()
    put_in = [Intervention(one.site, "value") for one in of_global]
    shown = track(donor, f"interchange of {passes.model.row_name}", n)
    return np.stack([passes.predict(put_in, row) for row in shown]), donor


def _repeated(passes: Passes, done: Sequence[Intervention], repeats: int) -> FloatArray:
    """Mean prediction over repeats, each with other donors and another seed."""
    resampled = any(one.operation in ("resample", "value") for one in done)
    if resampled:
        repeats = min(repeats, passes.n_images - 1)
        donors: Sequence[np.ndarray | None] = list(derangements(passes.n_images, repeats).numpy())
    else:
        donors = [None] * repeats
    total: FloatArray | None = None
    for k, donor in enumerate(donors):
        varied = [replace(one, seed=one.seed + k) for one in done]
        found = passes.predict(varied, donor).astype(np.float64)
        total = found if total is None else total + found
    assert total is not None
    return total / len(donors)


def _conditions(
    model: EncodingModule, conditions: Sequence[Condition], linear: bool
) -> tuple[dict[str, tuple[tuple[Intervention, ...], int]], dict[str, str]]:
    """Say what every condition does to this model; of a linear one, what cannot be done."""
    have = sites_of(model)
    found: dict[str, tuple[tuple[Intervention, ...], int]] = {}
    left_out: dict[str, str] = {}
    for one in conditions:
        done = one.on(model)
        missing = [part.site for part in done if part.site not in have]
        if missing and not linear:
            raise ConfigError(
                f"{one.name}: site {missing[0]}",
                f"{model.row_name} has no such site",
                f"Its sites: {', '.join(have)}.",
            )
        if missing:
            left_out[one.name] = f"{model.row_name} has no site {missing[0]}"
        elif one.each_token:
            assert model.sizes is not None
            for token in range(model.sizes.n_cls):
                single = tuple(replace(part, tokens=(token,)) for part in done)
                found[f"{one.name} {token + 1} of {model.sizes.n_cls}"] = single, one.repeats
        else:
            found[one.name] = done, one.repeats
    return found, left_out
