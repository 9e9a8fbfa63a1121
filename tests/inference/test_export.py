"""Exports: bit-identical predictions after the round trip, and nothing but what was written."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chasm.errors import ConfigError, DataError
from chasm.inference import Encoder
from chasm.inference.encoder import read_trained
from chasm.inference.export import write_export
from chasm.io import sha256_of_file


@pytest.fixture(scope="module", params=["stage1_run", "stage2_run"])
def run(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def exported1(stage1_run, tmp_path_factory):
    return write_export(read_trained(stage1_run), tmp_path_factory.mktemp("export") / "model")


@pytest.fixture
def folder(exported1, tmp_path):
    """A copy to damage."""
    shutil.copytree(exported1, tmp_path / "model")
    return tmp_path / "model"


def test_checkpoint_to_export_and_back_predicts_bit_for_bit_the_same(run, toy_images, tmp_path):
    before = Encoder.from_checkpoint(run)
    out = write_export(before.trained, tmp_path / "model")
    moved = tmp_path / "elsewhere"
    out.rename(moved)
    after = Encoder.from_checkpoint(moved)
    options = {"parcels": True, "draws": 2 if after.trained.module.unit == "voxel" else 0}
    expected = before.predict(toy_images, **options)
    found = after.predict(toy_images, **options)
    np.testing.assert_array_equal(found.voxels, expected.voxels)
    np.testing.assert_array_equal(found.parcels, expected.parcels)
    if options["draws"]:
        np.testing.assert_array_equal(found.draws, expected.draws)
    assert found.voxel_table.equals(expected.voxel_table)
    np.testing.assert_array_equal(after.trained.space.affine, before.trained.space.affine)
    assert dict(after.trained.facts) == json.loads(json.dumps(dict(before.trained.facts)))
    for name, value in before.module.state_dict().items():
        assert torch.equal(after.module.state_dict()[name], value), name


def test_what_is_in_the_folder(exported1, stage1_run):
    assert {p.name for p in exported1.iterdir()} == {
        "config.json", "model.safetensors", "voxels.csv", "README.md",
    }  # fmt: skip
    config = json.loads((exported1 / "config.json").read_text())
    assert config["facts"]["subject"] == "subj01"
    assert config["facts"]["simulated"] is True
    assert config["facts"]["statistics"] == "train"
    assert config["backbone"]["key"]["weights"] == {"source": "weight-free"}
    text = "".join(
        (exported1 / name).read_text() for name in ("config.json", "voxels.csv", "README.md")
    )
    for place in (str(stage1_run), str(stage1_run.parent), "/tmp/"):
        assert place not in text  # nothing of this machine travels
    for path in exported1.iterdir():
        assert path.stat().st_mode & 0o044 == 0o044, path


def test_only_its_own_kind_is_written_over(exported1, stage1_run, stage2_run, tmp_path):
    out = tmp_path / "model"
    write_export(read_trained(stage1_run), out)
    write_export(read_trained(stage1_run), out)
    with pytest.raises(ConfigError, match="something else stands here"):
        write_export(read_trained(stage2_run), out)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else stands here"):
        write_export(read_trained(stage1_run), notes)
    assert (notes / "a.txt").read_text() == "mine"
    write_export(read_trained(stage2_run), out, overwrite=True)
    assert read_trained(out).module.unit == "voxel"
    (tmp_path / "empty").mkdir()
    write_export(read_trained(stage1_run), tmp_path / "empty")


def test_a_failure_leaves_nothing(stage1_run, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("chasm.inference.export.model_card", fail)
    with pytest.raises(OSError, match="disk full"):
        write_export(read_trained(stage1_run), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def edit(folder, change, name="config.json"):
    config = json.loads((folder / name).read_text())
    change(config)
    (folder / name).write_text(json.dumps(config))


def edit_weights(folder, change):
    """Change tensors and make the hash fit again, so that the tensors themselves are looked at."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    edit(folder, lambda c: c["sha256"].update({"model.safetensors": sha256_of_file(path)}))


