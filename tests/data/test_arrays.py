from pathlib import Path

import h5py
import numpy as np
import pytest

from chasm.data.arrays import prepare_arrays
from chasm.data.splits import make_split, training_statistics
from chasm.data.store import SubjectStore
from chasm.errors import ChasmError, ConfigError, DataError, StoreError
from chasm.noise_ceiling import unit_ncsnr

UNITS, IMAGES, REPEATS = 6, 40, 4
MACAQUE = Path(__file__).parents[3] / "shared/data/macaque_v4"


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.integers(0, 256, (IMAGES, 5, 5, 3)).astype(np.uint8))
    values = rng.normal(size=(UNITS, IMAGES, 1)) + rng.normal(size=(UNITS, IMAGES, REPEATS))
    values[:, 3, 1] = np.nan
    values[:, 7, 2:] = np.nan
    np.save(tmp_path / "responses.npy", values)
    return tmp_path, values


def prepare(folder, **options):
    options = {"name": "unit", "dataset": "test"} | options
    path = prepare_arrays(
        folder / "images.npy", folder / "responses.npy", folder / "out/s.h5", **options
    )
    return SubjectStore.open(path)


def test_repeats_become_trials(files):
    folder, values = files
    store = prepare(folder)
    rows = [
        (image, values[:, image, repeat])
        for image in range(IMAGES)
        for repeat in range(REPEATS)
        if not np.isnan(values[0, image, repeat])
    ]
    assert store.n_trials == len(rows) == IMAGES * REPEATS - 3
    assert store.betas.dtype == np.float32
    np.testing.assert_array_equal(store.trials["image_id"], [image for image, _ in rows])
    np.testing.assert_allclose(store.betas, np.stack([row for _, row in rows]), rtol=1e-6)
    of_three = store.trials[store.trials["image_id"] == 3]
    assert of_three["repeat"].tolist() == [0, 1, 2]
    assert (store.source, store.subject, store.dataset) == ("arrays", "unit", "test")
    np.testing.assert_array_equal(store.open_images().ids, np.arange(IMAGES))


