"""What `assert_tracks` sends: which seeds, of which sizes and kinds, and to what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from local_distill._check import check_at_least
from local_distill.errors import ConfigError
from local_distill.transforms.tracking import Tracked, track
from local_distill.transforms.verification.repeated_calls import RepeatedCalls
from local_distill.transforms.verification.structured_light import patterns

__all__ = ["KINDS", "Case", "check_seeds", "check_sizes", "with_geometry"]

KINDS: dict[str, Callable[[Tensor], Any]] = {
    "pil": lambda levels: F.to_pil_image(_rounded(levels)),
    "tensor": lambda levels: _rounded(levels),
    "float": lambda levels: levels.to(torch.float32) / 255,
}
"""Kinds of image, made of (3, height, width) levels of 255."""


def _rounded(levels: Tensor) -> Tensor:
    return levels.round().to(torch.uint8)


class Case(NamedTuple):
    """One seed with the image that it gets."""

    seed: int
    size: tuple[int, int]
    kind: str

    def __str__(self) -> str:
        names = {"pil": "a PIL image", "tensor": "a uint8 tensor", "float": "a float tensor"}
        return f"seed {self.seed}, {names[self.kind]} of (height, width) = {self.size}"

    def image(self, levels: Tensor) -> Any:
        """(channels, height, width) levels of 255 as an RGB image of this kind."""
        return KINDS[self.kind](levels.expand(3, -1, -1).contiguous())

    def pattern_images(self) -> list[Any]:
        """The `patterns` as images of this kind."""
        return [self.image(pattern[None]) for pattern in patterns(*self.size)]


def with_geometry(
    pipeline: Callable[..., Any], trust: Iterable[Any], size: tuple[int, int]
) -> Callable[..., Any]:
    """The pipeline itself where it returns geometry, or else `track` of it."""
    trusted = list(trust)
    if isinstance(pipeline, Tracked):
        return pipeline
    if not callable(pipeline) or isinstance(pipeline, type):
        raise ConfigError(
            f"`pipeline` must be a callable such as an instance of a transform, got {pipeline!r}"
        )
    ours = type(pipeline).__module__.startswith("torchvision.transforms.v2")
    if not (trusted or ours or type(pipeline) is nn.Sequential):
        return pipeline
    try:
        return track(pipeline, trust=trusted)
    except ConfigError:
        # a container of v2 may end in a transform of the user's that returns the geometry
        if _returns_geometry(pipeline, size):
            return pipeline
        raise


def _returns_geometry(pipeline: Callable[..., Any], size: tuple[int, int]) -> bool:
    """Whether the pipeline gives views with geometry for any kind of image."""
    calls = RepeatedCalls(pipeline)
    for kind in KINDS:
        try:
            calls(Case(0, size, kind).pattern_images()[:1], 0)
        except Exception:  # any exception may be how a pipeline refuses a kind: try the next
            continue
        return True
    return False


def check_seeds(seeds: int | Iterable[int]) -> list[int]:
    """The seeds' numbers, from how many or which."""
    numbers = (
        list(range(check_at_least("seeds", seeds, 1)))
        if isinstance(seeds, int)
        else [check_at_least("seeds", seed, 0) for seed in seeds]
    )
    if not numbers:
        raise ConfigError("`seeds` must hold at least one seed, got none")
    return numbers


def check_sizes(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(height, width) pairs, checked."""
    pairs = list(sizes)
    if not pairs or any(not isinstance(pair, (tuple, list)) or len(pair) != 2 for pair in pairs):
        raise ConfigError(f"`sizes` must be a list of (height, width) in pixels, got {sizes!r}")
    return [(check_at_least("sizes", h, 16), check_at_least("sizes", w, 16)) for h, w in pairs]
