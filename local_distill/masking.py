"""Which tokens a student does not get to see: random blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from local_distill._check import check_at_least, check_fraction, check_positive
from local_distill.errors import ConfigError

__all__ = ["random_block_mask"]

# A block that does not fit is drawn anew this often before the mask is left as it is.
_TRIES = 10


def random_block_mask(
    batch: int,
    rows: int,
    cols: int,
    *,
    ratio_ranges: Sequence[tuple[float, float]] = ((0.0, 0.0), (0.1, 0.5)),
    aspect_range: tuple[float, float] = (0.3, 1 / 0.3),
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mask blocks of tokens, anew for each image.

    For an image one of ``ratio_ranges`` is picked, and a ratio ρ drawn evenly from it. Rectangles
    are then laid at random, each of an area between ⌊min(rows, cols)/3⌋² and what is left to mask,
    of an aspect ratio drawn evenly on a log scale, until ρ·rows·cols tokens are masked or none fits
    in ten tries.

    Convention: never more than ρ·rows·cols tokens are masked, and mostly a few less. A rectangle is
    shorter than the grid in rows and in columns, but on a grid of one row or one column.

    Args:
        batch: b, number of images.
        rows: rows of tokens.
        cols: columns of tokens.
        ratio_ranges: (least, most) share of tokens to mask, each as likely; the default is iBOT's:
            half of the images keep all tokens, the others lose 10 to 50 %.
        aspect_range: least and most height over width.
        generator: on the CPU; None: torch's own.

    Returns:
        (b, rows·cols) bool on the CPU, row-major: True where a token is masked, as
        `MaskedDistillationLoss` takes it.

    Raises:
        ConfigError: a size below 1 (``batch``: below 0), no range, a range that runs backwards,
            a ratio outside [0, 1], an aspect ratio not above 0.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> masked = random_block_mask(2, 5, 8, ratio_ranges=[(0.3, 0.3)], generator=g)
        >>> masked.shape, bool((masked.sum(1) <= 12).all())
        (torch.Size([2, 40]), True)

    Source: "BEiT: BERT Pre-Training of Image Transformers" (ICLR 2022), algorithm 1; ratios of
    "iBOT: Image BERT Pre-Training with Online Tokenizer" (ICLR 2022), section 3.2.

    Deviations from the authors' code: it never masks anything on a grid of one row or column; it
    draws from Python's generator, here the same numbers are drawn from torch's.
    """
    check_at_least("batch", batch, 0)
    check_at_least("rows", rows, 1)
    check_at_least("cols", cols, 1)
    if not ratio_ranges:
        raise ConfigError("`ratio_ranges` is empty; give at least one (least, most)")
    for low, high in ratio_ranges:
        check_fraction("ratio_ranges", low)
        check_fraction("ratio_ranges", high)
        _check_order("ratio_ranges", low, high)
    for end in aspect_range:
        check_positive("aspect_range", end)
    _check_order("aspect_range", *aspect_range)
    masks = torch.zeros(batch, rows, cols, dtype=torch.bool)
    for hidden in masks:
        which, share = torch.rand(2, generator=generator, device="cpu").tolist()
        low, high = ratio_ranges[int(which * len(ratio_ranges))]
        left = (low + share * (high - low)) * rows * cols
        while left > 0:
            added = _mask_block(hidden, left, aspect_range, generator)
            if not added:
                break
            left -= added
    return masks.flatten(1)


def _mask_block(
    hidden: Tensor,
    left: float,
    aspect_range: tuple[float, float],
    generator: torch.Generator | None,
) -> int:
    """Mask one more rectangle of ``hidden`` (rows, cols), in place, and say how much it added."""
    rows, cols = hidden.shape
    least = (min(rows, cols) // 3) ** 2
    low, high = (math.log(end) for end in aspect_range)
    for _ in range(_TRIES):
        draws = torch.rand(4, generator=generator, device="cpu", dtype=torch.float64).tolist()
        area = least + draws[0] * (left - least)
        aspect = math.exp(low + draws[1] * (high - low))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= max(rows, 2) or width >= max(cols, 2):
            continue
        top = int(draws[2] * (rows - height + 1))
        start = int(draws[3] * (cols - width + 1))
        block = hidden[top : top + height, start : start + width]
        added = block.numel() - int(block.sum())
        if 0 < added <= left:
            block.fill_(True)
            return added
    return 0


def _check_order(name: str, low: float, high: float) -> None:
    if low > high:
        raise ConfigError(f"`{name}` runs from {low!r} down to {high!r}; give (least, most)")
