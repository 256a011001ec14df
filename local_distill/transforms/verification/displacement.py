"""Says in words in which way the pixels of a view disagree with its geometry."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from local_distill.geometry import invert
from local_distill.structures import CropGeometry
from local_distill.transforms.verification.structured_light import (
    Signals,
    affine_fit,
    apply_affine,
    coherent,
    displacement,
    inner,
    predicted_positions,
    visible,
    wrapped,
)

__all__ = ["Explanation", "explain"]

_EXPLAINED = 0.75  # share of the pixels that must fit
_SAME_SHAPE = 0.03  # largest difference of two linear maps that count as one


class Explanation(NamedTuple):
    """What the pixels of a view show."""

    words: str
    """How that differs from the geometry, such as "mirrored left to right"."""
    shown: Tensor | None
    """(3, 2) affine map, view point (x, y, 1) → source point; None where none fits."""
    median: float
    """Distance between geometry and pixels in source px; NaN where no map fits."""
    largest: float
    """The same at the worst pixel."""


def explain(
    signals: Signals, geometry: CropGeometry, others: Mapping[int, CropGeometry]
) -> Explanation:
    """Find the affine map that the pixels show, and what tells it from the geometry.

    Args:
        signals: what the view tells.
        geometry: the view's, which disagrees.
        others: the geometries of the call's other views by their index, in case the order is
            wrong.
    """
    shown = shown_map(signals, geometry.source_size.tolist())
    if shown is None:
        return Explanation(
            "no affine map explains what the view shows: it is put together from several places, "
            "or its pixels were moved each on their own",
            None,
            math.nan,
            math.nan,
        )
    predicted = predicted_positions(geometry, signals.points)
    places = apply_affine(shown, signals.points)
    error = (places - predicted).norm(dim=-1).flatten()
    distances = wrapped(signals, places)
    rest = displacement(distances, signals.periods)
    good = visible(signals) & coherent(distances, signals.periods)
    uneven = rest[good].norm(dim=-1).median()
    if uneven > error.nanmedian():
        words = "moved unevenly, as by an elastic transform"
        error = (places + rest - predicted)[good].norm(dim=-1)
    else:
        told = _other_origin(signals.points, places, geometry, others)
        words = told or _in_words(shown, signals.points, geometry)
    return Explanation(words, shown, float(error.nanmedian()), float(error.nan_to_num(0.0).max()))


def shown_map(signals: Signals, source_size: Sequence[int]) -> Tensor | None:
    """(3, 2) affine map view → source that the pixels show, from nothing but every pixel."""
    points = signals.points
    seen = visible(signals) & inner(points, *signals.values.shape[-2:])
    if int(seen.sum()) < 64:
        return None
    middle = points[seen].mean(0)
    slopes = _slopes(signals, seen)  # (2, 2): of the source's axis along the view's axis
    places = (points - middle) @ slopes.T  # but for a shift
    shift = _shift(signals, places, seen, source_size)
    shown = torch.cat((slopes.T, (shift - slopes @ middle)[None]))
    good = seen
    for _ in range(4):
        places = apply_affine(shown, points)
        distances = wrapped(signals, places)
        good = seen & coherent(distances, signals.periods)
        if int(good.sum()) < 64:
            return None
        rest = displacement(distances, signals.periods)
        shown = affine_fit(points[good], (places + rest)[good])
    places = apply_affine(shown, points)
    size = torch.tensor([source_size[1], source_size[0]], dtype=torch.float64)
    # what is seen lies in the source, but for some padding that repeats it
    good &= ((places > -0.1 * size) & (places < 1.1 * size)).all(-1)
    return shown if int(good.sum()) >= _EXPLAINED * int(seen.sum()) else None


def _slopes(signals: Signals, seen: Tensor) -> Tensor:
    """How fast the positions change along the view's rows and columns: (2, 2) [source, view]."""
    longest = signals.periods[1]
    slopes = torch.zeros(2, 2, dtype=torch.float64)
    for axis in range(2):
        values = signals.values[axis, 1]
        for along in range(2):
            side = values.shape[1 - along]
            turns, lag = 0.0, 1
            # Twice the lag, twice the precision: tone curves with few steps make the phase jump.
            while lag == 1 or lag <= side // 3:
                first, second = (values.narrow(1 - along, i, side - lag) for i in (0, lag))
                both = seen.narrow(1 - along, 0, side - lag) & seen.narrow(
                    1 - along, lag, side - lag
                )
                found = float(_turn(second * first.conj(), both))
                turns = (found + round(turns * lag - found)) / lag
                lag *= 2
            slopes[axis, along] = turns * longest
    return slopes


def _turn(products: Tensor, keep: Tensor) -> Tensor:
    """The mean angle, in turns."""
    return torch.where(keep, products, 0).sum().angle() / (2 * math.pi)


def _shift(signals: Signals, places: Tensor, seen: Tensor, source_size: Sequence[int]) -> Tensor:
    """(x, y) that is added to ``places``: the one position that suits both periods."""
    found = {}
    for inverted in (False, True):
        values = -signals.values if inverted else signals.values
        shift, misfit = [], 0.0
        for axis in range(2):
            rests = []
            for index, period in enumerate(signals.periods):
                turns = places[..., axis] / period
                back = torch.polar(torch.ones_like(turns), -2 * math.pi * turns)
                rests.append(float(_turn(values[axis, index] * back, seen)) * period)
            side = source_size[1 - axis]
            best = _suits_both(rests, signals.periods, 0.0, side)
            shift.append(best[1])
            misfit += best[0]
        found[inverted] = (misfit, torch.tensor(shift, dtype=torch.float64))
    return min(found.values(), key=lambda pair: pair[0])[1]


