"""Reads off the pixels of a view where in the source they lie, whatever was done to the colours.

Sinusoids along x and along y, each of two periods and in four phases a quarter turn apart, go
through the pipeline under one seed. Of one period and axis, with the views I₀ … I₃,

    z = (I₀ − I₂) + i·(I₃ − I₁) = 2·gain·exp(2πi·position / period)

so that z's angle tells the position in the source up to whole periods. Every offset, every gain and
the even part of every tone curve drop out. Two periods of irrational ratio leave no second position
that suits both within the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from local_distill._precision import widest
from local_distill.geometry import grid_points, project
from local_distill.structures import CropGeometry, TokenGrid
from local_distill.transforms.images import image_size

__all__ = [
    "Measurement",
    "Signals",
    "affine_fit",
    "apply_affine",
    "blur_width",
    "coherent",
    "displacement",
    "inner",
    "measure",
    "patterns",
    "pixel_centers",
    "predicted_positions",
    "read_signals",
    "visible",
    "wrapped",
]

# Levels of 255: dark enough that brightness and contrast of 1.4 each stay below 128, where
# solarisation begins, and grey, which saturation, hue and greyscale leave alone.
_GREY, _SWING = 56.0, 24.0
# The golden section is worst of all approximated by fractions, which keeps the places where both
# periods come round again as far apart as can be.
_PERIOD_RATIO = (5 - math.sqrt(5)) / 2
# A tenth of the image: a local view of a twentieth of the area still shows two periods, without
# which contrast and equalisation, which look at the whole view, would not treat all phases alike.
_PERIODS_PER_IMAGE = 10
_LEAST_PERIOD = 12.0
_WEAK = 0.25  # of the view's strong pixels: below, a pixel is filled or erased rather than dim
_BORDER = 0.05  # of the view's side: blurs mix in what they take to lie outside the view
_FLAT = 0.2  # a view of a tenth of a period, 3 px of the source, would vary by as much
# Noise alone gives 1 on average. A wave whose lower half is cut off, by contrast, gives 1.7.
_CLEAR = 1.4
_BLUR_REACH = 2.0  # standard deviations
_DROWNED = 0.1  # the short wave beside the long one: below, rounding and reflections outdo it
_COHERENT = 0.2  # of a period: further out, a pixel shows another place
# Of the long period: where pixels seem to agree only because a displacement is about a number of
# whole or half periods, the two periods contradict each other by more. Right recipes make it 0.02
# at most, harsh ones 0.09 (400 seeds). What suits both periods even so, as 105 px do at 224 × 301,
# does not at the other size that `assert_tracks` sends.
_CONTRADICTION = 0.12
_TURNED = 0.75  # of the pixels: where so many fit with the short wave turned over, it is turned
_SAMPLES = 64  # along each side of the view


class Signals(NamedTuple):
    """What one view tells: four complex images, the order being (axis, period)."""

    values: Tensor
    """(2, 2, h, w) complex128: axis (x, y), then period."""
    noise: Tensor
    """(2, 2) root mean square of the parts that a sinusoid would not leave."""
    points: Tensor
    """(h, w, 2) centres (x, y) of the pixels in the view."""
    periods: tuple[float, float]
    """In source px."""


class Measurement(NamedTuple):
    """How far a view's pixels lie from where its geometry puts them, in source px."""

    inside: int
    """Pixels looked at that the geometry puts inside the source."""
    judged: int
    """Those of them that show the patterns."""
    agreeing: float
    """Share of the judged that lie within a fifth of both periods."""
    median: float
    """Distance between geometry and pixels, by the affine map that fits the pixels best."""
    largest: float
    """The same at the worst pixel."""
    scattered: float
    """Median distance of single pixels, less how far the two periods contradict each other."""
    scale: float
    """Source px per view px, the larger of the two directions."""


def _periods(height: int, width: int) -> tuple[float, float]:
    first = max(_LEAST_PERIOD, math.sqrt(height * width) / _PERIODS_PER_IMAGE)
    return first, first * _PERIOD_RATIO


def patterns(height: int, width: int) -> list[Tensor]:
    """The 16 images to send: (height, width) float32 levels of 255."""
    images = []
    for axis, side in ((1, width), (0, height)):
        position = (torch.arange(side, dtype=torch.float64) + 0.5).unsqueeze(1 - axis)
        for period in _periods(height, width):
            for quarter in range(4):
                wave = torch.cos(2 * math.pi * (position / period + quarter / 4))
                levels = (_GREY + _SWING * wave).expand(height, width)
                images.append(levels.to(torch.float32).contiguous())
    return images


