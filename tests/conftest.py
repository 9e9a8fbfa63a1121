"""A toy simulated NSD, prepared and extracted once for all tests that need one."""

import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

TINY = [
    "-c", str(ROOT / "experiments" / "smoke.yaml"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def toy_tree(tmp_path_factory):
    """Root of a toy simulated NSD with the betas of subject 1."""
    from chasm.data.simulation import SimulationConfig, simulate

    return simulate(SimulationConfig.toy(), tmp_path_factory.mktemp("toy") / "nsd", [1])


@pytest.fixture(scope="session")
def toy_dataset(toy_tree, tmp_path_factory):
    """Folder with subj01.h5 and its tokens; read-only by convention."""
    from chasm.data.prepare import prepare_nsd
    from chasm.pipeline import extract_tokens
    from chasm.training.recipes import Recipe

    folder = tmp_path_factory.mktemp("prepared") / "toy"
    prepare_nsd(toy_tree, 1, folder / "subj01.h5")
    extract_tokens(Recipe([*TINY, "--data.dataset_dir", str(folder)]).make_data())
    return folder


@pytest.fixture
def tiny_recipe(toy_dataset, tmp_path):
    """Arguments of a recipe that trains on the toy in a second or two, into tmp_path/runs."""
    return [*TINY, "--data.dataset_dir", str(toy_dataset), "--runs", str(tmp_path / "runs")]


@pytest.fixture(scope="session")
def toy_subjects(toy_tree, toy_dataset, tmp_path_factory):
    """Folder with stores of subjects 1, 2 and 3 and one token cache; read-only by convention."""
    from chasm.data.prepare import prepare_nsd
    from chasm.data.simulation import SimulationConfig, simulate
    from chasm.pipeline import extract_tokens
    from chasm.training.recipes import Recipe

    folder = tmp_path_factory.mktemp("several") / "toy"
    shutil.copytree(toy_dataset, folder)
    tree = folder.parent / "nsd"
    shutil.copytree(toy_tree, tree)
    simulate(SimulationConfig.toy(), tree, [2, 3])
    for subject in (2, 3):
        prepare_nsd(tree, subject, folder / f"subj{subject:02d}.h5")
        own = [*TINY, "--data.dataset_dir", str(folder), "--data.subject", str(subject)]
        extract_tokens(Recipe(own).make_data())
    return folder
