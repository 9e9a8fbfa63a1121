import fcntl
import gzip
import shutil
import struct
import tracemalloc
from concurrent.futures import Executor, Future

import h5py
import numpy as np
import pytest

from chasm.data import beta_files, repeat_noise
from chasm.data.prepare import prepare_nsd
from chasm.data.store import SubjectStore
from chasm.errors import ChasmError, DataError, StoreError
from chasm.noise_ceiling import ncsnr

from .nsd_tree import (
    AFFINE,
    SESSIONS,
    SHAPE,
    TRIALS,
    write_design,
    write_session,
    write_tree,
    write_volume,
)


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "nsd")


def prepare(tree, **options):
    out = tree.root.parent / "out/subj01.h5"
    return SubjectStore.open(prepare_nsd(tree.root, 1, out, **options))


def poison_own_session(tree, session, edit):
    """Apply `edit` to a session's betas (X, Y, Z, trials) and write it again."""
    betas = tree.betas[session - 1].copy()
    edit(betas)
    write_session(tree.session(session), betas)


@pytest.mark.parametrize("layout", ["voxel", "gzip", "trial", "contiguous", "nii"])
def test_betas_are_the_masked_voxels_of_every_layout(tmp_path, layout):
    tree = write_tree(tmp_path / "nsd", layout)
    store = prepare(tree)
    expected = np.concatenate([tree.masked(s) for s in range(1, SESSIONS + 1)])
    assert store.betas.dtype == np.int16
    np.testing.assert_array_equal(store.betas, expected)
    assert store.scale == 300
    i, j, k = np.nonzero(tree.mask)
    np.testing.assert_array_equal(store.voxels[["i", "j", "k"]], np.stack([i, j, k], 1))
    places = np.stack([i, j, k, np.ones_like(i)], 1) @ AFFINE.T
    np.testing.assert_allclose(store.coordinates(), places[:, :3], rtol=1e-6)
    np.testing.assert_array_equal(store.mask_volume(), tree.mask)
    assert store.volume_shape == SHAPE


def test_trials_and_images(tree):
    store = prepare(tree)
    ids = np.concatenate([tree.image_ids(s) for s in range(1, SESSIONS + 1)])
    np.testing.assert_array_equal(store.trials["image_id"], ids)
    np.testing.assert_array_equal(store.trials["session"], np.repeat([1, 2, 3, 4], TRIALS))
    for _, repeats in store.trials.groupby("image_id")["repeat"]:
        assert repeats.tolist() == [0, 1, 2]
    table = store.images
    np.testing.assert_array_equal(table.ids, np.unique(ids))
    np.testing.assert_array_equal(table.ids[table.shared], tree.sharedix - 1)
    assert table.special.any()
    assert not table.special[~table.shared].any()
    images = store.open_images()
    np.testing.assert_array_equal(images.read(ids[:1])[0], tree.pixels[ids[0]])
    assert store.simulated
    assert store.subject == "subj01"


def test_statistics_use_the_right_trials(tree):
    store = prepare(tree)
    shared = tree.sharedix - 1
    for row, session in enumerate(range(1, SESSIONS + 1)):
        values = tree.masked(session) / 300
        own = values[~np.isin(tree.image_ids(session), shared)]
        for which, used in (("train", own), ("all", values)):
            mean, std = store.normalisation(which)
            np.testing.assert_allclose(mean[row], used.mean(0), rtol=1e-5)
            np.testing.assert_allclose(std[row], used.std(0, ddof=1), rtol=1e-5)
    assert not np.isin(store.normalisation_image_ids, shared).any()


def test_no_shared_image_reaches_the_train_statistics(tree):
    mean, std = prepare(tree).normalisation("train")
    shared = tree.sharedix - 1
    for session in range(1, SESSIONS + 1):
        held_out = np.isin(tree.image_ids(session), shared)

        def edit(betas, held_out=held_out):
            betas[..., held_out] = 32767

        poison_own_session(tree, session, edit)
    poisoned = prepare(tree)
    assert (poisoned.betas == 32767).any()
    np.testing.assert_array_equal(poisoned.normalisation("train")[0], mean)
    np.testing.assert_array_equal(poisoned.normalisation("train")[1], std)
    assert np.abs(poisoned.normalisation("all")[0] - mean).min() > 1


def test_ncsnr_is_recomputed_and_the_published_one_kept(tree):
    published = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    published[tree.mask.nonzero()[0][0]] = np.nan
    write_volume(tree.folder / "ncsnr.nii.gz", published)
    store = prepare(tree)
    z = store.zscore(np.arange(store.n_trials), *store.normalisation("all"))
    expected = ncsnr(z.astype(float), store.trials["image_id"], None)
    np.testing.assert_allclose(store.voxels["ncsnr"], expected, rtol=1e-4)
    np.testing.assert_array_equal(store.voxels["ncsnr_published"], published[tree.mask])
    assert 0.6 < np.median(expected) < 1.4  # the tree has signal and noise of equal variance


