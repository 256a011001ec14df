"""What an upgraded pipeline is made of: v1 transforms, run beside the geometry of what they do.

Each step takes and returns ``(geometry, image)``. The v1 object itself is run on the image, so the
pixels and the random numbers are its own; its geometry is read off the parameters that it drew.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torchvision import transforms as v1
from torchvision.transforms.v2 import functional as F

from local_distill.errors import GeometryError
from local_distill.transforms.geometry_tensor import GeometryTensor, append_step
from local_distill.transforms.images import image_size
from local_distill.transforms.refusals import check_one_view

__all__ = ["GEOMETRIC", "ImageOnly", "Moving", "quarter_turn"]

Sample = tuple[Any, Any]
# (geometry before, transform, its drawn parameters, view) → geometry after
Record = Callable[[Any, Any, Any, Any], Any]


class ImageOnly:
    """A transform that moves no pixels: shown the image, and nothing else."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, sample: Sample) -> Sample:
        """Pass the geometry by.

        Raises:
            GeometryError: the size changed, or there are several views.
        """
        geometry, image = sample
        view = self.transform(image)
        check_one_view(view, "upgrade(pipeline)")
        before, after = image_size(image), image_size(view)
        if before != after:
            raise GeometryError(
                f"{_name(self.transform)} turned (height, width) = {before} into {after}, though "
                "it was taken to move no pixels; take it out of the pipeline, or out of `trust`"
            )
        return geometry, view

    def __repr__(self) -> str:
        return repr(self.transform)


class Moving:
    """A transform that moves pixels, and what to note of it."""

    def __init__(self, transform: Callable[[Any], Any], record: Record) -> None:
        self.transform = transform
        self.record = record

    def __call__(self, sample: Sample) -> Sample:
        """Transform the image, then the geometry with the same parameters.

        Raises:
            GeometryError: image and geometry come out at different sizes.
        """
        geometry, image = sample
        drawn: list[Any] = []
        view = _overheard(self.transform, drawn)(image)
        if view is image:  # a transform that spares the image hands on the very object
            return geometry, view
        geometry = self.record(geometry, self.transform, drawn[0] if drawn else None, view)
        if not isinstance(geometry, GeometryTensor):  # no kernel: torchvision passes it by
            raise GeometryError(f"{_name(self.transform)} is not tracked by this torchvision")
        seen, expected = image_size(view), tuple(F.get_size(geometry))
        if seen != expected:
            raise GeometryError(
                f"{_name(self.transform)} made a view of (height, width) = {seen} but the tracked "
                f"geometry says {expected}; please report this with the torchvision version"
            )
        return geometry, view

    def __repr__(self) -> str:
        return repr(self.transform)


def _name(transform: Any) -> str:
    return getattr(transform, "__name__", type(transform).__name__)


def _overheard(transform: Any, drawn: list[Any]) -> Any:
    """The transform, with what its ``get_params`` returns noted in ``drawn``."""
    if not hasattr(transform, "get_params"):
        return transform

    def get_params(*args: Any, **kwargs: Any) -> Any:
        drawn.append(transform.get_params(*args, **kwargs))
        return drawn[-1]

    # A copy a call: threads that share a pipeline must not hear each other's numbers.
    twin = copy.copy(transform)
    twin.get_params = get_params
    return twin


def _resize(geometry: Any, transform: Any, _: Any, view: Any) -> Any:
    # The view knows its size best: v1 takes sides, sequences of one side, and max_size.
    return F.resize(geometry, list(image_size(view)), interpolation=transform.interpolation)


def _resized_crop(geometry: Any, transform: Any, drawn: Any, view: Any) -> Any:
    size = list(image_size(view))
    return F.resized_crop(geometry, *drawn, size, interpolation=transform.interpolation)


def _center_crop(geometry: Any, transform: Any, *_: Any) -> Any:
    return F.center_crop(geometry, list(transform.size))


def _pad(geometry: Any, transform: Any, *_: Any) -> Any:
    return F.pad(geometry, transform.padding)


def _random_crop(geometry: Any, transform: Any, drawn: Any, _: Any) -> Any:
    if transform.padding is not None:
        geometry = F.pad(geometry, transform.padding)
    if transform.pad_if_needed:
        height, width = F.get_size(geometry)
        # What is missing is added on both sides, so that the crop can lie anywhere.
        missing = [max(0, transform.size[1] - width), max(0, transform.size[0] - height)]
        geometry = F.pad(geometry, missing)
    return F.crop(geometry, *drawn)


def _horizontal_flip(geometry: Any, *_: Any) -> Any:
    return F.horizontal_flip(geometry)


def _vertical_flip(geometry: Any, *_: Any) -> Any:
    return F.vertical_flip(geometry)


def _rotate(geometry: Any, transform: Any, angle: Any, view: Any) -> Any:
    old = F.get_size(geometry)
    turned = F.rotate(geometry, angle, center=transform.center)
    # With `expand`, v1's tensors, v2's tensors and PIL round the new size in three ways: the view
    # tells. It is laid about the middle of the old one.
    new = image_size(view)
    left, top = (old[1] - new[1]) / 2, (old[0] - new[0]) / 2
    return append_step(turned, (1, 0, left, 0, 1, top, 0, 0, 1), new)


def _affine(geometry: Any, transform: Any, drawn: Any, _: Any) -> Any:
    angle, translate, scale, shear = drawn
    return F.affine(
        geometry,
        angle=angle,
        translate=list(translate),
        scale=scale,
        shear=list(shear),
        interpolation=transform.interpolation,
        center=transform.center,
    )


def _perspective(geometry: Any, transform: Any, drawn: Any, _: Any) -> Any:
    return F.perspective(geometry, *drawn, interpolation=transform.interpolation)


def quarter_turn(geometry: Any, transform: Any, *_: Any) -> Any:
    """What lightly's ``RandomRotate`` does by a fixed angle."""
    return F.rotate(geometry, transform.angle)


GEOMETRIC: dict[type, Record] = {
    v1.CenterCrop: _center_crop,
    v1.Pad: _pad,
    v1.RandomAffine: _affine,
    v1.RandomCrop: _random_crop,
    v1.RandomHorizontalFlip: _horizontal_flip,
    v1.RandomPerspective: _perspective,
    v1.RandomResizedCrop: _resized_crop,
    v1.RandomRotation: _rotate,
    v1.RandomVerticalFlip: _vertical_flip,
    v1.Resize: _resize,
}
