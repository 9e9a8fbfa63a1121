"""The closed form written as weights predicts what himalaya's banded ridge predicts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from chasm.models.baselines import BANDS, LinearEncoder, baseline_kernels
from chasm.models.linear_path import LinearPath
from chasm.training.closed_form import fit_linear_path
from chasm.training.recipes import Recipe


@pytest.fixture(scope="module")
def data(toy_dataset):
    root = str(Path(__file__).parents[2] / "experiments" / "smoke.yaml")
    return Recipe(["-c", root, "--data.dataset_dir", str(toy_dataset)]).make_data()


def of_voxels(betas):
    return betas[:, :40]


def predictions(data, rank):
    sizes = data.sizes
    lengths = (sizes.n_cls * sizes.cls_width, sizes.n_patches * sizes.patch_width)
    path = LinearPath(*lengths, 40, rank)
    fit_linear_path(path, data, of_voxels, seed=3)
    assert bool(path.fitted)
    ids = data.data_split.validation
    cls, patches = (
        torch.from_numpy(np.asarray(t[ids])) for t in (data.tokens.cls, data.tokens.patches)
    )
    return path, path(cls, patches).numpy()


def himalaya(data):
    train, ids = data.dataset("train"), data.data_split.validation
    tokens = {"cls": data.tokens.cls, "patches": data.tokens.patches}
    kernels = baseline_kernels(tokens, train.image_ids, ids)
    ridge = LinearEncoder(("cls", "patches"), shares=BANDS, seed=3)
    ridge.fit(kernels, train.betas(range(len(train)))[:, :40])
    return ridge.predict(kernels)


def test_weights_of_features_give_the_dual_solution(data):
    _, found = predictions(data, None)
    np.testing.assert_allclose(found, himalaya(data), atol=2e-4)


def test_all_components_give_it_too_and_few_come_near(data):
    expected = himalaya(data)
    # More components than images: nothing is cut off.
    _, whole = predictions(data, len(data.data_split.train) + 5)
    np.testing.assert_allclose(whole, expected, atol=5e-4)
    _, few = predictions(data, 12)
    assert np.corrcoef(few.ravel(), expected.ravel())[0, 1] > 0.5
    assert np.abs(few - expected).max() > 1e-3


def test_the_parts_are_centred_on_the_train_images(data):
    path, _ = predictions(data, None)
    train = data.dataset("train")
    ids = train.image_ids
    cls, patches = (
        torch.from_numpy(np.asarray(t[ids])) for t in (data.tokens.cls, data.tokens.patches)
    )
    for part in path.parts(cls, patches):
        np.testing.assert_allclose(part.mean(0).numpy(), 0, atol=1e-4)
    mean = train.betas(range(len(train)))[:, :40].mean(0)
    np.testing.assert_allclose(path.bias.numpy(), mean, atol=1e-4)
