"""What the effects are computed from: predictions under coalitions, and the test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from chasm.errors import ConfigError, DataError
from chasm.evaluation.regions import Region

FloatArray = NDArray[np.floating[Any]]

COALITIONS = ("none", "local", "global", "both")
"""Streams that are left intact; the others are replaced."""


@dataclass(frozen=True)
class CoalitionValues:
    """Everything that one checkpoint of an encoder says of the test images.

    Attributes
    ----------
    encoder
        Name of the row, e.g. ``stage 1``, ``stage 2``, ``banded ridge``.
    model_class
        ``model``, or ``linear``: the second class that a claim is checked on.
    seed
        Seed of the training.
    predictions
        Coalition to (images, units), the gate free (total effects).
    held
        The same with the gate held at its clean value (direct effects); None without a gate.
    interchange
        Predictions (donors, images, units) of f(CLS of image ``donor[k, j]``, patches of image
        j), and ``donor`` (donors, images), each row a derangement; None where not computed.
    extra
        Name of a further condition to (images, units).
    """

    encoder: str
    model_class: Literal["model", "linear"]
    seed: int
    predictions: Mapping[str, FloatArray]
    held: Mapping[str, FloatArray] | None = None
    interchange: tuple[FloatArray, NDArray[np.int64]] | None = None
    extra: Mapping[str, FloatArray] = field(default_factory=dict)


@dataclass(frozen=True)
class TestSet:
    """The test images of a subject, shared by all its encoders.

    Attributes
    ----------
    subject, dataset
        Names.
    simulated
        Whether the responses are simulated.
    unit
        ``voxel`` or ``parcel``, or what else a unit is.
    target
        (images, units), responses averaged over repeats.
    train_mean
        (units,), the prediction whose R² is 0.
    ceiling
        (units,), noise ceiling NC(k) in r² units; NaN where unknown.
    regions
        Where effects are summed.
    early, higher
        Keys ``atlas:name`` of the two sets of regions that the asymmetry compares, fixed before
        any result is looked at; empty where there are none.
    seed_of_bootstrap, n_boot
        Seed and number of resamples of the images; 0 resamples: no intervals.
    nc_threshold
        Units whose ceiling is at or below it are left out of ceiling-normalised values.
    """

    __test__ = False  # not a test class, whatever pytest reads from its name

    subject: str
    dataset: str
    simulated: bool
    unit: str
    target: FloatArray
    train_mean: FloatArray
    ceiling: FloatArray
    regions: tuple[Region, ...]
    early: tuple[str, ...] = ()
    higher: tuple[str, ...] = ()
    seed_of_bootstrap: int = 0
    n_boot: int = 2000
    nc_threshold: float = 0.0

    @property
    def n_images(self) -> int:
        """Number of test images."""
        return len(self.target)


def region_key(region: Region) -> str:
    """Key of a region in the sets of the asymmetry: ``atlas:name``."""
    return f"{region.atlas}:{region.name}"


def check_test_set(test: TestSet) -> None:
    """Refuse a test set whose parts do not fit together.

    Raises
    ------
    DataError
        Shapes differ, or responses are not finite.
    ConfigError
        A region is in both sets.
    """
    where = f"test set of {test.subject}"
    if not len(test.target) or not test.regions:
        raise DataError(where, "no images or no regions", "Choose at least one of each.")
    if np.ndim(test.target) != 2 or not np.isfinite(test.target).all():
        raise DataError(
            f"{where}: target",
            "it is not a finite table (images, units)",
            "Leave out images without a response, or prepare the data again.",
        )
    n_units = test.target.shape[1]
    lengths = {"train_mean": len(test.train_mean), "ceiling": len(test.ceiling)}
    lengths |= {f"region {region_key(r)}": len(r.weights) for r in test.regions}
    for name, length in lengths.items():
        if length != n_units:
            raise DataError(
                f"{where}: {name}",
                f"{length} units, the target has {n_units}",
                "Take both from the same store.",
            )
    both = sorted(set(test.early) & set(test.higher))
    if both:
        raise ConfigError(
            f"{where}: early, higher",
            f"{', '.join(both)} is in both sets",
            "Give every region to one of them.",
        )


def check_values(values: Sequence[CoalitionValues], test: TestSet) -> None:
    """Refuse predictions that are incomplete, not finite, or not of these images and units.

    Raises
    ------
    DataError
        A coalition is missing, a shape differs, a value is not finite, a donor is the image
        itself, or two checkpoints have the same encoder and seed.
    """
    seen: set[tuple[str, int]] = set()
    kinds: dict[str, tuple[str, bool]] = {}
    for one in values:
        where = f"{one.encoder}, seed {one.seed}"
        if (one.encoder, one.seed) in seen:
            raise DataError(where, "given twice", "Give every checkpoint once.")
        seen.add((one.encoder, one.seed))
        kind = (one.model_class, one.held is not None)
        if kinds.setdefault(one.encoder, kind) != kind:
            raise DataError(
                where, "seeds differ in model class or gate", "Name different encoders differently."
            )
        for label, table in (("predictions", one.predictions), ("held", one.held)):
            if table is None:
                continue
            missing = [name for name in COALITIONS if name not in table]
            if missing:
                raise DataError(
                    f"{where}: {label}",
                    f"no predictions of {', '.join(missing)}",
                    f"Give all of {', '.join(COALITIONS)}.",
                )
        tables: tuple[Mapping[str, FloatArray], ...] = (one.predictions, one.held or {}, one.extra)
        for table in tables:
            for name, prediction in table.items():
                _check_prediction(f"{where}: {name}", prediction, test.target.shape)
        if one.interchange is not None:
            _check_interchange(f"{where}: interchange", one.interchange, test.target.shape)


def _check_prediction(where: str, prediction: FloatArray, shape: tuple[int, ...]) -> None:
    if prediction.shape != shape:
        raise DataError(
            where,
            f"predictions of shape {prediction.shape}, the target has {shape}",
            "Predict the same test images and units.",
        )
    if not np.isfinite(prediction).all():
        raise DataError(where, "not every prediction is finite", "Look at the checkpoint.")


def _check_interchange(
    where: str, interchange: tuple[FloatArray, NDArray[np.int64]], shape: tuple[int, ...]
) -> None:
    predictions, donor = interchange
    images = np.arange(shape[0])
    if donor.shape != predictions.shape[:2] or not np.array_equal(
        np.sort(donor, axis=1), np.broadcast_to(images, donor.shape)
    ):
        raise DataError(
            where,
            "the donors are no permutations of the images",
            "Give donors as (donors, images), each image once in every row.",
        )
    if (donor == images).any():
        raise DataError(where, "an image is its own donor", "Draw derangements.")
    for prediction in predictions:
        _check_prediction(where, prediction, shape)
