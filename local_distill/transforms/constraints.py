"""Crop boxes that share a least part of their area, in a bounded number of attempts.

Plain numbers throughout, as in `crop_boxes`: the boxes are settled before any pixel is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from local_distill._check import check_at_least, check_fraction
from local_distill.errors import ConfigError
from local_distill.transforms.crop_boxes import CropBox

__all__ = ["BoxConstraints", "DrawnBoxes", "constrain_boxes", "shared_pixels"]

_STEPS = 16  # on each leg of a repair's way


class DrawnBoxes(NamedTuple):
    """The boxes of one image's views, and what they took.

    Attributes:
        boxes: one per view.
        attempts: places tried per view, 1 where the first was good, never above 1 + max_retries.
        repaired: per view, whether no attempt was good, so that the best was moved or shrunk.
    """

    boxes: list[CropBox]
    attempts: list[int]
    repaired: list[bool]


class BoxConstraints(NamedTuple):
    """How much the views of an image have to share; see `MultiCrop` for each."""

    min_overlap: float = 0.0
    overlap_with: Literal["any", "all"] = "any"
    min_global_overlap: float = 0.0
    max_retries: int = 20

    def check(
        self,
        global_scales: Sequence[tuple[float, float]],
        local_scales: Sequence[tuple[float, float]],
    ) -> BoxConstraints:
        """Refuse constraints that no boxes of these scales can meet.

        Raises:
            ConfigError: a setting that cannot be, or that cannot be met.
        """
        check_fraction("min_overlap", self.min_overlap)
        check_fraction("min_global_overlap", self.min_global_overlap)
        check_at_least("max_retries", self.max_retries, 0)
        if self.overlap_with not in ("any", "all"):
            raise ConfigError(f"`overlap_with` must be 'any' or 'all', got {self.overlap_with!r}")
        every = self.overlap_with == "all"
        if self.min_overlap == 0 or not local_scales:
            return self
        if every and len(global_scales) > 1 and self.min_global_overlap == 0:
            raise ConfigError(
                "`overlap_with='all'` needs global views that overlap each other, which nothing "
                "makes sure of: set `min_global_overlap` above 0, or use overlap_with='any'"
            )
        largest = [scale[1] for scale in global_scales]
        reach = min(largest) if every else max(largest)
        for low, high in local_scales:
            if self.min_overlap * low > reach:
                raise ConfigError(
                    f"no local view of scale ({low:g}, {high:g}) can have {self.min_overlap:g} of "
                    f"its area in a global view, which shows at most {reach:g} of the image: "
                    "lower the local scale or the overlap, or raise the global scale"
                )
        return self

    def extra_draws(self, num_global: int, num_local: int) -> int:
        """Uniform numbers that the retries of one image may need, beyond the boxes' own."""
        constrained = (num_global - 1 if self.min_global_overlap else 0) + (
            num_local if self.min_overlap else 0
        )
        return 2 * self.max_retries * constrained


class _Demand(NamedTuple):
    """Share at least ``share`` with each of ``others``, or with one of them."""

    others: Sequence[CropBox]
    share: float
    every: bool
    of_smaller: bool  # of the smaller box's area, not of the own

    def base(self, box: CropBox, other: CropBox) -> int:
        own = box.height * box.width
        return min(own, other.height * other.width) if self.of_smaller else own

    def shares(self, box: CropBox) -> list[float]:
        return [shared_pixels(box, other) / self.base(box, other) for other in self.others]

    def score(self, box: CropBox) -> float:
        return min(self.shares(box)) if self.every else max(self.shares(box))

    def holds(self, box: CropBox) -> bool:
        return self.score(box) >= self.share

    def region(self, box: CropBox) -> CropBox:
        """Where a box has its whole area shared: what a repair heads for."""
        if self.every:
            return _common(self.others)
        shares = self.shares(box)
        return self.others[shares.index(max(shares))]


def constrain_boxes(
    boxes: Sequence[CropBox],
    num_global: int,
    source_size: tuple[int, int],
    constraints: BoxConstraints,
    draws: Iterator[float],
) -> DrawnBoxes:
    """Move boxes until they share what they have to.

    A box that meets its constraint stays as it is. Otherwise its place is drawn again, uniformly
    over the smallest rectangle of places that holds all the good ones, at most ``max_retries``
    times; its size is not, so that a constraint does not favour small views. Where all attempts
    fail, the best of them slides towards the global view just as far as it takes, and shrinks in
    its proportions only where its size is the obstacle. So the constraint always holds, each global
    view being settled before the next.

    Args:
        boxes: as drawn without constraints, global views first; flips are kept.
        num_global: how many of them are global views.
        source_size: (height, width) in pixels.
        constraints: what to keep to.
        draws: uniform numbers in [0, 1); at most ``constraints.extra_draws`` are taken.

    Returns:
        `DrawnBoxes`.

    Example:
        >>> whole, corner = CropBox(0, 0, 10, 10), CropBox(20, 20, 4, 4)
        >>> inside = BoxConstraints(min_overlap=1.0)
        >>> constrain_boxes([whole, corner], 1, (30, 30), inside, iter([0.0, 0.999])).boxes[1]
        CropBox(top=0, left=6, height=4, width=4, hflip=False, vflip=False)
        >>> never = inside._replace(max_retries=0)
        >>> constrain_boxes([whole, corner], 1, (30, 30), never, iter([])).boxes[1]
        CropBox(top=6, left=6, height=4, width=4, hflip=False, vflip=False)
    """
    settled: list[CropBox] = []
    attempts, repaired = [], []
    for index, box in enumerate(boxes):
        if index < num_global:
            demand = _Demand(settled[:index], constraints.min_global_overlap, True, True)
        else:
            every = constraints.overlap_with == "all"
            demand = _Demand(settled[:num_global], constraints.min_overlap, every, False)
        tried, mended = 1, False
        if demand.share > 0 and demand.others and not demand.holds(box):
            box, tried, mended = _settle(box, demand, source_size, constraints.max_retries, draws)
        settled.append(box)
        attempts.append(tried)
        repaired.append(mended)
    return DrawnBoxes(settled, attempts, repaired)


