"""Synthetic traffic signs: 16 classes of 32x32 color images, drawn from a key in seconds.

They stand in for photographs of signs where nothing can be downloaded: classes share shapes and colors and differ in
their glyphs, some are eight times as frequent as others, and perspective, weather, light, blur and clutter vary. No
image, font or logo of anybody is used; a sign is a shape, three colors and strokes, all below. How they are drawn is
this package's choice, made so that a small network classifies 95 to 99 % correctly. Results on them say nothing about
photographs.

    >>> images, labels = draw_signs(np.random.default_rng(0), 4)
    >>> images.shape, images.dtype, labels.tolist()
    ((4, 32, 32, 3), dtype('uint8'), [7, 2, 0, 0])
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

SIDE = 32
"""Pixels of an image's side."""
CHUNK = 250
"""Images drawn at a time, so that their arrays fit into a processor's cache. Another number draws other images."""

Color = tuple[float, float, float]
TICKS = ((np.arange(SIDE) + 0.5) / SIDE * 2 - 1).astype(np.float32)
X, Y, PIXEL = TICKS[None, None, :, None], TICKS[None, :, None, None], 2 / SIDE
"""Where pixels are in an image, from -1 to 1, and how large."""

RED, WHITE, BLUE = (0.72, 0.07, 0.11), (0.93, 0.93, 0.91), (0.06, 0.27, 0.62)
YELLOW, BLACK, GRAY = (0.95, 0.74, 0.10), (0.08, 0.08, 0.09), (0.45, 0.45, 0.47)
PALETTE = np.array(
    [(0.55, 0.65, 0.75), (0.30, 0.42, 0.22), (0.50, 0.36, 0.30), (0.60, 0.55, 0.45), (0.45, 0.45, 0.46)], np.float32
)
"""Of backgrounds: sky, leaves, bricks, sand and asphalt."""
INSCRIBED = {3: (0.56, 0.18)}
"""Apothem and drop of the triangle, which is larger and lower than its circle is; other polygons are within it."""


class Stroke(NamedTuple):
    """A line through points ``(x, y)``, with round ends; the sign reaches from -1 to 1, and y grows downwards."""

    points: tuple[tuple[float, float], ...]
    half_width: float = 0.09


@dataclasses.dataclass(frozen=True)
class Sign:
    """A class of signs.

    Attributes:
        name: of the class.
        frequency: how often it appears, relative to the others.
        corners: of its regular polygon; 0 is a circle.
        turn: of the polygon, in degrees; at 0 an edge is at the bottom.
        rim: its color.
        face: the color inside of the rim.
        ink: the color of the glyph.
        rim_width: where the face begins, inwards from the edge.
        strokes: the glyph.
    """

    name: str
    frequency: float
    corners: int
    turn: float
    rim: Color
    face: Color
    ink: Color
    rim_width: float
    strokes: tuple[Stroke, ...] = ()


def _digits(text: str) -> tuple[Stroke, ...]:
    """A number of two digits."""
    shapes = {
        "0": ((-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)),
        "3": ((-1, -1), (1, -1), (0, -0.15), (1, 0.2), (1, 0.8), (0, 1), (-1, 0.8)),
        "5": ((1, -1), (-0.9, -1), (-1, -0.15), (0.5, -0.2), (1, 0.2), (1, 0.8), (0, 1), (-1, 0.8)),
        "8": (
            (0, -0.05),
            (-0.8, -0.4),
            (-0.8, -1),
            (0.8, -1),
            (0.8, -0.4),
            (-1, 0.4),
            (-1, 1),
            (1, 1),
            (1, 0.4),
            (0, 0),
        ),
    }
    return tuple(
        Stroke(tuple((center + 0.17 * x, 0.36 * y) for x, y in shapes[digit]), 0.075)
        for center, digit in zip((-0.29, 0.29), text, strict=True)
    )


def _mirrored(strokes: tuple[Stroke, ...]) -> tuple[Stroke, ...]:
    return tuple(Stroke(tuple((-x, y) for x, y in points), half_width) for points, half_width in strokes)


