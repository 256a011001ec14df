"""Calls a pipeline again and again with the same random numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from local_distill.errors import ConfigError
from local_distill.structures import CropGeometry
from local_distill.transforms.generators import seed_generators

__all__ = ["RepeatedCalls"]

Output = tuple[list[Any], list[CropGeometry]]


class RepeatedCalls:
    """A pipeline that gives the same for the same seed, by copies of it if need be.

    Attributes:
        copies: whether each call of a seed gets a copy.
    """

    def __init__(self, pipeline: Callable[..., Any]) -> None:
        self._pipeline = pipeline
        self.copies = False
        self._snapshot: Any = None

    def copy_from_now_on(self) -> bool:
        """Let each call of a seed start from the same state of the pipeline; whether that works."""
        try:
            copy.deepcopy(self._pipeline)
        except Exception:  # whatever a user's class raises, it can't be copied
            return False
        self.copies = True
        return True

    def __call__(self, images: Sequence[Any], seed: int) -> list[Output]:
        """The views and geometries of several images under one seed."""
        if self.copies:
            self._snapshot = copy.deepcopy(self._pipeline)
        outputs = []
        for index, image in enumerate(images):
            # the first call is the pipeline's own, so that its state goes on from seed to seed
            pipeline = copy.deepcopy(self._snapshot) if self.copies and index else self._pipeline
            seed_generators(seed)
            outputs.append(_views_and_geometries(pipeline(image)))
        return outputs

    def again(self, image: Any, seed: int) -> Output:
        """One more call under the last seed."""
        seed_generators(seed)
        pipeline = copy.deepcopy(self._snapshot) if self.copies else self._pipeline
        return _views_and_geometries(pipeline(image))


def _views_and_geometries(output: Any) -> Output:
    if isinstance(output, (tuple, list)) and len(output) == 2:
        views, geometries = output
        if isinstance(geometries, CropGeometry):
            return [views], [geometries]
        if (
            isinstance(views, (tuple, list))
            and isinstance(geometries, (tuple, list))
            and len(views) == len(geometries) > 0
            and all(isinstance(geometry, CropGeometry) for geometry in geometries)
        ):
            return list(views), list(geometries)
    raise ConfigError(
        "`pipeline` must be image → (view, CropGeometry) or image → (list of views, list of as "
        f"many CropGeometry), got {_describe(output)}; a torchvision v2 pipeline is tracked as it "
        "is, a callable of your own returns both"
    )


def _describe(output: Any) -> str:
    if isinstance(output, (tuple, list)) and not isinstance(output, CropGeometry):
        parts = ", ".join(
            f"{len(part)} × {type(part[0]).__name__}"
            if isinstance(part, (tuple, list)) and part and not isinstance(part, CropGeometry)
            else type(part).__name__
            for part in output
        )
        return f"a {type(output).__name__} of ({parts})"
    return f"a {type(output).__name__}"
