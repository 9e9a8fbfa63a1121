"""The encoder: the run's own predictions, whatever the images come as; refusals by name."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from chasm.data.store import SubjectStore
from chasm.errors import ConfigError, DataError
from chasm.inference import Encoder
from chasm.inference.trained import _working_folder
from chasm.training.runs import load


@pytest.fixture(scope="module")
def encoder(stage1_run):
    return Encoder.from_checkpoint(stage1_run)


@pytest.fixture(scope="module")
def encoder2(stage2_run):
    return Encoder.from_checkpoint(stage2_run)


@torch.inference_mode()
def own_predictions(run):
    """Data, pixels of the test images, and what the run itself predicts from its tokens."""
    model, data, _ = load(run)
    ids, parts = [], []
    for batch in data.test_dataloader():
        ids.append(batch["image_id"])
        parts.append(model(data.on_after_batch_transfer(batch, 0)))
    images = data.store.open_images().read(torch.cat(ids).numpy())
    return data, images, torch.cat(parts).numpy()


def test_stage_1_predicts_what_the_run_predicts_from_its_token_cache(encoder, stage1_run):
    data, images, expected = own_predictions(stage1_run)
    found = encoder.predict(images, batch_size=5, parcels=True)
    np.testing.assert_allclose(found.parcels, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.01
    labels = data.parcellation.labels.numpy()
    inside = labels >= 0
    np.testing.assert_array_equal(found.voxels[:, inside], found.parcels[:, labels[inside]])
    assert np.isnan(found.voxels[:, ~inside]).all()
    assert (~inside).any()
    assert found.voxels.dtype == np.float32


def test_stage_2_predicts_what_the_run_predicts_from_its_token_cache(encoder2, stage2_run):
    _, images, expected = own_predictions(stage2_run)
    found = encoder2.predict(images, parcels=True)
    np.testing.assert_allclose(found.voxels, expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(found.voxels).all()


def test_stage_2_gives_the_parcels_of_its_stage_1(encoder, encoder2, toy_images):
    expected = encoder.predict(toy_images, parcels=True).parcels
    np.testing.assert_allclose(
        encoder2.predict(toy_images, parcels=True).parcels, expected, rtol=1e-4, atol=1e-5
    )


def test_images_may_come_as_anything(encoder, toy_images, tmp_path):
    for row, pixels in enumerate(toy_images):
        Image.fromarray(pixels).save(tmp_path / f"{row}.png")
    expected = encoder.predict(toy_images)
    given = (
        tmp_path,
        [tmp_path / f"{row}.png" for row in range(7)],
        [Image.fromarray(pixels) for pixels in toy_images],
        torch.from_numpy(toy_images).permute(0, 3, 1, 2),
        torch.from_numpy(toy_images).permute(0, 3, 1, 2) / 255,
    )
    for images in given:
        np.testing.assert_array_equal(encoder.predict(images).voxels, expected.voxels)
    assert encoder.predict(tmp_path).names == [f"{row}.png" for row in range(7)]
    one = encoder.predict(toy_images[3])
    np.testing.assert_allclose(one.voxels, expected.voxels[3:4], rtol=1e-4, atol=1e-5)


def test_sizes_may_differ_and_each_is_resized_alone(encoder, toy_images):
    large = np.asarray(Image.fromarray(toy_images[0]).resize((311, 97)))
    together = encoder.predict([toy_images[0], large, toy_images[1]])
    for row, image in enumerate((toy_images[0], large, toy_images[1])):
        alone = encoder.predict(image).voxels[0]
        np.testing.assert_allclose(together.voxels[row], alone, rtol=1e-4, atol=1e-5)
    assert not np.allclose(together.voxels[0], together.voxels[1], equal_nan=True)


def test_the_same_image_twice_has_two_rows(encoder, toy_images, tmp_path):
    Image.fromarray(toy_images[0]).save(tmp_path / "a.png")
    found = encoder.predict([tmp_path / "a.png"] * 2)
    assert len(found) == 2
    assert found.voxels.shape[0] == 2


def test_the_table_is_that_of_the_store(encoder, toy_dataset, toy_images):
    store = SubjectStore.open(toy_dataset / "subj01.h5")
    table = encoder.predict(toy_images[:1]).voxel_table
    for name in ("i", "j", "k", "ncsnr"):
        np.testing.assert_array_equal(table[name], store.voxels[name])
    v1 = table["roi:prf-visualrois"].isin(["V1v", "V1d"])
    np.testing.assert_array_equal(v1, store.roi_mask("prf-visualrois", ["V1v", "V1d"]))


def test_draws_depend_on_seed_and_image_alone(encoder2, toy_images):
    found = encoder2.predict(toy_images, draws=3, seed=1)
    assert found.draws.shape == (3, 7, found.voxels.shape[1])
    spread = found.draws.std(axis=0)
    assert (spread.max(axis=1) > 0).all()
    again = encoder2.predict(toy_images[::-1], draws=3, seed=1, batch_size=2)
    np.testing.assert_allclose(again.draws[:, ::-1], found.draws, rtol=1e-3, atol=1e-4)
    other = encoder2.predict(toy_images, draws=3, seed=2)
    assert not np.allclose(other.draws, found.draws, rtol=1e-3, atol=1e-4)


def test_draws_are_those_of_the_module_around_its_mean(encoder2, toy_images):
    """Many draws average to about the prediction at the latent's mean, per image."""
    found = encoder2.predict(toy_images[:2], draws=200)
    error = np.abs(found.draws.mean(axis=0) - found.voxels)
    noise = found.draws.std(axis=0) / np.sqrt(200)
    assert np.median(error) < 5 * np.median(noise)


