import fcntl
import hashlib
import io
import multiprocessing
import os
import pickle
import zipfile

import h5py
import numpy as np
import pytest
from PIL import Image

from chasm.data import store_format
from chasm.data.images import open_images
from chasm.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3)).astype(np.uint8)


def png(array, mode=None):
    stream = io.BytesIO()
    image = Image.fromarray(array) if mode is None else Image.fromarray(array).convert(mode)
    image.save(stream, "TIFF" if image.mode == "CMYK" else "PNG")
    return stream.getvalue()


@pytest.fixture(params=["hdf5", "folder", "zip", "npy"])
def source_path(request, tmp_path):
    names = [f"img{i}.png" for i in range(len(PIXELS))]  # img10 sorts after img2
    if request.param == "hdf5":
        path = tmp_path / "images.hdf5"
        with h5py.File(path, "w") as file:
            file.create_dataset("imgBrick", data=PIXELS, chunks=(1, 6, 5, 3))
    elif request.param == "npy":
        path = tmp_path / "images.npy"
        np.save(path, PIXELS)
    elif request.param == "zip":
        path = tmp_path / "images.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("__MACOSX/._img0.png", b"resource fork")
            for name, array in reversed(list(zip(names, PIXELS, strict=True))):
                archive.writestr(f"set/{name}", png(array))
    else:
        path = tmp_path / "images"
        path.mkdir()
        (path / "notes.txt").write_text("not an image")
        for name, array in zip(names, PIXELS, strict=True):
            (path / name).write_bytes(png(array))
    return path


def _read(source):
    return source.read(np.array([3]))[0]


def test_every_kind_gives_the_same_pixels(source_path):
    source = open_images("auto", source_path)
    assert len(source) == 12
    np.testing.assert_array_equal(source.ids, np.arange(12))
    for asked, got in zip([11, 2, 2, 0], source.read(np.array([11, 2, 2, 0])), strict=True):
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, PIXELS[asked])
    assert "12 images" in source.describe()


def test_sources_are_picklable_and_fork_safe(source_path):
    source = open_images("auto", source_path)
    _read(source)
    np.testing.assert_array_equal(_read(pickle.loads(pickle.dumps(source))), PIXELS[3])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for got in pool.map(_read, [source] * 4):
            np.testing.assert_array_equal(got, PIXELS[3])


@pytest.mark.parametrize("wrong", [-1, 12])
def test_an_id_that_is_not_there_is_named(source_path, wrong):
    with pytest.raises(DataError, match=rf"image id {wrong} asked for, but there are 12"):
        open_images("auto", source_path).read(np.array([0, wrong]))


def test_fingerprint_is_stable_and_sees_other_pixels(source_path, tmp_path):
    first = open_images("auto", source_path).fingerprint
    assert open_images("auto", source_path).fingerprint == first
    other = tmp_path / "other.npy"
    np.save(other, PIXELS)
    before = open_images("npy", other).fingerprint
    np.save(other, 255 - PIXELS)
    assert open_images("npy", other).fingerprint != before


@pytest.mark.parametrize("kind", ["folder", "zip", "npy"])
def test_fingerprint_sees_any_pixel(tmp_path, kind):
    def write(pixels):
        if kind == "npy":
            np.save(tmp_path / "a.npy", pixels)
            return tmp_path / "a.npy"
        if kind == "zip":
            with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
                for i, image in enumerate(pixels):
                    archive.writestr(f"img{i:02d}.ppm", ppm(image))
            return tmp_path / "a.zip"
        for i, image in enumerate(pixels):
            (tmp_path / f"img{i:02d}.ppm").write_bytes(ppm(image))
        return tmp_path

    many = np.random.default_rng(1).integers(0, 256, (40, 6, 5, 3)).astype(np.uint8)
    before = open_images(kind, write(many)).fingerprint
    assert open_images(kind, write(many.copy())).fingerprint == before or kind == "zip"
    for image in (1, 17, 38):
        other = many.copy()
        other[image, 2, 2, 1] ^= 1
        assert open_images(kind, write(other)).fingerprint != before


def ppm(image):
    """Uncompressed, so that other pixels give a file of the same size."""
    return b"P6 %d %d 255\n" % (image.shape[1], image.shape[0]) + image.tobytes()


def test_a_content_hash_is_computed_once_for_an_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    os.utime(path, ns=(10**18, 10**18))
    first = store_format.content_hash(path)
    monkeypatch.setattr(store_format, "sha256_of_file", None)  # a call would raise
    assert store_format.content_hash(path) == first
    monkeypatch.undo()
    path.write_bytes(b"two")  # the same size, within the clock's grain
    assert store_format.content_hash(path) == hashlib.sha256(b"two").hexdigest()
    path.write_bytes(b"six")
    assert store_format.content_hash(path) == hashlib.sha256(b"six").hexdigest()


