"""Runs of both stages on the toy simulation, trained once; read-only by convention."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def fitted(recipe, toy_dataset, folder, *more):
    from chasm.training.recipes import Recipe
    from chasm.training.runs import fit

    path = str(ROOT / "experiments" / recipe)
    args = ["-c", path, "--data.dataset_dir", str(toy_dataset), "--runs", str(folder / "runs")]
    return fit(Recipe([*args, *more]))


@pytest.fixture(scope="session")
def stage1_run(toy_dataset, tmp_path_factory):
    """Folder of a finished Stage-1 run."""
    return fitted("smoke.yaml", toy_dataset, tmp_path_factory.mktemp("inference1"))


@pytest.fixture(scope="session")
def stage2_run(stage1_run, toy_dataset, tmp_path_factory):
    """Folder of a finished Stage-2 run on top of it."""
    folder = tmp_path_factory.mktemp("inference2")
    more = ["--stage1", str(stage1_run), "--trainer.max_epochs", "1"]
    return fitted("smoke_stage2.yaml", toy_dataset, folder, *more)


@pytest.fixture(scope="session")
def tested_run(stage1_run, tmp_path_factory):
    """A copy of the Stage-1 run, tested."""
    from chasm.evaluation.testing import score_run

    run = tmp_path_factory.mktemp("tested") / "run"
    shutil.copytree(stage1_run, run)
    score_run(run, n_boot=100)
    return run


@pytest.fixture(scope="session")
def toy_images(toy_dataset):
    """Pixels of the first seven images of the toy store, uint8 (7, height, width, 3)."""
    import numpy as np

    from chasm.data.store import SubjectStore

    store = SubjectStore.open(toy_dataset / "subj01.h5")
    return np.stack(store.open_images().read(store.images.ids[:7]))
