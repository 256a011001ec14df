"""The picture of an image's views and of their matches, geometric beside similarity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from local_distill.backbones import TimmBackbone
from local_distill.matching import NearestMatcher, SimilarityMatcher, match_views
from local_distill.structures import CropGeometry, Matcher, Tokens
from local_distill.viz.figures import denormalize
from local_distill.viz.match_figure import match_figure

__all__ = ["match_picture", "patch_tokens"]


def match_picture(
    backbone: TimmBackbone,
    source: Any,
    views: Sequence[Tensor],
    geometries: Sequence[CropGeometry],
    num_global: int,
    *,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    max_distance: float | None = 0.5,
) -> Any:
    """Draw one image's views, and which tokens of the global ones answer theirs.

    Args:
        backbone: whose features are compared; in the mode that it is in.
        source: the PIL image.
        views: (3, h, w) each, as the network takes them.
        geometries: of one image each, in view order.
        num_global: the first of the views, which the teacher sees.
        normalize: mean and standard deviation that the views were normalised with; None: views
            that do not lie in [0, 1] are stretched to it.
        max_distance: limit of the geometric match in larger cell diagonals; None: none.

    Returns:
        A matplotlib figure.
    """
    tokens, grids = [], []
    for view, geometry in zip(views, geometries, strict=True):
        grid = backbone.token_grid((int(view.shape[-2]), int(view.shape[-1])))
        batched = CropGeometry(*(part[None] for part in geometry))
        tokens.append(Tokens(patch_tokens(backbone, view[None]), batched, grid))
        grids.append(grid)
    matchers: dict[str, Matcher] = {
        "geometric": NearestMatcher(max_distance),
        "similarity": SimilarityMatcher(),
    }
    teacher = tokens[:num_global]
    return match_figure(
        source,
        [_plain(view, normalize) for view in views],
        geometries,
        grids,
        {name: match_views(matcher, tokens, teacher) for name, matcher in matchers.items()},
        cost_labels={"geometric": "distance / cell diagonal", "similarity": "1 − cosine"},
    )


@torch.no_grad()
def patch_tokens(backbone: TimmBackbone, images: Tensor) -> Tensor:
    """Patch tokens (b, n, d) of images (b, 3, h, w), float32 on the CPU."""
    like = next(backbone.parameters())
    tokens: Tensor = backbone(images.to(like)).patch_tokens
    return tokens.float().cpu()


def _plain(view: Tensor, normalize: tuple[Sequence[float], Sequence[float]] | None) -> Tensor:
    if normalize is not None:
        return denormalize(view, *normalize)
    low, high = float(view.min()), float(view.max())
    if low >= 0 and high <= 1:
        return view
    return (view - low) / (high - low)  # normalised by something that these views do not tell
