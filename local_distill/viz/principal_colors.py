"""Patch tokens as colours: tokens that mean alike to the network look alike in the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from local_distill.errors import DataError, ShapeError
from local_distill.structures import TokenGrid
from local_distill.viz._drawing import check_count, picture_array, show
from local_distill.viz.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["principal_colors", "principal_figure"]

# The colours' ends: outliers beyond these shares of the tokens are cut off.
_LOW, _HIGH = 0.02, 0.98
# A component that spreads less than so many of the features' own size is rounding, not a finding.
_ROUNDING = 1e-6


def principal_colors(features: Tensor) -> Tensor:
    r"""The first three principal components of tokens as red, green and blue.

    .. math:: x - \bar x = U S V^\top, \quad \text{scores} = (x - \bar x) V_{:, :3}

    Each component is stretched so that its 2nd percentile over all tokens is 0 and its 98th is 1.
    A component has no sign of its own: here it is turned so that the sum of its cubed scores is
    positive. That depends on how the tokens lie to each other alone, so that a rotated or mirrored
    feature space (another step of a training, another library) gives the same colours.

    Args:
        features: (…, n, d) tokens of one or several images, which share their components.

    Returns:
        (…, n, 3) float32 in [0, 1], on the CPU. A component that is not there (constant features,
        fewer than three dimensions) is 0.5.

    Raises:
        ShapeError: fewer than two axes, no tokens, or features that are not floating point.
        DataError: NaN or infinity among the features.

    Example:
        >>> line = torch.tensor([[0.0, 0.0], [1.0, 2.0], [5.0, 10.0]])
        >>> principal_colors(line)
        tensor([[0.0000, 0.5000, 0.5000],
                [0.2000, 0.5000, 0.5000],
                [1.0000, 0.5000, 0.5000]])

    Source: DINOv2 (TMLR 2024), figure 1.
    """
    if not isinstance(features, Tensor) or features.dim() < 2 or 0 in features.shape:
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ShapeError(f"`features` must be (…, n, d) with at least one token, got {got}")
    if not features.is_floating_point():
        raise ShapeError(f"`features` must hold floating-point numbers, got {features.dtype}")
    rows = features.detach().cpu().double().flatten(0, -2)
    if not bool(rows.isfinite().all()):
        count = int((~rows.isfinite()).any(1).sum())
        raise DataError(
            f"`features`: {count} of {len(rows)} tokens hold NaN or infinity, which have no colour;"
            " look at the run's losses"
        )
    centered = rows - rows.mean(0)
    u, s, _ = torch.linalg.svd(centered, full_matrices=False)
    colors = torch.full((len(rows), 3), 0.5, dtype=torch.float64)
    least = _ROUNDING * float(rows.norm())
    for component in range(min(3, len(s))):
        if float(s[component]) > least:
            colors[:, component] = _stretch(_turned(u[:, component]))
    return colors.float().reshape(*features.shape[:-1], 3)


def _turned(scores: Tensor) -> Tensor:
    skew = scores.pow(3).sum()
    if float(skew.abs()) <= _ROUNDING * float(scores.abs().pow(3).sum()):
        skew = scores[scores.abs().argmax()]  # symmetric: any rule will do that stays the same
    return scores if float(skew) > 0 else -scores


def _stretch(scores: Tensor) -> Tensor:
    ends = torch.tensor([_LOW, _HIGH], dtype=scores.dtype)
    low, high = torch.quantile(scores, ends).tolist()
    if high <= low:  # all but a few tokens are alike
        low, high = float(scores.min()), float(scores.max())
    stretched: Tensor = ((scores - low) / (high - low)).clamp(0, 1)
    return stretched


def principal_figure(
    images: Sequence[Any],
    features: Tensor,
    grids: Sequence[TokenGrid],
) -> Figure:
    """Images and, below each, its patch tokens as colours (`principal_colors`).

    Args:
        images: one a column: (3, h, w) float in [0, 1] or uint8, or a PIL image; each as the
            network saw it, so that the tokens lie where its grid says.
        features: (images, n, d) patch tokens.
        grids: of each image.

    Returns:
        The figure; write it with ``figure.savefig("tokens.png")``.

    Raises:
        ShapeError: as many images, features and grids were not given, or grids of other sizes.
        DataError: NaN among the features, pixel values outside [0, 1].

    Example:
        >>> images = torch.rand(2, 3, 16, 24)
        >>> grid = TokenGrid.tiling(2, 3, (16, 24))
        >>> figure = principal_figure(list(images), torch.randn(2, 6, 8), [grid] * 2)
        >>> len(figure.axes)
        4
    """
    if not isinstance(features, Tensor) or features.dim() != 3 or not len(images):
        got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ShapeError(
            f"`features` must be (images, n, d) for at least one image, got {got} for "
            f"{len(images)} images"
        )
    check_count("images", images, features.shape[0])
    check_count("grids", grids, features.shape[0])
    for number, grid in enumerate(grids):
        if grid.num_tokens != features.shape[1]:
            raise ShapeError(
                f"`grids[{number}]` has {grid.rows} × {grid.cols} = {grid.num_tokens} tokens but "
                f"`features` has {features.shape[1]}"
            )
    colors = principal_colors(features).numpy()
    pictures = [picture_array(f"images[{i}]", image, 0) for i, image in enumerate(images)]
    tallest = max(picture.shape[0] / picture.shape[1] for picture in pictures)
    figure = new_figure(2.2 * len(images), 2 * 2.2 * min(tallest, 2.0) + 0.3)
    axes = figure.subplots(2, len(images), squeeze=False)
    for column, (picture, grid) in enumerate(zip(pictures, grids, strict=True)):
        height, width = picture.shape[:2]
        show(axes[0, column], picture, (0, width, height, 0))
        left, top = (o - step / 2 for o, step in zip(grid.offset, grid.stride, strict=True))
        right, bottom = left + grid.cols * grid.stride[0], top + grid.rows * grid.stride[1]
        cells = colors[column].reshape(grid.rows, grid.cols, 3)
        show(axes[1, column], cells, (left, right, bottom, top))
        # in the image's frame: where a grid does not tile the view, that shows
        axes[1, column].set_xlim(min(left, 0), max(right, width))
        axes[1, column].set_ylim(max(bottom, height), min(top, 0))
    axes[0, 0].set_ylabel("image", fontsize=9)
    axes[1, 0].set_ylabel("tokens", fontsize=9)
    return figure
