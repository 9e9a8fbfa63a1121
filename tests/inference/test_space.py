"""The voxel table: as the store says, and the same after every round trip."""

import dataclasses

import h5py
import nibabel as nib
import numpy as np
import pytest
from nilearn.masking import apply_mask

from chasm.data.store import RoiAtlas, SubjectStore
from chasm.errors import DataError
from chasm.inference.space import VoxelSpace


@pytest.fixture
def store(toy_dataset):
    return SubjectStore.open(toy_dataset / "subj01.h5")


@pytest.fixture
def space(store):
    return VoxelSpace.of_store(store)


def assert_same(a, b):
    assert a.n_voxels == b.n_voxels
    assert list(a.facts)
    assert set(a.facts) == set(b.facts)
    for name in a.facts:
        assert a.facts[name].dtype == b.facts[name].dtype, name
        np.testing.assert_array_equal(a.facts[name], b.facts[name])
    assert set(a.rois) == set(b.rois)
    for atlas in a.rois:
        assert a.rois[atlas].names == b.rois[atlas].names
        np.testing.assert_array_equal(a.rois[atlas].labels, b.rois[atlas].labels)
    np.testing.assert_array_equal(a.affine, b.affine)
    assert a.volume_shape == b.volume_shape


def test_a_vector_becomes_nifti_and_comes_back_through_the_mask(store, space, tmp_path):
    values = np.random.default_rng(0).normal(size=store.n_voxels).astype(np.float32)
    volume = space.to_volume(values, fill=0)
    np.testing.assert_array_equal(volume, store.to_volume(values, fill=0))
    nib.save(nib.Nifti1Image(volume, space.affine), tmp_path / "map.nii.gz")
    mask = nib.Nifti1Image(store.mask_volume().astype(np.uint8), store.affine)
    back = apply_mask(str(tmp_path / "map.nii.gz"), mask, ensure_finite=False)
    np.testing.assert_array_equal(back, values)
    outside = np.isnan(space.to_volume(values))
    np.testing.assert_array_equal(outside, ~store.mask_volume())


def test_the_table_says_what_the_store_says(store, space):
    table = space.table()
    assert len(table) == store.n_voxels
    for name in ("i", "j", "k", "ncsnr"):
        np.testing.assert_array_equal(table[name], store.voxels[name])
    names = np.unique(table["roi:streams"])
    assert "early" in names
    for name in set(names) - {""}:
        mask = store.roi_mask("streams", name)
        np.testing.assert_array_equal(table["roi:streams"] == name, mask)


def test_round_trip_through_csv_and_hdf5(space, tmp_path):
    ncsnr = space.facts["ncsnr"].copy()
    ncsnr[0] = np.nan
    space = dataclasses.replace(space, facts={**space.facts, "ncsnr": ncsnr})
    space.write_csv(tmp_path / "voxels.csv")
    assert_same(space, VoxelSpace.read_csv(tmp_path / "voxels.csv", space.described()))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        space.write_hdf5(file.create_group("voxels"))
        assert_same(space, VoxelSpace.read_hdf5(file["voxels"]))


def test_names_that_look_like_missing_values_survive(space, tmp_path):
    labels = np.resize(np.array([-1, 0, 1, 2], np.int16), space.n_voxels)
    odd = dataclasses.replace(space, rois={"a,b": RoiAtlas(labels, {1: "NA", 2: 'quo"te'})})
    odd.write_csv(tmp_path / "voxels.csv")
    found = VoxelSpace.read_csv(tmp_path / "voxels.csv", odd.described())
    assert_same(odd, found)
    assert list(found.table()["roi:a,b"][:4]) == ["", "", "NA", 'quo"te']


def test_unknown_voxels_have_an_empty_table_and_no_maps(tmp_path):
    space = VoxelSpace(7)
    assert space.table().shape == (7, 0)
    with pytest.raises(DataError, match="no place in a volume"):
        space.to_volume(np.zeros(7))
    space.write_csv(tmp_path / "voxels.csv")
    found = VoxelSpace.read_csv(tmp_path / "voxels.csv", space.described())
    assert (found.n_voxels, dict(found.facts), found.affine) == (7, {}, None)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        space.write_hdf5(file.create_group("voxels"))
        assert VoxelSpace.read_hdf5(file["voxels"]).n_voxels == 7


def test_damaged_tables_are_named(space, tmp_path):
    path = tmp_path / "voxels.csv"
    space.write_csv(path)
    described = space.described()
    with pytest.raises(DataError, match=r"voxels\.csv: .* rows for"):
        VoxelSpace.read_csv(path, {**described, "n_voxels": 3})
    with pytest.raises(DataError, match=r"voxels\.csv.*is no table of voxels"):
        VoxelSpace.read_csv(path, {**described, "rois": {"absent": {}}})
    path.write_text("nonsense\n1,2,3\n")
    with pytest.raises(DataError, match=r"voxels\.csv.*is no table of voxels"):
        VoxelSpace.read_csv(path, described)


def test_one_value_per_voxel(space):
    with pytest.raises(DataError, match="voxels"):
        space.to_volume(np.zeros(space.n_voxels - 1))