def shared_pixels(a: CropBox, b: CropBox) -> int:
    """The number of pixels that lie in both boxes.

    Example:
        >>> shared_pixels(CropBox(0, 0, 4, 6), CropBox(3, 4, 9, 9))
        2
    """
    height = min(a.top + a.height, b.top + b.height) - max(a.top, b.top)
    width = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
    return max(0, height) * max(0, width)


def _settle(
    box: CropBox,
    demand: _Demand,
    source_size: tuple[int, int],
    max_retries: int,
    draws: Iterator[float],
) -> tuple[CropBox, int, bool]:
    """A box in place of one that fails: the box, the attempts it took, whether it was repaired."""
    best, best_score, attempts = box, demand.score(box), 1
    places = _places(box, demand, source_size)
    if places is not None:
        top, bottom, left, right = places
        for _ in range(max_retries):
            attempts += 1
            tried = box._replace(
                top=top + int(next(draws) * (bottom - top + 1)),
                left=left + int(next(draws) * (right - left + 1)),
            )
            score = demand.score(tried)
            if score >= demand.share:
                return tried, attempts, False
            if score > best_score:
                best, best_score = tried, score
    return _repair(best, demand.region(best), demand.holds), attempts, True


def _places(
    box: CropBox, demand: _Demand, source_size: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """First and last top, first and last left where the demand may hold; None where nowhere.

    An overlap of a pixels needs a / (the most rows two boxes can share) columns, and so bounds how
    far apart the boxes may lie.
    """
    reaches = []
    for other in demand.others:
        area = demand.share * demand.base(box, other)
        rows = area / min(box.width, other.width)
        cols = area / min(box.height, other.height)
        reaches.append(
            (
                *_reach(box.height, other.top, other.height, rows, source_size[0]),
                *_reach(box.width, other.left, other.width, cols, source_size[1]),
            )
        )
    if demand.every:
        tops, bottoms, lefts, rights = zip(*reaches, strict=True)
        places = max(tops), min(bottoms), max(lefts), min(rights)
        return places if places[0] <= places[1] and places[2] <= places[3] else None
    good = [r for r in reaches if r[0] <= r[1] and r[2] <= r[3]]
    if not good:
        return None
    tops, bottoms, lefts, rights = zip(*good, strict=True)
    return min(tops), max(bottoms), min(lefts), max(rights)


def _reach(length: int, start: int, size: int, needed: float, limit: int) -> tuple[int, int]:
    """First and last place where ``length`` pixels share ``needed`` with [start, start + size)."""
    if needed > min(length, size) + 1e-9:
        return 1, 0
    shared = math.ceil(needed - 1e-9)
    return max(0, start + shared - length), min(limit - length, start + size - shared)


def _repair(box: CropBox, region: CropBox, holds: Callable[[CropBox], bool]) -> CropBox:
    """The first box that holds on the way into ``region``: sliding first, then shrinking."""
    moved = box._replace(
        top=_slide(box.top, box.height, region.top, region.height),
        left=_slide(box.left, box.width, region.left, region.width),
    )
    # In its proportions, and around its middle as far as the region lets it.
    height = max(1, min(box.height, region.height, box.height * region.width // box.width))
    width = max(1, min(box.width, region.width, box.width * region.height // box.height))
    shrunk = box._replace(
        top=_slide(moved.top + (box.height - height) // 2, height, region.top, region.height),
        left=_slide(moved.left + (box.width - width) // 2, width, region.left, region.width),
        height=height,
        width=width,
    )
    # The way ends inside the region, where everything is shared: there is always a first.
    return next(
        candidate
        for start, goal in ((box, moved), (moved, shrunk))
        for step in range(1, _STEPS + 1)
        if holds(candidate := _between(start, goal, step))
    )


def _slide(start: int, length: int, region_start: int, region_length: int) -> int:
    """The nearest place where the one interval lies in the other, whichever is longer."""
    low, high = sorted((region_start, region_start + region_length - length))
    return min(max(start, low), high)


def _between(a: CropBox, b: CropBox, step: int) -> CropBox:
    """``step`` of ``_STEPS`` of the way; edges are rounded, so that it stays in the source."""

    def edge(start: int, end: int) -> int:
        return (2 * (start * (_STEPS - step) + end * step) + _STEPS) // (2 * _STEPS)

    top, left = edge(a.top, b.top), edge(a.left, b.left)
    bottom = edge(a.top + a.height, b.top + b.height)
    right = edge(a.left + a.width, b.left + b.width)
    return a._replace(top=top, left=left, height=bottom - top, width=right - left)


def _common(boxes: Sequence[CropBox]) -> CropBox:
    """What all boxes share; boxes that overlap pairwise always share something."""
    top, left = max(box.top for box in boxes), max(box.left for box in boxes)
    bottom = min(box.top + box.height for box in boxes)
    right = min(box.left + box.width for box in boxes)
    return CropBox(top, left, bottom - top, right - left)
