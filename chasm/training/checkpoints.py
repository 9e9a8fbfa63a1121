"""Checkpoints: read without unpickling, and rebuilt into modules from what they say."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.pytorch.cli import instantiate_module

from chasm.data.datamodule import DataSizes
from chasm.errors import ConfigError, DataError
from chasm.parcellation import Parcellation
from chasm.training.base import EncodingModule

OWN = "chasm."
"""Classes that a description may name."""
_DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_WORD = re.compile(r"[A-Za-z0-9_+-]*")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors and plain types only.

    Raises
    ------
    DataError
        The file is damaged or holds anything else.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        what = "damaged, or not written by torch.save"
        if isinstance(error, pickle.UnpicklingError):
            what = "it holds more than tensors and plain types"
        raise DataError(
            path,
            f"is not a readable checkpoint ({what})",
            "Name another, or train again with --fresh.",
        ) from error
    if not isinstance(found, dict) or "state_dict" not in found:
        raise DataError(path, "holds no state_dict", "Name a checkpoint that `chasm fit` wrote.")
    return found


def load_module(path: Path) -> EncodingModule:
    """Rebuild a trained module from its checkpoint alone, on the CPU and in eval mode.

    Raises
    ------
    DataError
        The file is damaged, or no checkpoint of this package.
    """
    saved = read_checkpoint(path)
    if "subjects" in saved:
        raise DataError(
            path, f"holds models of {len(saved['subjects'])} subjects, trained together",
            f"Name the run of one of them: {', '.join(saved['subjects'])}, in the run's folder.",
        )  # fmt: skip
    for key in ("hyper_parameters", "sizes", "parcel_labels"):
        if key not in saved:
            raise DataError(path, f"has no {key}", "Name a checkpoint that `chasm fit` wrote.")
    description = {
        "settings": saved["hyper_parameters"],
        "sizes": saved["sizes"],
        "parcel_labels": saved["parcel_labels"].tolist(),
        "stage1": saved.get("stage1"),
        "source": saved.get("source"),
    }
    module = build_module(description, where=str(path))
    try:
        module.load_state_dict(saved["state_dict"])
    except RuntimeError as error:
        raise DataError(
            path, "its weights do not fit its own description", "Train again with --fresh."
        ) from error
    module.trained_on = saved.get("trained_on")
    return module.eval()


def describe_module(module: EncodingModule) -> dict[str, Any]:
    """Say in plain types what `build_module` needs to make this module again, without weights.

    Returns
    -------
    dict
        ``settings`` (class and arguments), ``sizes``, ``parcel_labels`` (one integer per voxel);
        for Stage 2 ``stage1``, the same of its Stage 1, else None; for an adapter ``source``, a
        list of the same of the models it started from, else None.

    Raises
    ------
    ConfigError
        The module was not made from a recipe, so that its settings are not plain.
    """
    assert module.sizes is not None
    assert module.parcellation is not None
    settings = dict(module.recipe_settings or module.hparams)
    settings.pop("_instantiator", None)
    if "_class_path" not in settings or not _is_plain(settings):
        raise ConfigError(
            "model", "it was not made from a recipe", "Make it with chasm.training.recipes.Recipe."
        )
    inner = getattr(module, "stage1", None)
    return {
        "settings": settings,
        "sizes": asdict(module.sizes),
        "parcel_labels": module.parcellation.labels.cpu().tolist(),
        "stage1": None if inner is None else describe_module(inner),
        "source": getattr(module, "source_description", None),
    }


def build_module(description: Mapping[str, Any], where: str = "model") -> EncodingModule:
    """Make the module that `describe_module` described; its weights are random.

    Raises
    ------
    DataError
        The description is incomplete, or names a class that is none of this package's.
    """
    try:
        settings = dict(description["settings"])
        sizes = DataSizes(**description["sizes"])
        labels = torch.tensor(description["parcel_labels"], dtype=torch.int64)
        settings.pop("_instantiator", None)
        _check_classes(settings, where)
        module = instantiate_module(EncodingModule, settings)
        module.recipe_settings = settings
    except (KeyError, TypeError, ValueError, ArgumentError) as error:
        line = " ".join(str(error).split())
        raise DataError(
            where, f"does not describe a model ({line})", "Export or train it again."
        ) from error
    if description.get("source") is not None:
        module.take_source([build_module(source, where) for source in description["source"]])
    if description.get("stage1") is not None:
        module.take_stage1(build_module(description["stage1"], where))
    module.build(sizes, Parcellation(labels))
    return module.eval()


def _check_classes(value: Any, where: str, key: str = "") -> None:
    """Refuse what could make jsonargparse import or read anything outside this package.

    Strings are plain words; a dotted one is a class of this package, under ``class_path``.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_classes(str(name), where)
            _check_classes(inner, where, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_classes(inner, where)
    elif isinstance(value, str):
        named = key in ("class_path", "_class_path") and value.startswith(OWN)
        if not _WORD.fullmatch(value) and not (named and _DOTTED_NAME.fullmatch(value)):
            raise DataError(where, f"names {value!r}", f"Only classes of {OWN}* can be loaded.")


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)
