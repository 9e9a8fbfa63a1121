"""`convert-official`: a published checkpoint becomes an export that predicts the same."""

import json

import numpy as np
import pytest
import torch

from chasm.data.store import SubjectStore
from chasm.errors import ConfigError, DataError
from chasm.features.backbones import BackboneSpec, create_backbone
from chasm.inference import Encoder
from chasm.inference.encoder import read_trained
from chasm.inference.official import convert
from chasm.models.official import WITHOUT_BATCH_AXIS, convert_official, official_name
from chasm.models.published import PublishedEncoder
from chasm.models.stage2 import MambaVAE
from chasm.parcellation import sequential

PER_PARCEL = 15


@pytest.fixture(scope="module")
def n_voxels(toy_dataset):
    return SubjectStore.open(toy_dataset / "subj01.h5").n_voxels


@pytest.fixture(scope="module")
def state(n_voxels):
    """A published state dict at small sizes that fit the pyramid's tokens and the toy subject."""
    torch.manual_seed(0)
    parcels = sequential(n_voxels, PER_PARCEL)
    tokens = {"cls_width": 725, "n_cls": 1, "patch_width": 36, "n_patches": 64}
    encoder = PublishedEncoder(**tokens, n_parcels=parcels.n_parcels, d_model=16, d_embedding=8)
    decoder = MambaVAE(
        **tokens, parcellation=parcels, d_model=12, encoder_blocks=1, decoder_blocks=1, d_patch=6,
        d_latent=3, d_variational=6, n_queries=2, d_hidden=9, d_residual=6, d_amplitude=6,
    )  # fmt: skip
    found = {}
    for part, module in (("encoder", encoder), ("decoder", decoder)):
        for key, value in module.state_dict().items():
            name = official_name(f"{part}.{key}")
            if name is not None:
                found[name] = value[None] if name in WITHOUT_BATCH_AXIS else value.clone()
    found["stage2.fusion_weight"] += 0.1
    return found


@pytest.fixture
def checkpoint(state, tmp_path):
    torch.save(state, tmp_path / "best_model.pth")
    return tmp_path / "best_model.pth"


def expected_voxels(state, toy_images):
    """Predict by the converted modules alone, from the pyramid's tokens."""
    official = convert_official(state)
    backbone = create_backbone(BackboneSpec())
    cls, patches = backbone(backbone.preprocess(list(toy_images)))
    cls, patches = cls.half().float(), patches.half().float()
    with torch.inference_mode():
        parcels = official.encoder(cls, patches).parcels
        return official.decoder(cls, patches, parcels).voxels.numpy()


def test_a_converted_checkpoint_predicts_as_the_published_model(
    state, checkpoint, toy_images, toy_dataset, tmp_path
):
    out = convert(
        checkpoint, tmp_path / "model", store=toy_dataset / "subj01.h5", backbone=BackboneSpec()
    )
    found = Encoder.from_checkpoint(out, subject=1).predict(toy_images)
    np.testing.assert_allclose(
        found.voxels, expected_voxels(state, toy_images), rtol=1e-4, atol=1e-5
    )
    assert "roi:streams" in found.voxel_table
    card = (out / "README.md").read_text()
    assert "Converted" in card
    assert "subj01" in card
    assert "Not tested" in card
    assert "optimistic" in card


def test_without_a_store_subject_and_voxels_are_unknown(checkpoint, toy_images, tmp_path):
    out = convert(checkpoint, tmp_path / "model", backbone=BackboneSpec())
    found = Encoder.from_checkpoint(out).predict(toy_images[:1])
    assert found.voxel_table.shape[1] == 0
    card = (out / "README.md").read_text()
    assert "The subject is unknown" in card
    assert "The voxels are unknown" in card
    assert "Natural Scenes Dataset" in card
    with pytest.raises(ConfigError, match="trained on unknown, subj01 was asked for"):
        Encoder.from_checkpoint(out, subject=1)


def test_an_untrained_stage_2_is_left_out(state, n_voxels, toy_images, tmp_path):
    untrained = {
        **state,
        "stage2.fusion_weight": torch.tensor(0.5),
        "stage2.global_scale": torch.tensor(2.5),
    }
    torch.save(untrained, tmp_path / "best_stage1.pth")
    out = convert(tmp_path / "best_stage1.pth", tmp_path / "model", backbone=BackboneSpec())
    assert "Stage 1 alone" in (out / "README.md").read_text()
    found = Encoder.from_checkpoint(out).predict(toy_images[:2], parcels=True)
    assert found.parcels.shape == (2, n_voxels // PER_PARCEL)


def test_the_default_backbone_is_the_published_one(checkpoint, tmp_path):
    out = convert(checkpoint, tmp_path / "model")
    spec = json.loads((out / "config.json").read_text())["backbone"]["spec"]
    assert (spec["model"], spec["image_size"]) == ("vit_base_patch14_dinov2", 224)
    assert read_trained(out).backbone_key is None


def test_a_store_of_other_voxels_is_refused(checkpoint, toy_dataset, state, tmp_path):
    from chasm.data.arrays import prepare_arrays

    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.integers(0, 255, (40, 8, 8, 3)).astype(np.uint8))
    np.save(tmp_path / "responses.npy", rng.normal(size=(9, 40, 2)).astype(np.float32))
    store = prepare_arrays(
        tmp_path / "images.npy", tmp_path / "responses.npy", tmp_path / "a.h5", name="a",
        dataset="d",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="has 9 voxels, the checkpoint predicts"):
        convert(checkpoint, tmp_path / "model", store=store)
    assert not (tmp_path / "model").exists()


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    torch.save({"model": Bomb(tmp_path / "boom")}, tmp_path / "best_model.pth")
    with pytest.raises(DataError, match="nothing else is ever loaded"):
        convert(tmp_path / "best_model.pth", tmp_path / "model")
    assert not (tmp_path / "boom").exists()
    assert not (tmp_path / "model").exists()


def test_other_checkpoints_are_refused(state, stage1_run, tmp_path):
    with pytest.raises(DataError):
        convert(stage1_run / "checkpoints" / "best.ckpt", tmp_path / "model")
    torch.save({**state, "stage3.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(DataError, match=r"stage3\.weight: is not part of the published model"):
        convert(tmp_path / "other.pth", tmp_path / "model")
    assert not (tmp_path / "model").exists()
