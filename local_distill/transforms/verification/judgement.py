"""When a view's pixels count as where its geometry says, and the sums over all seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from local_distill.errors import GeometryError
from local_distill.transforms.verification.structured_light import Measurement

__all__ = ["Totals", "TrackingError", "TrackingReport", "agrees", "limit_of", "report"]

# Source px, and source px per (source px per view px). Well above what correct recipes show
# (benchmarks/false_alarms.py), and less than the error of (scale − 1) / 2 that counting from pixel
# centres makes in views reduced more than 3.2-fold.
_TOLERANCE, _TOLERANCE_PER_SCALE = 0.75, 0.1
_LEAST_AGREEING = 0.75  # of a view's judged pixels
_LEAST_JUDGED = 0.05  # of all seeds' pixels that should show the source
_LEAST_SEEN = 0.25  # of one view's: less may be what a far too strong blur leaves at the border
_FEWEST = 64  # pixels from which a view can be judged


class TrackingError(GeometryError, AssertionError):
    """A pipeline whose geometry does not say where its pixels lie, or can't be shown to.

    It is an ``AssertionError`` as well, so that test runners report a failure, not an error.
    """


class TrackingReport(NamedTuple):
    """What `assert_tracks` looked at, and how close it came."""

    seeds: int
    """Seeds that were sent."""
    kinds: tuple[str, ...]
    """Kinds of image that the pipeline took."""
    views: int
    """Views that were judged, over all seeds."""
    judged: float
    """Share of the pixels inside the source that could be judged."""
    largest_median: float
    """Largest median error of a view, source px."""
    largest: float
    """Largest error of the fitted position of any pixel, source px."""


class Totals:
    """Sums over the seeds, per view."""

    def __init__(self) -> None:
        self.inside: list[int] = []
        self.judged: list[int] = []
        self.views = 0
        self.largest_median = 0.0
        self.largest = 0.0

    def add(self, index: int, found: Measurement) -> None:
        """Take in one view of one seed."""
        for counts in (self.inside, self.judged):
            counts.extend([0] * (index + 1 - len(counts)))
        self.inside[index] += found.inside
        if not can_be_judged(found):
            return
        self.judged[index] += found.judged
        self.views += 1
        self.largest_median = max(self.largest_median, found.median)
        self.largest = max(self.largest, found.largest)


def can_be_judged(found: Measurement) -> bool:
    """Whether enough pixels show the patterns."""
    return found.judged >= max(_FEWEST, _LEAST_SEEN * found.inside)


def agrees(found: Measurement, tolerance: float | None) -> bool:
    """Whether a view lies where its geometry says, as far as that can be told."""
    if not can_be_judged(found):
        return True  # nothing is said about it; `report` sees to it that this is no habit
    limit = limit_of(found, tolerance)
    return (
        found.agreeing >= _LEAST_AGREEING
        and found.median <= limit
        and found.largest <= 2 * limit
        and found.scattered <= limit
    )


def limit_of(found: Measurement, tolerance: float | None) -> float:
    """What a view's median error may be, source px; its worst pixel's, twice that."""
    return _TOLERANCE + _TOLERANCE_PER_SCALE * found.scale if tolerance is None else tolerance


def report(totals: Totals, seeds: int, kinds: Sequence[str]) -> TrackingReport:
    """The sums, unless there is a view about which they say nothing.

    Raises:
        TrackingError: naming the view and why: a check that checked nothing must not pass.
    """
    for index, (inside, judged) in enumerate(zip(totals.inside, totals.judged, strict=True)):
        if judged >= max(_FEWEST, _LEAST_JUDGED * inside):
            continue
        name = f"view {index}" if len(totals.inside) > 1 else "the view"
        reason = (
            f"its geometry puts only {inside} of the pixels looked at inside the source, clear of "
            "its border"
            if inside < _FEWEST
            else f"only {judged} of {inside} pixels showed the patterns that were sent"
        )
        raise TrackingError(
            f"nothing can be said about {name}: {reason}, over {seeds} seeds. Is it larger than "
            "10 px, and does it show the image? Try larger `sizes`, or a pipeline with less blur "
            "and fill"
        )
    share = sum(totals.judged) / sum(totals.inside)
    return TrackingReport(
        seeds, tuple(kinds), totals.views, share, totals.largest_median, totals.largest
    )
