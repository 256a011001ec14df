"""The pipelines inside objects of known codebases that make several views of an image."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision import transforms as v1

from local_distill.errors import ConfigError
from local_distill.transforms.generators import (
    generator_states,
    generators_kept,
    seed_generators,
)

__all__ = ["check_same_views", "inner_pipeline", "view_pipelines"]

# DINOViewTransform, BYOLView1Transform, …
_PASSING_ON = re.compile(r"\w+View\d?Transform|IJEPATransform|RandomRotateDegrees")
_DINO = ("global_transfo1", "global_transfo2", "local_transfo", "local_crops_number")
_DINOV2 = ("geometric_augmentation_global", "geometric_augmentation_local")


def inner_pipeline(transform: Any) -> Any | None:
    """The pipeline of an object that only passes the image on to it, else None.

    These are lightly's view transforms (``DINOViewTransform`` and the like) and its
    ``RandomRotateDegrees``.
    """
    kind = type(transform)
    if _of_lightly(kind) and _PASSING_ON.fullmatch(kind.__name__):
        return getattr(transform, "transform", None)
    return None


def view_pipelines(transform: Any) -> list[Any] | None:
    """One pipeline per view, in the order in which they are run, or None for anything else.

    Known are lightly's ``MultiViewTransform``s, solo-learn's ``FullTransformPipeline`` and
    ``NCropAugmentation``, and the ``DataAugmentationDINO`` of DINO and of DINOv2.
    """
    kind = type(transform)
    for base in kind.__mro__:
        if _of_lightly(base) and base.__name__ in ("MultiViewTransform", "MultiViewTransformV2"):
            return list(transform.transforms)
    if _of_lightly(kind) and kind.__name__ in ("AIMTransform", "CAPITransform", "MAETransform"):
        return [transform.transform]
    if kind.__name__ == "FullTransformPipeline" and _has(transform, ("transforms",)):
        parts = [view_pipelines(part) for part in transform.transforms]
        return None if None in parts else [view for part in parts if part for view in part]
    if kind.__name__ == "NCropAugmentation" and _has(transform, ("transform", "num_crops")):
        return [transform.transform] * transform.num_crops
    if not _has(transform, _DINO):
        return None
    views = [transform.global_transfo1, transform.global_transfo2]
    views += [transform.local_transfo] * transform.local_crops_number
    if _has(transform, _DINOV2):
        cut = [transform.geometric_augmentation_global] * 2
        cut += [transform.geometric_augmentation_local] * transform.local_crops_number
        views = [v1.Compose([first, then]) for first, then in zip(cut, views, strict=True)]
    return views


def check_same_views(transform: Any, upgraded: Callable[[Any], tuple[list[Any], Any]]) -> None:
    """Run both on one image under one seed and compare views and generators bit for bit.

    Codes that are handed around keep the names of their attributes and change what is done with
    them, so that the names alone prove nothing.

    Raises:
        ConfigError: other views, another number of them, or either could not be run.
    """
    name = type(transform).__name__
    advice = "upgrade each of its pipelines by itself, in the order in which it runs them"
    noise = np.random.default_rng(0).integers(0, 256, (251, 283, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(noise)
    with generators_kept():
        seed_generators(0)
        try:
            expected = _flat(transform(image))
        except Exception as error:  # whatever foreign code raises
            raise ConfigError(
                f"cannot upgrade {name}: it could not be tried on an RGB image "
                f"({type(error).__name__}: {error}); {advice}"
            ) from error
        drawn = generator_states()
        seed_generators(0)
        views, _ = upgraded(image)
        same = len(views) == len(expected) and all(map(_equal, views, expected))
        # What it draws besides may decide over another order or number of views next time.
        same = same and generator_states() == drawn
    if not same:
        raise ConfigError(
            f"cannot upgrade {name}: its {len(expected)} views, or the random numbers that it "
            f"draws, are not those of the {len(views)} that its attributes tell of; {advice}"
        )


def _flat(views: Any) -> Sequence[Any]:
    if isinstance(views, dict):  # DINOv2
        return [*views["global_crops"], *views["local_crops"]]
    return list(views)


def _equal(view: Any, other: Any) -> bool:
    if isinstance(view, Tensor) and isinstance(other, Tensor):
        return torch.equal(view, other)
    return bool(type(view) is type(other) and view == other)


def _has(transform: Any, names: Sequence[str]) -> bool:
    return not isinstance(transform, type) and all(hasattr(transform, name) for name in names)


def _of_lightly(kind: type) -> bool:
    return kind.__module__.startswith("lightly.transforms.")
