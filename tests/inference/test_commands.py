"""predict, export, map and convert-official on the command line: one line for what is wrong."""

import shutil

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from chasm.cli import main
from chasm.inference import Encoder


def run(capsys, *args):
    status = main([str(a) for a in args])
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == (status != 0)
    return status, said.out.split(), errors[0] if errors else ""


@pytest.fixture
def images(toy_images, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for row, pixels in enumerate(toy_images):
        Image.fromarray(pixels).save(folder / f"{row}.png")
    return folder


def test_predict_writes_what_the_encoder_gives(stage2_run, images, tmp_path, capsys):
    out = tmp_path / "pred.h5"
    status, said, _ = run(
        capsys, "predict", "--model", stage2_run, "--images", images, "--out", out, "--draws", 2,
        "--parcels", "--batch-size", 4, "--seed", 3, "--subject", 1, "--device", "cpu",
    )  # fmt: skip
    assert status == 0
    assert said == [str(out)]
    expected = Encoder.from_checkpoint(stage2_run).predict(
        images, batch_size=4, draws=2, parcels=True, seed=3
    )
    with h5py.File(out) as file:
        for name in ("voxels", "parcels", "draws"):
            np.testing.assert_array_equal(file[name][:], getattr(expected, name))


def test_a_corrupt_file_in_the_folder_is_named_and_the_rest_is_kept(
    stage1_run, images, tmp_path, capsys
):
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:60])
    out = tmp_path / "pred.h5"
    status, _, error = run(
        capsys, "predict", "--model", stage1_run, "--images", images, "--out", out
    )
    assert status == 3
    assert "3.png" in error
    assert "1 of 7" in error
    with h5py.File(out) as file:
        assert file["voxels"].shape[0] == 6
        assert list(file["refused/name"].asstr()) == ["3.png"]


def predict(model, images, tmp_path, *more):
    return [
        "predict",
        "--model",
        model,
        "--images",
        images,
        "--out",
        tmp_path / "o" / "p.h5",
        *more,
    ]


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_bad_input_is_one_line_and_leaves_nothing(stage1_run, images, tmp_path, capsys):
    cmyk = tmp_path / "cmyk"
    cmyk.mkdir()
    Image.new("CMYK", (8, 8)).save(cmyk / "a.jpg")
    pickled = tmp_path / "pickled"
    shutil.copytree(stage1_run, pickled)
    torch.save({"state_dict": Bomb(tmp_path / "boom")}, pickled / "checkpoints" / "best.ckpt")
    for args, named in (
        (predict(stage1_run, images, tmp_path, "--subject", 7), "subj07 was asked for"),
        (predict(stage1_run, cmyk, tmp_path), "mode CMYK"),
        (predict(pickled, images, tmp_path), "is not a readable checkpoint"),
        (predict(images, images, tmp_path), "is no trained model"),
        (predict(stage1_run, tmp_path / "absent", tmp_path), "no such file or folder"),
        (predict(stage1_run, images, tmp_path, "--draws", 2), "draws"),
        (predict(stage1_run, images, tmp_path, "--batch-size", 0), "batch_size 0"),
        (predict(stage1_run, images, tmp_path, "--device", "abacus"), "abacus"),
        (predict(stage1_run, images, tmp_path, "--backbone-weights", "x"), "has no weights"),
    ):
        status, _, error = run(capsys, *args)
        assert status == 2, args
        assert named in error, error
        out = tmp_path / "o"
        assert not out.exists() or list(out.iterdir()) == []
    assert not (tmp_path / "boom").exists()


def test_export_predict_from_it_and_draw_the_prediction(
    stage1_run, images, toy_images, tmp_path, capsys
):
    model, out = tmp_path / "model", tmp_path / "pred.h5"
    assert run(capsys, "export", stage1_run, "--out", model)[:2] == (0, [str(model)])
    status, _, error = run(capsys, "export", model, "--out", tmp_path / "again")
    assert status == 2
    assert "exported already" in error
    assert run(capsys, "predict", "--model", model, "--images", images, "--out", out)[0] == 0
    expected = Encoder.from_checkpoint(stage1_run).predict(images)
    with h5py.File(out) as file:
        np.testing.assert_array_equal(file["voxels"][:], expected.voxels)
    drawn = tmp_path / "maps" / "a.nii.gz"
    status, said, _ = run(capsys, "map", out, "--what", "prediction:2.png", "--out", drawn)
    assert (status, said) == (0, [str(drawn)])
    volume = np.asarray(nib.load(drawn).dataobj)
    places = tuple(expected.voxel_table[axis] for axis in "ijk")
    np.testing.assert_array_equal(volume[places], expected.voxels[2])


def test_export_leaves_other_things_alone(stage1_run, images, capsys):
    before = sorted(images.iterdir())
    status, _, error = run(capsys, "export", stage1_run, "--out", images)
    assert status == 2
    assert "--overwrite" in error
    assert sorted(images.iterdir()) == before
    assert run(capsys, "export", stage1_run, "--out", images, "--overwrite")[0] == 0
    assert (images / "config.json").is_file()


def test_score_maps_of_a_tested_run(tested_run, tmp_path, capsys):
    for what in ("r2", "ceiling"):
        out = tmp_path / f"{what}.nii.gz"
        assert run(capsys, "map", tested_run, "--what", what, "--out", out)[0] == 0
        assert np.isfinite(np.asarray(nib.load(out).dataobj)).sum() > 100
    gifti = tmp_path / "r2.func.gii"
    args = ["map", tested_run, "--what", "r2", "--out", gifti]
    status, _, error = run(capsys, *args)
    assert status == 2
    assert "--nsd TREE" in error
    status, _, error = run(capsys, *args, "--nsd", tmp_path)
    assert status == 2
    assert "ppdata/subj01/transforms/lh.func1pt8-to-layerB1.mgz" in error


def test_a_pickle_is_no_official_checkpoint(tmp_path, capsys):
    torch.save({"model": Bomb(tmp_path / "boom")}, tmp_path / "best_model.pth")
    status, _, error = run(
        capsys, "convert-official", tmp_path / "best_model.pth", "--out", tmp_path / "model"
    )
    assert status == 2
    assert "best_model.pth" in error
    assert not (tmp_path / "boom").exists()
    assert not (tmp_path / "model").exists()


def test_every_command_has_help_and_starts_light(capsys):
    from chasm.commands import COMMANDS

    for name in COMMANDS:
        if name in ("extract", "fit"):  # theirs is the recipe's, made by jsonargparse
            continue
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert "usage: chasm " + name in capsys.readouterr().out
