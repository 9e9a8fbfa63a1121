import errno
import multiprocessing
import os
import pickle
import shutil

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chasm.data import store_writer
from chasm.data.images import NpyImages
from chasm.data.prepare import prepare_nsd
from chasm.data.store import SubjectStore, session_statistics
from chasm.data.store_writer import StoreWriter
from chasm.errors import DataError, StoreError

from .nsd_tree import SESSIONS, SHAPE, TRIALS, write_tree


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    tree = write_tree(root / "nsd")
    return tree, prepare_nsd(tree.root, 1, root / "subj01.h5")


@pytest.fixture
def store(made):
    return SubjectStore.open(made[1])


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copy(made[1], tmp_path / "copy.h5")


def _first_row(store):
    return np.array(store.betas[0])


def test_a_store_survives_pickling_and_forks(store):
    row = _first_row(store)
    _ = store.trials, store.rois
    again = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 20_000
    np.testing.assert_array_equal(_first_row(again), row)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for got in pool.map(_first_row, [store] * 3):
            np.testing.assert_array_equal(got, row)


def test_betas_are_a_read_only_memory_map(store):
    assert isinstance(store.betas, np.memmap)
    with h5py.File(store.path) as file:
        np.testing.assert_array_equal(store.betas, file["betas"][:])
    with pytest.raises(ValueError, match="read-only"):
        store.betas[0, 0] = 1


def test_zscore_within_sessions(made, store):
    tree, _ = made
    mean, std = store.normalisation("all")
    z = store.zscore(np.arange(store.n_trials), mean, std)
    assert z.dtype == np.float32
    for session in range(1, SESSIONS + 1):
        values = tree.masked(session).astype(float)
        expected = (values - values.mean(0)) / values.std(0, ddof=1)
        rows = slice((session - 1) * TRIALS, session * TRIALS)
        np.testing.assert_allclose(z[rows], expected, atol=1e-4)
    np.testing.assert_array_equal(store.zscore(np.array([70, 3]), mean, std), z[[70, 3]])


def test_values_find_their_place_in_the_volume(made, store):
    tree, _ = made
    values = np.random.default_rng(0).normal(size=store.n_voxels)
    volume = store.to_volume(values)
    assert volume.shape == SHAPE
    np.testing.assert_allclose(volume[tree.mask], values, rtol=1e-6)
    assert np.isnan(volume[~tree.mask]).all()
    assert (store.to_volume(values, fill=0)[~tree.mask] == 0).all()


def test_rois(made, store):
    tree, _ = made
    both = store.roi_mask("streams", ["early", "ventral"])
    np.testing.assert_array_equal(both, np.isin(tree.streams[tree.mask], [1, 5]))
    with pytest.raises(DataError, match="no such ROI atlas; the store has nsdgeneral, streams"):
        store.rois_of("HCP")
    with pytest.raises(DataError, match="no label 'FFA-1'; there are early, "):
        store.roi_mask("streams", "FFA-1")
    with pytest.raises(DataError, match="no such statistics"):
        store.normalisation("test")


def test_moved_and_changed_images(made, store, tmp_path):
    tree, _ = made
    moved = shutil.copy(tree.stimuli, tmp_path / "moved.hdf5")
    assert store.open_images(moved).fingerprint == store.image_fingerprint
    with h5py.File(moved, "r+") as file:
        file["imgBrick"][:] = 0
    with pytest.raises(StoreError, match="have changed since"):
        store.open_images(moved)
    with pytest.raises(StoreError, match="no longer at"):
        store.open_images(tmp_path / "gone.hdf5")


def newer(file):
    file.attrs["format_version"] = 99


def foreign(file):
    del file.attrs["format"]


def without(name):
    def damage(file):
        del file[name]

    damage.__name__ = f"without_{name}"
    return damage


def without_attribute(file):
    del file.attrs["affine"]


def replaced(name, value, **options):
    def damage(file):
        del file[name]
        file.create_dataset(name, data=value, **options)

    damage.__name__ = f"replaced_{name}"
    return damage


