"""DINO's multi-crop augmentation, with where each view lies in the image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import PIL.Image
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from local_distill._check import check_at_least, check_fraction
from local_distill.errors import ConfigError
from local_distill.structures import CropGeometry
from local_distill.transforms.crop_boxes import CropBox, box_geometries, sample_box
from local_distill.transforms.images import rgb_tensor

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "MultiCrop"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_SOLARIZE_FROM = 128 / 255
_DRAWS = 40  # uniform numbers that one view may need: 22 for its box, 14 for its colours, 2 flips


class _Recipe(NamedTuple):
    """How one view is made."""

    size: tuple[int, int]
    scale: tuple[float, float]
    blur_p: float
    solarize_p: float


class MultiCrop(nn.Module):
    """Several random views of an image, two global and eight local by default, as in DINO.

    Each view is a random resized crop (bicubic, antialiased), flipped, colour-jittered, greyed,
    blurred and solarised at random, then normalised. The first global view is always blurred, the
    second rarely and sometimes solarised, local views every other time.

    All random numbers of an image come from one call of torch's generator, so that ``manual_seed``
    and a loader's workers behave as usual.

    Args:
        global_size: side, or (height, width), of the global views in pixels.
        local_size: the same of the local views.
        global_count: number of global views, at least 1.
        local_count: number of local views, may be 0.
        global_scale: least and largest share of the image's area that a global view shows.
        local_scale: the same of the local views.
        ratio: least and largest width / height of the crop in the source.
        hflip_p: probability of mirroring left to right.
        vflip_p: probability of mirroring top to bottom.
        color_jitter: strengths of brightness, contrast, saturation and hue; None for no jitter.
        color_jitter_p: probability of colour jitter.
        grayscale_p: probability of dropping the colours.
        blur_p: probability of blur for the first global view, the other global views and the local
            views.
        blur_sigma: least and largest standard deviation of the blur in view pixels. The kernel
            reaches to 3 sigma and depends on nothing else, as PIL's in DINO; SimCLR's is a tenth of
            the view wide instead, which cuts it off in small views.
        solarize_p: probability of solarising a global view other than the first.
        normalize: (mean, std) per channel, ImageNet's by default; None leaves values in [0, 1].

    Returns:
        From ``forward(image)``: the views, a list of (3, height, width) float32 tensors, global
        views first, and their geometries, a list of `CropGeometry` in the same order. A PIL image
        of any mode goes in, or a uint8 or [0, 1] float tensor. ``default_collate`` makes both lists
        batched.

    Raises:
        ConfigError: a setting that cannot be; ``forward`` raises ShapeError for what is no image.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> views, geometries = MultiCrop(local_count=2)(torch.rand(3, 60, 80))
        >>> [tuple(view.shape) for view in views]
        [(3, 224, 224), (3, 224, 224), (3, 96, 96), (3, 96, 96)]
        >>> geometries[0].source_size
        tensor([60, 80], dtype=torch.int32)

    Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", §3 and
        appendix; the augmentations are those of Grill et al. 2020 (BYOL), appendix B.

    Deviations from the authors' code: colours are worked out in float32 after the crop, not rounded
    to 8 bits between the steps; the blur is a Gaussian where PIL's is three box blurs of about its
    width.
    """

    def __init__(
        self,
        *,
        global_size: int | Sequence[int] = 224,
        local_size: int | Sequence[int] = 96,
        global_count: int = 2,
        local_count: int = 8,
        global_scale: Sequence[float] = (0.4, 1.0),
        local_scale: Sequence[float] = (0.05, 0.4),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        hflip_p: float = 0.5,
        vflip_p: float = 0.0,
        color_jitter: Sequence[float] | None = (0.4, 0.4, 0.2, 0.1),
        color_jitter_p: float = 0.8,
        grayscale_p: float = 0.2,
        blur_p: Sequence[float] = (1.0, 0.1, 0.5),
        blur_sigma: Sequence[float] = (0.1, 2.0),
        solarize_p: float = 0.2,
        normalize: Sequence[Sequence[float]] | None = (IMAGENET_MEAN, IMAGENET_STD),
    ) -> None:
        super().__init__()
        check_at_least("global_count", global_count, 1)
        check_at_least("local_count", local_count, 0)
        self.global_size = _check_size("global_size", global_size)
        self.local_size = _check_size("local_size", local_size)
        self.global_scale = _check_range("global_scale", global_scale, high=1.0)
        self.local_scale = _check_range("local_scale", local_scale, high=1.0)
        self.ratio = _check_range("ratio", ratio)
        self.hflip_p = check_fraction("hflip_p", hflip_p)
        self.vflip_p = check_fraction("vflip_p", vflip_p)
        self.color_jitter = None if color_jitter is None else _check_jitter(color_jitter)
        self.color_jitter_p = check_fraction("color_jitter_p", color_jitter_p)
        self.grayscale_p = check_fraction("grayscale_p", grayscale_p)
        blur = _check_numbers("blur_p", blur_p, 3, "(first global, other global, local)")
        self.blur_p = tuple(check_fraction("blur_p", p) for p in blur)
        self.blur_sigma = _check_range("blur_sigma", blur_sigma)
        self.solarize_p = check_fraction("solarize_p", solarize_p)
        self.normalize = None if normalize is None else _check_normalize(normalize)
        first, other, local = self.blur_p
        self._recipes = (
            _Recipe(self.global_size, self.global_scale, first, 0.0),
            *[_Recipe(self.global_size, self.global_scale, other, self.solarize_p)]
            * (global_count - 1),
            *[_Recipe(self.local_size, self.local_scale, local, 0.0)] * local_count,
        )
        self.num_global = global_count
        self.num_views = global_count + local_count

    @property
    def view_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each view, in the order of the views."""
        return [recipe.size for recipe in self._recipes]

    def forward(self, image: PIL.Image.Image | Tensor) -> tuple[list[Tensor], list[CropGeometry]]:
        """Make the views of one image; see the class."""
        source = rgb_tensor(image)
        source_size = (source.shape[1], source.shape[2])
        numbers = torch.rand(self.num_views, _DRAWS, dtype=torch.float64).tolist()
        views, boxes = [], []
        for recipe, row in zip(self._recipes, numbers, strict=True):
            draws = iter(row)
            box = sample_box(draws, source_size, recipe.scale, self.ratio)
            box = box._replace(hflip=next(draws) < self.hflip_p, vflip=next(draws) < self.vflip_p)
            boxes.append(box)
            views.append(self._colour(_cut(source, box, recipe.size), recipe, draws))
        return views, box_geometries(boxes, self.view_sizes, source_size)

    def _colour(self, view: Tensor, recipe: _Recipe, draws: Iterator[float]) -> Tensor:
        if self.color_jitter is not None and next(draws) < self.color_jitter_p:
            view = _jitter(view, self.color_jitter, draws)
        if next(draws) < self.grayscale_p:
            view = F.rgb_to_grayscale_image(view, num_output_channels=3)
        if next(draws) < recipe.blur_p:
            low, high = self.blur_sigma
            view = _blur(view, low + (high - low) * next(draws))
        if next(draws) < recipe.solarize_p:
            view = F.solarize_image(view, _SOLARIZE_FROM)
        if self.normalize is not None:
            view = F.normalize_image(view, *self.normalize)
        return view

    def extra_repr(self) -> str:
        """Counts, sizes and scales."""
        return (
            f"{self.num_global} × {self.global_size} of {self.global_scale}, "
            f"{self.num_views - self.num_global} × {self.local_size} of {self.local_scale}"
        )


