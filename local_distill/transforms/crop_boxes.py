"""Random crop boxes, as torchvision's RandomResizedCrop draws them, and where their views lie.

Plain numbers throughout: for a few numbers per view, a tensor operation costs more than its sum.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from local_distill.structures import CropGeometry

__all__ = ["CropBox", "box_geometries", "sample_box"]

_ATTEMPTS = 10  # after which the crop is a central one, as in torchvision


class CropBox(NamedTuple):
    """A rectangle of source pixels, and whether its view is mirrored.

    Attributes:
        top: first row.
        left: first column.
        height: number of rows.
        width: number of columns.
        hflip: mirrored left to right, after the resize.
        vflip: mirrored top to bottom, after the resize.
    """

    top: int
    left: int
    height: int
    width: int
    hflip: bool = False
    vflip: bool = False


def sample_box(
    draws: Iterator[float],
    source_size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> CropBox:
    """A box of random area and aspect ratio, at a random place.

    The distribution is that of ``torchvision.transforms.v2.RandomResizedCrop``: area uniform in
    ``scale``, aspect uniform in log ``ratio``, ten attempts to fit it in, else the largest central
    crop within ``ratio``.

    Args:
        draws: uniform numbers in [0, 1); two are taken per attempt and two for the place.
        source_size: (height, width) in pixels.
        scale: least and largest share of the source's area.
        ratio: least and largest width / height.

    Returns:
        The box, without flips.

    Example:
        >>> sample_box(iter([0.5, 0.5, 0.0, 0.999]), (10, 20), (0.5, 0.5), (1.0, 1.0))
        CropBox(top=0, left=10, height=10, width=10, hflip=False, vflip=False)
    """
    rows, cols = source_size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_ATTEMPTS):
        area = rows * cols * (scale[0] + (scale[1] - scale[0]) * next(draws))
        aspect = math.exp(low + (high - low) * next(draws))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= cols and 0 < height <= rows:
            top = int(next(draws) * (rows - height + 1))
            left = int(next(draws) * (cols - width + 1))
            return CropBox(top, left, height, width)
    width = min(cols, max(1, round(rows * ratio[1])))
    height = min(rows, max(1, round(cols / ratio[0])))
    return CropBox((rows - height) // 2, (cols - width) // 2, height, width)


def box_geometries(
    boxes: Sequence[CropBox],
    view_sizes: Sequence[tuple[int, int]],
    source_size: tuple[int, int],
) -> list[CropGeometry]:
    """The geometries of crops that were resized to ``view_sizes`` and then maybe flipped.

    The same numbers as `from_box` gives, or a `GeometryTensor` sent through crop, resize and flip,
    for all views of an image at once.

    Args:
        boxes: one per view.
        view_sizes: (height, width) per view.
        source_size: (height, width).

    Returns:
        One `CropGeometry` per view: float32 matrix, int32 sizes.

    Example:
        >>> box_geometries([CropBox(2, 4, 10, 20, hflip=True)], [(5, 5)], (20, 30))[0].matrix
        tensor([[-4.,  0., 24.],
                [ 0.,  2.,  2.],
                [ 0.,  0.,  1.]])
    """
    # Typed arrays, which a tensor takes over as they are: a list it would read number by number.
    numbers, sizes = array("f"), array("i")
    for (top, left, height, width, hflip, vflip), size in zip(boxes, view_sizes, strict=True):
        x_step, y_step = width / size[1], height / size[0]
        numbers.extend((-x_step, 0.0, left + width) if hflip else (x_step, 0.0, left))
        numbers.extend((0.0, -y_step, top + height) if vflip else (0.0, y_step, top))
        numbers.extend((0.0, 0.0, 1.0))
        sizes.extend(size)
    sizes.extend(source_size)
    matrices = torch.frombuffer(numbers, dtype=torch.float32).view(-1, 3, 3).unbind()
    *views, source = torch.frombuffer(sizes, dtype=torch.int32).view(-1, 2).unbind()
    return [
        CropGeometry(matrix, view, source) for matrix, view in zip(matrices, views, strict=True)
    ]