DAMAGE = [
    (newer, ":format_version: 99 found, this chasm reads up to 1. Update chasm"),
    (foreign, ": not a subject store"),
    (without("betas"), ":/betas: is missing"),
    (without("trials/repeat"), ":/trials/repeat: is missing"),
    (without("voxels/ncsnr"), ":/voxels/ncsnr: is missing"),
    (without("normalisation/train/std"), ":/normalisation/train/std: is missing"),
    (without("normalisation/train/image_ids"), ":/normalisation/train/image_ids: is missing"),
    (without("rois"), ":/rois: is missing"),
    (without("images/shared"), ":/images/shared: is missing"),
    (without_attribute, ":affine: attribute is missing"),
    (replaced("betas", np.zeros((4, 4))), ":/betas: float64 (4, 4) found"),
    (replaced("betas", np.zeros((4, 4), "i2"), chunks=(2, 2)), ":/betas: not contiguous"),
    (replaced("trials/run", np.zeros(3)), ":/trials/run: shape (3,) found, (120,) expected"),
    (replaced("rois/streams/labels", np.zeros(3)), ":/rois/streams/labels: shape (3,)"),
    (replaced("images/ids", np.arange(40)), ":/images/ids: are not the sorted ids"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=lambda v: getattr(v, "__name__", ""))
def test_a_damaged_store_names_the_field(copy, damage, message):
    with h5py.File(copy, "r+") as file:
        damage(file)
    with pytest.raises(StoreError) as error:
        SubjectStore.open(copy)
    assert f"copy.h5{message}" in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.remedy


@pytest.mark.parametrize("name", ["betas", "trials/run", "images/ids", "normalisation/all/mean"])
def test_a_group_in_place_of_a_dataset_is_named(copy, name):
    with h5py.File(copy, "r+") as file:
        del file[name]
        file.create_group(name)
    with pytest.raises(StoreError, match=f"/{name}: is a group where a dataset is expected"):
        SubjectStore.open(copy)


def test_missing_and_truncated_stores(copy, tmp_path):
    with pytest.raises(StoreError, match=r"none\.h5: no such file"):
        SubjectStore.open(tmp_path / "none.h5")
    copy.write_bytes(copy.read_bytes()[:9000])
    with pytest.raises(StoreError, match=r"copy\.h5: is damaged or truncated"):
        SubjectStore.open(copy)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_session_statistics_equal_numpy(data):
    n = data.draw(st.integers(4, 60))
    index = np.array(data.draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    use = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    seed = data.draw(st.integers(0, 1000))
    betas = np.random.default_rng(seed).integers(-32768, 32767, (n, 3)).astype(np.int16)
    mean, std = session_statistics(betas, index, use, 300, block=data.draw(st.integers(1, 9)))
    assert len(mean) == index.max() + 1
    for session in range(len(mean)):
        values = betas[(index == session) & use] / 300
        if len(values):
            np.testing.assert_allclose(mean[session], values.mean(0), rtol=1e-5, atol=1e-4)
        else:
            assert np.isnan(mean[session]).all()
        if len(values) > 1:
            np.testing.assert_allclose(std[session], values.std(0, ddof=1), rtol=1e-5)
        else:
            assert np.isnan(std[session]).all()


def write(path, rows, value=0.0, fail=False):
    np.save(path.parent / "images.npy", np.zeros((3, 4, 4, 3), np.uint8))
    source = NpyImages(path.parent / "images.npy")
    with StoreWriter(path, n_trials=3, n_voxels=2, dtype=np.float32, scale=1) as writer:
        writer.append(np.full((rows, 2), value))
        writer.write_trials(session=[1] * 3, run=[1] * 3, image_id=range(3), repeat=[0] * 3)
        for which in ("train", "all"):
            writer.write_normalisation(which, np.zeros((1, 2)), np.ones((1, 2)), np.arange(3))
        writer.write_voxels({})
        none = np.zeros(3, bool)
        writer.write_images(np.arange(3), none, none, source)
        if fail:
            raise ZeroDivisionError
        writer.write_attributes(
            subject="s", dataset="d", source="arrays", beta_version="", source_signature="x"
        )


def test_the_writer_is_all_or_nothing(tmp_path):
    path = tmp_path / "s.h5"
    with pytest.raises(ZeroDivisionError):
        write(path, 3, fail=True)
    assert not path.exists()
    write(path, 3)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="2 of 3 trials were written"):
        write(path, 2)
    with pytest.raises(ZeroDivisionError):
        write(path, 3, fail=True)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images.npy", "s.h5"]


@pytest.mark.parametrize("path", ["s.h5", "folder/s.h5"])
def test_a_full_disk_is_known_before_anything_is_written(tmp_path, monkeypatch, path):
    write(tmp_path / "s.h5", 3)
    before = (tmp_path / "s.h5").read_bytes()

    def full(handle, offset, n_bytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with (
        pytest.raises(StoreError, match=r"take 1,200.0 GB, and no space left.*elsewhere") as found,
        StoreWriter(
            tmp_path / path, n_trials=30_000, n_voxels=10_000_000, dtype=np.float32, scale=1
        ),
    ):
        raise AssertionError("not reached")
    assert str(tmp_path / path) in str(found.value)
    assert (tmp_path / "s.h5").read_bytes() == before
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"images.npy", "s.h5"}


def test_a_file_system_that_cannot_reserve_space_will_do(tmp_path, monkeypatch):
    write(tmp_path / "with.h5", 3, 5.0)

    def unknown(handle, offset, n_bytes):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unknown, raising=False)
    write(tmp_path / "without.h5", 3, 5.0)
    assert (tmp_path / "with.h5").read_bytes() == (tmp_path / "without.h5").read_bytes()