def read_signals(
    views: Sequence[Any], source_size: tuple[int, int], *, every_pixel: bool = False
) -> Signals:
    """What one view of each of the 16 `patterns` tells together.

    Args:
        views: PIL images or (channels, h, w) tensors of any range, in the order of `patterns`.
        source_size: (height, width) of the patterns.
        every_pixel: or else some 64 along each side, which are enough to judge by.
    """
    height, width = image_size(views[0])
    rows, cols = (1 if every_pixel else math.ceil(side / _SAMPLES) for side in (height, width))
    grey = torch.stack([_grey(view, rows, cols) for view in views])
    steps = grey.reshape(2, 2, 4, *grey.shape[1:]).unbind(2)
    values = torch.complex(steps[0] - steps[2], steps[3] - steps[1])
    noise = (steps[0] + steps[2] - steps[1] - steps[3]).flatten(2).std(-1)
    for axis in range(2):
        for period in range(2):
            values[axis, period] -= _common_offset(values[axis, period])
    points = pixel_centers(height, width)[::rows, ::cols]
    return Signals(values, noise, points, _periods(*source_size))


def _grey(view: Any, rows: int, cols: int) -> Tensor:
    tensor = F.pil_to_tensor(view) if isinstance(view, PIL.Image.Image) else view.detach()
    sampled = tensor.as_subclass(Tensor)[:, ::rows, ::cols]
    grey: Tensor = sampled.to("cpu", torch.float64).mean(0)
    return grey.nan_to_num(0.0, 0.0, 0.0)


def _common_offset(values: Tensor) -> Tensor:
    """The centre of the circle on which the values lie.

    Contrast adds to each image a share of its own mean, and the means of the four differ where the
    view shows a broken number of periods: that moves all values alike.
    """
    strong = values[_strong(values)]
    if len(strong) < 16:
        return torch.zeros((), dtype=values.dtype)
    mean = strong.mean()
    if float(strong.std()) < _FLAT * float(mean.abs()):
        return mean  # hardly a wave any more, after a blur wider than the period
    none = torch.zeros((), dtype=values.dtype)
    if _one_sided(strong):
        return none  # an arc too short to tell its centre
    sides = torch.stack((strong.real, strong.imag, torch.ones_like(strong.real)), 1)
    squares = strong.real.square() + strong.imag.square()
    x, y, _ = torch.linalg.lstsq(sides, squares[:, None], driver="gelsd").solution[:, 0] / 2
    center = torch.complex(x, y)
    # A wave that a blur weakened here more than there is no circle: what fits it best may be a wide
    # one that passes beside all of its turns.
    return none if _one_sided(strong - center) else center


def _one_sided(values: Tensor) -> bool:
    """Whether complex values mostly lie in one direction from 0."""
    return float((values / values.abs().clamp_min(1e-12)).mean().abs()) > 0.5


def _strong(values: Tensor) -> Tensor:
    """(h, w) bool: pixels that show the pattern clearly, by the view's own measure."""
    size = values.abs()
    usual = size.flatten().quantile(0.9)
    return (size > _WEAK * usual) & (usual > 1e-6)


def pixel_centers(height: int, width: int) -> Tensor:
    """(height, width, 2) float64 centres (x, y) of a view's pixels."""
    pixels = TokenGrid(height, width, stride=(1, 1), offset=(0.5, 0.5))
    points = grid_points(pixels, torch.device("cpu"), torch.float64)
    return points.reshape(height, width, 2)


def predicted_positions(geometry: CropGeometry, points: Tensor) -> Tensor:
    """(h, w, 2) float64 source positions of view points (h, w, 2); NaN beyond a horizon."""
    return project(widest(geometry.matrix), points.reshape(-1, 2)).reshape(points.shape)


def affine_fit(points: Tensor, values: Tensor) -> Tensor:
    """(3, k) coefficients of the affine map that takes points (n, 2) to values (n, k)."""
    sides = torch.cat((points, torch.ones_like(points[:, :1])), 1)
    coefficients: Tensor = torch.linalg.lstsq(sides, values, driver="gelsd").solution
    return coefficients


def apply_affine(coefficients: Tensor, points: Tensor) -> Tensor:
    """The affine map (3, k) at points (…, 2)."""
    return points @ coefficients[:2] + coefficients[2]


def wrapped(signals: Signals, positions: Tensor) -> Tensor:
    """How far each pixel lies from ``positions`` (h, w, 2), up to whole periods: (2, 2, h, w) px.

    A tone curve that falls turns all four signals by half a turn, which is undone here. So does a
    displacement by about half of both periods along both axes, but then the two disagree.
    """
    periods = torch.tensor(signals.periods, dtype=torch.float64)[:, None, None]
    expected = positions.movedim(-1, 0)[:, None] / periods  # (axis, period, h, w) in turns
    rest = signals.values * torch.polar(torch.ones_like(expected), -2 * math.pi * expected)
    inverted = (rest / rest.abs().clamp_min(1e-12)).real.sum((0, 1)) < 0
    rest = torch.where(inverted, -rest, rest)
    return rest.angle() / (2 * math.pi) * periods


def coherent(distances: Tensor, periods: Sequence[float]) -> Tensor:
    """(h, w) bool: both periods and axes say that the pixel lies near where it was expected."""
    reach = _COHERENT * torch.tensor(periods, dtype=torch.float64)[:, None, None]
    return (distances.abs() < reach).all(0).all(0)


