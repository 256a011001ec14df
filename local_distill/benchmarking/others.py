"""Other libraries' own parts, where they are installed; in the same process, by the same clock."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from local_distill.benchmarking.cases import Way
from local_distill.benchmarking.plain_forms import plain_centers
from local_distill.benchmarking.sizes import Step
from local_distill.structures import Tokens

__all__ = [
    "LIBRARIES",
    "MEASURED_LIBRARIES",
    "feature_ways",
    "installed",
    "library_versions",
    "place_ways",
]

MEASURED_LIBRARIES = ("kornia", "lightly")
LIBRARIES = (*MEASURED_LIBRARIES, "timm", "torchvision")


def installed(module: str) -> ModuleType | None:
    """The module, or None where its library is not there; one that is broken raises."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        return None


def library_versions() -> dict[str, str | None]:
    """The version of each of `LIBRARIES`, None where it is not installed; none is imported."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def place_ways(step: Step) -> dict[str, Way]:
    """Who else can find the nearest token by place."""
    lightly = installed("lightly.models.utils")
    if lightly is None:
        return {}
    nearest = lightly.nearest_neighbors

    def by_place(student: Tokens, teacher: Tokens) -> Any:
        s, t = plain_centers(student), plain_centers(teacher)
        return nearest(s, t, torch.cdist(s, t), -1)

    return {"Lightly nearest_neighbors": _pairwise(by_place, step)}


def feature_ways(step: Step) -> dict[str, Way]:
    """Who else can find the token of most similar features."""
    ways: dict[str, Way] = {"torch.cdist, min": _pairwise(_least_distance, step)}
    lightly, kornia = installed("lightly.models.utils"), installed("kornia.feature")
    if lightly is not None:
        nearest = lightly.nearest_neighbors

        def by_features(student: Tokens, teacher: Tokens) -> Any:
            f, g = _features(student), _features(teacher)
            return nearest(f, g, torch.cdist(f, g), -1)

        ways["Lightly nearest_neighbors"] = _pairwise(by_features, step)
    if kornia is not None:
        for mode in ("nn", "mnn"):
            ways[f"kornia DescriptorMatcher({mode!r})"] = _pairwise(
                _image_by_image(kornia.DescriptorMatcher(mode)), step
            )
    return ways


def _pairwise(way: Callable[[Tokens, Tokens], Any], step: Step) -> Way:
    return lambda: {(v, q): way(step.student[v], step.teacher[q]) for v, q in step.pairs}


def _image_by_image(matcher: Callable[[Tensor, Tensor], Any]) -> Callable[[Tokens, Tokens], Any]:
    """As those know no batch."""

    def match(student: Tokens, teacher: Tokens) -> list[Any]:
        images = zip(_features(student), _features(teacher), strict=True)
        return [matcher(one, other) for one, other in images]

    return match


def _least_distance(student: Tokens, teacher: Tokens) -> Any:
    return torch.cdist(_features(student), _features(teacher)).min(-1)


def _features(tokens: Tokens) -> Tensor:
    assert tokens.features is not None
    # torch.cdist, which they rest on, has no half precision
    return tokens.features.float() if tokens.features.itemsize < 4 else tokens.features
