"""How far a run is, which is all that schedules look at."""

from __future__ import annotations

import math
from typing import NamedTuple

from local_distill import schedules

__all__ = ["Progress"]


class Progress(NamedTuple):
    """One step's place in a run.

    Attributes:
        step: optimiser steps done before this one.
        total: steps of the whole run.
        unit: steps of one unit of a duration: those of an epoch, or 1.
        epoch: epochs of data seen before this step.

    Example:
        >>> now = Progress(step=30, total=100, unit=10, epoch=3.0)
        >>> now.linear(0.0, 1.0, over=6.0)  # half of six epochs of ten steps
        0.5
    """

    step: int
    total: int
    unit: float = 1.0
    epoch: float = 0.0

    def linear(self, start: float, end: float, *, over: float) -> float:
        """From ``start`` to ``end`` over a duration, then ``end``."""
        return schedules.linear(self.step, start=start, end=end, total=over * self.unit)

    def stairs(self, start: float, end: float, *, over: float) -> float:
        """Like `linear`, in whole units: the first has ``start``, the last of ``over`` has ``end``.

        Example:
            >>> at = lambda step: Progress(step, total=100, unit=10).stairs(0.0, 1.0, over=3)
            >>> [at(step) for step in (0, 9, 10, 19, 20, 99)]
            [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
        """
        # A step that begins a unit must not fall before it for the last bit of a division.
        units = math.floor(self.step / self.unit + 1e-9)
        if units >= over:
            return end
        return schedules.linear(units, start=start, end=end, total=over - 1) if over > 1 else start

    def cosine(self, start: float, end: float) -> float:
        """From ``start`` to ``end`` along half a cosine over the whole run."""
        return schedules.cosine(self.step, start=start, end=end, total=self.total)

    def warmup_cosine(self, peak: float, end: float, *, warmup: float) -> float:
        """From 0 to ``peak`` over a duration, at most the run's, then along a cosine to ``end``."""
        return schedules.warmup_cosine(
            self.step,
            peak=peak,
            end=end,
            warmup=min(warmup * self.unit, self.total),
            total=self.total,
        )

    def within(self, duration: float) -> bool:
        """Whether a duration from the start has not yet passed."""
        return self.step < duration * self.unit
