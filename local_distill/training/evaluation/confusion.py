"""Confusion matrices and the mean intersection over union."""

from __future__ import annotations

import torch
from torch import Tensor

from local_distill._check import check_at_least
from local_distill.errors import ShapeError

__all__ = ["IGNORED", "confusion_matrix", "mean_iou", "pixel_accuracy"]

IGNORED = 255
"""The class id of pixels that take no part."""


def confusion_matrix(predicted: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """How often each class was taken for each.

    Args:
        predicted: class ids below ``num_classes``, any shape.
        target: class ids of the same shape; where they are 255, nothing is counted.
        num_classes: c.

    Returns:
        (c, c) int64: row is the true class, column the predicted one. Matrices of several batches
        may be added.

    Raises:
        ShapeError: shapes that differ, or ids of ``num_classes`` and above.
        ConfigError: no class.

    Example:
        >>> confusion_matrix(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 255]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    c = check_at_least("num_classes", num_classes, 1)
    if predicted.shape != target.shape:
        raise ShapeError(
            f"`predicted` is {tuple(predicted.shape)} but `target` is {tuple(target.shape)}"
        )
    kept = target != IGNORED
    rows, columns = target[kept].long(), predicted[kept].long()
    for name, ids in (("target", rows), ("predicted", columns)):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < c:
            raise ShapeError(
                f"`{name}` holds ids from {int(ids.min())} to {int(ids.max())}, but `num_classes` "
                f"is {c}: ids run from 0 to {c - 1}, and 255 in `target` is ignored"
            )
    return torch.bincount(rows * c + columns, minlength=c * c).view(c, c)


def mean_iou(confusion: Tensor) -> float:
    r"""Mean over classes of intersection over union, pooled over all pixels.

    .. math:: \text{mean}_c\; TP_c / (TP_c + FP_c + FN_c)

    Convention: a class that neither occurs nor is ever predicted takes no part; one that is
    predicted and does not occur counts as 0.

    Args:
        confusion: (c, c), of `confusion_matrix`.

    Returns:
        In [0, 1]; 0 where nothing was counted.

    Example:
        >>> mean_iou(torch.tensor([[2, 1, 0], [1, 4, 0], [0, 0, 0]]))  # (2/4 + 4/6) / 2
        0.5833333333333333
    """
    counted = confusion.double()
    hits = counted.diagonal()
    union = counted.sum(0) + counted.sum(1) - hits
    seen = union > 0
    return float((hits[seen] / union[seen]).mean()) if bool(seen.any()) else 0.0


def pixel_accuracy(confusion: Tensor) -> float:
    """Share of what was counted that is right; 0 where nothing was.

    Example:
        >>> pixel_accuracy(torch.tensor([[2, 1], [1, 4]]))
        0.75
    """
    return float(confusion.diagonal().sum() / confusion.sum().clamp_min(1))
