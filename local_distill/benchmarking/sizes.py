"""Realistic steps: DINO's ten views of a batch, by the networks that people train."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from local_distill.errors import ConfigError
from local_distill.geometry import from_box
from local_distill.matching.match_views import cross_view_pairs
from local_distill.structures import TokenGrid, Tokens

__all__ = [
    "GLOBAL_VIEWS",
    "LOCAL_VIEWS",
    "SIZES",
    "SOURCE",
    "Size",
    "Step",
    "check_sizes",
    "named_size",
    "step",
]

GLOBAL_VIEWS, LOCAL_VIEWS = 2, 8
SOURCE = (375, 500)  # height and width of the images, px: ImageNet's usual ones
_SCALES = {True: (0.4, 1.0), False: (0.05, 0.4)}  # share of the image that a view shows, DINO's


class Size(NamedTuple):
    """What one network makes of global and of local views.

    Attributes:
        global_side: tokens along a side of a global view.
        local_side: the same of a local view.
        features: d.
        global_pixels: side of a global view, px.
        local_pixels: the same of a local view.
    """

    global_side: int
    local_side: int
    features: int
    global_pixels: int = 224
    local_pixels: int = 96


SIZES = {
    "Swin": Size(7, 3, 768),
    "S/16": Size(14, 6, 384),
    "S/8": Size(28, 12, 384),
    "L/14": Size(37, 16, 1024, 518, 224),
}


_OWN = re.compile(r"(\d+)\+(\d+)/(\d+):(\d+)")


class Step(NamedTuple):
    """The tokens of one training step.

    Attributes:
        student: `Tokens` of all views, the global ones first.
        teacher: `Tokens` of the global views; same places, other features.
        pairs: the 18 pairs of different views.
    """

    student: list[Tokens]
    teacher: list[Tokens]
    pairs: list[tuple[int, int]]

    def without_features(self) -> Step:
        """The same places."""
        student, teacher = ([view._replace(features=None) for view in views] for views in self[:2])
        return Step(student, teacher, self.pairs)

    def without_geometry(self) -> Step:
        """The same features, of unknown places."""
        student, teacher = ([Tokens(view.features) for view in views] for views in self[:2])
        return Step(student, teacher, self.pairs)


def named_size(name: str) -> Size:
    """One of `SIZES`, or one of your own: ``global+local/patch:features``.

    Args:
        name: such as ``"S/16"``, or ``"48+24/8:192"`` for global views of 48 px and local ones of
            24 px, in patches of 8 px, of 192 features each.

    Raises:
        ConfigError: neither of both, or patches that do not divide the views.

    Example:
        >>> named_size("48+24/8:192")
        Size(global_side=6, local_side=3, features=192, global_pixels=48, local_pixels=24)
    """
    if name in SIZES:
        return SIZES[name]
    found = _OWN.fullmatch(name)
    if found is None:
        raise ConfigError(
            f"no size {name!r}; there are {', '.join(SIZES)}; say your own as "
            "global+local/patch:features, such as 48+24/8:192"
        )
    large, small, patch, features = map(int, found.groups())
    if not (patch and features and large and small) or large % patch or small % patch:
        raise ConfigError(
            f"size {name!r}: views of {large} and {small} px are not made of patches of {patch} px "
            f"with {features} features; give sides that are multiples of the patch"
        )
    return Size(large // patch, small // patch, features, large, small)


def check_sizes(names: Iterable[str]) -> tuple[str, ...]:
    """The names, if `named_size` knows them all.

    Raises:
        ConfigError: a name that it does not know.

    Example:
        >>> check_sizes(["S/16"])
        ('S/16',)
    """
    names = tuple(names)
    for name in names:
        named_size(name)
    return names


def step(
    size: Size,
    batch: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Step:
    """Random crops, mirrored at random, of ``batch`` images, with random features.

    Example:
        >>> made = step(SIZES["Swin"], 2)
        >>> len(made.student), len(made.teacher), len(made.pairs)
        (10, 2, 18)
        >>> made.student[9].features.shape
        torch.Size([2, 9, 768])
    """
    generator = torch.Generator().manual_seed(0)
    kinds = [True] * GLOBAL_VIEWS + [False] * LOCAL_VIEWS
    student = [_view(size, batch, kind, generator, device, dtype) for kind in kinds]
    teacher = []
    for view in student[:GLOBAL_VIEWS]:
        assert view.features is not None
        drawn = torch.randn(view.features.shape, generator=generator)
        teacher.append(view._replace(features=drawn.to(device, dtype)))
    return Step(student, teacher, cross_view_pairs(len(student), len(teacher)))


def _view(
    size: Size,
    batch: int,
    is_global: bool,
    generator: torch.Generator,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tokens:
    side = size.global_side if is_global else size.local_side
    pixels = size.global_pixels if is_global else size.local_pixels
    box = _boxes(batch, _SCALES[is_global], generator)
    flip = torch.rand(batch, generator=generator) < 0.5
    geometry = from_box(box, (pixels, pixels), SOURCE, hflip=flip).to(device)
    features = torch.randn(batch, side * side, size.features, generator=generator)
    grid = TokenGrid.tiling(side, side, view_size=(pixels, pixels))
    return Tokens(features.to(device, dtype), geometry, grid)


def _boxes(batch: int, scale: tuple[float, float], generator: torch.Generator) -> Tensor:
    """(b, 4) of a share of the image's area, of aspect ratios about 3/4 to 4/3."""
    height, width = SOURCE
    area = scale[0] + (scale[1] - scale[0]) * torch.rand(batch, 1, generator=generator)
    stretch = torch.exp((torch.rand(batch, 1, generator=generator) - 0.5) * 0.29)
    root = area.sqrt() * (height * width) ** 0.5
    limits = torch.tensor([width, height], dtype=root.dtype)
    sides = torch.minimum(torch.cat((root * stretch, root / stretch), 1), limits)
    low = torch.rand(batch, 2, generator=generator) * (limits - sides)
    return torch.cat((low, low + sides), 1)