_BEND = (
    Stroke(((-0.16, 0.5), (-0.16, 0.22), (0.1, 0.02), (0.1, -0.2)), 0.085),
    Stroke(((-0.1, -0.1), (0.1, -0.36), (0.3, -0.1)), 0.075),
)
_TURN = (
    Stroke(((-0.3, 0.5), (-0.3, -0.1), (0.4, -0.1)), 0.1),
    Stroke(((0.14, -0.42), (0.5, -0.1), (0.14, 0.22)), 0.1),
)

SIGNS: tuple[Sign, ...] = (
    Sign("limit 30", 8, 0, 0, RED, WHITE, BLACK, 0.2, _digits("30")),
    Sign("limit 50", 8, 0, 0, RED, WHITE, BLACK, 0.2, _digits("50")),
    Sign("limit 80", 6, 0, 0, RED, WHITE, BLACK, 0.2, _digits("80")),
    Sign(
        "limits end",
        2,
        0,
        0,
        GRAY,
        WHITE,
        BLACK,
        0.06,
        tuple(Stroke(((-0.52 + d, 0.44 + d), (0.44 + d, -0.52 + d)), 0.05) for d in (-0.1, 0.04, 0.18)),
    ),
    Sign("no vehicles", 2, 0, 0, RED, WHITE, BLACK, 0.2),
    Sign("no entry", 4, 0, 0, RED, RED, WHITE, 0.0, (Stroke(((-0.5, 0), (0.5, 0)), 0.17),)),
    Sign(
        "stop",
        3,
        8,
        0,
        WHITE,
        RED,
        WHITE,
        0.09,
        (
            Stroke(((-0.46, -0.28), (-0.68, -0.28), (-0.68, 0), (-0.46, 0), (-0.46, 0.28), (-0.68, 0.28)), 0.055),
            Stroke(((-0.34, -0.28), (-0.08, -0.28), (-0.21, -0.28), (-0.21, 0.28)), 0.055),
            Stroke(((0.06, -0.28), (0.26, -0.28), (0.26, 0.28), (0.06, 0.28), (0.06, -0.28)), 0.055),
            Stroke(((0.42, 0.28), (0.42, -0.28), (0.64, -0.28), (0.64, 0), (0.42, 0)), 0.055),
        ),
    ),
    Sign("yield", 6, 3, 180, RED, WHITE, BLACK, 0.2),
    Sign("priority", 6, 4, 45, WHITE, YELLOW, BLACK, 0.17),
    Sign(
        "danger",
        3,
        3,
        0,
        RED,
        WHITE,
        BLACK,
        0.15,
        (Stroke(((0, -0.38), (0, 0.12)), 0.09), Stroke(((0, 0.36),), 0.1)),
    ),
    Sign("bend left", 2, 3, 0, RED, WHITE, BLACK, 0.15, _mirrored(_BEND)),
    Sign("bend right", 2, 3, 0, RED, WHITE, BLACK, 0.15, _BEND),
    Sign(
        "bumps",
        1,
        3,
        0,
        RED,
        WHITE,
        BLACK,
        0.15,
        (
            Stroke(((-0.46, 0.4), (0.46, 0.4)), 0.06),
            Stroke(((-0.22, 0.28),), 0.17),
            Stroke(((0.22, 0.28),), 0.17),
        ),
    ),
    Sign(
        "ahead",
        3,
        0,
        0,
        WHITE,
        BLUE,
        WHITE,
        0.07,
        (Stroke(((0, 0.55), (0, -0.4)), 0.1), Stroke(((-0.32, -0.16), (0, -0.52), (0.32, -0.16)), 0.1)),
    ),
    Sign("turn left", 2, 0, 0, WHITE, BLUE, WHITE, 0.07, _mirrored(_TURN)),
    Sign("turn right", 3, 0, 0, WHITE, BLUE, WHITE, 0.07, _TURN),
)
"""The classes, in the order of their labels."""


