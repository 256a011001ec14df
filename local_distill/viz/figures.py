"""What every picture starts from: figures, colours of views, images without normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from local_distill.errors import ShapeError, require_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["denormalize", "new_figure", "view_colors"]


def new_figure(width: float, height: float) -> Figure:
    """A figure outside pyplot, in inches; write it with ``figure.savefig(path)``.

    Raises:
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> new_figure(4, 3).axes
        []
    """
    figures = require_extra("matplotlib.figure", "train")
    figure: Figure = figures.Figure(figsize=(width, height), layout="constrained")
    return figure


def view_colors(count: int) -> list[tuple[float, float, float]]:
    """One colour a view, as (red, green, blue) in [0, 1]; they repeat after ten.

    Example:
        >>> len(view_colors(12)), view_colors(12)[0] == view_colors(12)[10]
        (12, True)
    """
    table = require_extra("matplotlib", "train").colormaps["tab10"].colors
    return [table[view % len(table)] for view in range(count)]


def denormalize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo a normalisation by channel: image · std + mean, clamped to [0, 1].

    Args:
        image: (…, c, h, w) normalised values.
        mean: c numbers, as they were given to the normalisation.
        std: c numbers.

    Returns:
        (…, c, h, w) in [0, 1], float32.

    Raises:
        ShapeError: the number of channels differs.

    Example:
        >>> image = torch.tensor([0.0, 2.0]).reshape(2, 1, 1)
        >>> denormalize(image, mean=(0.5, 0.5), std=(0.25, 0.2)).flatten()
        tensor([0.5000, 0.9000])
    """
    if image.dim() < 3 or not image.shape[-3] == len(mean) == len(std):
        raise ShapeError(
            f"`image` must have shape (…, c, h, w) with as many channels as `mean` ({len(mean)}) "
            f"and `std` ({len(std)}), got {tuple(image.shape)}"
        )
    scale = torch.tensor(std, dtype=torch.float32, device=image.device)[:, None, None]
    shift = torch.tensor(mean, dtype=torch.float32, device=image.device)[:, None, None]
    return (image.float() * scale + shift).clamp(0, 1)
