"""The steps that a tracked pipeline is rebuilt from: each acts on a geometry and its image.

torchvision's own way from a sample to its parts transforms only the first of several pure tensors,
which loses four of the five views of a ``FiveCrop``. So each step asks its transform for one draw
of parameters and then sends every view, and where it moves pixels every geometry, through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import PIL.Image
import torch
from torch import nn
from torchvision.transforms import v2

from local_distill.transforms.geometry_tensor import GeometryTensor, PilGeometryTensor

__all__ = ["Sample", "TrackedStep", "UntrackedStep", "VouchedStep"]

# A geometry and a view, or behind FiveCrop a tuple of each.
Sample = tuple[Any, Any]


def _each(act: Callable[[Any], Any], parts: Any) -> Any:
    """Act on one part, or on each of nested tuples of them, in order."""
    if isinstance(parts, (tuple, list)):
        return tuple(_each(act, part) for part in parts)
    return act(parts)


def _leaves(parts: Any) -> Iterator[Any]:
    if isinstance(parts, (tuple, list)):
        for part in parts:
            yield from _leaves(part)
    else:
        yield parts


class VouchedStep(nn.Module):
    """A transform that the caller vouched for: shown one view at a time, and nothing else."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, sample: Sample) -> Sample:
        """Change the views."""
        geometry, view = sample
        return geometry, _each(self.transform, view)

    def __repr__(self) -> str:
        return repr(self.transform)


class UntrackedStep(nn.Module):
    """A transform that moves no pixels, sent the views alone."""

    def __init__(self, transform: v2.Transform) -> None:
        super().__init__()
        self.transform = transform
        self.types = transform._transformed_types
        # What torchvision's transforms with a probability have in common is not public; a flip is.
        self.by_chance = type(transform).forward is v2.RandomHorizontalFlip.forward

    def forward(self, sample: Sample) -> Sample:
        """Draw once, then change all views, unless chance leaves the sample as it is."""
        geometry, view = sample
        views = list(_leaves(view))
        self.transform.check_inputs(views)
        if self.by_chance and torch.rand(1) >= self.transform.p:
            return sample
        params = self.transform.make_params([one for one in views if self.takes(one)])
        # The geometry goes first: what it refuses is then said in its words, not torch's.
        return self.carry(geometry, view, params), _each(
            lambda one: self.transform.transform(one, params) if self.takes(one) else one, view
        )

    def takes(self, view: Any) -> bool:
        """Whether the transform acts on images of this type at all."""
        return bool(v2.check_type(view, self.types))

    def carry(self, geometry: Any, view: Any, params: dict[str, Any]) -> Any:
        """The geometry afterwards: as before."""
        return geometry

    def __repr__(self) -> str:
        return repr(self.transform)


class TrackedStep(UntrackedStep):
    """A transform that moves pixels, sent the views and their geometries."""

    def carry(self, geometry: Any, view: Any, params: dict[str, Any]) -> Any:
        """The geometry afterwards: sent through the transform's own kernels."""
        if isinstance(self.transform, v2.RandomRotation):
            pil = isinstance(next(_leaves(view)), PIL.Image.Image)
            kind = PilGeometryTensor if pil else GeometryTensor
            geometry = _each(lambda one: one.as_subclass(kind), geometry)
        return _each(lambda one: self.transform.transform(one, params), geometry)
