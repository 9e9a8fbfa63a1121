"""Splits by image, never by trial: clean, paper, seeded; few-shot subsets of the train part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from chasm.data.store import SubjectStore, session_statistics
from chasm.errors import ConfigError, DataError

SPLITS = ("clean", "paper", "seeded")
FRACTIONS = (0.7, 0.1, 0.2)
"""Train, validation and test shares of a seeded split."""


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of images.

    Attributes
    ----------
    name
        ``clean``, ``paper`` or ``seeded``.
    train, validation, test
        Image ids, sorted int64, 0-based.

    Raises
    ------
    DataError
        If a part is empty, holds an id twice, or shares an id with another part.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def __post_init__(self) -> None:
        for part in ("train", "validation", "test"):
            ids = np.sort(np.asarray(getattr(self, part), dtype=np.int64))
            object.__setattr__(self, part, ids)
            if not ids.size:
                raise DataError(
                    f"split {self.name}:{part}",
                    "has no images",
                    "Use another split, or data with more sessions",
                )
        everything = np.concatenate([self.train, self.validation, self.test])
        ids, counts = np.unique(everything, return_counts=True)
        if (counts > 1).any():
            raise DataError(
                f"split {self.name}",
                f"image {ids[counts > 1][0]} is in it more than once",
                "Make the parts disjoint",
            )


def make_split(
    store: SubjectStore, name: str, seed: int | None = None, validation_fraction: float = 0.05
) -> Split:
    """Divide the images that have trials in a store.

    Parameters
    ----------
    store
        The subject.
    name
        ``clean``: train on images only this subject saw, validate on shared images outside the
        special ones, test on the special ones (seen three times by everyone).
        ``paper``: test on all shared images, validate on a seeded `validation_fraction` of the
        others. ``seeded``: shares given when the store was prepared, else `FRACTIONS`.
    seed
        For ``paper`` and ``seeded``; default: the store's own split seed, else 0.
    validation_fraction
        For ``paper``.

    Raises
    ------
    ConfigError
        If the name or the fraction cannot be used.
    DataError
        If a part would be empty.
    """
    if name not in SPLITS:
        raise ConfigError("split", f"unknown '{name}'", f"Use one of {', '.join(SPLITS)}")
    if not 0 < validation_fraction < 1:
        raise ConfigError(
            "validation_fraction", f"{validation_fraction} is not between 0 and 1", "Use e.g. 0.05"
        )
    table = store.images
    if seed is None:
        seed = int(store.attributes.get("split_seed", 0))
    if name == "seeded":
        fractions = store.attributes.get("split_fractions", FRACTIONS)
        return Split(name, *seeded_parts(table.ids, seed, [float(f) for f in fractions]))
    if not table.shared.any():
        raise DataError(
            f"{store.path}:/images/shared",
            f"no shared images, so there is no {name} split",
            "Use the split 'seeded'",
        )
    own, shared = table.ids[~table.shared], table.shared
    if name == "clean":
        special = table.special
        return Split(name, own, table.ids[shared & ~special], table.ids[shared & special])
    order = np.random.default_rng(seed).permutation(own)
    n_validation = max(1, round(validation_fraction * len(own)))
    return Split(name, order[n_validation:], order[:n_validation], table.ids[shared])


def seeded_parts(
    image_ids: np.ndarray, seed: int, fractions: Sequence[float] = FRACTIONS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Divide image ids at random into train, validation and test.

    Parameters
    ----------
    image_ids
        (images,) distinct ids; their order does not matter.
    seed
        Same seed, same parts.
    fractions
        Train, validation, test; positive, sum 1.

    Returns
    -------
    train, validation, test
        Sorted int64 ids; every id is in exactly one.

    Raises
    ------
    ConfigError
        If the fractions are not three positive numbers of sum 1.
    """
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.shape != (3,) or not (shares > 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise ConfigError(
            "split_fractions",
            f"{list(fractions)} are not three positive numbers of sum 1",
            f"Use e.g. {list(FRACTIONS)}",
        )
    order = np.random.default_rng(seed).permutation(np.sort(np.asarray(image_ids, np.int64)))
    ends = np.round(np.cumsum(shares)[:2] * len(order)).astype(int)
    train, validation, test = np.split(order, ends)
    return np.sort(train), np.sort(validation), np.sort(test)


@dataclass(frozen=True)
class FewShot:
    """How few of a subject's train images are used, validation included.

    Parameters
    ----------
    n
        Images; null takes all train images.
    draw
        Number of the random draw. Smaller sets of a draw are inside larger ones.
    order
        ``random``, or ``presentation``: the first `n` images that the subject saw, as in a
        first session.
    validation
        Share of the `n` images that selects the checkpoint, at least two of them. The shared
        validation images of the split are not used.
    """

    n: int | None = None
    draw: int = 0
    order: Literal["random", "presentation"] = "random"
    validation: float = 0.2


LEAST_SHOTS = 8
"""Fewest images: cross-validation, and a validation set, need some."""


def few_shot(split: Split, chosen: FewShot, presented: np.ndarray | None = None) -> Split:
    """Keep `n` train images, and take the validation images from among them.

    Parameters
    ----------
    split
        Of which the test images stay as they are.
    chosen
        Which images.
    presented
        Image ids in the order of the trials, for ``order: presentation``.

    Raises
    ------
    ConfigError
        If `n` is below `LEAST_SHOTS` or above the number of train images, the number of the draw
        is negative, or the share of validation is not between 0 and 1.
    """
    available = len(split.train)
    n = available if chosen.n is None else chosen.n
    if not LEAST_SHOTS <= n <= available:
        raise ConfigError(
            "data.few_shot.n",
            f"{n} of {available} train images",
            f"Ask for {LEAST_SHOTS} to {available}",
        )
    if chosen.draw < 0:
        raise ConfigError("data.few_shot.draw", f"found {chosen.draw}", "Use 0 or more")
    if not 0 < chosen.validation < 1:
        raise ConfigError(
            "data.few_shot.validation", f"{chosen.validation} is no share", "Use e.g. 0.2"
        )
    rng = np.random.default_rng((chosen.draw, 0))
    if chosen.order == "random":
        kept = rng.permutation(split.train)[:n]
    else:
        assert presented is not None
        own = presented[np.isin(presented, split.train)]
        images, first = np.unique(own, return_index=True)
        kept = np.random.default_rng((chosen.draw, 1)).permutation(images[np.argsort(first)][:n])
    n_validation = min(n - 2, max(2, round(chosen.validation * n)))
    return replace(split, train=kept[n_validation:], validation=kept[:n_validation])


def training_statistics(store: SubjectStore, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Session statistics that no validation or test trial has touched.

    The store's own train statistics are used when they come from exactly the split's train
    images (the clean split; the seeded split of an array store); else they are computed from
    the trials of the split's train images.

    Returns
    -------
    mean, std
        Each (sessions, voxels) float32, in units of value / scale.

    Raises
    ------
    DataError
        If a session has too few train trials, or a voxel does not vary over them.
    """
    if np.array_equal(np.unique(store.normalisation_image_ids), split.train):
        return store.normalisation("train")
    use = store.trials["image_id"].isin(split.train).to_numpy()
    mean, std = session_statistics(store.betas, store.session_index, use, store.scale)
    bad = ~(std > 0)
    if bad.any():
        sessions = np.unique(store.trials["session"])[bad.any(axis=1)]
        raise DataError(
            f"{store.path}:/betas",
            f"train trials of split {split.name} do not vary in session {sessions[0]} "
            f"for {int(bad.any(axis=0).sum())} of {store.n_voxels} voxels",
            "Use more train images, or leave that session out when preparing",
        )
    return mean, std