def draw_signs(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws signs of random classes.

    The first of them are the same however many are drawn.

    Args:
        rng: what everything random comes from.
        count: N, how many.

    Returns:
        uint8 images ``(N, 32, 32, 3)`` and int32 labels ``(N,)``, 0 to 15, by the frequencies in `SIGNS`.
    """
    frequencies = np.array([sign.frequency for sign in SIGNS])
    labels = rng.choice(len(SIGNS), count, p=frequencies / frequencies.sum()).astype(np.int32)
    streams = rng.spawn(-(-count // CHUNK))
    images = [
        _draw(stream, labels[start : start + CHUNK])
        for stream, start in zip(streams, range(0, count, CHUNK), strict=True)
    ]
    return np.concatenate(images), labels


def _draw(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """Images ``(N, 32, 32, 3)`` of these classes."""
    draws = Draws(rng, len(labels))
    x, y, pixel = _perspective(draws)
    scene = _background(draws)
    _paint(scene, np.maximum(np.abs(x) - 0.09, -y), pixel, draws.uniform(0.3, 0.6))  # The pole.
    tints, faded = draws.normal(0, 0.04, 3), draws.uniform(0, 0.3)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        sign, u, v, painted = SIGNS[label], x[own], y[own], scene[own]
        edge = _polygon(u, v, sign.corners, sign.turn)
        layers = [(sign.rim, edge), (sign.face, edge + sign.rim_width)]
        if sign.strokes:
            glyph = np.minimum.reduce([_stroke(u, v, stroke) for stroke in sign.strokes])
            layers.append((sign.ink, np.maximum(glyph, edge)))
        for color, distance in layers:
            tinted = np.asarray(color, np.float32) + tints[own]
            _paint(painted, distance, pixel[own], (1 - faded[own]) * tinted + faded[own] * 0.55)
        scene[own] = painted
    _cover(draws, scene, x, y, pixel)
    return _photograph(draws, scene)


class Draws(NamedTuple):
    """Random float32 numbers for so many images, ``(N, 1, 1, channels)``."""

    rng: np.random.Generator
    images: int

    def uniform(self, low: float, high: float, channels: int = 1) -> np.ndarray:
        """Between two bounds."""
        return (low + (high - low) * self.rng.random((self.images, 1, 1, channels), np.float32)).astype(np.float32)

    def normal(self, mean: float, deviation: float, channels: int = 1) -> np.ndarray:
        """Of a normal distribution."""
        drawn = self.rng.standard_normal((self.images, 1, 1, channels), np.float32)
        return (mean + deviation * drawn).astype(np.float32)


def _perspective(draws: Draws) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each pixel is on the sign, x and y ``(N, 32, 32, 1)``, and a pixel's size there, ``(N, 1, 1, 1)``."""
    scale, angle = draws.uniform(0.55, 0.95), np.deg2rad(draws.uniform(-10, 10))
    x = (X - draws.uniform(-0.14, 0.14)) / scale
    y = (Y - draws.uniform(-0.14, 0.14)) / (scale * draws.uniform(0.88, 1.14))
    x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    depth = 1 + draws.uniform(-0.18, 0.18) * x + draws.uniform(-0.1, 0.1) * y
    return x / depth, y / depth, PIXEL / scale


def _polygon(x: np.ndarray, y: np.ndarray, corners: int, turn: float) -> np.ndarray:
    """Distance from the edge of a regular polygon or circle, negative inside."""
    if not corners:
        return np.hypot(x, y) - 1
    apothem, drop = INSCRIBED.get(corners, (math.cos(math.pi / corners), 0.0))
    y = y - drop * math.cos(math.radians(turn))
    normals = np.deg2rad(90 + turn + 360 / corners * np.arange(corners)).tolist()
    return np.maximum.reduce([math.cos(angle) * x + math.sin(angle) * y for angle in normals]) - apothem


def _stroke(x: np.ndarray, y: np.ndarray, stroke: Stroke) -> np.ndarray:
    """Distance from the edge of a stroke, negative inside."""
    points, distances = stroke.points, []
    for (x0, y0), (x1, y1) in zip(points, points[1:] or points, strict=False):
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((x - x0) * dx + (y - y0) * dy) / max(dx * dx + dy * dy, 1e-9), 0, 1)
        distances.append((x - x0 - along * dx) ** 2 + (y - y0 - along * dy) ** 2)
    return np.sqrt(np.minimum.reduce(distances)) - stroke.half_width


