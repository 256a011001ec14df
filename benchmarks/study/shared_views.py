"""Views drawn once for all variants: they are a function of seed, epoch and image alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from local_distill.structures import CropGeometry

__all__ = ["SharedViews"]


class SharedViews:
    """Remembers the views of every sample, so that the next run gets the same without the work.

    The trainer sets torch's seed anew for every sample, from the run's seed, the epoch and the
    image's number; that seed is the name under which views are kept. Of use for the images and the
    seed of one run: another set of images needs another instance. Pixels are kept in float16, and
    the first run gets what was kept as well, so that all runs see the same.

    Args:
        views: image → (views, geometries).
        most: keep those of so many samples; what comes after is drawn anew each time.
    """

    def __init__(
        self, views: Callable[[Any], tuple[list[Tensor], list[CropGeometry]]], most: int
    ) -> None:
        self.views, self.most = views, most
        self._kept: dict[int, tuple[list[Tensor], list[CropGeometry]]] = {}

    def __call__(self, image: Any) -> tuple[Sequence[Tensor], Sequence[CropGeometry]]:
        """The views of the sample whose seed was just set."""
        name = torch.initial_seed()
        sample = self._kept.get(name)
        if sample is None:
            views, geometries = self.views(image)
            sample = [view.half() for view in views], geometries
            if len(self._kept) < self.most:
                self._kept[name] = sample
        views, geometries = sample
        return [view.float() for view in views], geometries
