"""Models of other subjects as a source: whether they fit a new subject, and their features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chasm.data.datamodule import NSDDataModule
from chasm.errors import ConfigError
from chasm.models.adapters import HEAD_SPACES, SourceFeatures, backbone_state
from chasm.models.baselines import LinearEncoder, fit_mixture
from chasm.models.encoder import ParcelEncoder
from chasm.models.kernels import FeatureKernels, FloatArray
from chasm.progress import track
from chasm.training.base import EncodingModule
from chasm.training.facts import facts_of
from chasm.training.modules import Stage1Module

HEAD_SHARES: FloatArray = np.array(
    [
        [0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0],
        [1 / 3, 1 / 3, 1 / 3],
    ],
    dtype=np.float32,
)  # fmt: skip
"""Shares of the (global, local, responses) kernels searched for a ridge head."""

BATCH_SIZE = 64
"""Images whose features are computed at once."""


def source_features(
    sources: Sequence[EncodingModule],
    data: NSDDataModule,
    image_ids: NDArray[np.int64],
    spaces: Sequence[str] = HEAD_SPACES,
) -> dict[str, FloatArray]:
    """Compute the features that frozen models of other subjects give a ridge head.

    Parameters
    ----------
    sources
        Stage 1 models of one backbone, which they share from now on.
    data
        Of the new subject, whose tokens are read.
    image_ids
        (images,).
    spaces
        Some of `HEAD_SPACES`: ``global`` and ``local``, what the heads of the two streams read,
        normalised; ``responses``, what the sources' networks predict for their subjects.

    Returns
    -------
    dict
        Space to (images, features), in the order of `image_ids`.

    Raises
    ------
    ConfigError
        A source is no Stage 1, or an adapter itself.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frozen = SourceFeatures([encoder_of(stage1_of(source)) for source in sources]).to(device)
    return features_of(frozen, data, image_ids, spaces, device)


def fit_head(
    kernels: Mapping[str, FeatureKernels], targets: NDArray[Any], seed: int
) -> LinearEncoder:
    """Fit a ridge head, see `fit_mixture`.

    Parameters
    ----------
    kernels
        Of every space in `HEAD_SPACES`.
    targets
        (train images, units).
    seed
        Of the folds.
    """
    return fit_mixture({s: kernels[s] for s in HEAD_SPACES}, targets, HEAD_SHARES, seed)


@torch.no_grad()
def features_of(
    source: SourceFeatures,
    data: NSDDataModule,
    image_ids: NDArray[np.int64],
    spaces: Sequence[str],
    device: torch.device,
) -> dict[str, FloatArray]:
    """Compute features of images of a subject on a device; see `source_features`."""
    found: dict[str, FloatArray] = {}
    starts = range(0, len(image_ids), BATCH_SIZE)
    for start in track(starts, "features of the source", len(starts)):
        rows = image_ids[start : start + BATCH_SIZE]
        cls, patches = (
            torch.from_numpy(np.asarray(tokens[rows])).to(device).float()
            for tokens in (data.tokens.cls, data.tokens.patches)
        )
        for space, values in source(cls, patches).items():
            if space in spaces:
                part = values.float().cpu().numpy()
                whole = found.setdefault(
                    space, np.empty((len(image_ids), part.shape[1]), np.float32)
                )
                whole[start : start + len(rows)] = part
    return {space: found[space] for space in spaces}


def check_sources(sources: Sequence[EncodingModule], data: NSDDataModule) -> None:
    """Refuse models that do not go with a new subject's data, or have seen its test images.

    Raises
    ------
    ConfigError
        A source is no Stage 1 or an adapter itself, does not have the backbone of the first,
        does not say what it was trained on, was trained on other tokens or parcels or on the
        new subject itself, or had test images of the new subject among its train or validation
        images.
    """
    first, *others = (backbone_state(encoder_of(stage1_of(source))) for source in sources)
    for state in others:
        if state.keys() != first.keys() or not all(
            torch.equal(value, state[name]) for name, value in first.items()
        ):
            raise _refused("its subjects have different backbones", "Train them together.")
    here = facts_of(data)
    test = torch.from_numpy(data.data_split.test.astype("int64"))
    for facts in _facts_of_all(sources):
        missing = [key for key in ("dataset", "images", "backbone", "parcels") if key not in facts]
        if missing:
            raise _refused(
                f"an older version wrote it, without its {', '.join(missing)}", "Train it again."
            )
        _check_same_kind(facts, here)
        own_name = (facts["dataset"], facts["subject"]) == (here["dataset"], here["subject"])
        if own_name or facts["store"] == here["store"]:
            raise _refused(
                f"{here['subject']}, the new subject, is one of those it was trained on",
                "Leave it out of the source.",
            )
        if facts["images"] != here["images"]:
            continue  # ids of other images
        for part in ("train", "validation"):
            n = int(torch.isin(test, facts[part]).sum())
            if n:
                raise _refused(
                    f"{n} of the {part} images of its {facts['subject']} are test images here",
                    "Use a split whose test images no source trains on, e.g. clean.",
                )


def _facts_of_all(sources: Sequence[EncodingModule]) -> Iterator[dict[str, Any]]:
    """Give what every subject was trained on that is behind the sources."""
    for source in sources:
        facts = stage1_of(source).trained_on
        if facts is None:
            raise _refused("it does not say what it was trained on", "Train it again.")
        yield facts
        yield from facts.get("trained_with", ())


def _check_same_kind(facts: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse other tokens, and parcels made in another way."""
    if facts["backbone"] != here["backbone"]:
        theirs, ours = facts["backbone"], here["backbone"]
        keys = [key for key in ours if theirs.get(key) != ours[key]] or list(theirs)
        told = "; ".join(f"{key} {theirs.get(key)}, here {ours.get(key)}" for key in keys)
        raise _refused(
            f"it was trained on tokens of another backbone ({told})",
            "Use the backbone it was trained with.",
        )
    if _kind(facts["parcels"]) != _kind(here["parcels"]):
        raise _refused(
            f"it was trained on parcels {_kind(facts['parcels'])}, "
            f"here they are {_kind(here['parcels'])}",
            "Use the parcels it was trained with.",
        )


def _kind(parcels: Mapping[str, Any]) -> str:
    atlas = f" in {parcels['atlas']}" if parcels["kind"] == "atlas" else ""
    return f"{parcels['kind']}{atlas} of {parcels['size']} voxels"


def stage1_of(source: EncodingModule) -> Stage1Module:
    """Refuse a source that is no Stage 1, or an adapter itself, by a ConfigError."""
    if source.needs_source:
        raise _refused("it is itself an adapter", "Name the model that it started from.")
    if not isinstance(source, Stage1Module):
        raise _refused(f"{source.row_name} is no Stage 1", "Name a model of parcels.")
    return source


def encoder_of(source: Stage1Module) -> ParcelEncoder:
    """Give the encoder of a source; a ConfigError where it was not built."""
    if source.encoder is None:
        raise _refused("it was not built", "Load it from a checkpoint.")
    return source.encoder


def _refused(problem: str, remedy: str) -> ConfigError:
    return ConfigError("source", problem, remedy)