def test_stage_1_has_no_draws(encoder, toy_images):
    with pytest.raises(ConfigError, match="draws"):
        encoder.predict(toy_images[:1], draws=2)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"draws": -1}])
def test_numbers_that_make_no_sense(encoder, toy_images, options):
    with pytest.raises(ConfigError, match="predict"):
        encoder.predict(toy_images[:1], **options)


def test_a_bad_image_among_good_ones_is_an_error(encoder, toy_images):
    with pytest.raises(DataError, match="range is not known"):
        encoder.predict([toy_images[0], toy_images[1].astype(np.float32)])


def test_a_checkpoint_of_the_run_will_do(stage1_run, toy_images, encoder):
    other = Encoder.from_checkpoint(stage1_run / "checkpoints" / "best.ckpt", "cpu")
    np.testing.assert_array_equal(
        other.predict(toy_images).voxels, encoder.predict(toy_images).voxels
    )


def test_another_subject_is_refused(stage1_run):
    assert Encoder.from_checkpoint(stage1_run, subject=1).trained.subject == "subj01"
    with pytest.raises(ConfigError, match=r"trained on subj01, subj02 was asked for"):
        Encoder.from_checkpoint(stage1_run, subject=2)


def test_an_unknown_device_is_refused(stage1_run):
    with pytest.raises(ConfigError, match="'abacus' cannot be used"):
        Encoder.from_checkpoint(stage1_run, device="abacus")


def test_what_is_no_model_is_named(stage1_run, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        Encoder.from_checkpoint(tmp_path / "absent")
    with pytest.raises(DataError, match="is no trained model"):
        Encoder.from_checkpoint(tmp_path)
    shutil.copy(stage1_run / "checkpoints" / "best.ckpt", tmp_path / "best.ckpt")
    with pytest.raises(DataError, match="lies outside its run"):
        Encoder.from_checkpoint(tmp_path / "best.ckpt")
    (tmp_path / "best_model.pth").write_bytes(b"x")
    with pytest.raises(DataError, match="convert-official"):
        Encoder.from_checkpoint(tmp_path / "best_model.pth")


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def copy_of(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    return copy


def test_a_pickle_in_place_of_weights_is_refused_and_not_executed(stage1_run, tmp_path):
    run = copy_of(stage1_run, tmp_path)
    torch.save({"state_dict": Bomb(tmp_path / "boom")}, run / "checkpoints" / "best.ckpt")
    with pytest.raises(DataError, match=r"best\.ckpt: is not a readable checkpoint"):
        Encoder.from_checkpoint(run)
    assert not (tmp_path / "boom").exists()


def test_an_unfinished_run_is_named(stage1_run, tmp_path):
    run = copy_of(stage1_run, tmp_path)
    facts = json.loads((run / "provenance.json").read_text())
    (run / "provenance.json").write_text(json.dumps(facts | {"status": "running"}))
    with pytest.raises(DataError, match="not finished"):
        Encoder.from_checkpoint(run)
    Encoder.from_checkpoint(run / "checkpoints" / "last.ckpt")


@pytest.fixture
def said(caplog, monkeypatch):
    """Warnings of chasm, whether or not a command has set up its logging before."""
    monkeypatch.setattr(logging.getLogger("chasm"), "propagate", True)
    return caplog


def test_without_its_store_a_run_predicts_with_an_empty_table(
    stage1_run, tmp_path, toy_images, said
):
    run = copy_of(stage1_run, tmp_path)
    facts = json.loads((run / "provenance.json").read_text())
    facts["store"]["path"] = str(tmp_path / "gone.h5")
    (run / "provenance.json").write_text(json.dumps(facts))
    found = Encoder.from_checkpoint(run).predict(toy_images[:1])
    assert "table of voxels is empty" in said.text
    assert found.voxel_table.shape == (found.voxels.shape[1], 0)


def test_a_store_that_has_changed_is_not_used(stage1_run, tmp_path, said):
    run = copy_of(stage1_run, tmp_path)
    facts = json.loads((run / "provenance.json").read_text())
    facts["store"]["fingerprint"] = "0" * 32
    (run / "provenance.json").write_text(json.dumps(facts))
    assert Encoder.from_checkpoint(run).voxel_table.shape[1] == 0
    assert "has changed since" in said.text


def edited_backbone(run, tmp_path, **fields):
    import yaml

    copy = copy_of(run, tmp_path)
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    settings["data"]["backbone"].update(fields)
    (copy / "config.yaml").write_text(yaml.safe_dump(settings))
    return copy


def test_another_backbone_than_in_training_is_refused(stage1_run, tmp_path):
    run = edited_backbone(stage1_run, tmp_path, image_size=144)
    with pytest.raises(ConfigError, match="image_size was 128 and is 144 now"):
        Encoder.from_checkpoint(run)


def test_paths_of_a_subjects_run_inside_the_run_of_several_are_found(tmp_path):
    of_all = tmp_path / "runs" / "toy" / "subj01+subj02" / "joint-0"
    (of_all / "subj01").mkdir(parents=True)
    assert _working_folder(of_all, {"runs": "runs"}) == tmp_path
    (of_all / "provenance.json").write_text("{}")
    assert _working_folder(of_all / "subj01", {"runs": "runs"}) == tmp_path