def test_the_fingerprint_is_of_the_content(tmp_path):
    prints = []
    for value in (0, 0, 1):
        write(tmp_path / "s.h5", 3, value)
        prints.append(SubjectStore.open(tmp_path / "s.h5").fingerprint)
    assert prints[0] == prints[1] != prints[2]


def write_some(path, rows, keep):
    """Write a store of which only some of the voxels are kept, after 4 and after all trials."""
    kept = rows[:, keep]
    np.save(path.parent / "images.npy", np.zeros((len(rows), 4, 4, 3), np.uint8))
    source = NpyImages(path.parent / "images.npy")
    with StoreWriter(
        path, n_trials=len(rows), n_voxels=rows.shape[1], dtype=np.int16, scale=300
    ) as writer:
        writer.append(rows[:4])
        np.testing.assert_array_equal(writer.read(np.array([2, 3, 0])), rows[[2, 3, 0]])
        writer.keep(keep)
        np.testing.assert_array_equal(writer.read(np.array([3, 1])), kept[[3, 1]])
        assert writer.read(np.array([], np.int64)).shape == (0, keep.sum())
        writer.append(kept[4:])
        ids = np.arange(len(rows))
        one, none = np.ones_like(ids), np.zeros(len(rows), bool)
        writer.write_trials(session=one, run=one, image_id=ids, repeat=none)
        for which in ("train", "all"):
            shape = (1, int(keep.sum()))
            writer.write_normalisation(which, np.zeros(shape), np.ones(shape), ids)
        writer.write_voxels({})
        writer.write_images(ids, none, none, source)
        writer.write_attributes(
            subject="s", dataset="d", source="arrays", beta_version="", source_signature="x"
        )
    return SubjectStore.open(path)


def test_voxels_left_out_on_the_way_leave_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, "_BLOCK_BYTES", 40)
    rows = np.random.default_rng(0).integers(-900, 900, (9, 6)).astype(np.int16)
    keep = np.array([True, False, True, True, False, True])
    some = write_some(tmp_path / "some.h5", rows, keep)
    whole = write_some(tmp_path / "whole.h5", rows[:, keep], np.ones(4, bool))
    np.testing.assert_array_equal(some.betas, rows[:, keep])
    assert some.fingerprint == whole.fingerprint
    assert (tmp_path / "some.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["images.npy", "some.h5", "whole.h5"]


def test_a_store_without_a_volume_says_so(tmp_path):
    write(tmp_path / "s.h5", 3)
    store = SubjectStore.open(tmp_path / "s.h5")
    assert store.affine is None
    assert store.coordinates() is None
    assert not store.simulated
    with pytest.raises(DataError, match="no place in a volume"):
        store.to_volume(np.zeros(2))
