"""Vision transformers of timm as frozen backbones."""

from __future__ import annotations

import difflib
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import load_state_dict
from torch import Tensor, nn

from chasm.errors import ConfigError
from chasm.features.backbones import (
    FILE,
    HUB,
    UNTRAINED,
    Backbone,
    BackboneSpec,
    Tokens,
    resize_images,
    resolve_layers,
    versions_of,
    weight_file,
)
from chasm.io import sha256_of_file

logger = logging.getLogger(__name__)


class VitBackbone(Backbone):
    """CLS and patch tokens of chosen blocks of a timm transformer.

    Every block's tokens go through the model's final norm, as `forward_intermediates` does with
    ``norm=True``; register tokens are left out. The whole image is resized to a square with the
    model's own interpolation, mean and standard deviation; nothing is cropped.
    """

    def __init__(self, spec: BackboneSpec) -> None:
        super().__init__()
        self.model: Any
        self.model, weights = load_model(spec)
        _require_tokens(self.model, spec.model)
        n_blocks = len(self.model.blocks)
        self.cls_layers = resolve_layers(spec.cls_layers, n_blocks, "cls_layers")
        self.patch_layers = resolve_layers(spec.patch_layers, n_blocks, "patch_layers")
        self._layers = sorted({*self.cls_layers, *self.patch_layers})

        own = resolve_data_config({}, model=self.model)
        default_size = own["input_size"][-1]
        size = spec.image_size or default_size
        config = resolve_data_config({"input_size": (3, size, size)}, model=self.model)
        self.image_size = size
        self._interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        self._mean = torch.tensor(config["mean"])[:, None, None]
        self._std = torch.tensor(config["std"])[:, None, None]

        label = weights["source"]
        self.weights_label = f"{FILE}:{weights['sha256'][:12]}" if label == FILE else label
        self.key = {
            "model": spec.model,
            "weights": weights,
            "cls_layers": list(self.cls_layers),
            "patch_layers": list(self.patch_layers),
            "n_blocks": n_blocks,
            "image_size": size,
            "default_image_size": default_size,
            "transform": {
                "resize": self._interpolation,
                "mean": list(config["mean"]),
                "std": list(config["std"]),
                "norm": True,
            },
            "versions": versions_of(spec.model),
        }
        self.model.eval()
        cls, patches = self.forward(torch.zeros(1, 3, size, size))
        self.n_cls, self.cls_width = cls.shape[1:]
        self.n_patches, self.patch_width = patches.shape[1:]
        rows, columns = self.model.patch_embed.grid_size
        self.grid = (rows, columns)

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        """Resize and standardise uint8 images (height, width, 3) -> (images, 3, size, size)."""
        pixels = resize_images(images, self.image_size, self._interpolation)
        return (pixels - self._mean) / self._std

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tokens:
        """Return the tokens of preprocessed images (images, 3, size, size)."""
        found = self.model.forward_intermediates(
            images,
            indices=[layer - 1 for layer in self._layers],
            return_prefix_tokens=True,
            norm=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        blocks = dict(zip(self._layers, found, strict=True))
        cls = torch.stack([blocks[layer][1][:, 0] for layer in self.cls_layers], dim=1)
        patches = torch.cat([blocks[layer][0] for layer in self.patch_layers], dim=-1)
        return Tokens(cls, patches)


def load_model(spec: BackboneSpec) -> tuple[nn.Module, dict[str, str]]:
    """Build a timm model with the weights that `spec` asks for.

    Returns
    -------
    nn.Module
        The model without its classifier.
    dict
        Where the weights come from (`source`) and their SHA-256: of the file for a local one,
        of names and values otherwise.

    Raises
    ------
    ConfigError
        If the model is unknown, does not take the image size, or its weights cannot be had.
    """
    if not timm.is_model(spec.model):
        near = difflib.get_close_matches(spec.model, timm.list_models(), n=3)
        hint = f" Near: {', '.join(near)}." if near else ""
        raise ConfigError(
            "backbone:model",
            f"timm has no model {spec.model!r}",
            "Choose `--data.backbone.model pyramid` or a name that timm.list_models() gives."
            f"{hint}",
        )
    options: dict[str, Any] = {"num_classes": 0}
    if spec.image_size is not None:
        options["img_size"] = spec.image_size
    if spec.weights == "pretrained":
        model = _from_hub(spec.model, options)
        return model, {"source": HUB, "sha256": hash_of_weights(model)}
    if spec.weights == "untrained":
        logger.warning("%s is UNTRAINED: its weights are random.", spec.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = _create(spec.model, options)
        return model, {"source": UNTRAINED, "sha256": hash_of_weights(model)}
    return _from_file(spec, options)


def _create(name: str, options: dict[str, Any], **more: Any) -> Any:
    try:
        return timm.create_model(name, **options, **more)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        raise ConfigError(
            "backbone:image_size",
            f"{name} does not take an image size",
            "Leave image_size out, or choose a vision transformer with a CLS token.",
        ) from error


def _from_hub(name: str, options: dict[str, Any]) -> nn.Module:
    logger.info("Fetching the weights of %s from the hub, unless they are already here.", name)
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.ERROR)  # it reports every retry; the error below says enough
    try:
        return _create(name, options, pretrained=True)
    except (OSError, RuntimeError, HfHubHTTPError) as error:
        raise ConfigError(
            "backbone:weights",
            f"the pretrained weights of {name} cannot be fetched ({_first_line(error)})",
            "Give a local file with `--data.backbone.weights FILE`, or choose "
            "`--data.backbone.weights untrained` or `--data.backbone.model pyramid`.",
        ) from error
    finally:
        hub_log.setLevel(level)


def _from_file(spec: BackboneSpec, options: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    path = weight_file(spec.weights)
    config = timm.get_pretrained_cfg(spec.model)
    found = (config.classifier if config else None) or ()
    heads = (found,) if isinstance(found, str) else found
    unused = tuple(f"{head}.{part}" for head in heads for part in ("weight", "bias"))
    try:
        state = load_state_dict(str(path), weights_only=True)
        state = {name: value for name, value in state.items() if name not in unused}
        # With equal class counts timm loads strictly, so that nothing is left random, after
        # adapting published layouts (DINOv2's own, CLIP, other position grids).
        overlay = {"state_dict": state, "num_classes": 0}
        model = _create(spec.model, options, pretrained=True, pretrained_cfg_overlay=overlay)
    except (OSError, RuntimeError, AttributeError, KeyError, SafetensorError) as error:
        raise ConfigError(
            f"{path}:weights",
            f"not a state dict of {spec.model} ({_first_line(error)})",
            "Give the weights of this very model as safetensors or as a .pth state dict.",
        ) from error
    model.pretrained_cfg["state_dict"] = None
    return model, {"source": FILE, "sha256": sha256_of_file(path)}


def _require_tokens(model: nn.Module, name: str) -> None:
    """Refuse models without a CLS token, a patch grid or blocks."""
    has_cls = getattr(model, "cls_token", None) is not None
    parts = ("blocks", "patch_embed", "forward_intermediates")
    if has_cls and all(hasattr(model, part) for part in parts):
        return
    raise ConfigError(
        "backbone:model",
        f"{name} has no CLS token next to patch tokens",
        "Choose a vision transformer with a class token, e.g. "
        "`--data.backbone.model vit_base_patch14_dinov2`, or `--data.backbone.model pyramid`.",
    )


def hash_of_weights(model: nn.Module) -> str:
    """Hexadecimal SHA-256 of the names, types, shapes and values of a model's state."""
    result = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        result.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        result.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return result.hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160].rstrip(".:") if lines else type(error).__name__
