"""Best and worst images: which ones, their pixels, their patterns."""

import base64
import io
import logging
from dataclasses import replace

import nibabel
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from chasm.errors import DataError
from chasm.evaluation import gallery
from chasm.evaluation.gallery import make_gallery, pattern_figure, thumbnail


def decoded(uri):
    assert uri.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def grey_of(image_ids):
    """Pixels whose level tells the image."""
    return [np.full((300, 400, 3), image_id % 200, np.uint8) for image_id in image_ids]


@pytest.fixture
def volume():
    places = np.argwhere(np.ones((4, 5, 2)))

    def place(values):
        data = np.full((12, 14, 10), np.nan, np.float32)
        data[tuple((places + 3).T)] = values
        return nibabel.Nifti1Image(data, np.diag([-1.8, 1.8, 1.8, 1]))

    return place


def test_the_ends_of_the_pattern_correlation_are_chosen(predictions, volume):
    file = predictions()
    r = np.array([
        stats.pearsonr(p, y)[0]
        for p, y in zip(file.rows["stage 1"].values, file.target, strict=True)
    ])  # fmt: skip
    found = make_gallery(file, volume, grey_of, n=3)
    assert found.row == "stage 1"
    assert [e.image_id for e in found.best] == list(file.image_id[np.argsort(-r)[:3]])
    assert [e.image_id for e in found.worst] == list(file.image_id[np.argsort(r)[:3]])
    for example in (*found.best, *found.worst):
        image = list(file.image_id).index(example.image_id)
        assert example.pattern_correlation == pytest.approx(r[image])
        assert example.repeats == file.repeats[image]
        picture = decoded(example.picture)
        assert picture.size == (200, 150)
        assert picture.getpixel((100, 75))[0] == pytest.approx(example.image_id % 200, abs=2)
        assert decoded(example.patterns).width > 300


def test_images_without_a_correlation_are_not_shown(predictions):
    file = predictions(n_images=6)
    values = file.rows["stage 1"].values.copy()
    values[2] = 0.3
    file = replace(file, rows={"stage 1": replace(file.rows["stage 1"], values=values)})
    found = make_gallery(file, None, None)
    shown = [e.image_id for e in (*found.best, *found.worst)]
    assert len(shown) == len(set(shown)) == 4
    assert file.image_id[2] not in shown
    constant = replace(file.rows["stage 1"], values=np.zeros_like(values))
    assert make_gallery(replace(file, rows={"stage 1": constant}), None, None) is None
    baseline = replace(file.rows["stage 1"], kind="baseline")
    assert make_gallery(replace(file, rows={"ridge": baseline}), None, None) is None


def test_missing_pixels_are_said_and_patterns_stay(predictions, caplog):
    def gone(image_ids):
        raise DataError("images.hdf5", "no longer there", "Bring them back.")

    with caplog.at_level(logging.WARNING, logger=gallery.__name__):
        found = make_gallery(predictions(), None, gone)
    assert "no longer there" in caplog.text
    assert all(e.picture == "" and e.patterns for e in (*found.best, *found.worst))


def test_thumbnails_keep_their_shape_and_are_never_enlarged():
    assert decoded(thumbnail(np.zeros((600, 300, 3), np.uint8))).size == (100, 200)
    assert decoded(thumbnail(np.zeros((40, 64, 3), np.uint8))).size == (64, 40)


def test_slices_show_the_values_at_their_places(volume):
    measured = np.arange(40.0) - 20
    axes = pattern_figure(measured, -3 * measured, volume).axes[0]
    data = nibabel.as_closest_canonical(volume(measured)).get_fdata()
    assert not np.allclose(data, volume(measured).get_fdata(), equal_nan=True)  # x is turned
    drawn = axes.images[0].get_array()
    inside = np.argwhere(np.isfinite(data))
    first = inside.min(axis=0) - 1  # a margin of one voxel
    across, along, _ = inside.max(axis=0) + 2 - first
    assert drawn.shape == (2 * along, gallery._SLICES * across)
    heights = [float(text.get_text().split()[2]) for text in axes.texts[: gallery._SLICES]]
    for place, height in enumerate(heights):
        (level,) = {z for _, _, z in inside if abs(1.8 * z - height) < 0.9}
        for line, values in ((1, data), (0, -3 * data)):
            panel = drawn[line * along :, place * across :][:along, :across].filled(np.nan)
            limit = np.nanpercentile(np.abs(values), 98)
            expected = values[first[0] :, first[1] :, level][:across, :along].T / limit
            np.testing.assert_allclose(panel, expected)
    assert f"±{np.percentile(np.abs(measured), 98):.2f}" in axes.texts[-2].get_text()


def test_without_a_volume_units_are_sorted_by_measurement():
    rng = np.random.default_rng(0)
    measured, predicted = rng.normal(size=(2, 30))
    lines = pattern_figure(measured, predicted, None).axes[0].lines
    np.testing.assert_array_equal(lines[1].get_ydata(), np.sort(measured))
    np.testing.assert_array_equal(lines[2].get_ydata(), predicted[np.argsort(measured)])