def _cut(source: Tensor, box: CropBox, size: tuple[int, int]) -> Tensor:
    """Crop, resize and flip: (3, height, width) float32 in [0, 1]."""
    view: Tensor = F.resized_crop_image(
        source,
        *box[:4],
        size=list(size),
        interpolation=InterpolationMode.BICUBIC,
        antialias=True,
    )
    flipped = [axis for axis, flip in ((-1, box.hflip), (-2, box.vflip)) if flip]
    if flipped:
        view = view.flip(flipped)
    if source.dtype == torch.uint8:
        return view.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return view.clamp(0, 1)  # bicubic overshoots


def _jitter(view: Tensor, strengths: Sequence[float], draws: Iterator[float]) -> Tensor:
    """Brightness, contrast, saturation and hue in random order, as v2's ColorJitter."""
    order = sorted((next(draws), index) for index in range(4))
    amounts = [strength * (2 * next(draws) - 1) for strength in strengths]
    for _, index in order:
        if strengths[index] == 0:
            continue
        if index == 0:
            view = F.adjust_brightness_image(view, max(0.0, 1 + amounts[0]))
        elif index == 1:
            view = F.adjust_contrast_image(view, max(0.0, 1 + amounts[1]))
        elif index == 2:
            view = F.adjust_saturation_image(view, max(0.0, 1 + amounts[2]))
        else:
            view = _shift_hue(view, amounts[3])
    return view


