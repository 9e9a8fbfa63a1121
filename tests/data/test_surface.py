"""Volume to fsaverage: fields that splines must reproduce, masks, labels, damaged transforms."""

import nibabel as nib
import numpy as np
import pytest

from chasm.data.surface import to_fsaverage, transforms_folder
from chasm.errors import DataError

SHAPE = (26, 24, 28)
N_NATIVE, N_AVERAGE = 40, 64


def save(path, values):
    nib.save(nib.MGHImage(np.asarray(values, np.float32), np.eye(4)), path)


@pytest.fixture
def transforms(tmp_path):
    """Random vertices far from the border; returns folder, 0-based places, fsaverage index."""
    rng = np.random.default_rng(0)
    folder = transforms_folder(tmp_path, 1)
    folder.mkdir(parents=True)
    places, index = {}, {}
    for hemi in ("lh", "rh"):
        places[hemi] = 9 + rng.random((3, N_NATIVE, 3)) * (np.array(SHAPE) - 19)
        for depth in (1, 2, 3):
            values = places[hemi][depth - 1] + 1
            values = values[:, None, None] if hemi == "lh" else values[:, :, None]
            save(folder / f"{hemi}.func1pt8-to-layerB{depth}.mgz", values)
        index[hemi] = rng.integers(0, N_NATIVE, N_AVERAGE)
        save(folder / f"{hemi}.white-to-fsaverage.mgz", (index[hemi] + 1)[:, None, None])
    return folder, places, index


def field(x, y, z):
    """A cubic polynomial: cubic splines reproduce it."""
    return 0.5 + 0.3 * x - 0.2 * y + 0.1 * z + 0.01 * x * y - 0.002 * z**3 + 0.001 * x * y * z


def test_a_cubic_field_is_reproduced_at_every_vertex(transforms):
    folder, places, index = transforms
    found = to_fsaverage(field(*np.indices(SHAPE)), folder)
    for hemi, values in found.items():
        expected = field(*places[hemi].transpose(2, 0, 1)).mean(axis=0)[index[hemi]]
        assert values.dtype == np.float32
        assert values.shape == (N_AVERAGE,)
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-3)


def test_unknown_voxels_leave_vertices_without_value_and_change_no_others(transforms):
    folder, places, index = transforms
    volume = field(*np.indices(SHAPE))
    far = volume.copy()
    far[:3] = np.nan  # more than a spline's reach away from every vertex
    for hemi, values in to_fsaverage(far, folder).items():
        np.testing.assert_allclose(values, to_fsaverage(volume, folder)[hemi], atol=2e-3)
    half = np.full(SHAPE, 2.5)
    half[13:] = np.nan
    for hemi, values in to_fsaverage(half, folder).items():
        known = (np.floor(places[hemi][..., 0] + 0.5) < 13).any(axis=0)[index[hemi]]
        assert 0 < known.sum() < N_AVERAGE
        np.testing.assert_allclose(values[known], 2.5, rtol=1e-6)  # neither zeros nor NaN flow in
        assert np.isnan(values[~known]).all()


def test_a_thin_mask_keeps_its_vertices(transforms):
    """A single voxel without known neighbours gives its own value to the vertices on it."""
    folder, places, index = transforms
    nearest = np.floor(places["rh"][1, 7] + 0.5).astype(int)
    volume = np.full(SHAPE, np.nan)
    volume[tuple(nearest)] = 3.0
    found = to_fsaverage(volume, folder)["rh"]
    on_it = (np.floor(places["rh"] + 0.5) == nearest).all(axis=2).any(axis=0)[index["rh"]]
    assert on_it.any()
    np.testing.assert_allclose(found[on_it], 3.0, rtol=1e-6)
    assert np.isnan(found[~on_it]).all()


def test_vertices_without_a_place_are_left_out_of_the_mean(transforms):
    folder, places, index = transforms
    path = folder / "lh.func1pt8-to-layerB1.mgz"
    values = nib.load(path).get_fdata()
    values[:10] = 9999
    save(path, values)
    expected = field(*places["lh"].transpose(2, 0, 1))
    expected[0, :10] = np.nan
    found = to_fsaverage(field(*np.indices(SHAPE)), folder)["lh"]
    np.testing.assert_allclose(found, np.nanmean(expected, axis=0)[index["lh"]], atol=1e-3)


def test_vertices_outside_the_volume_have_no_value(transforms):
    folder, _, index = transforms
    for depth in (1, 2, 3):
        path = folder / f"lh.func1pt8-to-layerB{depth}.mgz"
        values = nib.load(path).get_fdata()
        values[0] = 0.4  # 1-based: the first voxel is 1
        values[1] = [SHAPE[0] + 0.2, 12, 12]
        save(path, values)
    found = to_fsaverage(np.ones(SHAPE), folder)["lh"]
    assert (index["lh"] < 2).any()
    assert np.isnan(found[index["lh"] < 2]).all()
    assert np.isfinite(found[index["lh"] >= 2]).all()


def test_labels_stay_labels(transforms):
    folder, places, index = transforms
    labels = np.random.default_rng(1).integers(0, 4, SHAPE)
    found = to_fsaverage(labels, folder, labels=True)
    for hemi in ("lh", "rh"):
        nearest = np.floor(places[hemi] + 0.5).astype(int)
        votes = labels[tuple(nearest.transpose(2, 0, 1))]
        expected = []
        for column in votes.T:
            kinds, counts = np.unique(column, return_counts=True)
            expected.append(kinds[counts.argmax()] if counts.max() > 1 else column[1])
        assert np.array_equal(found[hemi], np.array(expected)[index[hemi]])


def remove(folder):
    (folder / "rh.func1pt8-to-layerB2.mgz").unlink()
    return "rh.func1pt8-to-layerB2.mgz: no such"


def truncate(folder):
    path = folder / "lh.white-to-fsaverage.mgz"
    path.write_bytes(path.read_bytes()[:40])
    return "lh.white-to-fsaverage.mgz"


def shorten(folder):
    path = folder / "lh.func1pt8-to-layerB3.mgz"
    save(path, nib.load(path).get_fdata()[:-1])
    return "40, 40, 39 vertices"


def count_from_zero(folder):
    path = folder / "lh.white-to-fsaverage.mgz"
    save(path, nib.load(path).get_fdata() - 1)
    return "outside the 40 vertices"


def two_coordinates(folder):
    path = folder / "lh.func1pt8-to-layerB3.mgz"
    save(path, nib.load(path).get_fdata()[..., :2])
    return "expected"


def elsewhere(folder):
    for path in folder.glob("*layerB*"):
        save(path, nib.load(path).get_fdata() + 1000)
    return "no vertex lies on a voxel"


@pytest.mark.parametrize(
    "damage", [remove, truncate, shorten, count_from_zero, two_coordinates, elsewhere]
)
def test_damaged_transforms_are_named(damage, transforms):
    folder, _, _ = transforms
    named = damage(folder)
    with pytest.raises(DataError, match=named):
        to_fsaverage(np.ones(SHAPE), folder)


def test_a_map_without_a_value_is_refused(transforms):
    with pytest.raises(DataError, match="without a value"):
        to_fsaverage(np.full(SHAPE, np.nan), transforms[0])