def first(tensors):
    return min(name for name in tensors if tensors[name].ndim == 2)


def drop(tensors):
    del tensors[first(tensors)]


def add(tensors):
    tensors["extra"] = torch.zeros(1)


def reshape(tensors):
    tensors[first(tensors)] = tensors[first(tensors)].T.contiguous()


def recast(tensors):
    tensors[first(tensors)] = tensors[first(tensors)].half()


@pytest.mark.parametrize(
    ("change", "named"),
    [(drop, "lacks 1"), (add, "adds 1"), (reshape, "expected"), (recast, "float16")],
)
def test_tensors_have_to_be_exactly_those_of_the_model(folder, change, named):
    edit_weights(folder, change)
    with pytest.raises(DataError, match=rf"model\.safetensors.*{named}"):
        read_trained(folder)


def newer(folder):
    edit(folder, lambda c: c.update(format_version=2))
    return "format_version: found 2, this chasm reads 1"


def other_format(folder):
    edit(folder, lambda c: c.update(format="bert"))
    return "is not 'chasm-encoder'"


def no_json(folder):
    (folder / "config.json").write_text("{")
    return "not readable as JSON"


def no_model(folder):
    edit(folder, lambda c: c.pop("model"))
    return "config.json:model: is missing"


def half_a_model(folder):
    edit(folder, lambda c: c["model"].pop("sizes"))
    return "does not describe a model"


def foreign_class(folder):
    edit(folder, lambda c: c["model"]["settings"]["encoder"].update(class_path="os.system"))
    return "os.system"


def foreign_name(folder):
    """A plain string is a class, too, to the parser; reading it would import the module."""
    edit(folder, lambda c: c["model"]["settings"].update(encoder="antigravity.webbrowser"))
    return "antigravity.webbrowser"


def other_weights(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return "model.safetensors: is not the file"


def pickled_weights(folder):
    path = folder / "model.safetensors"
    torch.save({"a": torch.zeros(1)}, path)
    edit(folder, lambda c: c["sha256"].update({"model.safetensors": sha256_of_file(path)}))
    return "is no safetensors file"


def no_weights(folder):
    (folder / "model.safetensors").unlink()
    return "model.safetensors: no such file"


def other_table(folder):
    (folder / "voxels.csv").write_text("voxel\n0\n")
    return "voxels.csv: is not the file"


def other_voxels(folder):
    edit(folder, lambda c: c["model"]["parcel_labels"].pop())
    return "model.safetensors:parcellation.labels"


def odd_backbone(folder):
    edit(folder, lambda c: c["backbone"]["spec"].update(sort="x"))
    return "backbone.spec: is no backbone"


@pytest.mark.parametrize(
    "damage",
    [newer, other_format, no_json, no_model, half_a_model, foreign_class, foreign_name,
     other_weights, pickled_weights, no_weights, other_table, other_voxels, odd_backbone],
)  # fmt: skip
def test_damaged_exports_are_named(folder, damage):
    named = damage(folder)
    with pytest.raises(DataError) as caught:
        read_trained(folder)
    assert named in str(caught.value)
    assert "antigravity" not in sys.modules


def test_another_backbone_than_in_training_is_refused(folder):
    edit(folder, lambda c: c["backbone"]["key"]["weights"].update(source="hub", sha256="ab" * 32))
    with pytest.raises(ConfigError, match=r"weights 'hub' \(sha256 abababababab\)") as caught:
        Encoder.from_checkpoint(folder)
    assert "--backbone-weights" in str(caught.value)


def test_another_version_of_the_backbone_library_is_a_warning(folder, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("chasm"), "propagate", True)
    edit(folder, lambda c: c["backbone"]["key"]["versions"].update(plenoptic="0.1"))
    Encoder.from_checkpoint(folder)
    assert "tokens may differ a little" in caplog.text


def test_another_subject_is_refused(exported1):
    with pytest.raises(ConfigError, match="subj05 was asked for"):
        Encoder.from_checkpoint(exported1, subject="subj05")