def displacement(distances: Tensor, periods: Sequence[float]) -> Tensor:
    """(h, w, 2) source px: both periods' `wrapped` distances in one."""
    # the same error of a phase is a distance in proportion to the period
    weights = torch.tensor(periods, dtype=torch.float64)[:, None, None] ** -2
    return ((distances * weights).sum(1) / weights.sum()).movedim(0, -1)


def visible(signals: Signals) -> Tensor:
    """(h, w) bool: all four signals are there, and no mere rounding or noise."""
    strong = torch.stack([_strong(signal) for pair in signals.values for signal in pair])
    clear = signals.values.abs() > _CLEAR * signals.noise[:, :, None, None]
    return strong.all(0) & clear.all(0).all(0)


def inner(points: Tensor, height: int, width: int, blur: float = 0.0) -> Tensor:
    """(h, w) bool: view points that a blur of ``blur`` view px leaves clear of the border."""
    size = torch.tensor([width, height], dtype=points.dtype)
    edge = (_BORDER * size).clamp_min(_BLUR_REACH * blur).round()
    return ((points > edge) & (points < size - edge)).all(-1)


def blur_width(signals: Signals, seen: Tensor) -> float:
    """Standard deviation in source px of the blur that the view went through; infinite if too much.

    A Gaussian weakens a wave by exp(−2π²·σ²/period²): the shorter of the two by more.
    """
    if not bool(seen.any()):
        return math.inf
    short, long = signals.values[:, :, seen].abs().median(-1).values.unbind(1)
    weakened = float((short / long).min())
    if weakened < _DROWNED:
        return math.inf
    first, second = signals.periods
    return math.sqrt(max(0.0, -math.log(weakened)) / (first**-2 - second**-2) / 2) / math.pi


def measure(signals: Signals, geometry: CropGeometry) -> Measurement:
    """Compare what a view's pixels tell with its geometry."""
    height, width = geometry.view_size.tolist()
    positions = predicted_positions(geometry, signals.points)
    scale = _scale(geometry)
    source_height, source_width = geometry.source_size.tolist()
    margin = 2 * max(1.0, scale)  # a bicubic filter's reach
    limit = torch.tensor([source_width, source_height], dtype=torch.float64)
    within = ((positions > margin) & (positions < limit - margin)).all(-1)
    within &= inner(signals.points, height, width)
    seen = within & visible(signals)
    judged = seen & inner(signals.points, height, width, blur_width(signals, seen) / scale)
    distances = wrapped(signals, positions)
    agree = judged & coherent(distances, signals.periods)
    inside, count, agreeing = int(within.sum()), int(judged.sum()), int(agree.sum())
    if _short_wave_is_turned(signals, positions, judged, agreeing):
        count = 0
    elif agreeing and _offset_of_periods(distances, agree) > _CONTRADICTION * signals.periods[1]:
        agreeing = 0
    nan = math.nan
    if agreeing < 8 or count == 0:
        return Measurement(inside, count, agreeing / max(count, 1), nan, nan, nan, scale)
    both = displacement(distances, signals.periods)
    fit = affine_fit(signals.points[agree], both[agree])
    error = apply_affine(fit, signals.points[within]).norm(dim=-1)
    contradiction = (distances[:, 0] - distances[:, 1]).norm(dim=0)[agree]
    scattered = float(both[agree].norm(dim=-1).median() - contradiction.median())
    return Measurement(
        inside,
        count,
        agreeing / count,
        float(error.median()),
        float(error.max()),
        scattered,
        scale,
    )


def _offset_of_periods(distances: Tensor, chosen: Tensor) -> float:
    """By how much the two periods disagree all over the view, source px.

    Single pixels may disagree by more: a tone curve that folds the waves over bends both unevenly.
    """
    apart = (distances[:, 0] - distances[:, 1])[:, chosen]
    return float(apart.median(-1).values.norm())


def _short_wave_is_turned(
    signals: Signals, positions: Tensor, judged: Tensor, agreeing: int
) -> bool:
    """Whether a blur explains what the geometry seems to get wrong.

    A Gaussian that is cut off at a few pixels, in a view that is much reduced, acts as a box wider
    than the short period: that wave comes out weak and turned over by half a period, and the long
    one does not. No displacement within the image does that to both of the sizes that are sent.
    """
    count = int(judged.sum())
    if agreeing >= _TURNED * count:
        return False
    for axes in ([0], [1], [0, 1]):
        values = signals.values.clone()
        values[axes, 0] *= -1
        distances = wrapped(signals._replace(values=values), positions)
        if int((judged & coherent(distances, signals.periods)).sum()) >= _TURNED * count:
            return True
    return False


def _scale(geometry: CropGeometry) -> float:
    """Source px per view px at the view's middle."""
    height, width = geometry.view_size.tolist()
    middle = torch.tensor([[width / 2, height / 2]], dtype=torch.float64)
    steps = torch.cat((middle, middle + torch.eye(2, dtype=torch.float64)))
    positions = project(widest(geometry.matrix), steps)
    return float((positions[1:] - positions[0]).norm(dim=-1).max().nan_to_num(1.0))
