"""Between tokens and the pixels of a class mask."""

from __future__ import annotations

import torch
from torch import Tensor

from local_distill._check import Axes
from local_distill.errors import ShapeError
from local_distill.geometry import grid_points
from local_distill.structures import TokenGrid

__all__ = ["token_labels", "upsample_scores"]


def token_labels(masks: Tensor, grid: TokenGrid, view_size: tuple[int, int]) -> Tensor:
    """The class at each token's centre.

    Args:
        masks: (n, h, w) class ids; a size other than the view's is one that shows the same.
        grid: where the tokens lie in the view.
        view_size: (height, width) in pixels.

    Returns:
        (n, rows·cols), in the masks' dtype.

    Raises:
        ShapeError: masks that are not (n, h, w).

    Example:
        >>> masks = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]]])
        >>> token_labels(masks, TokenGrid.tiling(1, 2, view_size=(4, 8)), (4, 8))
        tensor([[0, 1]])
    """
    Axes().bind("masks", masks, "n h w")
    points = grid_points(grid, masks.device, torch.float64)
    # a view pixel's place in the mask, which may be of another size
    scale = points.new_tensor([masks.shape[2] / view_size[1], masks.shape[1] / view_size[0]])
    x, y = (points * scale).long().unbind(-1)
    return masks[:, y.clamp(0, masks.shape[1] - 1), x.clamp(0, masks.shape[2] - 1)]


def upsample_scores(
    scores: Tensor, grid: TokenGrid, view_size: tuple[int, int], mask_size: tuple[int, int]
) -> Tensor:
    """Scores of tokens, bilinearly at every pixel of a mask; constant beyond the outer centres.

    Convention: between the tokens' true centres. Where cells tile the view this is
    ``torch.nn.functional.interpolate(..., mode="bilinear", align_corners=False)``; a ResNet's
    centres lie elsewhere, and interpolate would shift its map by half a cell.

    Args:
        scores: (n, rows·cols, c).
        grid: where the tokens lie in the view.
        view_size: (height, width) in pixels.
        mask_size: (height, width) of the mask, which shows the same as the view.

    Returns:
        (n, c, height, width) of the mask.

    Raises:
        ShapeError: another number of tokens than the grid has.

    Example:
        >>> grid = TokenGrid.tiling(1, 2, view_size=(4, 8))
        >>> scores = torch.tensor([[[0.0], [4.0]]])
        >>> upsample_scores(scores, grid, (4, 8), (1, 8)).flatten()
        tensor([0.0000, 0.0000, 0.5000, 1.5000, 2.5000, 3.5000, 4.0000, 4.0000])
    """
    Axes().bind("scores", scores, "n t c")
    if scores.shape[1] != grid.num_tokens:
        raise ShapeError(
            f"`scores` has {scores.shape[1]} tokens but `grid` has {grid.rows} × {grid.cols}"
        )

    def weights(count: int, axis: int, stride: float, offset: float) -> Tensor:
        pixels = torch.arange(mask_size[axis], dtype=torch.float64) + 0.5
        places = (pixels * view_size[axis] / mask_size[axis] - offset) / stride
        apart = (places.clamp(0, count - 1)[:, None] - torch.arange(count)).abs()
        return (1 - apart).clamp_min(0).to(scores)

    rows = weights(grid.rows, 0, grid.stride[1], grid.offset[1])
    cols = weights(grid.cols, 1, grid.stride[0], grid.offset[0])
    maps = scores.transpose(1, 2).reshape(len(scores), -1, grid.rows, grid.cols)
    upsampled: Tensor = rows @ maps @ cols.T
    return upsampled
