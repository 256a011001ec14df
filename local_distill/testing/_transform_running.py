"""Calling a pipeline under a seed, and looking at what comes out."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from local_distill.structures import CropGeometry
from local_distill.testing.properties import ensure
from local_distill.transforms.generators import generators_kept, seed_generators

Pipeline = Callable[[Any], Any]
Output = tuple[list[Any], list[CropGeometry]]


def run(pipeline: Pipeline, image: Any, seed: int, *, in_copy: bool = True) -> Output:
    """The views and their geometry under a seed."""
    with generators_kept():
        seed_generators(seed)
        return parts_of((copied(pipeline) if in_copy else pipeline)(image))


def copied(pipeline: Pipeline) -> Pipeline:
    """A copy, so that a pipeline that remembers starts every property afresh."""
    try:
        return copy.deepcopy(pipeline)
    except Exception:  # whatever a user's class raises, it can't be copied
        return pipeline


def parts_of(output: Any) -> Output:
    pair = isinstance(output, (tuple, list)) and len(output) == 2
    ensure(pair, f"got {type(output).__name__}, not (view, CropGeometry) or two lists of them")
    views, geometries = output
    if isinstance(geometries, CropGeometry):
        views, geometries = [views], [geometries]
    several = isinstance(views, (tuple, list)) and isinstance(geometries, (tuple, list))
    ensure(several, f"got {type(views).__name__} and {type(geometries).__name__}")
    found = len(geometries), len(views)
    ensure(found[0] == found[1], f"got {found[1]} views and {found[0]} geometries")
    ensure(
        all(isinstance(geometry, CropGeometry) for geometry in geometries),
        f"got {[type(each).__name__ for each in geometries]}, not CropGeometry",
    )
    return list(views), list(geometries)


def ensure_equal(found: Output, wanted: Output, what: str) -> None:
    ensure(len(found[0]) == len(wanted[0]), f"{what}: {len(found[0])} views")
    for index, (one, two) in enumerate(zip(found[1], wanted[1], strict=True)):
        same = all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        ensure(same, f"{what}: view {index} lies at {one.matrix.tolist()}, {two.matrix.tolist()}")
    for index, (one, two) in enumerate(zip(found[0], wanted[0], strict=True)):
        now, before = pixels_of(one), pixels_of(two)
        same = now.shape == before.shape and torch.allclose(now, before, equal_nan=True)
        ensure(same, f"{what}: the pixels of view {index} differ")


def pixels_of(image: Any) -> Tensor:
    if isinstance(image, PIL.Image.Image):
        return F.pil_to_tensor(image)  # type: ignore[no-any-return]
    ensure(isinstance(image, Tensor), f"a view is {type(image).__name__}, no image")
    return image.detach().as_subclass(Tensor)  # type: ignore[no-any-return]


@functools.cache
def scratch_folder() -> Path:
    """Where assert_tracks draws its picture: one folder a process, however long the search is."""
    return Path(tempfile.mkdtemp(prefix="check_transform_"))
