"""The faithful recipe on trees in NSD's layout, either beta format, any number of sessions."""

from pathlib import Path

import h5py
import pandas as pd
import pytest

from chasm.cli import main
from chasm.data.simulation import SimulationConfig, simulate

RECIPE = Path(__file__).parents[2] / "experiments" / "paper" / "stage1.yaml"
WITHOUT_HUB = [
    "--data.backbone.model", "vit_tiny_patch16_224", "--data.backbone.weights", "untrained",
]  # fmt: skip
SMALL = ["--model.init_args.encoder.init_args.d_model", "16", "--trainer.max_epochs", "1"]


def run(tree, folder, *extra):
    return main([
        "run", "-c", str(RECIPE), "--nsd", str(tree), "--data.subject", "1", "--n-boot", "100",
        "--data.dataset_dir", str(folder / "nsd"), "--runs", str(folder / "runs"), *extra,
    ])  # fmt: skip


def rows_by_target(folder):
    (path,) = (folder / "runs").rglob("scores.csv")
    scores = pd.read_csv(path)
    return {target: set(part["row"]) for target, part in scores.groupby("target")}, scores


@pytest.mark.parametrize("betas_format", ["hdf5", "nii.gz"])
def test_it_runs_on_both_formats_and_says_untrained(betas_format, tmp_path, capsys):
    config = SimulationConfig.toy(betas_format=betas_format)
    tree = simulate(config, tmp_path / "tree", [1])
    assert run(tree, tmp_path, *WITHOUT_HUB, *SMALL) == 0
    shown = capsys.readouterr().out
    assert "SIMULATED" in shown
    assert "UNTRAINED" in shown
    rows, scores = rows_by_target(tmp_path)
    assert "stage 1" in rows["target"], "scored against plain parcel means"
    assert "stage 1" in rows["top_p"], "and against its own targets"
    assert set(scores["split"]) == {"paper"}
    (predictions,) = (tmp_path / "runs").rglob("predictions.h5")
    with h5py.File(predictions) as file:
        assert len(file["image_id"]) == 32, "all shared images are the test images"


def test_it_runs_on_the_sessions_that_are_there(toy_tree, tmp_path):
    import shutil

    tree = tmp_path / "tree"
    shutil.copytree(toy_tree, tree)
    (last,) = tree.rglob("subj01/**/betas_session04.hdf5")
    last.unlink()
    assert run(tree, tmp_path, *WITHOUT_HUB, *SMALL) == 0
    with h5py.File(tmp_path / "nsd" / "subj01.h5") as store:
        assert sorted(set(store["trials/session"][:])) == [1, 2, 3]
        assert len(store["betas"]) == 180


@pytest.mark.slow
def test_it_runs_at_the_papers_size(toy_tree, tmp_path):
    """DINOv2 ViT-B/14 at 224 px (untrained here) and the published widths, one epoch."""
    extra = ["--data.backbone.weights", "untrained", "--trainer.max_epochs", "1"]
    assert run(toy_tree, tmp_path, *extra) == 0
