"""The `chasm` command from end to end, on the toy simulation."""

import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from chasm.cli import main

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "experiments" / "smoke.yaml")


def run(args, capsys):
    status = main([str(a) for a in args])
    return status, capsys.readouterr()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """`chasm run` once, from nothing, in a process of its own."""
    folder = tmp_path_factory.mktemp("workspace")
    command = [
        sys.executable, "-m", "chasm.cli", "run", "-c", SMOKE, "--simulate", "--size", "toy",
        "--data.dataset_dir", "data/simulated", "--data.subject", "1", "--n-boot", "200",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, command, done


def test_one_command_goes_from_nothing_to_a_table_and_a_report(workspace):
    folder, _, done = workspace
    assert "SIMULATED" in done.stdout
    for row in (
        "mean pattern",
        "ridge",
        "banded ridge",
        "linear probe",
        "stage 1",
        "noise ceiling",
    ):
        assert row in done.stdout
    (result,) = (folder / "runs").glob("simulated/subj01/smoke-*")
    for name in (
        "config.yaml", "provenance.json", "metrics.csv", "predictions.h5", "test_readings.jsonl",
        "checkpoints/best.ckpt", "checkpoints/last.ckpt", "report/scores.csv", "report/report.html",
    ):  # fmt: skip
        assert (result / name).is_file(), name
    assert "SIMULATED" in (result / "report" / "report.html").read_text()
    report = done.stdout.splitlines()[-1].removeprefix("Report: ")
    assert (folder / report).is_file()
    scores = pd.read_csv(result / "report" / "scores.csv")
    assert {"stage 1", "ridge", "mean pattern", "noise ceiling"} <= set(scores["row"])


def test_a_second_call_skips_what_is_current(workspace):
    folder, command, _ = workspace
    watched = [
        p
        for p in folder.rglob("*")
        if p.is_file() and p.suffix in (".h5", ".ckpt", ".f16", ".hdf5")
    ]
    assert len(watched) >= 6
    before = {p: p.stat().st_mtime_ns for p in watched}
    again = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in watched} == before
    assert "SIMULATED" in again.stdout
    assert len((next((folder / "runs").rglob("test_readings.jsonl"))).read_text().splitlines()) == 1


def test_each_step_alone_gives_the_same_run(workspace, capsys, monkeypatch):
    folder, _, _ = workspace
    monkeypatch.chdir(folder)
    recipe = ["-c", SMOKE, "--data.subject", "1"]
    store = "data/simulated/subj01.h5"
    prepare = ["prepare", "nsd", "--nsd", "data/simulated/nsd", "--subject", 1, "--out", store]
    status, said = run(prepare, capsys)
    assert status == 0
    assert said.out.strip().endswith("subj01.h5")
    assert run(["extract", *recipe], capsys)[0] == 0
    status, said = run(["fit", *recipe], capsys)
    assert status == 0
    assert Path(said.out.strip()).is_dir()
    status, said = run(["test", said.out.strip(), "--n-boot", 200], capsys)
    assert status == 0
    assert "stage 1" in said.out


def test_a_run_is_handed_on_and_used_elsewhere(workspace, capsys, tmp_path, monkeypatch):
    """Export, then predict and draw from the export alone, with one corrupt image in between.

    Called where another store lies under the path that the run calls its own by.
    """
    folder, _, _ = workspace
    other = tmp_path / "data" / "simulated" / "subj01.h5"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"another")
    monkeypatch.chdir(tmp_path)
    (result,) = (folder / "runs").glob("simulated/subj01/smoke-*")
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for row, size in enumerate(((40, 60), (128, 128), (7, 300))):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{row}.png")
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    model, out = tmp_path / "model", tmp_path / "pred.h5"
    assert run(["export", result, "--out", model], capsys)[0] == 0
    card = (model / "README.md").read_text()
    assert "SIMULATED" in card
    assert "banded ridge" in card
    status, said = run(["predict", "--model", model, "--images", images, "--out", out], capsys)
    assert status == 3
    assert "broken.jpg" in said.err
    with h5py.File(out) as file:
        assert file["voxels"].shape[0] == 3
        assert len(np.unique(file["voxels"][:, 0])) == 3
    drawn = tmp_path / "map.nii.gz"
    assert run(["map", out, "--what", "prediction:1.png", "--out", drawn], capsys)[0] == 0
    assert run(["map", result, "--what", "r2", "--out", drawn], capsys)[0] == 0


def test_an_unknown_command_lists_the_commands(capsys):
    status, said = run(["train"], capsys)
    assert status == 2
    assert "simulate" in said.err
    assert len(said.err.strip().splitlines()) == 1


def broken_tree(toy_tree, tmp_path):
    tree = tmp_path / "nsd"
    shutil.copytree(toy_tree, tree)
    return tree


def session(tree, number=1):
    (found,) = tree.rglob(f"subj01/**/betas_session{number:02d}.hdf5")
    return found


def lose_a_session(tree):
    session(tree, 1).unlink()
    return ["--sessions", "1,2"], "betas_session01"


def truncate(tree):
    path = session(tree)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return [], "betas_session01.hdf5"


