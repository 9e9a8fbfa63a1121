"""Images of every kind: read as `chasm extract` reads them, or refused by name."""

import struct
import zipfile
import zlib

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from chasm.data.images import open_images
from chasm.errors import ConfigError, DataError
from chasm.inference.pictures import pictures_of

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 9, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (7, 5), dtype=np.uint8)


def only(images):
    (picture,) = pictures_of(images)
    return picture.read()


def save(path, pixels, mode=None, **options):
    image = Image.fromarray(pixels) if mode is None else Image.fromarray(pixels).convert(mode)
    image.save(path, **options)
    return path


def test_a_folder_gives_the_pixels_that_extract_sees_in_the_same_order(tmp_path):
    save(tmp_path / "img10.png", PIXELS)
    save(tmp_path / "img2.png", GREY)
    save(tmp_path / "img1.jpg", PIXELS)
    save(tmp_path / "palette.gif", PIXELS, "P")
    save(tmp_path / "one_bit.png", GREY, "1")
    save(tmp_path / "opaque.png", PIXELS, "RGBA")
    save(tmp_path / "sixteen.tiff", GREY.astype(np.uint16) * 257)
    (tmp_path / "notes.txt").write_text("not an image")
    source = open_images("folder", tmp_path)
    pictures = pictures_of(tmp_path)
    assert [p.name for p in pictures] == source.names
    for picture, expected in zip(pictures, source.read(source.ids), strict=True):
        found = picture.read()
        assert found.dtype == np.uint8
        assert np.array_equal(found, expected), picture.name
    assert np.array_equal(only(tmp_path / "img2.png"), np.repeat(GREY[..., None], 3, axis=2))


def test_files_zips_and_bricks(tmp_path):
    path = save(tmp_path / "a.png", PIXELS)
    assert np.array_equal(only(str(path)), PIXELS)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(path, "sub/a.png")
    assert np.array_equal(only(tmp_path / "all.zip"), PIXELS)
    brick = np.stack([PIXELS, PIXELS[::-1]])
    with h5py.File(tmp_path / "stimuli.hdf5", "w") as file:
        file["imgBrick"] = brick
    np.save(tmp_path / "stimuli.npy", brick)
    for name in ("stimuli.hdf5", "stimuli.npy"):
        pictures = pictures_of(tmp_path / name)
        assert [p.name for p in pictures] == ["0", "1"]
        assert np.array_equal(np.stack([p.read() for p in pictures]), brick)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (PIXELS, PIXELS),
        (GREY, np.stack([GREY] * 3, axis=2)),
        (GREY[..., None], np.stack([GREY] * 3, axis=2)),
        (np.dstack([PIXELS, np.full((12, 9), 255, np.uint8)]), PIXELS),
        (Image.fromarray(PIXELS), PIXELS),
        (torch.from_numpy(PIXELS).permute(2, 0, 1), PIXELS),
        (torch.from_numpy(PIXELS).permute(2, 0, 1) / 255, PIXELS),
        (torch.from_numpy(PIXELS).permute(2, 0, 1).double() / 255, PIXELS),
        (torch.from_numpy(GREY)[None], np.stack([GREY] * 3, axis=2)),
    ],
)
def test_one_image_of_each_kind(given, expected):
    assert np.array_equal(only(given), expected)


def test_lists_batches_and_mixed_sizes(tmp_path):
    path = save(tmp_path / "a.png", PIXELS)
    batch = np.stack([PIXELS, PIXELS[::-1]])
    tensor = torch.from_numpy(batch).permute(0, 3, 1, 2)
    found = pictures_of([path, batch, Image.fromarray(GREY), tensor, (PIXELS,)])
    assert [p.name for p in found] == [str(path), "1.0", "1.1", "2", "3.0", "3.1", "4.0"]
    expected = [PIXELS, *batch, np.stack([GREY] * 3, axis=2), *batch, PIXELS]
    for picture, pixels in zip(found, expected, strict=True):
        assert np.array_equal(picture.read(), pixels)


def rgb16_png(path):
    """A PNG of 16 bits per channel, which Pillow itself cannot write."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data
            + struct.pack(">I", zlib.crc32(kind + data))
        )  # fmt: skip

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" + np.arange(6, dtype=">u2").tobytes())
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


def turned_jpeg(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    return save(path, PIXELS, exif=exif)


def animation(path):
    frames = [Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1].copy())]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


def keyed_png(path):
    return save(path, PIXELS, transparency=tuple(int(v) for v in PIXELS[0, 0]))


def corrupt(path):
    save(path, PIXELS)
    path.write_bytes(path.read_bytes()[:100])
    return path


def empty(path):
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    ("name", "make", "named"),
    [
        ("a.png", lambda p: save(p, np.dstack([PIXELS, PIXELS[..., 0]])), "transparent"),
        ("a.png", keyed_png, "transparent"),
        ("a.tiff", lambda p: save(p, GREY.astype(np.uint16) * 256), "16-bit grey"),
        ("a.png", rgb16_png, "16 bits per channel"),
        ("a.jpg", lambda p: save(p, PIXELS, "CMYK"), "mode CMYK"),
        ("a.tiff", lambda p: save(p, PIXELS, "LAB"), "mode LAB"),
        ("a.tiff", lambda p: save(p, GREY.astype(np.float32)), "mode F"),
        ("a.gif", animation, "2 frames"),
        ("a.jpg", turned_jpeg, "orientation 6"),
        ("a.png", corrupt, "cannot be decoded"),
        ("a.png", empty, "cannot be decoded"),
    ],
)
def test_files_without_one_faithful_reading_are_refused_by_name(tmp_path, name, make, named):
    path = make(tmp_path / name)
    with pytest.raises(DataError, match=named) as caught:
        only(path)
    assert str(path) in str(caught.value)
    with pytest.raises(DataError, match=named):
        pictures_of(tmp_path)[0].read()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (PIXELS.astype(np.float32), "float32, whose range"),
        (PIXELS.astype(np.uint16), "uint16"),
        (PIXELS > 5, "bool"),
        (PIXELS.transpose(2, 0, 1), r"shape \(3, 12, 9\)"),
        (np.zeros((0, 5, 3), np.uint8), "shape"),
        (np.zeros(5, np.uint8), "shape"),
        (np.dstack([PIXELS, PIXELS[..., 0]]), "transparent"),
        (torch.from_numpy(PIXELS), "colour axis first"),
        (torch.from_numpy(PIXELS).permute(2, 0, 1).float(), "not from 0 to 1"),
        (torch.from_numpy(PIXELS).permute(2, 0, 1) / 255 - 0.5, "Undo any normalisation"),
        (torch.full((3, 4, 4), float("nan")), "not from 0 to 1"),
        (torch.from_numpy(PIXELS).permute(2, 0, 1).int(), "torch.int32"),
    ],
)
def test_arrays_without_one_faithful_reading_are_refused(given, named):
    with pytest.raises(DataError, match=named):
        only(given)


def test_what_is_no_image_at_all(tmp_path):
    for given in (5, {"a": 1}, b"bytes", [None]):
        with pytest.raises(ConfigError, match="is no image"):
            pictures_of(given)
    for given, named in (
        ([], "none given"),
        (tmp_path, "no image files"),
        (tmp_path / "absent.png", "no such file"),
        (np.zeros((0, 4, 4, 3), np.uint8), "none given"),
    ):
        with pytest.raises(DataError, match=named):
            pictures_of(given)


def test_images_are_read_when_asked_for_and_not_before(tmp_path):
    path = save(tmp_path / "a.png", PIXELS)
    (picture,) = pictures_of(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.png: cannot be read"):
        picture.read()
