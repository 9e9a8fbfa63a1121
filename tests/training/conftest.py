"""A Stage 1 of two toy subjects, trained together once."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from chasm.data.store import SubjectStore
from chasm.training.recipes import Recipe
from chasm.training.runs import fit

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def joint_recipe(dataset, runs, *extra):
    """Arguments of the smallest recipe on subjects 1 and 2."""
    return [
        "-c", str(EXPERIMENTS / "smoke.yaml"), "--subjects", "[1,2]", "--trainer.max_epochs", "2",
        "--data.parcels.size", "7", "--model.init_args.linear", "banded_ridge",
        "--data.dataset_dir", str(dataset), "--runs", str(runs), *extra,
    ]  # fmt: skip


def adapter_recipe(dataset, runs, source, *extra):
    """Arguments of an adapter for subject 3."""
    return [
        "-c", str(EXPERIMENTS / "adapt.yaml"), "--source", str(source), "--data.subject", "3",
        "--data.parcels.size", "7", "--data.batch_size", "16", "--trainer.max_epochs", "2",
        "--data.dataset_dir", str(dataset), "--runs", str(runs), *extra,
    ]  # fmt: skip


def poison_test_images(folder):
    """Overwrite the betas of every test image of every subject in a folder by NaN."""
    for path in folder.glob("subj*.h5"):
        store = SubjectStore.open(path)
        special = store.images.ids[store.images.shared & store.images.special]
        rows = np.flatnonzero(store.trials["image_id"].isin(special))
        assert len(rows) > 10
        with h5py.File(path, "r+") as file:
            betas = file["betas"][:].astype(np.float32)
            betas[rows] = np.nan
            attributes = dict(file["betas"].attrs)
            del file["betas"]
            file["betas"] = betas
            file["betas"].attrs.update(attributes)
            for statistic in file["normalisation/all"].values():
                statistic[:] = np.nan


@pytest.fixture(scope="session")
def joint_run(toy_subjects, tmp_path_factory):
    """Finished run of subjects 1 and 2 together, with closed forms; read-only by convention."""
    return fit(Recipe(joint_recipe(toy_subjects, tmp_path_factory.mktemp("joint"))))
