"""The backbone of a trained model: the very weights it was trained on, or a named error."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file

from chasm.errors import ConfigError
from chasm.features.backbones import BackboneSpec, create_backbone
from chasm.features.vit import hash_of_weights
from chasm.inference.backbone import make_backbone
from chasm.inference.space import VoxelSpace
from chasm.inference.trained import TrainedModel
from chasm.io import sha256_of_file

TINY = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files of weights for the same model."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("a", "b"):
        model = timm.create_model(TINY, img_size=64, num_classes=0)
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """Say of a model that it was trained on the tokens of file a."""
    spec = BackboneSpec(TINY, str(folder / "a.safetensors"), 64)
    backbone = create_backbone(spec)
    names = ("n_cls", "cls_width", "n_patches", "patch_width")
    sizes = SimpleNamespace(**{name: getattr(backbone, name) for name in names})
    module = SimpleNamespace(sizes=sizes)
    return TrainedModel(module, spec, backbone.key, VoxelSpace(1), {}, Path("model"))


def with_weights(trained, **weights):
    return replace(trained, backbone_key={**trained.backbone_key, "weights": weights})


def test_the_same_file_in_its_place_or_elsewhere(trained, folder, tmp_path):
    expected = make_backbone(trained).model.state_dict()
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes((folder / "a.safetensors").read_bytes())
    gone = replace(trained, backbone=replace(trained.backbone, weights=str(tmp_path / "gone.pth")))
    with pytest.raises(ConfigError, match="no such weight file") as caught:
        make_backbone(gone)
    assert "--backbone-weights FILE" in str(caught.value)
    found = make_backbone(gone, str(moved)).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_other_weights_are_refused(trained, folder):
    digest = sha256_of_file(folder / "b.safetensors")[:12]
    with pytest.raises(ConfigError, match=rf"found are weights 'file' \(sha256 {digest}\)"):
        make_backbone(trained, str(folder / "b.safetensors"))
    with pytest.raises(ConfigError, match="weights 'UNTRAINED'"):
        make_backbone(replace(trained, backbone=BackboneSpec(TINY, "untrained", 64)))


def test_weights_of_the_hub_may_come_from_a_file_of_the_same_values(trained, folder):
    values = hash_of_weights(create_backbone(trained.backbone).model)
    of_hub = with_weights(trained, source="hub", sha256=values)
    make_backbone(of_hub, str(folder / "a.safetensors"))
    with pytest.raises(ConfigError, match="was trained on weights 'hub'"):
        make_backbone(of_hub, str(folder / "b.safetensors"))


def test_other_layers_are_refused(trained):
    spec = replace(trained.backbone, patch_layers=(-2,))
    with pytest.raises(ConfigError, match=r"patch_layers was \[12\] and is \[11\] now"):
        make_backbone(replace(trained, backbone=spec))


def test_sizes_are_compared_where_the_weights_are_not_known(trained, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("chasm"), "propagate", True)
    unknown = replace(trained, backbone_key=None)
    make_backbone(unknown)
    assert "is not known" in caplog.text
    spec = replace(trained.backbone, cls_layers=(1, 2))
    with pytest.raises(ConfigError, match="needs n_cls 1, its backbone gives 2"):
        make_backbone(replace(unknown, backbone=spec))