def test_statistics_are_of_the_train_images_of_the_seeded_split(files):
    folder, _ = files
    store = prepare(folder, split_seed=4, fractions=(0.5, 0.2, 0.3))
    split = make_split(store, "seeded")
    assert (len(split.train), len(split.validation), len(split.test)) == (20, 8, 12)
    np.testing.assert_array_equal(store.normalisation_image_ids, split.train)
    train = store.betas[store.trials["image_id"].isin(split.train)]
    mean, std = training_statistics(store, split)
    np.testing.assert_allclose(mean[0], train.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(std[0], train.std(0, ddof=1), rtol=1e-5)
    np.testing.assert_allclose(store.normalisation("all")[0][0], store.betas.mean(0), rtol=1e-4)


def test_ncsnr_with_and_without_repeats(files):
    folder, values = files
    store = prepare(folder)
    expected = unit_ncsnr(np.asarray(store.betas, float), store.trials["image_id"])
    np.testing.assert_allclose(store.voxels["ncsnr"], expected, rtol=1e-5)
    assert (expected > 0).all()
    np.save(folder / "responses.npy", values[:, :, 0])
    single = prepare(folder)
    assert single.n_trials == IMAGES
    assert single.voxels["ncsnr"].isna().all()


def test_whole_numbers_are_accepted(files):
    folder, values = files
    counts = np.nan_to_num(values * 10).astype(np.int16)
    np.save(folder / "responses.npy", counts)
    np.testing.assert_array_equal(prepare(folder).betas[5], counts[:, 1, 1])


def test_rois_and_coordinates(files):
    folder, _ = files
    (folder / "rois.csv").write_text(
        "unit,atlas,label\n0,area,V4\n1,area,IT\n4,area,V4\n2,layer,deep\n"
    )
    (folder / "places.csv").write_text(
        "unit,x,y,z\n" + "".join(f"{u},{u},0,{-u}\n" for u in reversed(range(UNITS)))
    )
    store = prepare(folder, rois=folder / "rois.csv", coordinates=folder / "places.csv")
    assert store.rois["area"].names == {1: "IT", 2: "V4"}
    assert store.rois["area"].labels.tolist() == [2, 1, 0, 0, 2, 0]
    assert store.roi_mask("layer", "deep").tolist() == [False, False, True, False, False, False]
    np.testing.assert_array_equal(store.coordinates()[:, 2], -np.arange(UNITS))
    np.save(folder / "area.npy", np.array([1, 0, 2, 2, -1, 1]))
    np.save(folder / "places.npy", np.ones((UNITS, 3)))
    store = prepare(folder, rois=folder / "area.npy", coordinates=folder / "places.npy")
    assert store.rois["area"].names == {1: "1", 2: "2"}
    assert (store.coordinates() == 1).all()


def test_a_constant_unit_is_kept_out_and_counted(files):
    folder, values = files
    values[2] = np.where(np.isnan(values[2]), np.nan, 3.0)
    np.save(folder / "responses.npy", values)
    np.save(folder / "area.npy", np.arange(UNITS))
    store = prepare(folder, rois=folder / "area.npy")
    assert store.n_voxels == UNITS - 1
    assert store.rois["area"].labels.tolist() == [0, 1, 3, 4, 5]
    with h5py.File(store.path) as file:
        assert file["voxels"].attrs["n_constant"] == 1
        assert file["voxels"].attrs["n_mask"] == UNITS


def test_a_current_store_is_left_alone(files):
    folder, values = files
    before = prepare(folder).path.stat().st_mtime_ns
    assert prepare(folder).path.stat().st_mtime_ns == before
    assert prepare(folder, split_seed=1).attributes["split_seed"] == 1
    fingerprint = prepare(folder).fingerprint
    np.save(folder / "responses.npy", values + 1)
    assert prepare(folder).fingerprint != fingerprint
    prepare(folder, overwrite=True)


@pytest.mark.parametrize("what", ["name", "dataset", "responses", "images"])
def test_a_store_of_another_source_is_not_replaced(files, what):
    folder, _ = files
    store = prepare(folder)
    before = store.path.read_bytes()
    options = {"name": "unit", "dataset": "test"}
    paths = {"images": folder / "images.npy", "responses": folder / "responses.npy"}
    if what in options:
        options[what] = "other"
    else:
        paths[what] = paths[what].rename(folder / f"other_{what}.npy")
    with pytest.raises(
        StoreError, match=r"holds another store.*subject unit.*--overwrite"
    ) as error:
        prepare_arrays(*paths.values(), store.path, **options)
    assert "other" in str(error.value)
    assert store.path.read_bytes() == before
    prepare_arrays(*paths.values(), store.path, **options, overwrite=True)
    assert store.path.read_bytes() != before


def test_one_changed_image_is_noticed(files):
    folder, _ = files
    store = prepare(folder)
    fingerprint = store.image_fingerprint
    pixels = np.load(folder / "images.npy")
    pixels[33, 0, 0, 0] ^= 1
    np.save(folder / "images.npy", pixels)
    with pytest.raises(StoreError, match="have changed since"):
        store.open_images()
    again = prepare(folder)
    assert again.image_fingerprint != fingerprint
    again.open_images()


def _set(index, value, dims=3):
    def damage(folder, values):
        values = values.copy() if dims == 3 else np.nan_to_num(values[:, :, 0])
        values[index] = value
        np.save(folder / "responses.npy", values)

    return damage


def _save(make):
    def damage(folder, values):
        np.save(folder / "responses.npy", make(values))

    return damage


def _archive(folder, values):
    np.savez(folder / "a.npz", values=values)
    (folder / "a.npz").rename(folder / "responses.npy")


BAD = [
    (_set((2, 5), np.nan, dims=2), "1 responses of 1 images are NaN or infinite"),
    (_set((2, 5), np.inf, dims=2), "1 responses of 1 images are NaN or infinite"),
    (
        _set(2, np.nan),
        "1 of 6 units are NaN throughout (the first: unit 2)",
    ),
    (_set((slice(None), 9), np.nan), "1 of 40 images have no response (the first: image 9)"),
    (_set((2, 5, 1), np.nan), "repeat 1 of image 5 is NaN in 1 of 6 units"),
    (_save(lambda v: v[:, :-1]), "means 39 images, but there are 40"),
    (_save(lambda v: np.nan_to_num(v[:, :, 0]).T), "transpose it"),
    (_save(lambda v: v[0, :, 0]), "float64 (40,) found"),
    (_save(lambda v: v.astype(str)), "numbers (units, images[, repeats]) expected"),
    (_save(lambda v: np.zeros_like(v)), "no unit varies over the train images"),
    (lambda f, v: (f / "responses.npy").write_bytes(b"x"), "not a readable .npy array"),
    (_archive, "responses.npy: is an .npz archive (values), not a .npy array"),
    (lambda f, v: (f / "responses.npy").unlink(), "responses.npy: no such file"),
    (lambda f, v: (f / "images.npy").unlink(), "images.npy: no such file or folder"),
]


@pytest.mark.parametrize(("damage", "message"), BAD)
def test_bad_responses_are_one_line_and_leave_nothing(files, damage, message):
    folder, values = files
    damage(folder, values)
    with pytest.raises(DataError) as error:
        prepare(folder)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.remedy
    assert not list((folder / "out").glob("*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rois.csv", "unit,area\n0,V4\n", "['atlas', 'label', 'unit'] expected"),
        ("rois.csv", "unit,atlas,label\n6,a,b\n", "rois.csv:2: unit '6' found, 0 to 5 expected"),
        ("rois.npy", np.zeros(UNITS), "float64 (6,) found"),
        ("coordinates.csv", "x,y,z\n1,2,3\n", "1 finite rows found"),
        ("coordinates.csv", "x,y,z\n1,2,a\n", "coordinates.csv:2: could not convert"),
        ("coordinates.npy", np.zeros((UNITS, 2)), "shape (6, 2)"),
        ("coordinates.npy", None, "no such file"),
        ("coordinates.npy", np.full((UNITS, 3), "a"), "<U1 found, numbers expected"),
        ("rois.csv", b"unit,atlas,label\n0,V\xe4,b\n", "rois.csv: not a readable CSV file"),
        ("coordinates.csv", b"\xff\xfex\x00", "coordinates.csv: not a readable CSV file"),
    ],
)
def test_bad_tables(files, name, content, message):
    folder, _ = files
    path = folder / name
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(ChasmError) as error:
        prepare(folder, **{path.stem: path})
    assert message in str(error.value)
    assert not list((folder / "out").glob("*"))


