"""Stimuli: what each image shows (latents), and its pixels.

An image is a 1/f background whose orientations and colours depend on its scene type, with
one to three objects of `objects.CATEGORIES` on it. Position and size of an object are drawn
from factorial grids, so that "what" and "where" can be told apart.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import numpy as np
import scipy.fft
from PIL import Image, ImageDraw

from chasm.data.simulation.config import (
    FIELD_OF_VIEW_DEG,
    SimulationConfig,
    Stream,
    random_stream,
)
from chasm.data.simulation.objects import CATEGORIES, object_parts

MAX_OBJECTS = 3
CELL_DEG = 2.2
"""Distance of the 3 × 3 cells in which objects stand."""
SIZES_DEG = (1.8, 2.7, 4.0)
PREFERRED_CELL = {
    "face": (0, 1),
    "body": (0, 0),
    "house": (1, 1),
    "word": (-1, 1),
    "food": (0, -1),
    "vehicle": (-1, -1),
    "animal": (1, -1),
    "tool": (-1, 0),
}
"""Where (columns right, rows up from the centre) each category prefers to stand."""


@dataclass(frozen=True)
class Scene:
    """Statistics of a background: colours in 0-1, orientation of its contours in degrees."""

    name: str
    top: tuple[float, float, float]
    bottom: tuple[float, float, float]
    horizon: float
    slope: float
    orientation: float
    anisotropy: float
    contrast: float


SCENES = (
    Scene("interior", (0.78, 0.69, 0.58), (0.47, 0.34, 0.25), 0.30, 1.4, 90, 0.7, 0.13),
    Scene("street", (0.72, 0.75, 0.80), (0.36, 0.36, 0.38), 0.45, 1.1, 90, 0.4, 0.13),
    Scene("field", (0.55, 0.72, 0.90), (0.38, 0.58, 0.22), 0.55, 1.1, 0, 0.6, 0.13),
    Scene("forest", (0.30, 0.42, 0.24), (0.22, 0.24, 0.12), 0.35, 0.9, 90, 0.9, 0.15),
    Scene("coast", (0.60, 0.78, 0.92), (0.20, 0.42, 0.60), 0.50, 1.3, 0, 1.2, 0.12),
    Scene("mountain", (0.62, 0.70, 0.84), (0.52, 0.50, 0.48), 0.60, 1.2, 45, 0.8, 0.16),
)


@dataclass(frozen=True)
class Latents:
    """What each image shows; the first axis of every array is the image.

    Parameters
    ----------
    scene
        (images,) index into `SCENES`.
    horizon
        (images,) height of the horizon, 0 bottom to 1 top.
    light
        (images,) factor on brightness.
    category
        (images, 3) index into `CATEGORIES`, −1 where there is no object.
    x, y, size
        (images, 3) centre (right, up) and extent in degrees of visual angle.
    angle
        (images, 3) rotation in radians.
    style
        (images, 3, 4) style numbers in [0, 1].
    """

    scene: np.ndarray
    horizon: np.ndarray
    light: np.ndarray
    category: np.ndarray
    x: np.ndarray
    y: np.ndarray
    size: np.ndarray
    angle: np.ndarray
    style: np.ndarray

    def take(self, rows: np.ndarray) -> Latents:
        """Latents of some images, in the order of `rows`."""
        return Latents(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def draw_latents(config: SimulationConfig, image_ids: np.ndarray) -> Latents:
    """Draw what images show, each from its own random stream.

    Parameters
    ----------
    config
        Gives the seed and the tie between category and position.
    image_ids
        (images,) rows of the stimulus file.
    """
    n = len(image_ids)
    objects = (n, MAX_OBJECTS)
    latents = Latents(
        scene=np.zeros(n, np.int8),
        horizon=np.zeros(n, np.float32),
        light=np.zeros(n, np.float32),
        category=np.full(objects, -1, np.int8),
        x=np.zeros(objects, np.float32),
        y=np.zeros(objects, np.float32),
        size=np.zeros(objects, np.float32),
        angle=np.zeros(objects, np.float32),
        style=np.zeros((*objects, 4), np.float32),
    )
    for row, image_id in enumerate(image_ids):
        rng = random_stream(config.seed, Stream.LATENTS, int(image_id))
        scene = int(rng.integers(len(SCENES)))
        latents.scene[row] = scene
        latents.horizon[row] = np.clip(SCENES[scene].horizon + rng.normal(0, 0.1), 0.1, 0.9)
        latents.light[row] = np.exp(rng.normal(0, 0.12))
        _place_objects(latents, row, config.category_position, rng)
    return latents


def _place_objects(
    latents: Latents, row: int, category_position: float, rng: np.random.Generator
) -> None:
    """Fill one row's object latents: distinct cells, any category, any of three sizes."""
    cells = [(column, height) for column in (-1, 0, 1) for height in (-1, 0, 1)]
    for slot in range(int(rng.integers(1, MAX_OBJECTS + 1))):
        category = int(rng.integers(len(CATEGORIES)))
        preferred = PREFERRED_CELL[CATEGORIES[category]]
        if rng.random() < category_position and preferred in cells:
            cell = preferred
        else:
            cell = cells[int(rng.integers(len(cells)))]
        cells.remove(cell)
        jitter = rng.normal(0, 0.25, 2)
        latents.category[row, slot] = category
        latents.x[row, slot] = cell[0] * CELL_DEG + jitter[0]
        latents.y[row, slot] = cell[1] * CELL_DEG + jitter[1]
        latents.size[row, slot] = rng.choice(SIZES_DEG) * np.exp(rng.normal(0, 0.08))
        latents.angle[row, slot] = rng.normal(0, 0.08)
        latents.style[row, slot] = rng.random(4)


