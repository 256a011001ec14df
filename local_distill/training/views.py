"""The views that the built-in scenes are trained on, and the one they are tested on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from local_distill._check import check_at_least
from local_distill.transforms.multi_crop import IMAGENET_MEAN, IMAGENET_STD, MultiCrop

__all__ = ["DemoCrop", "eval_transform"]


class DemoCrop(MultiCrop):
    """`MultiCrop` with the sizes and the mild colours that suit the built-in scenes.

    It takes no settings: for other views name `MultiCrop` itself, whose defaults are DINO's.

    Example:
        >>> views, _ = DemoCrop()(torch.rand(3, 64, 64))
        >>> [view.shape[-1] for view in views]
        [48, 48, 24, 24, 24, 24]
    """

    def __init__(self) -> None:
        super().__init__(
            global_size=48,
            local_size=24,
            global_count=2,
            local_count=4,
            global_scale=(0.35, 1.0),
            local_scale=(0.08, 0.35),
            color_jitter=(0.4, 0.4, 0.2, 0.03),
            grayscale_p=0.1,
            blur_p=(0.0, 0.0, 0.0),
            solarize_p=0.0,
        )


def eval_transform(size: int) -> Callable[[Any], Tensor]:
    """Resize the shorter side, crop the middle, normalise: PIL image → (3, size, size)."""
    from torchvision.transforms import v2

    check_at_least("size", size, 1)
    steps: Sequence[Any] = [
        v2.ToImage(),
        v2.Resize(size, v2.InterpolationMode.BICUBIC, antialias=True),
        v2.CenterCrop(size),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        v2.ToPureTensor(),
    ]
    transform: Callable[[Any], Tensor] = v2.Compose(steps)
    return transform
