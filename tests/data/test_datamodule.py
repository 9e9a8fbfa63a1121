"""Batches against a naive reading of store and token cache."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from chasm.data import datamodule
from chasm.data.batches import EpochShuffle
from chasm.data.datamodule import NSDDataModule, ParcelOptions, subject_name
from chasm.data.splits import make_split
from chasm.errors import ConfigError, DataError


@pytest.fixture
def data(toy_dataset):
    return NSDDataModule(dataset_dir=str(toy_dataset), batch_size=16)


def naive_betas(data, image):
    store = data.store
    mean, std = store.normalisation("train")
    rows = np.flatnonzero(store.trials["image_id"] == image)
    sessions = store.session_index[rows]
    values = store.betas[rows].astype(np.float64) / store.scale
    return (values - mean[sessions]) / std[sessions], rows


def test_a_batch_holds_the_right_tokens_and_the_mean_over_repeats(data):
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["cls"].shape == (16, data.sizes.n_cls, data.sizes.cls_width)
    assert batch["patches"].shape == (16, data.sizes.n_patches, data.sizes.patch_width)
    assert batch["betas"].shape == (16, data.sizes.n_voxels)
    assert set(batch["image_id"].tolist()) <= set(data.data_split.train.tolist())
    for row, image in enumerate(batch["image_id"].tolist()):
        betas, trials = naive_betas(data, image)
        np.testing.assert_allclose(batch["betas"][row], betas.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(batch["cls"][row], data.tokens.cls[image])
        np.testing.assert_array_equal(batch["patches"][row], data.tokens.patches[image])
        assert batch["trial"][row] == trials[0]


def test_single_trials_are_one_item_each(toy_dataset):
    data = NSDDataModule(dataset_dir=str(toy_dataset), samples="trials", batch_size=7)
    train = data.dataset("train", "trials")
    assert len(train) == data.store.trials["image_id"].isin(data.data_split.train).sum()
    seen = torch.cat([batch["trial"] for batch in data.train_dataloader()])
    assert sorted(seen.tolist()) == sorted(int(t[0]) for t in train.trials)
    batch = next(iter(data.train_dataloader()))
    for row in range(7):
        betas, trials = naive_betas(data, int(batch["image_id"][row]))
        (own,) = np.flatnonzero(trials == int(batch["trial"][row]))
        np.testing.assert_allclose(batch["betas"][row], betas[own], rtol=1e-4, atol=1e-5)


def test_repeats_are_padded_with_nan_and_average_to_the_betas(data):
    test = data.dataset("test")
    repeats = test.repeat_betas()
    assert repeats.shape[:2] == (len(test), test.repeats.max())
    np.testing.assert_array_equal(np.isfinite(repeats[..., 0]).sum(1), test.repeats)
    np.testing.assert_allclose(
        np.nanmean(repeats, axis=1), test.betas(range(len(test))), rtol=1e-4, atol=1e-5
    )


def test_the_order_depends_on_seed_and_epoch_only():
    sampler = EpochShuffle(50, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(50))
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    again = EpochShuffle(50, seed=3)
    again.set_epoch(1)
    assert list(again) == second
    assert list(EpochShuffle(50, seed=4)) != first


def test_token_statistics_are_those_of_the_train_images_in_any_block(data):
    train = data.data_split.train
    cls = np.asarray(data.tokens.cls[train], np.float64)
    patches = np.asarray(data.tokens.patches[train], np.float64).reshape(-1, data.sizes.patch_width)
    for block_bytes in (1, 2**25):
        found = data.token_statistics(block_bytes)
        np.testing.assert_allclose(found.cls_mean, cls.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.patches_mean, patches.mean(0), rtol=1e-4, atol=1e-5)
        varies = patches.std(0) > 1e-3
        np.testing.assert_allclose(found.patches_std[varies], patches.std(0)[varies], rtol=1e-3)


def test_the_split_seed_of_the_store_holds_unless_another_is_given(toy_dataset):
    own = NSDDataModule(dataset_dir=str(toy_dataset), split="seeded")
    other = NSDDataModule(dataset_dir=str(toy_dataset), split="seeded", split_seed=9)
    expected = make_split(own.store, "seeded")
    np.testing.assert_array_equal(own.data_split.test, expected.test)
    assert not np.array_equal(other.data_split.test, expected.test)


def test_statistics_of_all_trials_are_another_setting(toy_dataset, data):
    paper = NSDDataModule(dataset_dir=str(toy_dataset), statistics="all")
    np.testing.assert_array_equal(paper.normalisation[0], data.store.normalisation("all")[0])
    assert not np.array_equal(paper.normalisation[0], data.normalisation[0])


@pytest.mark.parametrize("kind", ["spatial", "atlas"])
def test_parcels_follow_the_options(toy_dataset, kind):
    data = NSDDataModule(dataset_dir=str(toy_dataset), parcels=ParcelOptions(kind=kind, size=20))
    assert data.parcellation.n_voxels == data.store.n_voxels
    assert (data.parcellation.labels >= 0).all()
    if kind == "atlas":
        labels = data.store.rois_of("streams").labels
        for parcel in range(data.parcellation.n_parcels):
            inside = np.maximum(labels[data.parcellation.labels.numpy() == parcel], 0)
            assert len(set(inside)) == 1, "no parcel straddles two areas"


def test_names_of_subjects():
    assert subject_name(1) == subject_name("1") == "subj01"
    assert subject_name("210325") == "210325"
    assert subject_name("monkey") == "monkey"


def test_a_store_named_by_a_small_number_is_found(toy_dataset, tmp_path):
    (tmp_path / "7.h5").symlink_to(toy_dataset / "subj01.h5")
    assert NSDDataModule(subject=7, dataset_dir=str(tmp_path)).store.n_voxels > 0


def test_bad_options_are_named(toy_dataset):
    with pytest.raises(ConfigError, match=r"data\.batch_size"):
        NSDDataModule(batch_size=0)
    unknown = ParcelOptions(kind="atlas", atlas="brodmann")
    data = NSDDataModule(dataset_dir=str(toy_dataset), parcels=unknown)
    with pytest.raises(DataError, match="streams"):
        _ = data.parcellation


def trainer(kind, n=1):
    device = SimpleNamespace(root_device=torch.device(kind))
    return SimpleNamespace(strategy=device, num_devices=n, world_size=n, global_rank=0)


@pytest.mark.parametrize(
    ("kind", "processes", "beside", "cores", "n"),
    [
        ("cpu", 1, 1, 16, 0),  # the step needs the cores
        ("cuda", 1, 1, 16, 4),
        ("cuda", 1, 1, 3, 2),
        ("cuda", 1, 1, 1, 0),
        ("cuda", 4, 1, 16, 3),  # a core is left to every process that trains
        ("cuda", 1, 8, 16, 1),
        ("cuda", 1, 8, 6, 0),
    ],
)
def test_workers_leave_the_cores_that_training_needs(
    data, monkeypatch, kind, processes, beside, cores, n
):
    monkeypatch.setattr(datamodule, "n_cores", lambda: cores)
    assert data.n_workers == 0, "no trainer, no workers"
    data.trainer, data.n_beside = trainer(kind, processes), beside
    assert data.n_workers == n
    loader = data.train_dataloader()
    assert loader.num_workers == n
    assert loader.prefetch_factor == (4 if n else None)
    assert loader.pin_memory == (kind == "cuda")
    data.num_workers = 3
    assert data.n_workers == 3, "a given number is taken"


def test_workers_give_the_batches_of_the_main_process(toy_dataset):
    known = {"parcels": torch.arange(2000.0)[:, None]}
    found = []
    for workers in (0, 2):
        data = NSDDataModule(dataset_dir=str(toy_dataset), batch_size=16, num_workers=workers)
        loader = data.train_dataloader()
        data.known["train"].learn(np.arange(2000), known)  # after the loader was made, as in a fit
        found.append(list(loader))
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert torch.equal(one["parcels"][:, 0], one["image_id"].float())
