"""The frozen backbone of a trained model, which has to be the very one it was trained on."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from chasm.errors import ConfigError
from chasm.features.backbones import FILE, HUB, PYRAMID, Backbone, create_backbone
from chasm.inference.trained import TrainedModel

log = logging.getLogger(__name__)

_GIVE_FILE = "Give the weights it was trained on with --backbone-weights FILE"


def make_backbone(trained: TrainedModel, weights: str | None = None) -> Backbone:
    """Build the backbone and compare it with the one behind the tokens of training.

    Parameters
    ----------
    trained
        The model.
    weights
        File of the backbone's weights, if it is no longer where it was.

    Raises
    ------
    ConfigError
        The weights cannot be had, or they, the layers or the transform are others.
    """
    spec, key = trained.backbone, trained.backbone_key
    if weights is not None:
        if spec.model == PYRAMID:
            raise ConfigError("--backbone-weights", "the pyramid has no weights", "Leave it out.")
        spec = replace(spec, weights=weights)
    try:
        backbone = create_backbone(spec)
    except ConfigError as error:
        remedy = _GIVE_FILE if error.where.endswith(":weights") else error.remedy
        raise ConfigError(
            trained.path, f"its backbone cannot be built: {error.where}: {error.problem}", remedy
        ) from error
    if key is None:
        log.warning("%s: which backbone weights it was trained on is not known", trained.path)
    else:
        _compare(trained, backbone, dict(key))
    _check_sizes(trained, backbone)
    return backbone


def _compare(trained: TrainedModel, backbone: Backbone, key: dict[str, Any]) -> None:
    found = dict(backbone.key)
    if key["weights"]["source"] == HUB and found["weights"]["source"] == FILE:
        # Those of the hub are known by names and values, not by the bytes of a file.
        from chasm.features.vit import hash_of_weights

        model: Any = backbone.model
        found["weights"] = {"source": HUB, "sha256": hash_of_weights(model)}
    if found["weights"] != key["weights"]:
        raise ConfigError(
            trained.path,
            f"was trained on {_words(key['weights'])} of {key['model']}, found are "
            f"{_words(found['weights'])}",
            _GIVE_FILE,
        )
    for name in sorted((key.keys() | found.keys()) - {"weights", "versions"}):
        if found.get(name) != key.get(name):
            raise ConfigError(
                trained.path,
                f"its backbone's {name} was {key.get(name)} and is {found.get(name)} now",
                "Use the version of chasm it was trained with.",
            )
    if found["versions"] != key["versions"]:
        log.warning(
            "%s was trained with %s, here is %s: tokens may differ a little",
            trained.path, key["versions"], found["versions"],
        )  # fmt: skip


def _words(weights: dict[str, Any]) -> str:
    digest = weights.get("sha256")
    return f"weights '{weights['source']}'" + (f" (sha256 {digest[:12]})" if digest else "")


def _check_sizes(trained: TrainedModel, backbone: Backbone) -> None:
    sizes = trained.module.sizes
    assert sizes is not None
    for name in ("n_cls", "cls_width", "n_patches", "patch_width"):
        if getattr(sizes, name) != getattr(backbone, name):
            raise ConfigError(
                trained.path,
                f"needs {name} {getattr(sizes, name)}, its backbone gives "
                f"{getattr(backbone, name)}",
                "Name the backbone it was trained on.",
            )
