"""Parametric shapes of eight object categories, as painted polygons.

Shapes live in a unit square, x to the right and y up, both in [-1, 1]. `style` holds four
numbers in [0, 1] that vary proportions and colours within a category.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np

Colour = tuple[int, int, int]
Part = tuple[np.ndarray, Colour]
"""Corners (n, 2) of a polygon, and its RGB colour in 0-255."""

CATEGORIES = ("face", "body", "house", "word", "food", "vehicle", "animal", "tool")


def object_parts(category: str, style: np.ndarray) -> list[Part]:
    """Return the polygons of an object, back to front.

    Parameters
    ----------
    category
        One of `CATEGORIES`.
    style
        (4,) numbers in [0, 1].
    """
    return _SHAPES[category](style)


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def _ellipse(x: float, y: float, width: float, height: float, colour: Colour) -> Part:
    turn = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    return np.stack([x + width * np.cos(turn), y + height * np.sin(turn)], axis=1), colour


def _box(left: float, bottom: float, right: float, top: float, colour: Colour) -> Part:
    corners = [[left, bottom], [right, bottom], [right, top], [left, top]]
    return np.array(corners), colour


def _bar(x0: float, y0: float, x1: float, y1: float, width: float, colour: Colour) -> Part:
    """Draw a thick line from (x0, y0) to (x1, y1)."""
    along = np.array([x1 - x0, y1 - y0])
    across = np.array([-along[1], along[0]]) / np.hypot(*along) * width / 2
    ends = np.array([[x0, y0], [x1, y1]])
    return np.concatenate([ends + across, ends[::-1] - across]), colour


def _face(style: np.ndarray) -> list[Part]:
    skin = _hsv(0.03 + 0.05 * style[0], 0.25 + 0.45 * style[1], 0.95 - 0.5 * style[1])
    hair = _hsv(0.07, 0.7 * style[2], 0.1 + 0.5 * style[2])
    dark, white, lips = _hsv(0.6, 0.4, 0.15), (240, 240, 235), _hsv(0.98, 0.6, 0.65)
    wide = 0.62 + 0.12 * style[3]
    parts = [
        _ellipse(0, 0.14, wide + 0.1, 0.86, hair),
        _ellipse(0, -0.08, wide, 0.84, skin),
        _bar(0, 0.12, 0.04, -0.22, 0.1, _hsv(0.05, 0.5, 0.55)),
        _ellipse(0, -0.48, 0.26, 0.06 + 0.06 * style[0], lips),
    ]
    for side in (-1, 1):
        parts += [
            _ellipse(0.29 * side, 0.12, 0.14, 0.08, white),
            _ellipse(0.29 * side, 0.12, 0.065, 0.075, dark),
            _bar(0.14 * side, 0.29, 0.44 * side, 0.27 + 0.06 * style[2], 0.07, hair),
        ]
    return parts


def _body(style: np.ndarray) -> list[Part]:
    skin = _hsv(0.05, 0.3 + 0.3 * style[1], 0.9 - 0.4 * style[1])
    shirt, trousers = _hsv(style[0], 0.7, 0.75), _hsv(style[2], 0.5, 0.4)
    swing, lift = 0.2 + 0.25 * style[3], -0.3 + 0.9 * style[2]
    parts = []
    for side in (-1, 1):
        parts += [
            _bar(0.1 * side, -0.1, swing * side, -0.98, 0.19, trousers),
            _bar(0.2 * side, 0.48, 0.55 * side, 0.1 + lift * (side > 0), 0.13, shirt),
            _ellipse(0.56 * side, 0.08 + lift * (side > 0), 0.08, 0.08, skin),
        ]
    return [
        *parts,
        _box(-0.25, -0.2, 0.25, 0.55, shirt),
        _box(-0.07, 0.5, 0.07, 0.65, skin),
        _ellipse(0, 0.8, 0.16, 0.2, skin),
    ]


def _house(style: np.ndarray) -> list[Part]:
    wall, roof = _hsv(0.05 + 0.1 * style[0], 0.3, 0.85), _hsv(0.02, 0.6, 0.3 + 0.3 * style[1])
    glass, door = _hsv(0.58, 0.45, 0.45), _hsv(style[2], 0.6, 0.35)
    height = 0.15 + 0.25 * style[3]
    parts = [
        _box(-0.82, -0.9, 0.82, height, wall),
        (np.array([[-0.98, height], [0.98, height], [0.0, 0.95]]), roof),
        _box(-0.16, -0.9, 0.16, -0.25, door),
    ]
    for column in (-0.52, 0.52):
        for row in (-0.45, height - 0.3):
            parts.append(_box(column - 0.17, row - 0.14, column + 0.17, row + 0.14, glass))
    return parts


def _word(style: np.ndarray) -> list[Part]:
    dark = style[0] < 0.5
    plate = _hsv(style[1], 0.25, 0.95) if dark else _hsv(style[1], 0.6, 0.25)
    ink = (20, 20, 25) if dark else (245, 245, 240)
    letters = 4 + int(2 * style[2])
    width = 1.8 / letters
    strokes: dict[int, list[tuple[float, float, float, float]]] = {
        0: [(0, 0, 0, 1), (0, 1, 1, 1), (0, 0.5, 0.8, 0.5), (0, 0, 1, 0)],
        1: [(0, 0, 0.5, 1), (0.5, 1, 1, 0), (0.2, 0.4, 0.8, 0.4)],
        2: [(0, 1, 1, 1), (0.5, 1, 0.5, 0)],
        3: [(0, 0, 0, 1), (1, 0, 1, 1), (0, 0.5, 1, 0.5)],
        4: [(0, 1, 0.5, 0), (0.5, 0, 1, 1)],
        5: [(0, 0, 0, 1), (0, 0, 1, 0)],
    }
    parts = [_box(-1, -0.4, 1, 0.4, plate)]
    for place in range(letters):
        glyph = strokes[int(style[3] * 997 + place * (1 + style[2] * 89)) % len(strokes)]
        left = -0.9 + width * (place + 0.18)
        for x0, y0, x1, y1 in glyph:
            x = [left + 0.64 * width * value for value in (x0, x1)]
            y = [-0.26 + 0.52 * value for value in (y0, y1)]
            parts.append(_bar(x[0], y[0], x[1], y[1], 0.09, ink))
    return parts


def _food(style: np.ndarray) -> list[Part]:
    plate = (235, 235, 240)
    parts = [
        _ellipse(0, 0, 0.98, 0.62 + 0.2 * style[3], plate),
        _ellipse(0, 0, 0.76, 0.46 + 0.16 * style[3], (215, 215, 222)),
    ]
    hues = (0.03, 0.1, 0.16, 0.28)
    for piece in range(5):
        turn = 2 * np.pi * (piece / 5 + style[0])
        hue = hues[int(4 * style[1] + piece) % 4]
        colour = _hsv(hue, 0.8, 0.6 + 0.3 * ((piece + style[2]) % 1))
        parts.append(
            _ellipse(0.38 * np.cos(turn), 0.24 * np.sin(turn), 0.24 + 0.06 * style[2], 0.2, colour)
        )
    return [*parts, _ellipse(0, 0.02, 0.2, 0.17, _hsv(hues[int(4 * style[2]) % 4], 0.85, 0.8))]


def _vehicle(style: np.ndarray) -> list[Part]:
    paint, glass, tyre = _hsv(style[0], 0.8, 0.75), _hsv(0.57, 0.3, 0.8), (25, 25, 28)
    roof = 0.35 + 0.3 * style[1]
    nose = 0.35 + 0.3 * style[2]
    parts = [
        (np.array([[-0.75, 0.0], [nose, 0.0], [nose - 0.2, roof], [-0.55, roof]]), paint),
        (np.array([[-0.6, 0.0], [-0.1, 0.0], [-0.1, roof - 0.1], [-0.47, roof - 0.1]]), glass),
        (
            np.array([[0, 0.0], [nose - 0.1, 0], [nose - 0.25, roof - 0.1], [0, roof - 0.1]]),
            glass,
        ),
        _box(-0.98, -0.45, 0.98, 0.06, paint),
        _box(0.85, -0.2, 0.98, -0.05, (250, 240, 170)),
    ]
    for axle in (-0.55, 0.55):
        parts += [
            _ellipse(axle, -0.46, 0.25, 0.25, tyre),
            _ellipse(axle, -0.46, 0.11, 0.11, (170, 170, 175)),
        ]
    return parts


def _animal(style: np.ndarray) -> list[Part]:
    fur = _hsv(0.04 + 0.09 * style[0], 0.3 + 0.4 * style[1], 0.3 + 0.55 * style[1])
    shade = _hsv(0.06, 0.4, 0.25)
    parts = [_bar(-0.6, 0.15, -0.98, 0.2 + 0.5 * style[2], 0.1, fur)]
    for leg in (-0.5, -0.3, 0.25, 0.45):
        parts.append(_bar(leg, -0.1, leg + 0.08 * (style[3] - 0.5), -0.85, 0.15, fur))
    return [
        *parts,
        _ellipse(-0.05, 0.05, 0.66, 0.36, fur),
        _bar(0.4, 0.15, 0.66, 0.5, 0.3, fur),
        _ellipse(0.68, 0.5, 0.27, 0.24, fur),
        (np.array([[0.5, 0.65], [0.58, 0.98], [0.7, 0.7]]), shade),
        _ellipse(0.9, 0.43, 0.09, 0.08, shade),
        _ellipse(0.74, 0.57, 0.05, 0.05, (15, 15, 15)),
    ]


def _tool(style: np.ndarray) -> list[Part]:
    handle, metal = _hsv(0.08 + 0.9 * (style[0] > 0.6), 0.7, 0.55), _hsv(0.6, 0.08, 0.65)
    if style[1] < 0.5:
        head = [_box(-0.5, 0.5, 0.35 + 0.2 * style[2], 0.85, metal)]
    else:
        head = [
            _ellipse(0, 0.62, 0.33, 0.33, metal),
            _box(-0.12, 0.62, 0.12, 1.0, handle),
        ]
    return [_bar(0, -0.98, 0, 0.6, 0.2 + 0.12 * style[3], handle), *head]


_SHAPES: dict[str, Callable[[np.ndarray], list[Part]]] = {
    "face": _face,
    "body": _body,
    "house": _house,
    "word": _word,
    "food": _food,
    "vehicle": _vehicle,
    "animal": _animal,
    "tool": _tool,
}
