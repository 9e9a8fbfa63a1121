"""Weights of CHASMBrain's published code in our modules.

The published training script writes ``best_stage1.pth`` and ``best_model.pth``, each the flat
state dict of its whole model (``model/hierarchical_v3_1.py``, github.com/sowwnn/Chasm-Brain).
All names and shapes here were read off that file; none is inferred from the paper. Checkpoints
of other versions of the model have other names and are refused.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chasm.errors import DataError
from chasm.models.published import PublishedEncoder
from chasm.models.stage2 import MambaVAE
from chasm.parcellation import Parcellation, sequential

NAMES = {
    "stage1.what_proj": "encoder.global_stream.projection",
    "stage1.what_norm": "encoder.global_stream.norm",
    "stage1.what_mamba.{n}": "encoder.global_stream.blocks.{n}.mamba",
    "stage1.what_head.0": "encoder.global_stream.head.0",
    "stage1.what_head.1": "encoder.global_stream.head.2",
    "stage1.where_proj": "encoder.local_stream.projection",
    "stage1.where_pos_embed": "encoder.local_stream.position",
    "stage1.where_norm": "encoder.local_stream.norm",
    "stage1.where_mamba.{n}": "encoder.local_stream.blocks.{n}.mamba",
    "stage1.where_pool.0": "encoder.local_stream.head.0",
    "stage1.where_pool.1": "encoder.local_stream.head.1",
    "stage1.where_head": "encoder.local_stream.head.4",
    "stage1.fusion_gate": "encoder.gate.mlp",
    "stage1.img_contrastive_head.net": "encoder.contrastive.visual",
    "stage1.brain_contrastive_head.net": "encoder.contrastive.response",
    "patch_pooler": "decoder.visual.pool",
    "stage2.vis_tokenizer": "decoder.visual.projection",
    "stage2.roi_tokenizer": "decoder.value",
    "stage2.roi_pos_embed": "decoder.position",
    "stage2.backbone_norm": "decoder.norm",
    "stage2.backbone.{n}": "decoder.blocks.{n}.mamba",
    "stage2.vae_encoder": "decoder.latent.hidden",
    "stage2.fc_mu": "decoder.latent.mean",
    "stage2.fc_logvar": "decoder.latent.log_variance",
    "stage2.latent_proj": "decoder.latent.projection",
    "stage2.global_queries": "decoder.holistic.queries",
    "stage2.global_mamba.{n}": "decoder.holistic.blocks.{n}.mamba",
    "stage2.global_head": "decoder.holistic.head.layers",
    "stage2.local_head": "decoder.residual.mlp",
    "stage2.remainder_head": "decoder.residual.outside",
    "stage2.fusion_weight": "decoder.fusion",
    "stage2.scale_layer": "decoder.amplitude.mlp",
    "stage2.global_scale": "decoder.amplitude.bound",
}
"""Published name -> ours, each with everything below it; {n} counts Mamba layers."""

WITHOUT_BATCH_AXIS = ("stage1.where_pos_embed", "stage2.roi_pos_embed", "stage2.global_queries")
"""Published tensors with a leading axis of length 1 that ours do not have."""

UNTRAINED = {"stage2.fusion_weight": 0.5, "stage2.global_scale": 2.5}
"""Initial values of the published Stage 2; one step of its optimiser changes both."""

_REMEDY = "Give best_model.pth or best_stage1.pth of the published code, as it wrote it."


class OfficialModel(NamedTuple):
    """A published checkpoint as our modules, in eval mode.

    It was trained on tokens as DINOv2 gives them (no scaling) and on top-p parcel values
    (p = 0.7) of z-scored betas.
    """

    encoder: PublishedEncoder
    decoder: MambaVAE
    parcellation: Parcellation
    """Runs of voxels in mask order; the remainder has no parcel."""
    sizes: dict[str, int]
    """n_cls, cls_width, n_patches, patch_width, n_voxels, n_parcels."""
    encoder_args: dict[str, Any]
    """Options of `PublishedEncoder` that rebuild the encoder, beside the sizes."""
    decoder_args: dict[str, Any]
    """Options of `MambaVAE` that rebuild the decoder, beside the sizes."""
    stage2_trained: bool
    """False where Stage 2 still has its initial values, as in ``best_stage1.pth``."""


def convert_official(
    state: Mapping[str, Tensor], where: str | os.PathLike[str] = "official checkpoint"
) -> OfficialModel:
    """Put a published state dict into our modules; every size comes from the tensors' shapes.

    Parameters
    ----------
    state
        Published name -> tensor, any floating dtype; copied, as float32.
    where
        What errors name, e.g. the file.

    Raises
    ------
    DataError
        If a tensor is missing, unexpected, of the wrong shape, not floating or not finite; the
        error names its key.
    """
    for key, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise DataError(f"{where}:{key}", "is not a floating-point tensor", _REMEDY)
    sizes, encoder_args, decoder_args = _sizes(state, where)
    parcellation = sequential(sizes["n_voxels"], sizes.pop("parcel_size"))
    tokens: dict[str, Any] = {
        name: sizes[name] for name in ("cls_width", "n_cls", "patch_width", "n_patches")
    }
    encoder = PublishedEncoder(**tokens, n_parcels=sizes["n_parcels"], **encoder_args).eval()
    decoder = MambaVAE(**tokens, parcellation=parcellation, **decoder_args).eval()
    _load({"encoder": encoder, "decoder": decoder}, state, where)
    trained = any(float(state[key]) != value for key, value in UNTRAINED.items())
    return OfficialModel(encoder, decoder, parcellation, sizes, encoder_args, decoder_args, trained)


def read_official(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict without unpickling anything but tensors and plain types.

    Parameters
    ----------
    path
        A dict of tensors, or a dict of which exactly one value is a dict, of tensors.

    Raises
    ------
    DataError
        If the file cannot be read, holds other objects, or is no such dict.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            path,
            "is no file of tensors and plain types, and nothing else is ever loaded",
            "If you trust it, write its weights with torch.save(model.state_dict(), path).",
        ) from error
    except (OSError, EOFError, RuntimeError, KeyError, ValueError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(path, f"is not a readable checkpoint ({line})", _REMEDY) from error
    nested = []
    if isinstance(content, Mapping):
        nested = [value for value in content.values() if isinstance(value, Mapping)]
    state = nested[0] if len(nested) == 1 else content
    if not isinstance(state, Mapping) or not state:
        raise DataError(path, f"holds a {type(content).__name__}, no state dict", _REMEDY)
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise DataError(f"{path}:{key}", f"is a {type(value).__name__}, no tensor", _REMEDY)
    return {str(key): value for key, value in state.items()}


def official_name(ours: str) -> str | None:
    """Give the published name of one of our parameters, None where there is none.

    Parameters
    ----------
    ours
        "encoder." or "decoder." and the name in that module's state dict.
    """
    for theirs, mine in NAMES.items():
        pattern = re.escape(mine).replace(re.escape("{n}"), r"(\d+)") + r"(?=\.|$)"
        found = re.match(pattern, ours)
        if found:
            number = found.group(1) if "{n}" in mine else ""
            return theirs.replace("{n}", number) + ours[found.end() :]
    return None


def _load(
    modules: dict[str, PublishedEncoder | MambaVAE],
    state: Mapping[str, Tensor],
    where: str | os.PathLike[str],
) -> None:
    """Copy `state` into the modules after checking that it is exactly what they need."""
    own = {f"{part}.{k}": v for part, m in modules.items() for k, v in m.state_dict().items()}
    targets = {name: own[key] for key in own if (name := official_name(key)) is not None}
    for key in state:
        if key not in targets:
            raise DataError(f"{where}:{key}", "is not part of the published model", _REMEDY)
    for key, target in targets.items():
        if key not in state:
            raise DataError(f"{where}:{key}", "is missing", _REMEDY)
        value = state[key]
        expected = (1, *target.shape) if key in WITHOUT_BATCH_AXIS else tuple(target.shape)
        if tuple(value.shape) != expected:
            found = f"shape {tuple(value.shape)}, expected {expected}"
            raise DataError(f"{where}:{key}", found, _REMEDY)
        if not value.isfinite().all():
            raise DataError(f"{where}:{key}", "has values that are not finite", _REMEDY)
        target.copy_(value.reshape(target.shape))


def _sizes(
    state: Mapping[str, Tensor], where: str | os.PathLike[str]
) -> tuple[dict[str, int], dict[str, Any], dict[str, Any]]:
    """Read sizes, encoder options and decoder options off the shapes."""

    def size(key: str, axis: int) -> int:
        if key not in state:
            raise DataError(f"{where}:{key}", "is missing", _REMEDY)
        if state[key].ndim <= axis:
            found = f"shape {tuple(state[key].shape)}, expected at least {axis + 1} axes"
            raise DataError(f"{where}:{key}", found, _REMEDY)
        return state[key].shape[axis]

    def layers(prefix: str) -> int:
        numbers = (re.match(re.escape(prefix) + r"\.(\d+)\.", key) for key in state)
        return len({found.group(1) for found in numbers if found})

    def mamba(prefix: str, d_model: int) -> dict[str, int]:
        return {
            "d_model": d_model,
            "d_state": size(f"{prefix}.A_log", 1),
            "d_conv": size(f"{prefix}.conv1d.weight", 2),
            "expand": max(1, size(f"{prefix}.A_log", 0) // d_model),
        }

    sizes = {
        "n_cls": 1,
        "cls_width": size("stage1.what_proj.weight", 1),
        "n_patches": size("stage1.where_pos_embed", 1),
        "patch_width": size("stage1.where_proj.weight", 1),
        "n_voxels": size("stage2.global_head.4.weight", 0),
        "n_parcels": size("stage2.roi_pos_embed", 1),
        "parcel_size": size("stage2.local_head.4.weight", 0),
    }
    _check_parcels(sizes, where)
    encoder = {
        **mamba("stage1.where_mamba.0", size("stage1.what_proj.weight", 0)),
        "global_blocks": layers("stage1.what_mamba"),
        "local_blocks": layers("stage1.where_mamba"),
        "d_embedding": size("stage1.img_contrastive_head.net.2.weight", 0),
    }
    decoder = {
        **mamba("stage2.backbone.0", size("stage2.vis_tokenizer.weight", 0)),
        "encoder_blocks": layers("stage2.backbone"),
        "decoder_blocks": layers("stage2.global_mamba"),
        "d_patch": size("patch_pooler.0.weight", 0),
        "d_latent": size("stage2.fc_mu.weight", 0),
        "d_variational": size("stage2.vae_encoder.0.weight", 0),
        "n_queries": size("stage2.global_queries", 1),
        "d_hidden": size("stage2.global_head.0.weight", 0),
        "d_residual": size("stage2.local_head.0.weight", 0),
        "d_amplitude": size("stage2.scale_layer.0.weight", 0),
        "residual_clamp": 10.0,
        "dropout": 0.4,
    }
    return sizes, encoder, decoder


def _check_parcels(sizes: dict[str, int], where: str | os.PathLike[str]) -> None:
    """Refuse numbers of voxels and parcels that no sequential parcellation has."""
    voxels, parcels, per_parcel = sizes["n_voxels"], sizes["n_parcels"], sizes["parcel_size"]
    if per_parcel < 1 or voxels // per_parcel != parcels:
        raise DataError(
            f"{where}:stage2.global_head.4.weight",
            f"{voxels} voxels do not make {parcels} parcels of {per_parcel}",
            _REMEDY,
        )
