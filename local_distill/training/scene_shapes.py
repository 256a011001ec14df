"""The outlines, textures and backgrounds that `SyntheticScenes` is drawn with."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["REACH", "SHAPES", "TEXTURES", "background", "outline", "texture"]

Array = NDArray[np.float32]

SHAPES = ("disk", "square", "triangle", "star", "cross")
TEXTURES = ("striped", "checkered", "dotted", "ringed", "blotched")

# No outline reaches further from its centre than this, in radii (the tips of triangle and star).
REACH = 1.25

# Waves per radius, in radians: coarse enough that the smallest object at 64 px (radius 6.4)
# still has about four pixels a period, and different enough that textures differ in scale too.
_FREQUENCY = {"striped": 9.5, "checkered": 6.0, "dotted": 7.5, "ringed": 9.5, "blotched": 4.5}

_TENTH = np.pi / 5
# The star's two reflection axes, which fold all ten half-arms onto one.
_STAR_AXES = tuple((np.float32(s * np.cos(_TENTH)), np.float32(np.sin(-_TENTH))) for s in (1, -1))
_STAR_TIP, _STAR_WAIST = 1.25, 0.56
# The one edge left then runs from (0, tip) to the waist a tenth of a turn away; its unit normal.
_STAR_RUN = (_STAR_WAIST * np.sin(_TENTH), _STAR_TIP - _STAR_WAIST * np.cos(_TENTH))
_STAR_EDGE = (
    np.float32(_STAR_RUN[1] / np.hypot(*_STAR_RUN)),
    np.float32(_STAR_RUN[0] / np.hypot(*_STAR_RUN)),
)


def outline(shape: str, u: Array, v: Array) -> Array:
    """Signed distance from an outline, negative inside.

    Convention: a shape's frame has its centre at 0 and the unit is its radius, v pointing down.
        The areas are alike, so that size does not tell the shape. Distances are exact near edges;
        beyond a corner they are to the nearest edge's line, which keeps corners sharp.

    Args:
        shape: one of `SHAPES`.
        u: `(h, w)` abscissae in radii.
        v: `(h, w)` ordinates in radii.

    Returns:
        `(h, w)` distances in radii.

    Example:
        >>> import numpy as np
        >>> outline("square", np.float32([[0.0, 0.8, 1.8]]), np.float32([[0.0, 0.0, 0.0]])).round(3)
        array([[-0.8,  0. ,  1. ]], dtype=float32)
    """
    distance: Array
    if shape == "disk":
        distance = np.sqrt(u * u + v * v) - np.float32(0.92)
    elif shape == "triangle":
        side, base = np.float32(np.sqrt(0.75)), np.float32(0.5)
        distance = np.maximum(side * np.abs(u) - base * v, v) - np.float32(0.62)
    elif shape == "star":
        u, v = np.abs(u), -v
        for x, y in _STAR_AXES:
            beyond = np.float32(2) * np.maximum(u * x + v * y, np.float32(0))
            u, v = u - beyond * x, v - beyond * y
        x, y = _STAR_EDGE
        distance = np.abs(u) * x + v * y - y * np.float32(_STAR_TIP)
    else:
        u, v = np.abs(u), np.abs(v)
        distance = np.maximum(u, v)
        if shape == "square":
            distance = distance - np.float32(0.8)
        else:
            arm = np.minimum(u, v) - np.float32(0.38)
            distance = np.maximum(distance - np.float32(1.05), arm)
    return distance


def texture(name: str, u: Array, v: Array, phases: Array, radius: float) -> Array:
    """A two-tone texture with anti-aliased edges.

    Convention: -1 is one tone, +1 the other; the period is a fixed share of the radius.

    Args:
        name: one of `TEXTURES`.
        u: `(h, w)` abscissae in radii.
        v: `(h, w)` ordinates in radii.
        phases: `(6,)` numbers in [0, 1) which shift the texture (and turn its waves, if blotched).
        radius: the object's radius in pixels, which says how wide an edge of one pixel is.

    Returns:
        `(h, w)` values in [-1, 1].

    Example:
        >>> import numpy as np
        >>> u = np.float32([[-0.15, 0.0, 0.15, 0.5]])
        >>> texture("striped", u, 0 * u, np.zeros(6, np.float32), radius=40.0)
        array([[-1.,  0.,  1., -1.]], dtype=float32)
    """
    frequency = np.float32(_FREQUENCY[name])
    turn = 2 * np.pi * phases
    if name == "striped":
        wave = np.sin(frequency * u + turn[0])
    elif name == "checkered":
        wave = np.sin(frequency * u + turn[0]) * np.sin(frequency * v + turn[1])
    elif name == "dotted":
        wave = np.cos(frequency * u + turn[0]) + np.cos(frequency * v + turn[1]) - np.float32(0.6)
    elif name == "ringed":
        wave = np.sin(frequency * np.sqrt(u * u + v * v) + turn[0])
    else:
        # Three waves a third of a half-turn apart, each with its own angle and phase.
        wave = np.zeros_like(u)
        for k in range(3):
            angle = (k + phases[k]) * np.pi / 3
            along = np.cos(angle) * u + np.sin(angle) * v
            wave += np.sin(frequency * along + turn[3 + k])
    # The wave rises by `frequency` a radius where it crosses 0: this gain makes the step from
    # -1 to 1 one pixel wide, so that textures are sharp in large scenes and do not alias in small.
    tones: Array = np.clip(wave * np.float32(2 * radius / frequency), -1, 1)
    return tones


@lru_cache(maxsize=64)
def _interpolation(length: int, cells: int) -> Array:
    """`(length, cells + 1)` weights that spread `cells + 1` knots smoothly over `length` pixels."""
    at = (np.arange(length) + 0.5) / length * cells
    low = np.floor(at).astype(int)
    rise = at - low
    rise = rise * rise * (3 - 2 * rise)
    weights = np.zeros((length, cells + 1), np.float32)
    weights[np.arange(length), low] = 1 - rise
    weights[np.arange(length), low + 1] = rise
    return weights


def background(rng: np.random.Generator, height: int, width: int) -> Array:
    """Colourful smooth noise of two scales, with a drift of luminance across the image.

    The noise is finer than the image, so that a background has no colour of its own: a network that
    could tell images by their backgrounds would learn little else.

    Convention: the numbers drawn depend on the ratio of the sides, not on their size, so that
        one generator gives one background at any enlargement.

    Args:
        rng: the generator to draw from.
        height: pixels.
        width: pixels.

    Returns:
        `(height, width, 3)` RGB around 0.5, not clipped to [0, 1].

    Example:
        >>> import numpy as np
        >>> background(np.random.default_rng(0), 48, 64).shape
        (48, 64, 3)
    """
    short = min(height, width)
    luminance = rng.uniform(0.4, 0.6)
    slope = rng.uniform(-0.15, 0.15, 2)
    y = np.linspace(-slope[1], slope[1], height)[:, None]
    x = np.linspace(-slope[0], slope[0], width)
    out = np.repeat((luminance + y + x).astype(np.float32)[..., None], 3, axis=2)
    for cells, strength in ((5, 0.12), (9, 0.06)):
        rows, cols = max(1, round(cells * height / short)), max(1, round(cells * width / short))
        knots = strength * rng.uniform(-1, 1, (rows + 1, cols + 1, 3))
        wide = _interpolation(height, rows) @ knots.astype(np.float32).reshape(rows + 1, -1)
        out += _interpolation(width, cols) @ wide.reshape(height, cols + 1, 3)
    return out