def test_rois_follow_the_mask(tree):
    store = prepare(tree, mask="streams")
    kept = tree.streams >= 1
    assert store.n_voxels == kept.sum()
    np.testing.assert_array_equal(store.rois["streams"].labels, tree.streams[kept])
    early = store.roi_mask("streams", "early")
    np.testing.assert_array_equal(early, tree.streams[kept] == 1)


def test_any_set_of_sessions(tree):
    store = prepare(tree, sessions=[4, 2])
    np.testing.assert_array_equal(store.trials["session"].unique(), [2, 4])
    np.testing.assert_array_equal(store.betas[TRIALS:], tree.masked(4))
    tree.session(3).unlink()
    assert prepare(tree).trials["session"].unique().tolist() == [1, 2, 4]


def test_a_current_store_is_left_alone_and_an_old_one_made_again(tree):
    store = prepare(tree)
    before = store.path.stat().st_mtime_ns
    assert prepare(tree).path.stat().st_mtime_ns == before
    assert prepare(tree, overwrite=True).fingerprint == store.fingerprint
    assert prepare(tree, sessions=[1, 2, 3]).n_trials == 3 * TRIALS
    poison_own_session(tree, 1, lambda betas: betas.__iadd__(1))
    assert prepare(tree).fingerprint != store.fingerprint


def test_something_else_at_the_place_is_not_overwritten(tree):
    out = tree.root.parent / "notes.h5"
    out.write_text("my notes")
    with pytest.raises(StoreError, match="exists and is not a subject store"):
        prepare_nsd(tree.root, 1, out)
    assert out.read_text() == "my notes"
    prepare_nsd(tree.root, 1, out, overwrite=True)
    SubjectStore.open(out)


def test_voxels_that_do_not_vary_are_kept_out_and_counted(tree):
    first, second, third = np.argwhere(tree.mask)[[0, 3, 5]]
    own = ~np.isin(tree.image_ids(3), tree.sharedix - 1)

    def edit(betas):
        betas[tuple(first)] = 0
        betas[tuple(second)] = 77
        betas[(*third, own)] = -5  # varies over shared images only

    poison_own_session(tree, 3, edit)
    store = prepare(tree)
    assert store.n_voxels == tree.mask.sum() - 3
    with h5py.File(store.path) as file:
        attributes = dict(file["voxels"].attrs)
    assert attributes["n_mask"] == tree.mask.sum()
    assert (attributes["n_invalid"], attributes["n_constant"]) == (1, 2)
    left = np.delete(tree.masked(1), [0, 3, 5], axis=1)
    np.testing.assert_array_equal(store.betas[:TRIALS], left)
    for which in ("train", "all"):
        assert (store.normalisation(which)[1] > 0).all()


def test_chunks_that_were_never_written_are_zero_and_so_invalid(tree):
    reverse = tree.betas[0].transpose(3, 2, 1, 0)
    gone = tuple(np.argwhere(tree.mask)[1])
    with h5py.File(tree.session(1), "w") as file:
        betas = file.create_dataset("betas", reverse.shape, "i2", chunks=(TRIALS, 1, 1, 1))
        for place in np.argwhere(tree.mask):
            if tuple(place) != gone:
                x, y, z = place
                betas[:, z, y, x] = reverse[:, z, y, x]
    store = prepare(tree)
    np.testing.assert_array_equal(store.betas[:TRIALS], np.delete(tree.masked(1), 1, axis=1))


def truncate(tree):
    path = tree.session(2)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(tree, values, chunks=None):
    with h5py.File(tree.session(2), "w") as file:
        file.create_dataset("betas", data=values, chunks=chunks)


def wrong_axes(tree):
    rewrite(tree, tree.betas[1])


def half_wrong_axes(tree):
    rewrite(tree, tree.betas[1].transpose(3, 0, 1, 2))


def float_betas(tree):
    rewrite(tree, tree.betas[1].transpose(3, 2, 1, 0) / np.float32(300))


def fewer_trials(tree):
    rewrite(tree, tree.betas[1].transpose(3, 2, 1, 0)[:-4])


def other_dataset(tree):
    with h5py.File(tree.session(2), "w") as file:
        file["beta"] = 1


def no_one_in_mask(tree):
    write_volume(tree.roi_folder / "nsdgeneral.nii.gz", np.full(SHAPE, -1, np.int16))


