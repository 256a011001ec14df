"""The pixels of a view of `MultiCrop`: cut out of the image, then its colours changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from local_distill.errors import GeometryError
from local_distill.geometry import compose
from local_distill.structures import CropGeometry
from local_distill.transforms.crop_boxes import CropBox
from local_distill.transforms.tracking import Tracked

__all__ = ["blur", "cut_view", "jitter", "run_pipeline", "shift_hue"]


def cut_view(source: Tensor, box: CropBox, size: tuple[int, int]) -> Tensor:
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


def jitter(view: Tensor, strengths: Sequence[float], draws: Iterator[float]) -> Tensor:
    """Brightness, contrast, saturation and hue in random order, as v2's ColorJitter.

    Args:
        view: (3, height, width).
        strengths: of brightness, contrast, saturation and hue.
        draws: uniform numbers in [0, 1); eight are taken.
    """
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
            view = shift_hue(view, amounts[3])
    return view


def shift_hue(view: Tensor, amount: float) -> Tensor:
    """``adjust_hue_image`` of v2 in a third of its operations, which were half of a view's cost."""
    largest, which = view.max(0, keepdim=True)
    chroma = largest - view.amin(0, keepdim=True)
    # The hue in sixths of a turn: 2·(the largest channel) + (the next − the one after) / chroma.
    around = (view.roll(-1, 0) - view.roll(-2, 0)).gather(0, which)
    hue = around / chroma.clamp_min(1e-12) + 2 * which + 6 * amount
    # The way back: each channel falls below the largest by chroma times a trapezium of the hue.
    position = (hue + torch.tensor([5.0, 3.0, 1.0], device=view.device).view(3, 1, 1)).remainder(6)
    return largest - chroma * torch.minimum(position, 4 - position).clamp(0, 1)


def blur(view: Tensor, sigma: float) -> Tensor:
    """A Gaussian of ``sigma`` pixels, cut off at three of them."""
    # Reflection needs the kernel's half to be smaller than the view.
    kernel = [
        1 + 2 * min(math.ceil(3 * sigma), side - 1) for side in (view.shape[2], view.shape[1])
    ]
    return F.gaussian_blur_image(view, kernel, [sigma, sigma])  # type: ignore[no-any-return]


def run_pipeline(
    pipeline: Tracked, view: Tensor, geometry: CropGeometry
) -> tuple[Tensor, CropGeometry]:
    """A recipe's own pipeline; where it moves pixels the geometry goes along."""
    made, inner = pipeline(view)
    if not torch.equal(inner.view_size, inner.source_size):
        raise GeometryError(
            f"a recipe's `pipeline` turned a view of (height, width) = "
            f"{tuple(inner.source_size.tolist())} into {tuple(inner.view_size.tolist())}; it has "
            "to keep the size, which is the recipe's `size`: take resizes, crops and pads out of it"
        )
    if not torch.equal(inner.matrix, torch.eye(3)):
        geometry = compose(geometry, inner)
    return made, geometry