def test_bad_fractions(files):
    with pytest.raises(ConfigError, match="not three positive numbers"):
        prepare(files[0], fractions=(0.5, 0.5))


@pytest.mark.skipif(not MACAQUE.is_dir(), reason="the macaque V4 recordings are not here")
def test_real_recordings(tmp_path):
    values = np.load(MACAQUE / "responses_raw_210325.npy")
    store = SubjectStore.open(
        prepare_arrays(
            MACAQUE / "images_210325.zip",
            MACAQUE / "responses_raw_210325.npy",
            tmp_path / "s.h5",
            name="210325",
            dataset="macaque_v4",
        )
    )
    assert store.n_trials == np.isfinite(values[0]).sum() == 4840
    noise = np.nanmean(np.nanvar(values, axis=2, ddof=1), axis=1)
    share = np.mean(1 / np.isfinite(values[0]).sum(1))
    signal = np.nanmean(values, axis=2).var(axis=1, ddof=1) - share * noise
    expected = np.sqrt(np.maximum(0, signal) / noise)
    np.testing.assert_allclose(store.voxels["ncsnr"], expected, rtol=0.05)
    assert store.voxels["ncsnr"].median() == pytest.approx(0.66, abs=0.005)
    assert store.open_images().read(np.array([639]))[0].shape == (112, 112, 3)