def _suits_both(
    rests: Sequence[float], periods: Sequence[float], low: float, high: float
) -> tuple[float, float]:
    """(misfit, position) of the position in [low, high] that leaves these rests."""
    first, second = periods
    best = (math.inf, 0.0)
    for turn in range(
        math.ceil((low - rests[0]) / first), math.floor((high - rests[0]) / first) + 1
    ):
        position = rests[0] + turn * first
        misfit = (position - rests[1]) / second
        best = min(best, (abs(misfit - round(misfit)) * second, position))
    return best


def _other_origin(
    points: Tensor, places: Tensor, geometry: CropGeometry, others: Mapping[int, CropGeometry]
) -> str | None:
    """Whether another geometry than the view's own describes it."""

    def describes(candidate: CropGeometry) -> bool:
        error = (predicted_positions(candidate, points) - places).norm(dim=-1)
        return bool(error.max() < 1.5)  # False for NaN

    for index, other in others.items():
        if torch.equal(other.view_size, geometry.view_size) and describes(other):
            return (
                f"geometry {index} describes this view: views and geometries are in different "
                "orders"
            )
    if describes(invert(geometry)):
        return "the matrix maps source to view: pass its inverse"
    return None


def _in_words(shown: Tensor, points: Tensor, geometry: CropGeometry) -> str:
    height, width = geometry.view_size.tolist()
    predicted = predicted_positions(geometry, points)
    finite = predicted.isfinite().all(-1)
    claimed = affine_fit(points[finite], predicted[finite])
    middle = torch.tensor([width / 2, height / 2], dtype=torch.float64)
    shift = apply_affine(shown, middle) - apply_affine(claimed, middle)
    real, told = shown[:2].T, claimed[:2].T  # columns: along the view's x and y
    in_source = real @ torch.linalg.inv(told)
    in_view = torch.linalg.solve(told, real)
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    if _close(in_source, swap) or _close(in_view, swap):
        return "x and y are swapped"
    words = _linear(in_source, in_view)
    scale = real.norm(dim=0)
    if float(shift.abs().max()) <= (max(0.5, 0.25 * float(scale.max())) if words else 0.0):
        return ", ".join(words)
    source = f"({_number(shift[0])}, {_number(shift[1])}) px in the source"
    if words:
        words.append(f"its middle shifted by {source}")
        return ", ".join(words)
    moved = -torch.linalg.solve(told, shift)
    words.append(
        f"shifted by {source}, which moves the view's content by "
        f"({_number(moved[0])}, {_number(moved[1])}) px in the view"
    )
    half = (scale - 1) / 2
    if _close(shift.abs(), half.abs(), 0.25) and float(half.min()) > 0.75:
        words.append("half a view pixel less half a source pixel: are centres counted as i + 0.5?")
    return ", ".join(words)


def _linear(in_source: Tensor, in_view: Tensor) -> list[str]:
    """What tells the shown map from the told one, but for a shift; nothing where they are alike."""
    off_diagonal = in_view - in_view.diagonal().diag()
    if float(off_diagonal.abs().max()) > _SAME_SHAPE:
        return [_turned(in_view) or _turned(in_source) or _matrix(in_source)]
    words = []
    across, down = in_view.diagonal().tolist()
    if across < 0 and down < 0:
        words.append("turned by 180° (mirrored left to right and top to bottom)")
    elif across < 0:
        words.append("mirrored left to right")
    elif down < 0:
        words.append("mirrored top to bottom")
    if max(abs(abs(across) - 1), abs(abs(down) - 1)) > _SAME_SHAPE:
        words.append(f"scaled by ({abs(across):.2f}, {abs(down):.2f}) along the view's (x, y)")
    return words


def _turned(matrix: Tensor) -> str | None:
    size = float(matrix.det().abs().sqrt())
    turned = matrix / max(size, 1e-12)
    unit = torch.eye(2, dtype=matrix.dtype)
    if float(turned.det()) < 0 or not _close(turned @ turned.T, unit):
        return None
    # What lies further counterclockwise, with y down, is drawn where it was not to be.
    angle = math.degrees(math.atan2(float(matrix[1, 0]), float(matrix[0, 0])))
    way = "counterclockwise" if angle > 0 else "clockwise"
    scaled = f" and scaled by {size:.2f}" if abs(size - 1) > _SAME_SHAPE else ""
    return f"its content turned {way} by {abs(angle):.1f}°{scaled}"


def _matrix(matrix: Tensor) -> str:
    rows = "; ".join(" ".join(f"{value:.3f}" for value in row) for row in matrix.tolist())
    return f"carried on by the linear map [{rows}] in the source"


def _number(value: Tensor) -> str:
    return f"{round(float(value), 1) + 0.0:.1f}"  # + 0.0 turns −0.0 into 0.0


def _close(first: Tensor, second: Tensor, within: float = 0.08) -> bool:
    return bool((first - second).abs().max() < within)
