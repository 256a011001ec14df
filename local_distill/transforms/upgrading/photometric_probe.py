"""Whether a transform that can't be seen into leaves every pixel where it is, tried on images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from local_distill.errors import GeometryError
from local_distill.transforms.generators import generators_kept, seed_generators

__all__ = ["check_moves_nothing"]

_CELL = 32  # px; one dot in each
_ROWS, _COLS = 3, 4
_RADIUS = 2  # of a square dot
# Solarising, inverting or equalising can level one of these with its background, not all three.
_BACKGROUND, _DOT = (40, 90, 200), (220, 140, 60)
# (x, y) of the dots in their cells, without a symmetry: a mirrored, turned or shifted image has no
# dot where one was.
_PLACES = (
    *((11, 14), (19, 10), (14, 20), (20, 17)),
    *((17, 11), (10, 19), (21, 13), (12, 12)),
    *((13, 21), (20, 20), (10, 11), (18, 15)),
)
_SEEDS = 8
_ALLOWED = 0.25  # px: less than any move on purpose, more than an even-sized filter's rounding
_PROBABILITIES = ("p", "prob", "probability")


def check_moves_nothing(transform: Callable[[Any], Any]) -> None:
    """Try a transform on an image of dots under several seeds and look where the dots end up.

    A copy is tried, as it is and with its probability raised to 1, and the generators are left as
    they were. This can convict a transform but not clear it: what moves pixels once in a thousand
    calls, or only in images of some size, would pass.

    Args:
        transform: a callable from an image to an image.

    Raises:
        GeometryError: a dot moved, the size changed, or the transform could not be tried.

    Example:
        >>> from PIL import ImageFilter, ImageOps
        >>> check_moves_nothing(lambda image: image.filter(ImageFilter.GaussianBlur(2)))
        >>> check_moves_nothing(ImageOps.mirror)
        Traceback (most recent call last):
        ...
        local_distill.errors.GeometryError: it moves pixels: a dot that was centred at (x, y) = ...
    """
    image, centers = _dots()
    with generators_kept():
        for attempt in (_forced(_twin(transform)), _twin(transform)):
            for seed in range(_SEEDS):
                seed_generators(seed)
                _check_centers(_values(_call(attempt, image)), centers)


def _dots() -> tuple[PIL.Image.Image, np.ndarray[Any, Any]]:
    array = np.empty((_ROWS * _CELL, _COLS * _CELL, 3), np.uint8)
    array[:] = _BACKGROUND
    corner = [(_CELL * col, _CELL * row) for row in range(_ROWS) for col in range(_COLS)]
    centers = np.array(corner) + np.array(_PLACES)
    for x, y in centers:
        array[y - _RADIUS : y + _RADIUS + 1, x - _RADIUS : x + _RADIUS + 1] = _DOT
    return PIL.Image.fromarray(array), centers + 0.5


def _twin(transform: Callable[[Any], Any]) -> Callable[[Any], Any]:
    try:
        return copy.deepcopy(transform)
    except Exception as error:  # a lock, an open file
        raise GeometryError(f"it can't be copied ({type(error).__name__}: {error})") from error


def _forced(transform: Callable[[Any], Any]) -> Callable[[Any], Any]:
    for name in _PROBABILITIES:
        if isinstance(getattr(transform, "__dict__", {}).get(name), (int, float)):
            setattr(transform, name, 1.0)
    return transform


def _call(transform: Callable[[Any], Any], image: PIL.Image.Image) -> Any:
    try:
        return transform(image.copy())
    except Exception:  # whatever foreign code raises when it wants a tensor
        tensor = F.to_dtype(F.to_image(image), torch.float32, scale=True).as_subclass(Tensor)
        try:
            return transform(tensor)
        except Exception as error:
            raise GeometryError(
                f"it takes neither a PIL image nor a float tensor of {image.height} × "
                f"{image.width} pixels ({type(error).__name__}: {error})"
            ) from error


def _values(view: Any) -> np.ndarray[Any, Any]:
    """(height, width, channels) float64, in levels of 0 to 255 or in units of 1 / 255."""
    if isinstance(view, PIL.Image.Image):
        view = F.pil_to_tensor(view)
    if not isinstance(view, Tensor) or view.dim() != 3:
        raise GeometryError(f"it makes a {type(view).__name__} of an image, not an image")
    values = view.double() * (255 if view.is_floating_point() else 1)
    return values.permute(1, 2, 0).numpy()


def _check_centers(values: np.ndarray[Any, Any], centers: np.ndarray[Any, Any]) -> None:
    height, width = _ROWS * _CELL, _COLS * _CELL
    if values.shape[:2] != (height, width):
        raise GeometryError(
            f"it makes {values.shape[0]} × {values.shape[1]} pixels of {height} × {width}"
        )
    contrast = np.abs(values - np.median(values, axis=(0, 1))).sum(-1)
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    for row in range(_ROWS):
        for col in range(_COLS):
            cell = np.s_[row * _CELL : (row + 1) * _CELL, col * _CELL : (col + 1) * _CELL]
            expected, weight = centers[row * _COLS + col], contrast[cell]
            if not weight.sum() > 0:  # NaN as well
                raise GeometryError(f"a dot at (x, y) = {tuple(expected.tolist())} is gone")
            found = np.array([(axis[cell] * weight).sum() / weight.sum() for axis in (x, y)])
            shift = float(np.hypot(*(found - expected)))
            if shift > _ALLOWED:
                raise GeometryError(
                    f"it moves pixels: a dot that was centred at (x, y) = "
                    f"{tuple(expected.tolist())} came out {shift:.1f} px off"
                )