def _paint(scene: np.ndarray, distance: np.ndarray, pixel: np.ndarray | float, color: np.ndarray) -> None:
    """Paints colors ``(N, 1, 1, 3)`` over a scene where distances are negative; edges cover parts of their pixels."""
    scene += np.clip(0.5 - distance / pixel, 0, 1) * (color - scene)


def _background(draws: Draws) -> np.ndarray:
    """Scenes ``(N, 32, 32, 3)``: textures, straight edges as of roofs and streets, and round spots, in dull colors."""

    def colors() -> np.ndarray:
        """Mixtures of gray with the colors of sky, leaves, bricks and sand."""
        hue = PALETTE[draws.rng.integers(len(PALETTE), size=draws.images)][:, None, None, :]
        return draws.uniform(0.3, 1.5) * (hue + draws.normal(0, 0.06, 3))

    scene = colors() + np.zeros((SIDE, SIDE, 1), np.float32)
    for cells, strength in ((3, 0.16), (7, 0.12), (15, 0.08)):
        gray = strength * draws.rng.standard_normal((draws.images, cells, cells), np.float32)
        weights = _interpolation(cells)
        scene += (weights @ gray @ weights.T)[..., None]
    for _ in range(2):
        angle, offset = draws.uniform(0, 2 * np.pi), draws.uniform(0.1, 1.2)
        _paint(scene, offset - np.cos(angle) * X - np.sin(angle) * Y, PIXEL, colors())
    for _ in range(3):
        at_x, at_y, radius = draws.uniform(-1, 1), draws.uniform(-1, 1), draws.uniform(0.05, 0.35)
        _paint(scene, np.hypot(X - at_x, Y - at_y) - radius, PIXEL, colors())
    return scene


def _interpolation(cells: int) -> np.ndarray:
    """Weights ``(32, cells)`` that interpolate linearly between cells."""
    at = np.linspace(0, cells - 1, SIDE)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells))).astype(np.float32)


def _cover(draws: Draws, scene: np.ndarray, x: np.ndarray, y: np.ndarray, pixel: np.ndarray) -> None:
    """Hides a part of some signs, as leaves do."""
    angle, radius = draws.uniform(0, 2 * np.pi), draws.uniform(0.15, 0.4)
    radius = np.where(draws.uniform(0, 1) < 0.25, radius, -1)
    distance = np.hypot(x - 0.9 * np.cos(angle), y - 0.9 * np.sin(angle)) - radius
    _paint(scene, distance, pixel, draws.uniform(0.05, 0.6) * PALETTE[1])


def _photograph(draws: Draws, scene: np.ndarray) -> np.ndarray:
    """Light, shadow, haze, blur, noise and rounding."""
    angle = draws.uniform(0, 2 * np.pi)
    across = np.cos(angle) * X + np.sin(angle) * Y
    light = np.exp(draws.normal(-0.1, 0.35) + draws.normal(0, 0.2) * across)
    shade = np.where(draws.uniform(0, 1) < 0.3, draws.uniform(0.2, 0.6), 0)
    light *= 1 - shade * np.clip(0.5 + 8 * (across - draws.uniform(-0.5, 0.5)), 0, 1)
    haze = draws.uniform(0, 0.3)
    scene = (1 - haze) * scene * light * np.exp(draws.normal(0, 0.06, 3)) + 0.6 * haze
    scene = (_blur(draws) @ scene.reshape(draws.images, SIDE, 3 * SIDE)).reshape(scene.shape)
    scene = _blur(draws)[:, None] @ scene
    scene += draws.uniform(0.005, 0.05) * draws.rng.standard_normal(scene.shape, np.float32)
    return np.rint(255 * np.clip(scene, 0, 1)).astype(np.uint8)


def _blur(draws: Draws) -> np.ndarray:
    """Matrices ``(N, 32, 32)`` that blur a line of pixels."""
    apart = np.arange(SIDE)[:, None] - np.arange(SIDE)
    deviation = np.maximum(draws.rng.gamma(2.0, 0.28, draws.images), 0.2)[:, None, None]
    weights = np.exp(-0.5 * (apart / deviation) ** 2)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
