"""A model as a folder to hand on: weights, description, voxels and card, without any pickle.

=====================  =====================================================================
``config.json``        format and version, description of the model, backbone, voxels' volume
                       and ROI names, facts of training, SHA-256 of the other two
``model.safetensors``  every tensor of the model
``voxels.csv``         one row per voxel: place, ncsnr, label in every atlas
``README.md``          the model card
=====================  =====================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from chasm.errors import ConfigError, DataError
from chasm.features.backbones import BackboneSpec
from chasm.inference.card import model_card
from chasm.inference.space import VoxelSpace
from chasm.inference.trained import TrainedModel, spec_of
from chasm.io import atomic_folder, sha256_of_file, write_json, write_text
from chasm.training.base import EncodingModule
from chasm.training.checkpoints import build_module, describe_module

FORMAT = "chasm-encoder"
FORMAT_VERSION = 1
CONFIG, WEIGHTS, VOXELS, CARD = "config.json", "model.safetensors", "voxels.csv", "README.md"
AGAIN = "Export it again, or fetch it again"


def is_export(path: Path) -> bool:
    """Whether a folder looks like an exported model."""
    return (path / CONFIG).is_file()


def write_export(trained: TrainedModel, out: str | Path, *, overwrite: bool = False) -> Path:
    """Write a model to a folder, as a whole or not at all.

    Parameters
    ----------
    trained
        The model.
    out
        The folder. An export of the same checkpoint is written again; anything else that stands
        there is only replaced with `overwrite`.
    overwrite
        Replace whatever is there.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ConfigError
        Something else stands at `out`.
    """
    out = Path(out)
    if not overwrite:
        _require_free(out, trained)
    with atomic_folder(out) as folder:
        state = trained.module.state_dict()
        weights = {name: value.detach().cpu().clone() for name, value in state.items()}
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / WEIGHTS)
        trained.space.write_csv(folder / VOXELS)
        write_text(folder / CARD, model_card(trained))
        (folder / WEIGHTS).chmod(0o644)
        write_json(folder / CONFIG, _config(trained, folder))
    return out


def _require_free(out: Path, trained: TrainedModel) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    try:
        held = json.loads((out / CONFIG).read_text(encoding="utf-8"))
        if held["facts"]["fingerprints"] == trained.facts["fingerprints"]:
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ConfigError(
        out, "something else stands here", "Give another --out, or replace it by --overwrite."
    )


def _config(trained: TrainedModel, folder: Path) -> dict[str, Any]:
    spec = trained.backbone
    if Path(spec.weights).suffix:  # a place on this machine means nothing elsewhere
        spec = replace(spec, weights=Path(spec.weights).name)
    key = trained.backbone_key
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "written_by": f"chasm-fmri {version('chasm-fmri')}",
        "model": describe_module(trained.module),
        "backbone": {"spec": asdict(spec), "key": None if key is None else dict(key)},
        "voxels": trained.space.described(),
        "facts": dict(trained.facts),
        "sha256": {name: sha256_of_file(folder / name) for name in (WEIGHTS, VOXELS)},
    }


def read_export(path: str | Path) -> TrainedModel:
    """Read an exported folder; nothing in it is executed or unpickled.

    Raises
    ------
    DataError
        A file is missing, damaged, changed since it was written, of a newer format, or the
        tensors are not exactly those of the model described.
    """
    folder = Path(path)
    config = _read_config(folder / CONFIG)
    for name in (WEIGHTS, VOXELS):
        if not (folder / name).is_file():
            raise DataError(folder / name, "no such file", AGAIN)
        if sha256_of_file(folder / name) != config["sha256"][name]:
            raise DataError(folder / name, f"is not the file that {CONFIG} was written with", AGAIN)
    module = build_module(config["model"], where=f"{folder / CONFIG}:model")
    _load_weights(module, folder / WEIGHTS)
    space = VoxelSpace.read_csv(folder / VOXELS, config["voxels"])
    if module.sizes is None or space.n_voxels != module.sizes.n_voxels:
        raise DataError(folder / VOXELS, f"{space.n_voxels} voxels, the model has others", AGAIN)
    return TrainedModel(
        module=module.eval(),
        backbone=_spec(folder, config["backbone"]),
        backbone_key=config["backbone"]["key"],
        space=space,
        facts=config["facts"],
        path=folder,
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(path, f"is not readable as JSON ({error})", AGAIN) from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise DataError(f"{path}:format", f"is not {FORMAT!r}", "Name an exported model")
    if config.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}:format_version",
            f"found {config.get('format_version')}, this chasm reads {FORMAT_VERSION}",
            "Update chasm, or export the model again",
        )
    parts = {"model": dict, "backbone": dict, "voxels": dict, "facts": dict, "sha256": dict}
    for name, kind in parts.items():
        if not isinstance(config.get(name), kind):
            raise DataError(f"{path}:{name}", "is missing or malformed", AGAIN)
    for name, inner in (("backbone", ("spec", "key")), ("facts", ("subject", "dataset", "model"))):
        for key in inner:
            if key not in config[name]:
                raise DataError(f"{path}:{name}.{key}", "is missing", AGAIN)
    return config


def _spec(folder: Path, fields: Mapping[str, Any]) -> BackboneSpec:
    try:
        return spec_of(fields["spec"])
    except TypeError as error:
        raise DataError(
            f"{folder / CONFIG}:backbone.spec", f"is no backbone ({error})", AGAIN
        ) from error


def _load_weights(module: EncodingModule, path: Path) -> None:
    """Load exactly the tensors that the module has."""
    try:
        found = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(path, f"is no safetensors file ({error})", AGAIN) from error
    own = module.state_dict()
    for what, names in (("lacks", own.keys() - found.keys()), ("adds", found.keys() - own.keys())):
        if names:
            raise DataError(
                path, f"{what} {len(names)} tensors of the model, e.g. {min(names)}", AGAIN
            )
    for name, value in found.items():
        if value.shape != own[name].shape or value.dtype != own[name].dtype:
            raise DataError(
                f"{path}:{name}",
                f"{value.dtype} {tuple(value.shape)} found, {own[name].dtype} "
                f"{tuple(own[name].shape)} expected",
                AGAIN,
            )
    with torch.no_grad():
        module.load_state_dict(found)
