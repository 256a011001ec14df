"""Random v2 pipelines that are tracked, drawn by hypothesis or by a seed.

``pick(list)`` and ``whole(low, high)`` make the choices, so that both can drive the same drawing.
"""

import torch
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from helpers.ramps import SpoilRing

BILINEAR, BICUBIC = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC
FILTERS = (BILINEAR, BICUBIC, InterpolationMode.LANCZOS)
CONTAINERS = (
    v2.Compose,
    v2.RandomApply,
    v2.RandomChoice,
    v2.RandomOrder,
    lambda parts: nn.Sequential(*parts),
)


def resize_filters():
    """Filters that tensors of the installed torchvision resize with."""
    # Lanczos on tensors came after torchvision 0.21; that it does is asked, not read off a version
    try:
        v2.functional.resize(torch.zeros(1, 4, 4), [3, 3], InterpolationMode.LANCZOS)
    except (ValueError, NotImplementedError):
        return FILTERS[:2]
    return FILTERS


def exact(pick, whole):
    """One transform that moves pixels without resampling them."""
    size = (whole(1, 40), whole(1, 40))
    return pick(
        [
            lambda: v2.CenterCrop(size),
            lambda: v2.CenterCrop(whole(1, 40)),
            lambda: v2.Pad(whole(0, 4)),
            lambda: v2.Pad([whole(0, 5), whole(0, 5)]),
            lambda: v2.Pad([whole(0, 5) for _ in range(4)]),
            lambda: v2.RandomCrop(size, pad_if_needed=True),
            lambda: v2.RandomCrop(
                size, padding=pick([None, 2, [1, 3], [0, 1, 2, 3]]), pad_if_needed=True
            ),
            lambda: v2.RandomHorizontalFlip(pick([0.5, 1.0])),
            lambda: v2.RandomVerticalFlip(pick([0.5, 1.0])),
            lambda: v2.RandomZoomOut(side_range=(1.0, 1.6)),
            lambda: v2.RandomRotation((pick([90, 180, 270, -90]),) * 2, expand=True),
        ]
    )()


def affine(pick, whole, interpolation=BILINEAR):
    """A rotation or an affine transform."""
    center = pick([None, None, (whole(0, 30), whole(0, 30))])
    if pick([True, False]):
        degrees = pick([10, 45, 180, (90, 90), (30, 31)])
        return v2.RandomRotation(degrees, interpolation, expand=pick([True, False]), center=center)
    return v2.RandomAffine(
        pick([5, 30, 180]),
        translate=pick([None, (0.3, 0.1)]),
        scale=pick([None, (0.5, 0.9), (0.9, 2.0)]),
        shear=pick([None, 15, (-10, 5, 3, 20)]),
        interpolation=interpolation,
        center=center,
    )


def perspective(pick, whole, interpolation=BILINEAR):
    """A perspective transform."""
    return v2.RandomPerspective(pick([0.1, 0.3, 0.5]), pick([0.5, 1.0]), interpolation)


def warp(pick, whole, interpolation=BILINEAR):
    """Either."""
    return pick([affine, perspective])(pick, whole, interpolation)


def resize(pick, whole, filters):
    """A transform that resamples the whole image."""
    kernel = {"interpolation": pick(list(filters))}
    pair = (whole(1, 60), whole(1, 60))
    return pick(
        [
            lambda: v2.Resize(pair, **kernel),
            lambda: v2.Resize(whole(4, 30), max_size=whole(31, 60), **kernel),
            lambda: v2.Resize(None, max_size=whole(20, 60), **kernel),
            lambda: v2.ScaleJitter((whole(8, 50), whole(8, 50)), (0.5, 1.5), **kernel),
            lambda: v2.RandomShortestSize([whole(8, 30), whole(8, 30)], max_size=60, **kernel),
        ]
    )()


def pipeline(pick, whole, kinds, filters=FILTERS, most=8, depth=2):
    """Up to ``most`` transforms of ``kinds`` (see `helpers.ramps.KINDS`), nested in containers.

    What resamples has a `SpoilRing` before it.
    """
    parts, left = [], whole(1, most)
    while left > 0:
        if depth and left > 1 and pick([True, False, False]):
            inner = whole(2, left)
            parts.append(pipeline(pick, whole, kinds, filters, inner, depth - 1))
            left -= inner
            continue
        kind = pick(list(kinds))
        if kind == "exact":
            parts.append(exact(pick, whole))
        else:
            made = {
                "affine": lambda: affine(pick, whole),
                "perspective": lambda: perspective(pick, whole),
                "resize": lambda: resize(pick, whole, filters),
            }[kind]()
            parts.append(v2.Compose([SpoilRing(), made]))
        left -= 1
    return pick(list(CONTAINERS))(parts)