def test_fingerprint_of_chosen_images_does_not_see_the_others(tmp_path):
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("imgBrick", data=PIXELS)
    before = open_images("hdf5", path, sample_ids=[0, 1]).fingerprint
    with h5py.File(path, "r+") as file:
        file["imgBrick"][5] = 0
    assert open_images("hdf5", path, sample_ids=[0, 1]).fingerprint == before
    with h5py.File(path, "r+") as file:
        file["imgBrick"][1] = 0
    assert open_images("hdf5", path, sample_ids=[0, 1]).fingerprint != before


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "1", "P"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    grey = np.repeat(PIXELS[0, :, :, :1], 3, axis=2)
    (tmp_path / "a.png").write_bytes(png(grey, mode))
    image = open_images("folder", tmp_path).read(np.array([0]))[0]
    assert image.shape == (6, 5, 3)
    assert image.dtype == np.uint8
    if mode in ("L", "RGBA", "CMYK"):
        assert np.abs(image.astype(int) - grey).max() <= 1


def test_sixteen_bit_grey_keeps_its_range(tmp_path):
    values = np.array([[0, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    image = open_images("folder", tmp_path).read(np.array([0]))[0]
    np.testing.assert_array_equal(image[0, :, 0], [0, 128, 255])


@pytest.mark.parametrize("content", [b"", b"not an image", png(PIXELS[0])[:60]])
def test_a_corrupt_file_is_named(tmp_path, content):
    for i in range(3):
        (tmp_path / f"img{i}.png").write_bytes(png(PIXELS[i]))
    source = open_images("folder", tmp_path)
    (tmp_path / "img1.png").write_bytes(content)
    with pytest.raises(DataError, match=r"img1\.png: cannot be decoded"):
        source.read(np.array([0, 1]))


def test_a_corrupt_entry_of_a_zip_is_named(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/img0.png", b"nothing")
    with pytest.raises(DataError, match=r"a\.zip:x/img0\.png: cannot be decoded"):
        open_images("zip", path).read(np.array([0]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", b"PK nothing", "not a readable zip"),
        ("a.npy", b"nothing", "not a readable .npy"),
        ("a.hdf5", b"nothing", "or no HDF5 file"),
        ("a.xyz", b"nothing", "cannot tell what '.xyz' is"),
        ("a.npy", "floats", "float64 (4, 3) found"),
        ("a.npy", "objects", "not a readable .npy"),
    ],
)
def test_files_that_are_no_images_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "floats":
        np.save(path, np.zeros((4, 3)))
    elif content == "objects":
        np.save(path, np.array([{}, []], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        open_images("auto", path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_hdf5_content_and_empty_folder_are_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["pictures"] = np.zeros((2, 3, 4, 4), np.float32)
    with pytest.raises(DataError, match=r"pictures"):
        open_images("hdf5", tmp_path / "a.h5")
    with pytest.raises(DataError, match=r"float32 \(2, 3, 4, 4\) found"):
        open_images("hdf5", tmp_path / "a.h5", "pictures")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image files"):
        open_images("auto", tmp_path / "empty")
    with pytest.raises(DataError, match="no such file or folder"):
        open_images("auto", tmp_path / "nowhere")


def test_groups_and_archives_are_no_images(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("imgBrick")
    with pytest.raises(DataError, match=r"a\.h5:imgBrick: no such dataset"):
        open_images("auto", tmp_path / "a.h5")
    np.savez(tmp_path / "b.npz", x=PIXELS)
    (tmp_path / "b.npz").rename(tmp_path / "b.npy")
    with pytest.raises(DataError, match=r"b\.npy: is an \.npz archive \(x\)"):
        open_images("auto", tmp_path / "b.npy")
    (tmp_path / "c.npy").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DataError, match=r"c\.npy: not a readable"):
        open_images("auto", tmp_path / "c.npy")


def test_a_lock_does_not_matter(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["imgBrick"] = PIXELS
    with (tmp_path / "a.h5").open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        np.testing.assert_array_equal(_read(open_images("auto", tmp_path / "a.h5")), PIXELS[3])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied"), "may not be read by you"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "locked by another program"),
        (OSError("bad symbol table"), "damaged or truncated"),
    ],
)
def test_what_keeps_a_file_from_opening_is_told_apart(tmp_path, monkeypatch, error, message):
    def fail(*_args, **_options):
        raise error

    path = tmp_path / "a.h5"
    path.touch()
    monkeypatch.setattr(store_format.h5py, "File", fail)
    with pytest.raises(DataError, match=message) as caught:
        open_images("auto", path)
    assert ("damaged" in str(caught.value)) == (message == "damaged or truncated")


def test_grey_arrays(tmp_path):
    np.save(tmp_path / "g.npy", PIXELS[..., 0])
    image = open_images("npy", tmp_path / "g.npy").read(np.array([4]))[0]
    np.testing.assert_array_equal(image, np.repeat(PIXELS[4, :, :, :1], 3, axis=2))