def other_shape_of_atlas(tree):
    write_volume(tree.roi_folder / "streams.nii.gz", np.zeros((3, 3, 3), np.int16))


def beyond_stimuli(tree):
    tree.subjectim[0, -1] = len(tree.pixels) + 5
    write_design(tree)


def no_stimuli(tree):
    tree.stimuli.unlink()


def wrong_brain(tree):
    for session in range(1, SESSIONS + 1):
        poison_own_session(tree, session, lambda betas: betas.__imul__(~tree.mask[..., None]))


def group_of_betas(tree):
    with h5py.File(tree.session(2), "w") as file:
        file.create_group("betas")


def group_of_images(tree):
    with h5py.File(tree.stimuli, "w") as file:
        file.create_group("imgBrick")


def no_label(tree):
    write_volume(tree.roi_folder / "streams.nii.gz", np.zeros(SHAPE, np.int16))


BAD = [
    (group_of_betas, {}, "betas_session02.hdf5:betas: no such dataset; the file holds betas"),
    (group_of_images, {}, "nsd_stimuli.hdf5:imgBrick: no such dataset"),
    (no_label, {"mask": "streams"}, "streams.nii.gz: no voxel has a label ≥ 1 (labels: [0])"),
    (truncate, {}, "betas_session02.hdf5: is damaged or truncated"),
    (wrong_axes, {}, "betas_session02.hdf5:betas: axes are in the wrong order"),
    (half_wrong_axes, {}, "betas_session02.hdf5:betas: axes are in the wrong order"),
    (float_betas, {}, "betas_session02.hdf5:betas: float32 values found, int16"),
    (fewer_trials, {}, "betas_session02.hdf5:betas: 26 trials found, 30 expected"),
    (other_dataset, {}, "betas_session02.hdf5:betas: no such dataset; the file holds beta"),
    (no_one_in_mask, {}, "nsdgeneral.nii.gz: no voxel has label 1 (labels: [-1])"),
    (other_shape_of_atlas, {}, "streams.nii.gz: shape (3, 3, 3) found"),
    (beyond_stimuli, {}, "imgBrick: holds 69 images, but subject 1 saw image id 73"),
    (no_stimuli, {}, "nsd_stimuli.hdf5: no such file"),
    (wrong_brain, {}, "voxels of the mask are zero or constant"),
    (None, {"sessions": [1, 9]}, "betas_session09.hdf5: session 9 is missing; present are 1–4"),
    (None, {"sessions": []}, "sessions: is an empty list"),
    (None, {"mask": "floc-faces"}, "no ROI atlas 'floc-faces'; there are nsdgeneral, streams"),
    (None, {"version": "b4"}, "no betas of version 'b4'"),
]