def turn_axes(tree):
    with h5py.File(session(tree), "r+") as file:
        betas = file["betas"][:]
        del file["betas"]
        file["betas"] = np.ascontiguousarray(betas.transpose(3, 2, 1, 0))
    return [], "axes|shape"


def float_betas(tree):
    with h5py.File(session(tree), "r+") as file:
        betas = file["betas"][:].astype(np.float32)
        del file["betas"]
        file["betas"] = betas
    return [], "float32"


def empty_mask(tree):
    import nibabel

    path = next(tree.rglob("subj01/func1pt8mm/roi/nsdgeneral.nii.gz"))
    image = nibabel.load(path)
    nibabel.save(
        nibabel.Nifti1Image(np.minimum(image.dataobj, 0).astype(np.int16), image.affine), path
    )
    return [], "nsdgeneral"


@pytest.mark.parametrize("damage", [lose_a_session, truncate, turn_axes, float_betas, empty_mask])
def test_a_damaged_tree_is_one_line_and_leaves_nothing(damage, toy_tree, tmp_path, capsys):
    tree = broken_tree(toy_tree, tmp_path)
    extra, named = damage(tree)
    out = tmp_path / "out" / "subj01.h5"
    status, said = run(
        ["prepare", "nsd", "--nsd", tree, "--subject", 1, "--out", out, *extra], capsys
    )
    assert status == 2
    error = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    import re

    assert re.search(named, error[0]), error[0]
    assert not out.parent.exists() or list(out.parent.iterdir()) == []


def test_an_unknown_subject_lists_those_there_are(toy_tree, tmp_path, capsys):
    out = tmp_path / "out" / "subj09.h5"
    status, said = run(["prepare", "nsd", "--nsd", toy_tree, "--subject", 9, "--out", out], capsys)
    assert status == 2
    assert "subj01" in said.err
    assert not out.exists()


def test_an_unknown_recipe_key_is_one_line(capsys):
    status, said = run(["fit", "-c", SMOKE, "--model.init_args.learning_rat", "1"], capsys)
    assert status == 2
    assert "learning_rat" in said.err
    assert len(said.err.strip().splitlines()) == 1


def test_a_corrupted_token_cache_is_named(toy_dataset, tiny_recipe, tmp_path, capsys):
    folder = tmp_path / "toy"
    shutil.copytree(toy_dataset, folder)
    (patches,) = folder.rglob("patches.f16")
    from chasm.data.splits import make_split
    from chasm.data.store import SubjectStore

    image = int(make_split(SubjectStore.open(folder / "subj01.h5"), "clean").train[0])
    store_like = np.memmap(patches, np.uint8, "r+")
    from chasm.features.cache import TokenCache

    row = TokenCache.open(patches.parent).patches.shape[1:]
    store_like[image * int(np.prod(row)) * 2 + 5] ^= 0xFF
    store_like.flush()
    status, said = run(["fit", *tiny_recipe, "--data.dataset_dir", folder], capsys)
    assert status == 2
    assert "patches.f16" in said.err
    assert str(image) in said.err
    assert "--fresh" in said.err


def test_a_store_of_a_newer_format_is_named(toy_dataset, tiny_recipe, tmp_path, capsys):
    folder = tmp_path / "toy"
    shutil.copytree(toy_dataset, folder)
    with h5py.File(folder / "subj01.h5", "r+") as file:
        file.attrs["format_version"] = 99
    status, said = run(["fit", *tiny_recipe, "--data.dataset_dir", folder], capsys)
    assert status == 2
    assert "subj01.h5" in said.err
    assert "99" in said.err


def test_extract_reports_a_damaged_cache_and_fresh_mends_it(
    toy_dataset, tiny_recipe, tmp_path, capsys
):
    folder = tmp_path / "toy"
    shutil.copytree(toy_dataset, folder)
    (patches,) = folder.rglob("patches.f16")
    stored = np.memmap(patches, np.uint8, "r+")
    place = int(np.flatnonzero(stored)[0])
    stored[place] ^= 0xFF
    stored.flush()
    args = ["extract", *tiny_recipe, "--data.dataset_dir", folder]
    status, said = run(args, capsys)
    assert status == 2
    assert "patches.f16" in said.err
    assert run([*args, "--fresh"], capsys)[0] == 0
    assert run(args, capsys)[0] == 0
    (whole,) = toy_dataset.rglob("patches.f16")
    assert patches.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("extra", [["--sim-seed", "9"], ["--size", "toy"], ["--mask", "streams"]])
def test_options_without_effect_are_refused(extra, capsys):
    status, said = run(["run", "-c", SMOKE, *extra], capsys)
    assert status == 2
    assert "--simulate" in said.err or "--nsd" in said.err


def test_a_real_tree_never_lands_among_the_simulated_stores(
    toy_tree, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    status, _ = run(["run", "-c", SMOKE, "--nsd", toy_tree, "--n-boot", "100"], capsys)
    assert status == 0
    assert (tmp_path / "data" / toy_tree.name / "subj01.h5").is_file()
    assert not (tmp_path / "data" / "simulated").exists()
