"""A toy simulated NSD, prepared and extracted once for all tests that need one."""

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
