"""Brain maps: where values are, and that the clickable page needs nothing from elsewhere."""

import base64
import io
import json
import re

import nibabel
import numpy as np
import pytest
from PIL import Image

from chasm.errors import DataError
from chasm.evaluation import brain_maps
from chasm.evaluation.brain_maps import brain_figure, cropped, interactive_map

AFFINE = np.array([[-1.8, 0, 0, 40], [0, 1.8, 0, -60], [0, 0, 1.8, -20], [0, 0, 0, 1.0]])
PLACES = np.argwhere(np.ones((5, 6, 4))) + np.array([0, 3, 9])  # touches the volume's border


def volume(values):
    data = np.full((20, 18, 16), np.nan, np.float32)
    data[tuple(PLACES.T)] = values
    return nibabel.Nifti1Image(data, AFFINE)


@pytest.fixture
def values():
    return np.random.default_rng(0).uniform(-0.2, 0.6, len(PLACES))


def options_of(page):
    return json.loads(re.search(r"brainsprite\((\{.*?\})\);", page, re.DOTALL)[1])


def test_a_cropped_image_has_every_value_where_it_was(values):
    image = cropped(volume(values), margin=4)
    assert image.shape == (5 + 8, 6 + 8, 4 + 8)
    data = np.asarray(image.dataobj)
    assert np.isfinite(data).sum() == len(PLACES)
    back = np.linalg.inv(image.affine)
    for place, value in zip(PLACES, values, strict=True):
        there = np.round((back @ AFFINE @ [*place, 1])[:3]).astype(int)
        assert data[tuple(there)] == np.float32(value)


def test_the_clickable_page_asks_nothing_of_the_network(values):
    found = interactive_map(values, volume, "R²")
    for source in re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", found.page):
        assert source.startswith(("data:", "#")) or source == "", source[:80]
    assert not re.search(r"""(?:@import|url\(|import\(|fetch\(|<link)""", found.page)
    assert 1 < found.ratio < 4


def test_a_viewer_that_loads_from_elsewhere_is_refused(values, monkeypatch):
    import nilearn.plotting

    class View:
        html = '<html><head></head><script src="https://cdn.example/x.js"></script></html>'

    monkeypatch.setattr(nilearn.plotting, "view_img", lambda *_, **__: View())
    with pytest.raises(DataError, match=r"load from elsewhere.*cdn\.example"):
        interactive_map(values, volume, "R²")


def test_the_page_holds_every_value_at_its_place(values):
    """Read the viewer's own sprite back: a mosaic of sagittal slices in the map's colours."""
    from matplotlib import colormaps

    limits = (-0.6, 0.6)
    page = interactive_map(values, volume, "R²", limits=limits, colours="RdBu_r").page
    options = options_of(page)
    assert options["flagValue"] is True
    name = options["overlay"]["sprite"]
    source = re.search(rf'id="{name}"\s+class="hidden"\s+src="([^"]*)"', page)[1]
    sprite = Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).convert("RGBA")
    size = options["overlay"]["nbSlice"]
    columns = sprite.width // size["Y"]
    pixels = np.asarray(sprite).astype(int)
    back = np.linalg.inv(np.array(options["affine"]))
    for place, value in zip(PLACES[::7], values[::7], strict=True):
        x, y, z = np.round((back @ AFFINE @ [*place, 1])[:3]).astype(int)
        row = (x // columns) * size["Z"] + (size["Z"] - 1 - z)
        column = (x % columns) * size["Y"] + y
        expected = colormaps["RdBu_r"]((value - limits[0]) / (limits[1] - limits[0]), bytes=True)
        assert pixels[row, column] == pytest.approx(np.array(expected), abs=8)
    # Outside the map nothing is drawn: the opaque pixels are the voxels, each as a cube.
    cells = pixels[..., 3].reshape(-1, size["Z"], columns, size["Y"]).swapaxes(1, 2)
    opaque = (cells.reshape(-1, size["Z"], size["Y"])[: size["X"]] > 0).sum()
    factor = round(1.8 / abs(options["affine"][0][0]))
    assert factor > 1
    assert opaque == len(PLACES) * factor**3


def test_the_viewer_starts_at_the_strongest_value(values):
    values[17] = 2.0
    options = options_of(interactive_map(values, volume, "R²").page)
    index = [options["numSlice"][axis] for axis in "XYZ"]
    place = np.array(options["affine"]) @ [*index, 1]
    assert np.abs(place[:3] - (AFFINE @ [*PLACES[17], 1])[:3]).max() <= 1.8


def test_colour_limits_are_symmetric_where_asked():
    image = volume(np.linspace(-1, 0.5, len(PLACES)))
    low, high = brain_maps.colour_limits(image)
    assert low == 0
    assert 0.95 < high <= 1
    assert brain_maps.colour_limits(image, symmetric=True) == (-high, high)


def test_what_lies_outside_the_scale_is_drawn_as_its_end(values):
    shown, _ = brain_maps.visible(volume(values), 0.0, 0.4)
    drawn = np.asarray(shown.dataobj)[tuple(PLACES.T)]
    assert (drawn[values < 0] == np.float32(4e-7)).all()
    assert (drawn[values > 0.4] == np.float32(0.4)).all()
    between = (values > 0) & (values < 0.4)
    np.testing.assert_array_equal(drawn[between], np.float32(values[between]))
    assert (values < 0).any()


def test_zero_inside_the_map_is_drawn():
    image = volume(np.zeros(len(PLACES)))
    shown, cover = brain_maps.visible(image, 0.0, 1.0)
    assert (np.asarray(shown.dataobj) > 0).sum() == np.asarray(cover.dataobj).sum() == len(PLACES)
    assert brain_figure(np.zeros(len(PLACES)), volume, "flat").axes
