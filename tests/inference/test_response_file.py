"""Predictions on disk: the same numbers, every good image, every bad one named, atomic."""

import h5py
import numpy as np
import pytest
from PIL import Image

from chasm.errors import ConfigError, DataError
from chasm.inference import Encoder
from chasm.inference.pictures import pictures_of
from chasm.inference.response_file import ResponseFile, SomeRefusedError, write_responses


@pytest.fixture(scope="module")
def encoder(stage2_run):
    return Encoder.from_checkpoint(stage2_run)


@pytest.fixture
def folder(toy_images, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for row, pixels in enumerate(toy_images):
        Image.fromarray(pixels).save(folder / f"{row}.png")
    return folder


def test_the_file_holds_what_predict_gives(encoder, folder, toy_images, tmp_path):
    out = tmp_path / "new" / "pred.h5"
    options = {"draws": 2, "parcels": True, "seed": 4, "batch_size": 3}
    assert write_responses(encoder, pictures_of(folder), out, **options) == out
    expected = encoder.predict(toy_images, **options)
    with h5py.File(out) as file:
        for name in ("voxels", "parcels", "draws"):
            assert file[name].dtype == np.float32
            np.testing.assert_array_equal(file[name][:], getattr(expected, name))
        assert list(file["images/name"].asstr()) == [f"{row}.png" for row in range(7)]
        assert len(file["refused/name"]) == 0
        assert bool(file.attrs["simulated"])
        assert file.attrs["subject"] == "subj01"
        assert file.attrs["weights"] == "weight-free"
    found = ResponseFile.open(out)
    np.testing.assert_array_equal(found.voxels_of("3.png"), expected.voxels[3])
    assert found.space.table().equals(expected.voxel_table)
    np.testing.assert_array_equal(found.space.affine, encoder.trained.space.affine)
    assert str(found.attributes["model"]).startswith("SIMULATED")


def test_bad_images_are_listed_and_the_others_predicted(encoder, folder, toy_images, tmp_path):
    (folder / "1.png").write_bytes(b"no image")
    Image.new("CMYK", (9, 9)).save(folder / "4.jpg")
    (folder / "4.png").unlink()
    out = tmp_path / "pred.h5"
    with pytest.raises(SomeRefusedError) as caught:
        write_responses(encoder, pictures_of(folder), out, batch_size=2)
    for word in ("2 of 7", "1.png", "4.jpg", "CMYK", "other 5", str(out)):
        assert word in str(caught.value)
    assert caught.value.exit_status == 3
    good = [0, 2, 3, 5, 6]
    expected = encoder.predict(toy_images[good])
    with h5py.File(out) as file:
        assert list(file["images/name"].asstr()) == [f"{row}.png" for row in good]
        np.testing.assert_allclose(file["voxels"][:], expected.voxels, rtol=1e-4, atol=1e-5)
        assert list(file["refused/name"].asstr()) == ["1.png", "4.jpg"]
        assert "CMYK" in file["refused/reason"].asstr()[1]


def test_without_a_single_good_image_there_is_no_file(encoder, folder, tmp_path):
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none can be used") as caught:
        write_responses(encoder, pictures_of(folder), tmp_path / "out" / "pred.h5")
    assert caught.value.exit_status == 2
    assert list((tmp_path / "out").iterdir()) == []


def test_a_long_list_is_cut_in_the_message_and_whole_in_the_file(
    encoder, folder, toy_images, tmp_path
):
    for row in range(25):
        (folder / f"bad{row}.png").write_bytes(b"")
    with pytest.raises(SomeRefusedError, match="and 5 more"):
        write_responses(encoder, pictures_of(folder), tmp_path / "pred.h5")
    with h5py.File(tmp_path / "pred.h5") as file:
        assert len(file["refused/name"]) == 25


def test_a_file_of_its_own_kind_is_replaced_and_nothing_else(
    encoder, folder, toy_dataset, tmp_path
):
    out = tmp_path / "pred.h5"
    pictures = pictures_of(folder)
    write_responses(encoder, pictures[:1], out)
    write_responses(encoder, pictures[:2], out)
    assert len(ResponseFile.open(out).names) == 2
    store = tmp_path / "subj01.h5"
    store.write_bytes((toy_dataset / "subj01.h5").read_bytes())
    before = store.read_bytes()
    with pytest.raises(ConfigError, match="something else stands here"):
        write_responses(encoder, pictures, store)
    (tmp_path / "text.h5").write_text("notes")
    with pytest.raises(ConfigError, match="something else stands here"):
        write_responses(encoder, pictures, tmp_path / "text.h5")
    assert store.read_bytes() == before


def test_a_failure_leaves_the_old_file(encoder, folder, tmp_path):
    out = tmp_path / "pred.h5"
    write_responses(encoder, pictures_of(folder)[:1], out)
    before = out.read_bytes()
    with pytest.raises(ConfigError):
        write_responses(encoder, pictures_of(folder), out, draws=-1)
    assert out.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name != "images"] == ["pred.h5"]


def test_memory_does_not_grow_with_the_number_of_images(encoder, folder, tmp_path, monkeypatch):
    """At no time are more images in memory than a batch, and blocks go to the file at once."""
    alive, most = [], []
    inner = encoder.stream

    def watched(*args):
        for block in inner(*args):
            alive.append(len(block))
            most.append(len(alive))
            yield block
            alive.pop()

    monkeypatch.setattr(encoder, "stream", watched)
    write_responses(encoder, pictures_of(folder), tmp_path / "pred.h5", batch_size=2)
    assert len(most) == 4
    assert max(most) == 1


def test_other_files_are_named(encoder, folder, toy_dataset, tmp_path):
    out = tmp_path / "pred.h5"
    write_responses(encoder, pictures_of(folder), out)
    found = ResponseFile.open(out)
    with pytest.raises(DataError, match=r"0 images are called '33.png'.*3\.png"):
        found.voxels_of("33.png")
    with pytest.raises(DataError, match="holds no predicted responses"):
        ResponseFile.open(toy_dataset / "subj01.h5")
    with h5py.File(out, "r+") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(DataError, match="99, this chasm reads up to"):
        ResponseFile.open(out)
    with h5py.File(out, "r+") as file:
        file.attrs["format_version"] = 1
        del file["images"]
    with pytest.raises(DataError, match="damaged or incomplete"):
        ResponseFile.open(out)
    with pytest.raises(DataError, match="no such file"):
        ResponseFile.open(tmp_path / "absent.h5")