@pytest.mark.parametrize(("damage", "options", "message"), BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tree, damage, options, message):
    if damage:
        damage(tree)
    with pytest.raises(ChasmError) as error:
        prepare(tree, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.remedy
    out = tree.root.parent / "out"
    assert not out.exists() or not list(out.iterdir())


def test_nsdgeneral_keeps_label_1_and_other_atlases_all_labels(tree):
    volume = np.where(tree.mask, 1, 0).astype(np.int16)
    inside = np.argwhere(tree.mask)
    volume[tuple(inside[0])] = 2
    write_volume(tree.roi_folder / "nsdgeneral.nii.gz", volume)
    assert prepare(tree).n_voxels == len(inside) - 1
    assert prepare(tree, mask="streams").n_voxels == (tree.streams >= 1).sum()


@pytest.mark.parametrize("other", ["tree", "version", "subject", "source"])
def test_a_store_of_another_source_is_not_replaced(tree, other, tmp_path):
    store = prepare(tree)
    before, root, options = store.path.read_bytes(), tree.root, {}
    if other == "tree":
        root = write_tree(tmp_path / "else", seed=1).root
    elif other == "version":
        shutil.copytree(tree.folder, tree.folder.with_name("betas_assumehrf"))
        options = {"version": "betas_assumehrf"}
    elif other == "source":
        with h5py.File(store.path, "r+") as file:
            file.attrs["source"], file.attrs["source_signature"] = "nsd", "of the real tree"
        before = store.path.read_bytes()
    else:
        with h5py.File(store.path, "r+") as file:
            file.attrs["subject"], file.attrs["source_signature"] = "subj02", "of subject 2"
        before = store.path.read_bytes()
    with pytest.raises(StoreError, match=r"holds another store.*--out.*--overwrite") as error:
        prepare_nsd(root, 1, store.path, **options)
    assert "\n" not in str(error.value)
    assert store.path.read_bytes() == before
    prepare_nsd(root, 1, store.path, **options, overwrite=True)
    assert store.path.read_bytes() != before


def test_more_sessions_of_the_same_source_replace_the_store(tree):
    assert prepare(tree, sessions=[1, 2]).n_trials == 2 * TRIALS
    assert prepare(tree).n_trials == SESSIONS * TRIALS


def test_locked_betas_are_read(tree):
    with tree.session(2).open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert prepare(tree).n_trials == SESSIONS * TRIALS


def test_an_unknown_subject_is_told_who_is_there(tree):
    with pytest.raises(DataError, match="subject 7 is not in this tree, which has subj01"):
        prepare_nsd(tree.root, 7, tree.root.parent / "x.h5")


@pytest.mark.parametrize("damage", ["header", "half", "scaled", "float"])
def test_damaged_nifti_betas(tmp_path, damage):
    tree = write_tree(tmp_path / "nsd", "nii")
    path = tree.session(2, "nii.gz")
    if damage == "header":
        path.write_bytes(b"nothing")
    elif damage == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "float":
        write_session(path, tree.betas[1].astype(np.float32), "nii")
    else:
        raw = bytearray(gzip.decompress(path.read_bytes()))
        raw[112:120] = struct.pack("<ff", 0.5, 0)  # scl_slope, scl_inter of NIfTI-1
        path.write_bytes(gzip.compress(bytes(raw)))
    with pytest.raises(DataError, match=r"betas_session02\.nii\.gz") as error:
        prepare(tree)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*"))


def test_a_failure_leaves_the_older_store(tree):
    store = prepare(tree)
    truncate(tree)
    with pytest.raises(DataError):
        prepare(tree)
    assert SubjectStore.open(store.path).fingerprint == store.fingerprint
    assert [p.name for p in store.path.parent.iterdir()] == ["subj01.h5"]


def test_a_session_without_own_images_is_refused(tree):
    trials = tree.ordering[:TRIALS]
    order = np.argsort(tree.ordering > len(tree.sharedix), kind="stable")
    tree.ordering[:] = tree.ordering[order]  # shared images first
    assert (trials <= len(tree.sharedix)).all()
    write_design(tree)
    with pytest.raises(DataError, match="session 1 has fewer than two trials"):
        prepare(tree)


class AtOnce(Executor):
    """Does what is submitted before it returns."""

    def __init__(self, max_workers: int) -> None:
        assert max_workers == 1

    def submit(self, function, /, *args, **kwargs):
        done = Future()
        done.set_result(function(*args, **kwargs))
        return done


def test_memory_does_not_grow_with_the_number_of_sessions(tree, monkeypatch):
    """Traced peak of 2 and of 4 sessions, voxels repeated so that betas outweigh all else.

    Sessions are written as soon as they are read: how much of a writing falls into the next reading
    is chance, and more than a session's worth of memory.
    """
    monkeypatch.setattr("chasm.data.prepare.ThreadPoolExecutor", AtOnce)
    for module in (repeat_noise, beta_files):
        monkeypatch.setattr(module, "_BLOCK_BYTES", 1 << 18)
    shape = (20, 20, 30)
    write_volume(tree.roi_folder / "nsdgeneral.nii.gz", np.ones(shape, np.int16))
    write_volume(tree.roi_folder / "streams.nii.gz", np.ones(shape, np.int16))
    rng = np.random.default_rng(0)
    for session in range(1, SESSIONS + 1):
        values = rng.integers(-900, 900, (*shape, TRIALS)).astype(np.int16)
        write_session(tree.session(session), values, "contiguous")
    out, peaks = tree.root.parent / "out.h5", []
    for sessions in ([1, 2], [1, 2], [1, 2, 3, 4]):  # the first run pays for imports
        tracemalloc.start()
        prepare_nsd(tree.root, 1, out, sessions=sessions, overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one_session = 2 * TRIALS * np.prod(shape)
    assert peaks[2] - peaks[1] < one_session


def test_a_simulated_tree_is_read_as_it_was_written(toy_tree, tmp_path):
    """The generator and the reader were written apart: ids, ncsnr and the special set agree."""
    store = SubjectStore.open(prepare_nsd(toy_tree, 1, tmp_path / "subj01.h5"))
    assert store.simulated
    table = store.voxels
    np.testing.assert_allclose(table["ncsnr"], table["ncsnr_published"], atol=1e-3)
    assert table["ncsnr"].median() > 0.1
    counts = store.trials["image_id"].value_counts()
    assert (counts[store.images.ids[store.images.special]] == 3).all()
    assert np.isin(store.images.ids, store.open_images().ids).all()
