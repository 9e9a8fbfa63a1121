"""Checkpoints of the published code as exported models."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chasm.data.store import SubjectStore
from chasm.errors import ConfigError
from chasm.features.backbones import BackboneSpec
from chasm.inference.export import write_export
from chasm.inference.space import VoxelSpace
from chasm.inference.trained import UNKNOWN, TrainedModel
from chasm.io import sha256_of_file
from chasm.models.official import OfficialModel, convert_official, read_official
from chasm.training.base import EncodingModule
from chasm.training.checkpoints import build_module
from chasm.training.modules import Stage1Module
from chasm.training.stage2 import Stage2Module

log = logging.getLogger(__name__)

DINOV2 = BackboneSpec("vit_base_patch14_dinov2", "pretrained", 224)
"""The backbone that the published code says it used: the last block's tokens at 224 pixels."""

CONVERTED = (
    "**Converted** from a checkpoint of the published CHASMBrain code (file SHA-256 `{digest}`). "
    "chasm neither trained nor tested it. The published code chose its best epoch on the test "
    "images and z-scored with test trials, so scores on NSD's shared images are optimistic. "
    "That its image features were those of the backbone below is taken from the paper."
)
UNTRAINED_STAGE2 = "Its Stage 2 was not trained, so this folder holds Stage 1 alone."
UNKNOWN_SUBJECT = (
    "**The subject is unknown**: the checkpoint does not say whose responses it predicts. Convert "
    "it again with `--store subjXX.h5` of the subject and mask it was trained on."
)
ASSUMED_SUBJECT = (
    "That it belongs to {subject} and to these voxels was said by whoever converted it; the "
    "checkpoint only confirms their number."
)


def convert(
    path: str | Path,
    out: str | Path,
    *,
    store: str | Path | None = None,
    backbone: BackboneSpec = DINOV2,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint of the published code as an exported model.

    Parameters
    ----------
    path
        ``best_model.pth`` (both stages) or ``best_stage1.pth``; nothing but tensors is read.
    out
        Folder of the export.
    store
        Store of the subject it was trained on, whose voxels it then has; without one the card
        says that subject and voxels are unknown.
    backbone
        Whose tokens it takes.
    overwrite
        Replace whatever stands at `out`.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    DataError
        The file holds anything but tensors, or is no checkpoint of the published code.
    ConfigError
        The store has another number of voxels, or something else stands at `out`.
    """
    path = Path(path)
    official = convert_official(read_official(path), path)
    space, facts = _space(official.sizes["n_voxels"], store)
    module = module_of(official)
    digest = sha256_of_file(path)
    notes = [CONVERTED.format(digest=digest)]
    notes += [] if official.stage2_trained else [UNTRAINED_STAGE2]
    notes += [
        UNKNOWN_SUBJECT if store is None else ASSUMED_SUBJECT.format(subject=facts["subject"])
    ]
    facts |= {
        "model": f"published CHASMBrain, {module.row_name}",
        "unit": module.unit,
        "target": module.target,
        "statistics": "all",
        "weights": f"{backbone.weights}, not checked",
        "notes": notes,
        "fingerprints": {"checkpoint": digest},
    }
    trained = TrainedModel(module, backbone, None, space, facts, path)
    return write_export(trained, out, overwrite=overwrite)


def _space(n_voxels: int, store: str | Path | None) -> tuple[VoxelSpace, dict[str, Any]]:
    if store is None:
        log.warning("subject and voxels are unknown: give --store to name them")
        return VoxelSpace(n_voxels), {"subject": UNKNOWN, "dataset": UNKNOWN, "source": "nsd"}
    found = SubjectStore.open(store)
    if found.n_voxels != n_voxels:
        raise ConfigError(
            found.path, f"has {found.n_voxels} voxels, the checkpoint predicts {n_voxels}",
            "Give the store of the subject and mask it was trained on.",
        )  # fmt: skip
    names = ("subject", "dataset", "source", "beta_version", "simulated")
    return VoxelSpace.of_store(found), {name: getattr(found, name) for name in names}


def module_of(official: OfficialModel) -> EncodingModule:
    """Put a converted model into the module that our checkpoints hold: Stage 2 around Stage 1.

    A Stage 2 that was never trained is left out.
    """
    stage1 = _described(
        official,
        "chasm.training.modules.Stage1Module",
        {"encoder": _part("chasm.models.published.PublishedEncoder", official.encoder_args),
         "target": "top_p", "top_p": 0.7},
    )  # fmt: skip
    if not official.stage2_trained:
        module = build_module(stage1)
        assert isinstance(module, Stage1Module)
        assert module.encoder is not None
        module.encoder.load_state_dict(official.encoder.state_dict())
        return module
    decoder = {"decoder": _part("chasm.models.stage2.MambaVAE", official.decoder_args)}
    whole = _described(official, "chasm.training.stage2.Stage2Module", decoder)
    module = build_module({**whole, "stage1": stage1})
    assert isinstance(module, Stage2Module)
    assert module.decoder is not None
    assert module.parcel_model.encoder is not None
    module.parcel_model.encoder.load_state_dict(official.encoder.state_dict())
    module.decoder.load_state_dict(official.decoder.state_dict())
    return module


def _part(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return {"class_path": name, "init_args": dict(options)}


def _described(official: OfficialModel, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Describe a module on tokens as they come, as `describe_module` does."""
    return {
        "settings": {"_class_path": name, **settings, "token_scaling": "none"},
        "sizes": official.sizes,
        "parcel_labels": official.parcellation.labels.tolist(),
        "stage1": None,
    }
