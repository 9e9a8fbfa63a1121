"""Frozen vision backbones: an image becomes CLS tokens and patch tokens of chosen layers.

Two families share one interface: the weight-free steerable pyramid (`chasm.features.pyramid`)
and any timm transformer with a class token (`chasm.features.vit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chasm.errors import ConfigError
from chasm.io import sha256_of_file

PYRAMID = "pyramid"
"""Name of the backbone that has no weights."""

WEIGHT_FREE = "weight-free"
UNTRAINED = "UNTRAINED"
HUB = "hub"
FILE = "file"


@dataclass(frozen=True)
class BackboneSpec:
    """Which frozen backbone, with which weights, and which of its layers.

    Parameters
    ----------
    model
        ``pyramid`` (steerable-pyramid energies and texture statistics, needs no weights) or the
        name of a timm model with a class token, e.g. ``vit_base_patch14_dinov2``.
    weights
        ``pretrained`` (from the hub), ``untrained`` (random; every result is labelled so), or a
        local ``.safetensors``, ``.pth`` or ``.pt`` file. The pyramid ignores it.
    image_size
        Side in pixels to which images are resized; none means the model's own (128 for the
        pyramid; 518 for DINOv2, where the paper takes 224).
    cls_layers
        Blocks whose CLS tokens are kept, counted from 1, or negative from the end.
    patch_layers
        Blocks whose patch tokens are kept; several are joined along the width.
    """

    model: str = PYRAMID
    weights: str = "pretrained"
    image_size: int | None = None
    cls_layers: tuple[int, ...] = (-1,)
    patch_layers: tuple[int, ...] = (-1,)


class Tokens(NamedTuple):
    """What a backbone says about a batch of images."""

    cls: Tensor
    """CLS tokens, (images, layers, width)."""
    patches: Tensor
    """Patch tokens, (images, patches, width of all patch layers together)."""


class Backbone(nn.Module):
    """Interface of every backbone: frozen, in evaluation mode, without gradients.

    Attributes
    ----------
    n_cls, cls_width
        Number of CLS layers and width of each.
    n_patches, patch_width, grid
        Number of patch tokens, their width over all patch layers, and their (rows, columns);
        tokens run along rows first.
    image_size
        Side of the input in pixels.
    cls_layers, patch_layers
        Blocks kept, counted from 1.
    weights_label
        ``hub``, ``file:<first 12 digits of its SHA-256>``, ``UNTRAINED`` or ``weight-free``.
    key
        Everything that changes the tokens, as plain JSON types.
    """

    n_cls: int
    cls_width: int
    n_patches: int
    patch_width: int
    grid: tuple[int, int]
    image_size: int
    cls_layers: tuple[int, ...]
    patch_layers: tuple[int, ...]
    weights_label: str
    key: dict[str, Any]

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        """Turn images of any size into the input of `forward`.

        Parameters
        ----------
        images
            uint8 arrays, each (height, width, 3).

        Returns
        -------
        Tensor
            (images, 3, image_size, image_size) float32 on the CPU.
        """
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tokens:
        """Return the tokens of preprocessed images (images, 3, size, size)."""
        raise NotImplementedError


def resize_images(images: Sequence[np.ndarray], size: int, mode: str = "bicubic") -> Tensor:
    """Resize whole images to a square, so that nothing of the visual field is cut away.

    Parameters
    ----------
    images
        uint8 arrays, each (height, width, 3).
    size
        Side of the result in pixels.
    mode
        ``bicubic`` or ``bilinear``, both with antialiasing.

    Returns
    -------
    Tensor
        (images, 3, size, size) float32 in 0..1.
    """
    result = torch.empty(len(images), 3, size, size)
    for row, image in zip(result, images, strict=True):
        pixels = torch.tensor(image, dtype=torch.float32).permute(2, 0, 1)[None]
        if pixels.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode=mode, antialias=True)
        row.copy_(pixels[0].clamp(0, 255).div(255))
    return result


def resolve_layers(layers: Sequence[int], n_blocks: int, field: str) -> tuple[int, ...]:
    """Turn block numbers that may be negative into numbers from 1, in the order given.

    Raises
    ------
    ConfigError
        If there is none, one is out of range, or one is named twice.
    """
    resolved = tuple(n_blocks + 1 + layer if layer < 0 else layer for layer in layers)
    outside = [a for a, b in zip(layers, resolved, strict=True) if not 1 <= b <= n_blocks]
    if outside or not resolved or len(set(resolved)) != len(resolved):
        raise ConfigError(
            f"backbone:{field}",
            f"{list(layers)} is not a choice among blocks 1..{n_blocks}",
            "Count blocks from 1, or from the end with -1, and name each once.",
        )
    return resolved


def versions_of(model: str) -> dict[str, str]:
    """Versions of the libraries that define a backbone's numbers."""
    library = "plenoptic" if model == PYRAMID else "timm"
    return {library: version(library)}


def weight_file(weights: str) -> Path:
    """Return the path of a local weight file.

    Raises
    ------
    ConfigError
        If there is no such file, or its kind is unknown.
    """
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"{path}:weights",
            "there is no such weight file",
            "Give a .safetensors, .pth or .pt file by `--data.backbone.weights`, or `pretrained` "
            "or `untrained`.",
        )
    if path.suffix not in {".safetensors", ".pth", ".pt"}:
        raise ConfigError(
            f"{path}:weights",
            f"found a {path.suffix or 'nameless'} file where a state dict is expected",
            "Give a .safetensors, .pth or .pt file.",
        )
    return path


def matches(spec: BackboneSpec, key: dict[str, Any]) -> bool:
    """Say whether a backbone with this `Backbone.key` is what `spec` asks for, without building it.

    Raises
    ------
    ConfigError
        If the spec names a weight file that is not there.
    """
    if key["model"] != spec.model or key["versions"] != versions_of(spec.model):
        return False
    if key["image_size"] != (spec.image_size or key["default_image_size"]):
        return False
    for field in ("cls_layers", "patch_layers"):
        if list(resolve_layers(getattr(spec, field), key["n_blocks"], field)) != key[field]:
            return False
    source = key["weights"]["source"]
    if spec.model == PYRAMID:
        return source == WEIGHT_FREE
    if spec.weights in {"pretrained", "untrained"}:
        return source == (HUB if spec.weights == "pretrained" else UNTRAINED)
    return source == FILE and key["weights"]["sha256"] == sha256_of_file(weight_file(spec.weights))


def create_backbone(spec: BackboneSpec) -> Backbone:
    """Build a frozen backbone.

    Raises
    ------
    ConfigError
        If the model is unknown or has no CLS token, its weights cannot be had, or a layer or
        image size does not fit it.
    """
    if spec.model == PYRAMID:
        from chasm.features.pyramid import PyramidBackbone

        return PyramidBackbone(spec).eval().requires_grad_(False)
    from chasm.features.vit import VitBackbone

    return VitBackbone(spec).eval().requires_grad_(False)