def _shift_hue(view: Tensor, amount: float) -> Tensor:
    """``adjust_hue_image`` of v2 in a third of its operations, which were half of a view's cost."""
    largest, which = view.max(0, keepdim=True)
    chroma = largest - view.amin(0, keepdim=True)
    # The hue in sixths of a turn: 2·(the largest channel) + (the next − the one after) / chroma.
    around = (view.roll(-1, 0) - view.roll(-2, 0)).gather(0, which)
    hue = around / chroma.clamp_min(1e-12) + 2 * which + 6 * amount
    # The way back: each channel falls below the largest by chroma times a trapezium of the hue.
    position = (hue + torch.tensor([5.0, 3.0, 1.0], device=view.device).view(3, 1, 1)).remainder(6)
    return largest - chroma * torch.minimum(position, 4 - position).clamp(0, 1)


def _blur(view: Tensor, sigma: float) -> Tensor:
    # Reflection needs the kernel's half to be smaller than the view.
    kernel = [
        1 + 2 * min(math.ceil(3 * sigma), side - 1) for side in (view.shape[2], view.shape[1])
    ]
    return F.gaussian_blur_image(view, kernel, [sigma, sigma])  # type: ignore[no-any-return]


def _check_numbers(name: str, values: Any, count: int, meaning: str) -> tuple[float, ...]:
    if (
        not isinstance(values, Sequence)
        or len(values) != count
        or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)
    ):
        raise ConfigError(f"`{name}` must be {count} finite numbers {meaning}, got {values!r}")
    return tuple(float(value) for value in values)


def _check_size(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, Sequence) or len(sides) != 2:
        raise ConfigError(f"`{name}` must be a side or (height, width) in pixels, got {size!r}")
    return check_at_least(name, sides[0], 1), check_at_least(name, sides[1], 1)


def _check_range(
    name: str, bounds: Sequence[float], *, high: float = math.inf
) -> tuple[float, float]:
    least, largest = _check_numbers(name, bounds, 2, "(least, largest)")
    if not 0 < least <= largest <= high:
        limit = "" if high == math.inf else f" ≤ {high:g}"
        raise ConfigError(f"`{name}` must be 0 < least ≤ largest{limit}, got {tuple(bounds)}")
    return least, largest


def _check_jitter(strengths: Sequence[float]) -> tuple[float, ...]:
    meaning = "(brightness, contrast, saturation, hue)"
    values = _check_numbers("color_jitter", strengths, 4, meaning)
    if min(values) < 0 or values[3] > 0.5:
        raise ConfigError(
            f"`color_jitter` {meaning} must not be negative, and hue at most 0.5, got {values}"
        )
    return values


def _check_normalize(normalize: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    if not isinstance(normalize, Sequence) or len(normalize) != 2:
        raise ConfigError(f"`normalize` must be (mean, std) or None, got {normalize!r}")
    mean = _check_numbers("normalize", normalize[0], 3, "as mean")
    std = _check_numbers("normalize", normalize[1], 3, "as std")
    if min(std) <= 0:
        raise ConfigError(f"`normalize`: std must be above 0, got {std}")
    return list(mean), list(std)
