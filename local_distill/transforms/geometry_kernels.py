"""What every geometric functional of torchvision v2 does to a `GeometryTensor`.

The kernels are registered with torchvision when this module is imported. Each says where the
*pixels* of the image come from, in continuous coordinates:

- crop, flip, pad: whole pixels.
- resize: (0, 0) and the far corner stay corners, so a step is in / out, with no half pixel.
- affine and rotate: about the image's middle (w/2, h/2), or about ``center`` in continuous
  coordinates; the same for PIL and tensors. Torchvision's matrix already maps output to input.
- perspective: the eight coefficients map output to input in *continuous* coordinates, although
  torchvision fits them between pixel indices; PIL and tensors alike add the half pixel before and
  take it off after. So a corner given as index i moves the point i, not the pixel's centre i + ½.
- rotate with ``expand``: PIL and tensors round the new size differently, see `PilGeometryTensor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from local_distill.errors import GeometryError
from local_distill.transforms.geometry_tensor import (
    GeometryTensor,
    PilGeometryTensor,
    append_step,
    view_size,
)

__all__ = ["check_interpolation"]

_Geometry = TypeVar("_Geometry", bound=GeometryTensor)
_Point = tuple[float, float]


def check_interpolation(name: str, interpolation: Any) -> None:
    """Refuse the one interpolation whose pixels a *resize* does not put where the sizes say.

    Rotations, affine and perspective transforms take it: there it reads the pixel that the position
    falls into, which is off by half a pixel at most and on the average by nothing.
    """
    # torch's "nearest" takes the source pixel at i·scale instead of (i + ½)·scale: a bias of half a
    # step, and on tensors only, which can't be seen from here. 0 is PIL's code for it.
    if interpolation in (InterpolationMode.NEAREST, "nearest", 0):
        raise GeometryError(
            f"`{name}` with interpolation NEAREST shifts tensor images by up to half a source "
            "step; use InterpolationMode.NEAREST_EXACT (the same pixels on PIL images)"
        )


def _translate(geometry: _Geometry, left: int, top: int, view: Sequence[int]) -> _Geometry:
    return append_step(geometry, (1, 0, left, 0, 1, top, 0, 0, 1), view)


def _horizontal_flip(geometry: _Geometry) -> _Geometry:
    view = view_size(geometry)
    return append_step(geometry, (-1, 0, view[1], 0, 1, 0, 0, 0, 1), view)


def _vertical_flip(geometry: _Geometry) -> _Geometry:
    view = view_size(geometry)
    return append_step(geometry, (1, 0, 0, 0, -1, view[0], 0, 0, 1), view)


def _crop(geometry: _Geometry, top: int, left: int, height: int, width: int) -> _Geometry:
    return _translate(geometry, left, top, (height, width))


def _pad(geometry: _Geometry, padding: int | Sequence[int], **_: Any) -> _Geometry:
    sides = [padding] if isinstance(padding, int) else list(padding)
    # v2 takes one number, (left/right, top/bottom) or (left, top, right, bottom).
    left, top, right, bottom = sides * (4 // len(sides))
    height, width = view_size(geometry)
    return _translate(geometry, -left, -top, (height + top + bottom, width + left + right))


def _pair(size: int | Sequence[int]) -> list[int]:
    sides = [size] if isinstance(size, int) else list(size)
    return sides * (2 // len(sides))


def _center_crop(geometry: _Geometry, output_size: int | Sequence[int]) -> _Geometry:
    wanted = _pair(output_size)
    top, left = (
        _center_offset(have, want) for have, want in zip(view_size(geometry), wanted, strict=True)
    )
    return _translate(geometry, left, top, wanted)


def _center_offset(have: int, want: int) -> int:
    # Where the image is too small it is padded first, the smaller half before it; otherwise the
    # middle is rounded half to even.
    return -((want - have) // 2) if want > have else round((have - want) / 2)


def _five_crop(geometry: _Geometry, size: int | Sequence[int]) -> tuple[_Geometry, ...]:
    height, width = _pair(size)
    rows, cols = view_size(geometry)
    if height > rows or width > cols:
        raise GeometryError(
            f"five_crop and ten_crop of (height, width) = {(height, width)} do not fit into an "
            f"image of {(rows, cols)}: crop smaller, or resize or pad first"
        )
    corners = tuple(
        _crop(geometry, top, left, height, width)
        for top in (0, rows - height)
        for left in (0, cols - width)
    )
    return (*corners, _center_crop(geometry, (height, width)))


def _ten_crop(
    geometry: _Geometry, size: int | Sequence[int], vertical_flip: bool = False
) -> tuple[_Geometry, ...]:
    flipped = (_vertical_flip if vertical_flip else _horizontal_flip)(geometry)
    return (*_five_crop(geometry, size), *_five_crop(flipped, size))


def _resize(
    geometry: _Geometry,
    size: int | Sequence[int] | None,
    interpolation: Any = InterpolationMode.BILINEAR,
    max_size: int | None = None,
    **_: Any,
) -> _Geometry:
    check_interpolation("resize", interpolation)
    height, width = view_size(geometry)
    if isinstance(size, Sequence) and len(size) == 2 and max_size is None:
        new_height, new_width = size
    else:
        # torchvision's own rule for one side, asked of an image without channels
        probe = F.resize(torch.empty(0, height, width), size, max_size=max_size)
        new_height, new_width = probe.shape[-2:]
    if min(new_height, new_width) < 1:
        raise GeometryError(
            f"resize would turn {height} × {width} pixels into {new_height} × {new_width}"
        )
    step = (width / new_width, 0, 0, 0, height / new_height, 0, 0, 0, 1)
    return append_step(geometry, step, (new_height, new_width))


def _resized_crop(
    geometry: _Geometry,
    top: int,
    left: int,
    height: int,
    width: int,
    size: int | Sequence[int],
    interpolation: Any = InterpolationMode.BILINEAR,
    **_: Any,
) -> _Geometry:
    if not isinstance(size, Sequence) or len(size) != 2 or min(size) < 1:
        return _resize(_crop(geometry, top, left, height, width), size, interpolation)
    check_interpolation("resized_crop", interpolation)
    step = (width / size[1], 0, left, 0, height / size[0], top, 0, 0, 1)
    return append_step(geometry, step, size)  # at once, as this is every recipe's first transform


def _affine(
    geometry: _Geometry,
    angle: float,
    translate: Sequence[float],
    scale: float,
    shear: float | Sequence[float],
    center: Sequence[float] | None = None,
    **_: Any,
) -> _Geometry:
    view = view_size(geometry)
    if not scale > 0:
        raise GeometryError(f"`affine` needs a positive `scale`, got {scale}")
    # A single number shears along x alone; a list of one, along both, as torchvision reads them.
    shears = (shear, 0.0) if isinstance(shear, (int, float)) else tuple(shear)
    along_x, along_y = shears * (2 // len(shears))
    turn = math.radians(angle)
    cos, sin = math.cos(turn), math.sin(turn)
    tan_x, tan_y = math.tan(math.radians(along_x)), math.tan(math.radians(along_y))
    # input → output: rotation · shear along y · shear along x, of determinant 1, times the scale
    a, c = cos + sin * tan_y, sin - cos * tan_y
    b, d = -a * tan_x - sin, -c * tan_x + cos
    inverse = (d / scale, -b / scale, -c / scale, a / scale)
    x, y = _middle(view) if center is None else (float(center[0]), float(center[1]))
    pivot = (x + float(translate[0]), y + float(translate[1]))
    return append_step(geometry, _linear_step(inverse, pivot, (x, y)), view)


def _rotate(
    geometry: _Geometry,
    angle: float,
    interpolation: Any = InterpolationMode.NEAREST,
    expand: bool = False,
    center: Sequence[float] | None = None,
    **_: Any,
) -> _Geometry:
    view = view_size(geometry)
    new = view
    if expand:
        pil = isinstance(geometry, PilGeometryTensor)
        new = _expanded_by_pil(view, angle, center) if pil else _expanded(view, angle, center)
    cos, sin = _quarter_exact(angle)
    x, y = _middle(view) if center is None else (float(center[0]), float(center[1]))
    # The larger image is laid about the middle of the old one; without `expand` both are one.
    pivot = (x + (new[1] - view[1]) / 2, y + (new[0] - view[0]) / 2)
    # angles count anticlockwise as seen, y pointing down
    return append_step(geometry, _linear_step((cos, -sin, sin, cos), pivot, (x, y)), new)


def _quarter_exact(angle: float) -> tuple[float, float]:
    turn = math.radians(angle % 360)
    # so that quarter turns are whole: PIL and torchvision transpose the pixels for these
    return round(math.cos(turn), 15), round(math.sin(turn), 15)


def _expanded(view: list[int], angle: float, center: Sequence[float] | None) -> list[int]:
    # torchvision's rule works in float32, so it is asked itself, of an image without pixels
    probe = torch.empty(0, *view, device="meta")
    wanted = None if center is None else list(center)
    return list(F.rotate(probe, angle, expand=True, center=wanted).shape[-2:])


def _expanded_by_pil(view: list[int], angle: float, center: Sequence[float] | None) -> list[int]:
    height, width = view
    angle = angle % 360.0
    if center is None and angle in (0, 180):
        return view
    if center is None and angle in (90, 270):
        return [width, height]
    # Where the four corners go, in PIL's order of float64 operations: a bit decides over a pixel.
    turn = -math.radians(angle)
    cos, sin = round(math.cos(turn), 15), round(math.sin(turn), 15)
    x, y = (width / 2, height / 2) if center is None else (center[0], center[1])
    shift_x = cos * -x + sin * -y + 0.0 + x
    shift_y = -sin * -x + cos * -y + 0.0 + y
    corners = ((0, 0), (width, 0), (width, height), (0, height))
    xs = [cos * i + sin * j + shift_x for i, j in corners]
    ys = [-sin * i + cos * j + shift_y for i, j in corners]
    return [math.ceil(max(ys)) - math.floor(min(ys)), math.ceil(max(xs)) - math.floor(min(xs))]


def _middle(view: Sequence[int]) -> _Point:
    return view[1] / 2, view[0] / 2


def _linear_step(
    linear: tuple[float, float, float, float], pivot: _Point, image: _Point
) -> tuple[float, ...]:
    """Output → input by a 2 × 2 matrix that takes the output point ``pivot`` to ``image``."""
    a, b, c, d = linear
    left = image[0] - a * pivot[0] - b * pivot[1]
    top = image[1] - c * pivot[0] - d * pivot[1]
    return (a, b, left, c, d, top, 0, 0, 1)


def _perspective(
    geometry: _Geometry,
    startpoints: Sequence[Sequence[float]] | None,
    endpoints: Sequence[Sequence[float]] | None,
    interpolation: Any = InterpolationMode.BILINEAR,
    fill: Any = None,
    coefficients: Sequence[float] | None = None,
) -> _Geometry:
    if coefficients is None and startpoints is not None and endpoints is not None:
        coefficients = _fit_homography(startpoints, endpoints)
    if coefficients is None or len(coefficients) != 8:
        raise GeometryError(
            "`perspective` needs `startpoints` and `endpoints`, or eight `coefficients`, got "
            f"{startpoints}, {endpoints} and {coefficients}"
        )
    if not all(map(math.isfinite, coefficients)):
        raise GeometryError(
            f"`perspective` has no finite coefficients ({list(coefficients)}): its corners "
            "coincide or lie on a line; lower `distortion_scale`, or enlarge the image"
        )
    return append_step(geometry, (*coefficients, 1.0), view_size(geometry))


def _fit_homography(
    startpoints: Sequence[Sequence[float]], endpoints: Sequence[Sequence[float]]
) -> list[float]:
    """The eight coefficients that take four output points to four input points."""
    rows, wanted = [], []
    for (x, y), (u, v) in zip(endpoints, startpoints, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
        wanted += [u, v]
    system = torch.tensor(rows, dtype=torch.float64)
    solution, info = torch.linalg.solve_ex(system, torch.tensor(wanted, dtype=torch.float64))
    if int(info):
        return [math.nan] * 8
    # torchvision hands float32 numbers to the image, so these are what its pixels follow
    coefficients: list[float] = solution.to(torch.float32).tolist()
    return coefficients


def _refuse_elastic(geometry: GeometryTensor, *_: Any, **__: Any) -> GeometryTensor:
    raise GeometryError(
        "`elastic` moves pixels in a way that is no homography, so the geometry would be wrong; "
        "take it out of the pipeline or apply it before tracking begins"
    )


_KERNELS: dict[str, Callable[..., Any]] = {
    "get_size": view_size,
    "horizontal_flip": _horizontal_flip,
    "vertical_flip": _vertical_flip,
    "crop": _crop,
    "pad": _pad,
    "center_crop": _center_crop,
    "five_crop": _five_crop,
    "ten_crop": _ten_crop,
    "resize": _resize,
    "resized_crop": _resized_crop,
    "affine": _affine,
    "rotate": _rotate,
    "perspective": _perspective,
    # Without a kernel of its own, a transform passes an unknown tensor by in silence.
    "elastic": _refuse_elastic,
}
for _name, _kernel in _KERNELS.items():
    F.register_kernel(getattr(F, _name), GeometryTensor)(_kernel)
