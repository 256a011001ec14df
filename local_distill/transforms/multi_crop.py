"""DINO's multi-crop augmentation, with where each view lies in the image."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import PIL.Image
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from local_distill._check import check_at_least, check_fraction
from local_distill.structures import CropGeometry
from local_distill.transforms.constraints import BoxConstraints, DrawnBoxes, constrain_boxes
from local_distill.transforms.crop_boxes import box_geometries, sample_box
from local_distill.transforms.images import rgb_tensor
from local_distill.transforms.setting_checks import (
    check_jitter,
    check_normalize,
    check_numbers,
    check_range,
    check_size,
)
from local_distill.transforms.view_pixels import blur, cut_view, jitter, run_pipeline
from local_distill.transforms.view_recipes import ViewRecipe, ViewSettings, check_recipes

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "MultiCrop"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_SOLARIZE_FROM = 128 / 255
_DRAWS = 40  # uniform numbers that one view may need: 22 for its box, 14 for its colours, 2 flips


class MultiCrop(nn.Module):
    """Several random views of an image, two global and eight local by default, as in DINO.

    Each view is a random resized crop (bicubic, antialiased), flipped, colour-jittered, greyed,
    blurred and solarised at random, then normalised. The first global view is always blurred, the
    second rarely and sometimes solarised, local views every other time.

    The boxes can be constrained, before any pixel is touched: ``min_overlap`` of each local view's
    own area lies in a global view, ``min_global_overlap`` of the smaller of two global views' in
    the other. A box that meets its constraint is left alone. Otherwise its place is drawn again
    ``max_retries`` times at most, its size is kept; where that fails too the best place tried is
    moved as far as it takes, and shrunk only where its size is the obstacle. So the constraint
    always holds; `draw_boxes` says how often what was needed.

    All random numbers of an image come from one call of torch's generator, so that ``manual_seed``
    and a loader's workers behave as usual (a recipe's own ``pipeline`` draws for itself). Under one
    seed a constraint changes the boxes that fail it and nothing else.

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
        recipes: the views one kind after the other, global ones first, for several local sizes or
            augmentations of their own; in place of the two sizes, counts and scales above.
        min_overlap: least share of a local view's area that lies in a global view, 0 for any.
        overlap_with: whether "any" global view will do, or "all" have to have that share of it;
            "all" needs ``min_global_overlap``.
        local_inside: local views lie in a global view (or in all): ``min_overlap`` of 1.
        min_global_overlap: least share of the smaller of any two global views that both show.
        max_retries: how often a place is drawn again, at most.

    Returns:
        From ``forward(image)``: the views, a list of (3, height, width) float32 tensors, global
        views first, and their geometries, a list of `CropGeometry` in the same order. A PIL image
        of any mode goes in, or a uint8 or [0, 1] float tensor. ``default_collate`` makes both lists
        batched.

    Raises:
        ConfigError: a setting that cannot be, or a constraint that views of these scales cannot
            meet; ``forward`` raises ShapeError for what is no image, and GeometryError where a
            recipe's pipeline changes the size of its view.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> views, geometries = MultiCrop(local_count=2)(torch.rand(3, 60, 80))
        >>> [tuple(view.shape) for view in views]
        [(3, 224, 224), (3, 224, 224), (3, 96, 96), (3, 96, 96)]
        >>> geometries[0].source_size
        tensor([60, 80], dtype=torch.int32)
        >>> inside = MultiCrop(local_inside=True, overlap_with="all", min_global_overlap=0.2)
        >>> max(inside.draw_boxes((60, 80)).attempts) <= 1 + 20
        True

    Source: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", §3 and
        appendix; the augmentations are those of Grill et al. 2020 (BYOL), appendix B. Constraints:
        Van Gansbeke et al. 2021, "Revisiting Contrastive Methods for Unsupervised Learning of
        Visual Representations" (a tenth of a local view in one given global view), and Ziegler and
        Asano 2022, "Self-Supervised Learning of Object Parts for Semantic Segmentation" (a
        hundredth of the image in all global views).

    Deviations from the authors' code: Van Gansbeke's gives a constraint up after ten attempts,
    Ziegler's retries without end, and both draw the size again as well. DINO's rounds colours to 8
    bits between the steps, here they are float32 after the crop; its blur is PIL's three box blurs
    of about the Gaussian's width.
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
        recipes: Sequence[ViewRecipe] | None = None,
        min_overlap: float = 0.0,
        overlap_with: Literal["any", "all"] = "any",
        local_inside: bool = False,
        min_global_overlap: float = 0.0,
        max_retries: int = 20,
    ) -> None:
        super().__init__()
        self.ratio = check_range("ratio", ratio)
        self.hflip_p = check_fraction("hflip_p", hflip_p)
        self.vflip_p = check_fraction("vflip_p", vflip_p)
        self.color_jitter = None if color_jitter is None else check_jitter(color_jitter)
        self.color_jitter_p = check_fraction("color_jitter_p", color_jitter_p)
        self.grayscale_p = check_fraction("grayscale_p", grayscale_p)
        three = check_numbers("blur_p", blur_p, 3, "(first global, other global, local)")
        self.blur_p = tuple(check_fraction("blur_p", p) for p in three)
        self.blur_sigma = check_range("blur_sigma", blur_sigma)
        self.solarize_p = check_fraction("solarize_p", solarize_p)
        self.normalize = None if normalize is None else check_normalize(normalize)
        if recipes is None:
            check_at_least("global_count", global_count, 1)
            check_at_least("local_count", local_count, 0)
            self.global_size = check_size("global_size", global_size)
            self.local_size = check_size("local_size", local_size)
            self.global_scale = check_range("global_scale", global_scale, high=1.0)
            self.local_scale = check_range("local_scale", local_scale, high=1.0)
            recipes = [
                ViewRecipe(self.global_size, self.global_scale, global_count, is_global=True),
                *[ViewRecipe(self.local_size, self.local_scale)] * local_count,
            ]
        else:
            simple = {
                "global_size": global_size,
                "local_size": local_size,
                "global_count": global_count,
                "local_count": local_count,
                "global_scale": global_scale,
                "local_scale": local_scale,
            }
            declared = inspect.signature(MultiCrop).parameters
            check_recipes(recipes, simple, {name: declared[name].default for name in simple})
        kinds = [recipe for recipe in recipes for _ in range(recipe.count)]
        self.num_global = sum(recipe.is_global for recipe in kinds)
        self.num_views = len(kinds)
        self._views = tuple(
            ViewSettings.of(
                recipe,
                ratio=self.ratio,
                hflip_p=self.hflip_p,
                vflip_p=self.vflip_p,
                blur_p=self.blur_p[0 if index == 0 else 1 if recipe.is_global else 2],
                solarize_p=self.solarize_p if recipe.is_global and index > 0 else 0.0,
            )
            for index, recipe in enumerate(kinds)
        )
        self.constraints = BoxConstraints(
            1.0 if local_inside else check_fraction("min_overlap", min_overlap),
            overlap_with,
            check_fraction("min_global_overlap", min_global_overlap),
            max_retries,
        ).check(
            [view.scale for view in self._views if view.is_global],
            [view.scale for view in self._views if not view.is_global],
        )

    @property
    def view_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each view, in the order of the views."""
        return [view.size for view in self._views]

    def draw_boxes(self, source_size: tuple[int, int]) -> DrawnBoxes:
        """Draw the boxes of one image's views alone, to see what the constraints come to.

        They are those that ``forward`` would cut out of an image of that size, under the same seed.

        Args:
            source_size: (height, width) in pixels.

        Returns:
            The boxes, the places tried for each, and which were repaired.

        Example:
            >>> _ = torch.manual_seed(0)
            >>> crop = MultiCrop(min_overlap=0.9, max_retries=1)
            >>> drawn = [crop.draw_boxes((375, 500)) for _ in range(100)]
            >>> max(attempts for image in drawn for attempts in image.attempts)
            2
            >>> 0 < sum(repaired for image in drawn for repaired in image.repaired) < 800
            True
        """
        return self._draw(check_size("source_size", source_size))[0]

    def forward(self, image: PIL.Image.Image | Tensor) -> tuple[list[Tensor], list[CropGeometry]]:
        """Make the views of one image; see the class."""
        source = rgb_tensor(image)
        source_size = (source.shape[1], source.shape[2])
        (boxes, *_), numbers = self._draw(source_size)
        geometries = box_geometries(boxes, self.view_sizes, source_size)
        views = []
        for index, (settings, box, draws) in enumerate(
            zip(self._views, boxes, numbers, strict=True)
        ):
            view = cut_view(source, box, settings.size)
            if settings.pipeline is None:
                view = self._colour(view, settings, draws)
            else:
                view, geometries[index] = run_pipeline(settings.pipeline, view, geometries[index])
            views.append(view)
        return views, geometries

    def _draw(self, source_size: tuple[int, int]) -> tuple[DrawnBoxes, list[Iterator[float]]]:
        """The boxes, and each view's remaining random numbers."""
        num_local = self.num_views - self.num_global
        own = self.num_views * _DRAWS
        extra = self.constraints.extra_draws(self.num_global, num_local)
        # One call. The retries' numbers come last, so that they shift nobody else's.
        numbers = torch.rand(own + extra, dtype=torch.float64).tolist()
        rows = [iter(numbers[start : start + _DRAWS]) for start in range(0, own, _DRAWS)]
        boxes = []
        for view, draws in zip(self._views, rows, strict=True):
            box = sample_box(draws, source_size, view.scale, view.ratio)
            hflip, vflip = next(draws) < view.hflip_p, next(draws) < view.vflip_p
            boxes.append(box._replace(hflip=hflip, vflip=vflip))
        drawn = constrain_boxes(
            boxes, self.num_global, source_size, self.constraints, iter(numbers[own:])
        )
        return drawn, rows

    def _colour(self, view: Tensor, settings: ViewSettings, draws: Iterator[float]) -> Tensor:
        if self.color_jitter is not None and next(draws) < self.color_jitter_p:
            view = jitter(view, self.color_jitter, draws)
        if next(draws) < self.grayscale_p:
            view = F.rgb_to_grayscale_image(view, num_output_channels=3)
        if next(draws) < settings.blur_p:
            low, high = self.blur_sigma
            view = blur(view, low + (high - low) * next(draws))
        if next(draws) < settings.solarize_p:
            view = F.solarize_image(view, _SOLARIZE_FROM)
        if self.normalize is not None:
            view = F.normalize_image(view, *self.normalize)
        return view

    def extra_repr(self) -> str:
        """Counts, sizes and scales, and the constraints."""
        kinds: dict[tuple[Any, ...], int] = {}
        for view in self._views:
            kinds[view.is_global, view.size, view.scale] = (
                kinds.get((view.is_global, view.size, view.scale), 0) + 1
            )
        parts = [
            f"{count} × {size} {'global' if is_global else 'local'} of {scale}"
            for (is_global, size, scale), count in kinds.items()
        ]
        changed = zip(BoxConstraints._fields, self.constraints, BoxConstraints(), strict=True)
        parts += [f"{name}={value!r}" for name, value, default in changed if value != default]
        return ", ".join(parts)
