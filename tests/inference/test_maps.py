"""Maps: the right values at the right voxels, NIfTI there and back, GIFTI on fsaverage."""

import nibabel as nib
import numpy as np
import pytest
from nilearn.masking import apply_mask
from PIL import Image

from chasm.data.store import SubjectStore
from chasm.data.surface import to_fsaverage
from chasm.errors import ConfigError, DataError
from chasm.inference import Encoder
from chasm.inference.encoder import read_trained
from chasm.inference.export import write_export
from chasm.inference.maps import BrainMap, make_map, write_map
from chasm.inference.pictures import pictures_of
from chasm.inference.response_file import write_responses
from chasm.inference.space import VoxelSpace


@pytest.fixture
def store(toy_dataset):
    return SubjectStore.open(toy_dataset / "subj01.h5")


@pytest.fixture
def image(toy_images, tmp_path):
    Image.fromarray(toy_images[2]).save(tmp_path / "seen.png")
    return tmp_path / "seen.png"


def test_a_map_goes_to_nifti_and_back(store, tmp_path):
    values = np.random.default_rng(0).normal(size=store.n_voxels).astype(np.float32)
    brain_map = BrainMap(values, VoxelSpace.of_store(store), "SIMULATED · R² of x", "subj01")
    (path,) = write_map(brain_map, tmp_path / "maps" / "a.nii.gz")
    image = nib.load(path)
    np.testing.assert_array_equal(image.affine, store.affine)
    assert image.shape == store.volume_shape
    assert image.header.get_xyzt_units()[0] == "mm"
    assert bytes(image.header["descrip"]).startswith(b"SIMULATED")
    mask = nib.Nifti1Image(store.mask_volume().astype(np.uint8), store.affine)
    np.testing.assert_array_equal(apply_mask(image, mask, ensure_finite=False), values)
    outside = np.asarray(image.dataobj)[~store.mask_volume()]
    assert np.isnan(outside).all()


def test_a_prediction_of_a_run_of_an_export_and_of_a_file_is_one_map(
    stage1_run, image, store, tmp_path
):
    encoder = Encoder.from_checkpoint(stage1_run)
    expected = encoder.predict(image).voxels[0]
    exported = write_export(encoder.trained, tmp_path / "model")
    write_responses(encoder, pictures_of(image.parent), tmp_path / "pred.h5")
    for source, name in (
        (stage1_run, str(image)),
        (exported, str(image)),
        (tmp_path / "pred.h5", "seen.png"),
    ):
        found = make_map(source, f"prediction:{name}")
        np.testing.assert_array_equal(found.values, expected)
        assert found.title.startswith("SIMULATED")
        assert found.title.endswith("seen.png")
        (path,) = write_map(found, tmp_path / "map.nii")
        volume = np.asarray(nib.load(path).dataobj)
        np.testing.assert_array_equal(volume, store.to_volume(expected))


def test_an_atlas_is_a_map_of_its_labels(stage1_run, store):
    found = make_map(stage1_run, "roi:streams")
    assert found.labels
    np.testing.assert_array_equal(found.values, store.rois_of("streams").labels)
    with pytest.raises(ConfigError, match=r"there are: .*streams"):
        make_map(stage1_run, "roi:Glasser")


@pytest.mark.parametrize("what", ["r2:x", "prediction", "prediction:", "voxels", "", "roi"])
def test_an_unknown_kind_of_map_lists_the_kinds(stage1_run, what):
    with pytest.raises(ConfigError, match="prediction:IMAGE or roi:ATLAS"):
        make_map(stage1_run, what)


def test_scores_need_a_tested_run(stage1_run, image, tmp_path):
    with pytest.raises(DataError, match=r"predictions\.h5"):
        make_map(stage1_run, "r2")
    trained = read_trained(stage1_run)
    with pytest.raises(ConfigError, match="exported model has no ceiling"):
        make_map(write_export(trained, tmp_path / "model"), "ceiling")
    out = tmp_path / "pred.h5"
    write_responses(Encoder.from_checkpoint(stage1_run), pictures_of(image), out)
    with pytest.raises(ConfigError, match="has no r2"):
        make_map(out, "r2")


def test_a_folder_of_images_is_no_single_prediction(stage1_run, toy_images, tmp_path):
    for row in range(2):
        Image.fromarray(toy_images[row]).save(tmp_path / f"{row}.png")
    with pytest.raises(ConfigError, match="holds 2 images"):
        make_map(stage1_run, f"prediction:{tmp_path}")


def test_voxels_without_a_place_have_no_map(tmp_path):
    brain_map = BrainMap(np.zeros(5, np.float32), VoxelSpace(5), "x", "unknown")
    with pytest.raises(DataError, match="no place in a volume"):
        write_map(brain_map, tmp_path / "a.nii.gz")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def transforms(store, tmp_path):
    """Transforms that put every vertex on a voxel of the mask."""
    folder = tmp_path / "transforms"
    folder.mkdir()
    rng = np.random.default_rng(0)
    places = store.voxels[["i", "j", "k"]].to_numpy()
    for hemi in ("lh", "rh"):
        rows = rng.integers(0, store.n_voxels, 30)
        for depth in (1, 2, 3):
            coordinates = places[rows] + 1 + rng.uniform(-0.2, 0.2, (30, 3))
            image = nib.MGHImage(coordinates.astype(np.float32)[:, None, None], np.eye(4))
            nib.save(image, folder / f"{hemi}.func1pt8-to-layerB{depth}.mgz")
        index = rng.integers(1, 31, 50).astype(np.float32)
        image = nib.MGHImage(index[:, None, None], np.eye(4))
        nib.save(image, folder / f"{hemi}.white-to-fsaverage.mgz")
    return folder


def test_a_map_goes_to_both_hemispheres_of_fsaverage(stage1_run, store, transforms, tmp_path):
    values = store.voxels["ncsnr"].to_numpy()
    brain_map = BrainMap(values, VoxelSpace.of_store(store), "SIMULATED · ncsnr", "subj01")
    paths = write_map(brain_map, tmp_path / "out" / "ncsnr.func.gii", transforms)
    assert [p.name for p in paths] == ["lh.ncsnr.func.gii", "rh.ncsnr.func.gii"]
    expected = to_fsaverage(store.to_volume(values), transforms)
    for path, hemi, structure in zip(
        paths, ("lh", "rh"), ("CortexLeft", "CortexRight"), strict=True
    ):
        image = nib.load(path)
        (array,) = image.darrays
        np.testing.assert_array_equal(array.data, expected[hemi])
        assert array.data.dtype == np.float32
        assert image.meta["AnatomicalStructurePrimary"] == structure
        assert array.meta["Name"].startswith("SIMULATED")
    labels = make_map(stage1_run, "roi:streams")
    paths = write_map(labels, tmp_path / "streams.func.gii", transforms)
    found = set(np.unique(nib.load(paths[0]).darrays[0].data))
    assert found <= set(store.rois_of("streams").labels.tolist())


def test_the_name_of_the_file_says_the_format(store, tmp_path):
    brain_map = BrainMap(np.zeros(store.n_voxels), VoxelSpace.of_store(store), "x", "subj01")
    with pytest.raises(ConfigError, match="says no format"):
        write_map(brain_map, tmp_path / "map.png")
    with pytest.raises(ConfigError, match="needs NSD's transform files"):
        write_map(brain_map, tmp_path / "map.func.gii")
