import h5py
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chasm.data.prepare import prepare_nsd
from chasm.data.splits import (
    FewShot,
    Split,
    few_shot,
    make_split,
    seeded_parts,
    training_statistics,
)
from chasm.data.store import SubjectStore
from chasm.errors import ConfigError, DataError

from .nsd_tree import SESSIONS, write_tree


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("splits")
    return SubjectStore.open(prepare_nsd(write_tree(root / "nsd").root, 1, root / "s.h5"))


@given(st.sets(st.integers(0, 10**6), min_size=10, max_size=200), st.integers(0, 2**31))
def test_seeded_parts_hold_every_image_once(ids, seed):
    ids = np.array(sorted(ids))
    parts = seeded_parts(ids, seed, (0.5, 0.2, 0.3))
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), ids)
    for part, share in zip(parts, (0.5, 0.2, 0.3), strict=True):
        assert abs(len(part) - share * len(ids)) <= 1
        assert (np.diff(part) > 0).all()
    for a, b in zip(parts, seeded_parts(ids[::-1], seed, (0.5, 0.2, 0.3)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_another_seed_is_another_split():
    a, b = (seeded_parts(np.arange(100), seed)[2] for seed in (0, 1))
    assert set(a) != set(b)


@pytest.mark.parametrize(
    "fractions", [(0.5, 0.5), (0.5, 0.5, 0.0), (0.7, 0.2, 0.2), (1.2, -0.1, -0.1)]
)
def test_wrong_fractions(fractions):
    with pytest.raises(ConfigError, match="split_fractions"):
        seeded_parts(np.arange(10), 0, fractions)


@given(st.lists(st.integers(0, 30), max_size=8), st.lists(st.integers(0, 30), max_size=8))
def test_parts_that_overlap_or_are_empty_are_refused(train, test):
    repeated = len(set(train + test)) < len(train + test)
    assume(repeated or not train or not test)
    with pytest.raises(DataError, match=r"split x"):
        Split("x", np.array(train), np.array([99]), np.array(test))


def test_clean(store):
    split, table = make_split(store, "clean"), store.images
    assert set(split.train) == set(table.ids[~table.shared])
    assert set(split.test) == set(table.ids[table.special])
    assert set(split.validation) == set(table.ids[table.shared & ~table.special])
    assert split.train.dtype == np.int64
    assert all((np.diff(part) > 0).all() for part in (split.train, split.validation, split.test))


def test_paper(store):
    split, table = make_split(store, "paper", seed=3, validation_fraction=0.2), store.images
    own = table.ids[~table.shared]
    assert set(split.test) == set(table.ids[table.shared])
    assert set(split.train) | set(split.validation) == set(own)
    assert len(split.validation) == round(0.2 * len(own))
    again = make_split(store, "paper", seed=3, validation_fraction=0.2)
    np.testing.assert_array_equal(split.validation, again.validation)
    other = make_split(store, "paper", seed=4, validation_fraction=0.2)
    assert set(other.validation) != set(split.validation)


def test_only_images_with_trials_are_used(store, tmp_path):
    root = write_tree(tmp_path / "nsd").root
    few = SubjectStore.open(prepare_nsd(root, 1, tmp_path / "s.h5", sessions=[1]))
    split = make_split(few, "paper")
    shown = set(few.trials["image_id"])
    assert set(split.train) | set(split.validation) | set(split.test) == shown
    assert len(shown) < len(store.images.ids)


def test_what_cannot_be_split(store, tmp_path):
    with pytest.raises(ConfigError, match="unknown 'random'"):
        make_split(store, "random")
    with pytest.raises(ConfigError, match="validation_fraction"):
        make_split(store, "paper", validation_fraction=1.0)
    copy = tmp_path / "s.h5"
    copy.write_bytes(store.path.read_bytes())
    with h5py.File(copy, "r+") as file:
        file["images/special"][:] = False
    with pytest.raises(DataError, match="split clean:test: has no images"):
        make_split(SubjectStore.open(copy), "clean")
    with h5py.File(copy, "r+") as file:
        file["images/shared"][:] = False
    with pytest.raises(DataError, match="no shared images"):
        make_split(SubjectStore.open(copy), "clean")
    seeded = make_split(SubjectStore.open(copy), "seeded", seed=1)
    assert len(seeded.train) == 28


def test_few_shot_sets_are_nested_and_validate_inside(store):
    split = make_split(store, "clean")
    small, large = (few_shot(split, FewShot(n, draw=2)) for n in (8, 14))
    for chosen, n in ((small, 8), (large, 14)):
        assert len(chosen.train) + len(chosen.validation) == n
        assert len(chosen.validation) >= 2
        assert not set(chosen.validation) & set(split.validation)
        np.testing.assert_array_equal(chosen.test, split.test)
    inside = [set(s.train) | set(s.validation) for s in (small, large)]
    assert inside[0] < inside[1] <= set(split.train)
    assert set(few_shot(split, FewShot(8, draw=3)).train) != set(small.train)
    for n in (0, 7, len(split.train) + 1):
        with pytest.raises(ConfigError, match=r"few_shot\.n"):
            few_shot(split, FewShot(n))


def test_few_shots_in_order_of_presentation_are_the_first_images(store):
    split = make_split(store, "clean")
    seen = store.trials["image_id"].to_numpy()
    chosen = few_shot(split, FewShot(9, order="presentation"), seen)
    first = list(dict.fromkeys(i for i in seen.tolist() if i in set(split.train.tolist())))[:9]
    assert set(chosen.train) | set(chosen.validation) == set(first)


@pytest.mark.parametrize("name", ["clean", "paper", "seeded"])
def test_training_statistics_are_those_of_train_trials(store, name):
    split = make_split(store, name, seed=5, validation_fraction=0.3)
    mean, std = training_statistics(store, split)
    values = store.betas / 300
    train = store.trials["image_id"].isin(split.train).to_numpy()
    for session in range(SESSIONS):
        used = values[train & (store.session_index == session)]
        np.testing.assert_allclose(mean[session], used.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(std[session], used.std(0, ddof=1), rtol=1e-4)


@pytest.mark.parametrize("name", ["clean", "paper", "seeded"])
def test_held_out_betas_never_reach_the_training_statistics(store, name, tmp_path):
    split = make_split(store, name, seed=5, validation_fraction=0.3)
    mean, std = training_statistics(store, split)
    copy = tmp_path / "s.h5"
    copy.write_bytes(store.path.read_bytes())
    held_out = ~store.trials["image_id"].isin(split.train).to_numpy()
    with h5py.File(copy, "r+") as file:
        betas = file["betas"][:]
        betas[held_out] = 32000
        file["betas"][:] = betas
    poisoned = SubjectStore.open(copy)
    for a, b in zip((mean, std), training_statistics(poisoned, split), strict=True):
        np.testing.assert_array_equal(a, b)


def test_too_few_train_trials_of_a_session_are_said(store):
    split = make_split(store, "clean")
    tiny = Split("seeded", split.train[:1], split.train[1:], split.test)
    with pytest.raises(DataError, match="do not vary in session"):
        training_statistics(store, tiny)