def render(config: SimulationConfig, latents: Latents, row: int, image_id: int) -> np.ndarray:
    """Render one image.

    Returns
    -------
    ndarray
        (size, size, 3) uint8 RGB, row 0 at the top.
    """
    rng = random_stream(config.seed, Stream.PIXELS, image_id)
    size = config.image_size
    scene = SCENES[latents.scene[row]]
    texture = _background_noise(scene, size, rng)
    canvas = _gradient(scene, float(latents.horizon[row]), size)
    canvas += texture * np.array([1.0, 0.95, 0.9], np.float32)
    canvas += _chroma_noise(size, rng)
    canvas *= latents.light[row]
    shading = 1 + 0.8 * texture[..., 0]
    for slot in np.flatnonzero(latents.category[row] >= 0):
        _paint(canvas, latents, row, int(slot), shading)
    return np.clip(np.rint(255 * canvas), 0, 255).astype(np.uint8)


def _gradient(scene: Scene, horizon: float, size: int) -> np.ndarray:
    """Sky over ground with a soft horizon: (size, size, 3) in 0-1."""
    height = 1 - (np.arange(size, dtype=np.float32) + 0.5) / size
    sky = (1 / (1 + np.exp(-(height - horizon) / 0.02)))[:, None, None]
    top, bottom = (np.array(colour, np.float32) for colour in (scene.top, scene.bottom))
    depth = 0.75 + 0.25 * np.abs(height - horizon)[:, None, None] / 0.5
    rows = (sky * top + (1 - sky) * bottom) * depth
    return np.repeat(rows, size, axis=1).astype(np.float32)


@functools.cache
def _spectrum(size: int, slope: float, orientation: float, anisotropy: float) -> np.ndarray:
    """Amplitudes f^-slope, stronger for contours at `orientation` (degrees, 0 horizontal)."""
    fy = scipy.fft.fftfreq(size)[:, None] * size
    fx = scipy.fft.rfftfreq(size)[None, :] * size
    frequency = np.maximum(np.hypot(fx, fy), 1.0)
    # Image rows run downward; contours are perpendicular to their wave vector.
    direction = np.arctan2(-fy, fx) - np.deg2rad(orientation) - np.pi / 2
    amplitude = frequency**-slope * np.exp(anisotropy * np.cos(2 * direction))
    amplitude[0, 0] = 0
    return amplitude.astype(np.float32)


def _background_noise(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """Oriented 1/f luminance noise with the scene's contrast: (size, size, 1)."""
    white = scipy.fft.rfft2(rng.standard_normal((size, size), np.float32))
    shape = _spectrum(size, scene.slope, scene.orientation, scene.anisotropy)
    noise = scipy.fft.irfft2(white * shape, s=(size, size))
    return (scene.contrast * noise / noise.std())[..., None].astype(np.float32)


def _chroma_noise(size: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth blue-yellow and red-green variation of constant luminance: (size, size, 3)."""
    white = scipy.fft.rfft2(rng.standard_normal((2, size, size), np.float32))
    fields_ = scipy.fft.irfft2(white * _spectrum(size, 1.6, 0, 0), s=(size, size))
    fields_ /= fields_.std(axis=(1, 2), keepdims=True)
    red_green = np.array([0.03, -0.012, 0.0], np.float32)
    blue_yellow = np.array([0.012, 0.012, -0.04], np.float32)
    chroma = fields_[0, ..., None] * red_green + fields_[1, ..., None] * blue_yellow
    return chroma.astype(np.float32)


def _paint(canvas: np.ndarray, latents: Latents, row: int, slot: int, shading: np.ndarray) -> None:
    """Paint one object onto the canvas in place, antialiased."""
    size = canvas.shape[0]
    pixels = size / FIELD_OF_VIEW_DEG
    centre = np.array([latents.x[row, slot], -latents.y[row, slot]]) * pixels + size / 2
    radius = float(latents.size[row, slot]) / 2 * pixels
    angle = float(latents.angle[row, slot])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    reach = 1.45 * radius + 1
    left, top = np.maximum(np.floor(centre - reach), 0).astype(int)
    right, bottom = np.minimum(np.ceil(centre + reach), size).astype(int)
    if right <= left or bottom <= top:
        return
    finer = 3
    colours = Image.new("RGB", (finer * (right - left), finer * (bottom - top)))
    cover = Image.new("L", colours.size)
    draw_colour, draw_cover = ImageDraw.Draw(colours), ImageDraw.Draw(cover)
    for corners, colour in object_parts(
        CATEGORIES[latents.category[row, slot]], latents.style[row, slot]
    ):
        turned = (corners @ turn.T) * [1, -1] * radius + centre - [left, top]
        outline = [tuple(point) for point in (finer * turned)]
        draw_colour.polygon(outline, fill=colour)
        draw_cover.polygon(outline, fill=255)
    shape = (right - left, bottom - top)
    # Colours are premultiplied by cover: the layer is black where nothing is painted.
    paint = np.asarray(colours.resize(shape, Image.Resampling.BOX), np.float32) / 255
    alpha = np.asarray(cover.resize(shape, Image.Resampling.BOX), np.float32)[..., None] / 255
    window = canvas[top:bottom, left:right]
    light = shading[top:bottom, left:right, None]
    window *= 1 - alpha
    window += paint * light * latents.light[row]
