"""Patch tokens tested one by one: retrieval by k-NN, and linear segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from local_distill._check import Axes
from local_distill.errors import ShapeError
from local_distill.kernels.byte_budget import block_length, slices
from local_distill.structures import TokenGrid
from local_distill.training.evaluation.confusion import (
    IGNORED,
    confusion_matrix,
    mean_iou,
    pixel_accuracy,
)
from local_distill.training.evaluation.knn import knn_predictions
from local_distill.training.evaluation.linear_probe import fit_linear
from local_distill.training.evaluation.token_maps import upsample_scores

__all__ = ["DenseScores", "linear_segmentation", "majority_scores", "token_retrieval"]


class DenseScores(NamedTuple):
    """How well classes of tokens or pixels are told.

    Attributes:
        accuracy: share that is right, in [0, 1]; background usually dominates it.
        miou: mean over classes of intersection over union, in [0, 1]; see `mean_iou`.
        confusion: (c, c) int64, rows are the true classes.
    """

    accuracy: float
    miou: float
    confusion: Tensor

    @classmethod
    def of(cls, confusion: Tensor) -> DenseScores:
        """Both numbers of a confusion matrix."""
        return cls(pixel_accuracy(confusion), mean_iou(confusion), confusion)


def token_retrieval(
    train_tokens: Tensor,
    train_labels: Tensor,
    test_tokens: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temp: float = 0.07,
    num_classes: int | None = None,
) -> DenseScores:
    """Each tested patch token's class by the vote of its k nearest among other images' tokens.

    Args:
        train_tokens: (n, d) tokens of the voting images.
        train_labels: (n,) class at each one's centre; those of 255 take no part.
        test_tokens: (m, d), of other images.
        test_labels: (m,); those of 255 take no part.
        k: neighbours; see `knn_predictions`.
        temp: temperature of their weights.
        num_classes: class ids there are; None: the largest label's and one.

    Returns:
        `DenseScores` over tokens.

    Raises:
        ShapeError, ConfigError: as `knn_predictions`.

    Example:
        >>> tokens = torch.eye(3)
        >>> token_retrieval(tokens, torch.tensor([0, 1, 1]), tokens, torch.tensor([0, 1, 255]), k=1)
        DenseScores(accuracy=1.0, miou=1.0, confusion=tensor([[1, 0],
                [0, 1]]))

    Source: the dense nearest-neighbour retrieval of "Towards In-context Scene Understanding"
    (NeurIPS 2023), with one label a token instead of a patch's label map.
    """
    train_tokens, train_labels = _counted("train", train_tokens, train_labels)
    test_tokens, test_labels = _counted("test", test_tokens, test_labels)
    c = _class_count(num_classes, train_labels, test_labels)
    found = knn_predictions(train_tokens, train_labels, test_tokens, ks=[k], temp=temp)[0]
    return DenseScores.of(confusion_matrix(found, test_labels, c))


def linear_segmentation(
    train_tokens: Tensor,
    train_labels: Tensor,
    test_tokens: Tensor,
    test_masks: Tensor,
    grid: TokenGrid,
    view_size: tuple[int, int],
    *,
    strengths: Sequence[float] = (0.01, 0.1, 1.0),
    num_classes: int | None = None,
    seed: int = 0,
) -> DenseScores:
    """A linear classifier of patch tokens, its logits upsampled to the mask, pixel by pixel.

    The classifier (`fit_linear`) learns the class at the tokens' centres; that is where
    `upsample_scores` puts their logits. It is scored on every pixel of the masks.

    Args:
        train_tokens: (n, d) tokens of the training images.
        train_labels: (n,) class at each one's centre; those of 255 take no part.
        test_tokens: (m, rows·cols, d), all tokens of the tested images.
        test_masks: (m, h, w) class ids; pixels of 255 take no part.
        grid: where the tokens lie in the view.
        view_size: (height, width) in pixels of the view, which shows the same as the mask.
        strengths: see `fit_linear`.
        num_classes: class ids there are; None: the largest label's and one.
        seed: see `fit_linear`.

    Returns:
        `DenseScores` over pixels.

    Raises:
        ShapeError: sizes that do not belong together.
        DataError: tokens of one class alone.

    Example:
        >>> tokens = torch.eye(2).repeat(4, 1)  # class 0 and 1 in turn
        >>> masks = torch.tensor([[[0, 0, 1, 1]]])
        >>> grid = TokenGrid.tiling(1, 2, view_size=(8, 16))
        >>> labels = torch.tensor([0, 1] * 4)
        >>> linear_segmentation(tokens, labels, torch.eye(2)[None], masks, grid, (8, 16)).miou
        1.0
    """
    train_tokens, train_labels = _counted("train", train_tokens, train_labels)
    axes = Axes()
    axes.bind("test_tokens", test_tokens, "m t d")
    axes.bind("test_masks", test_masks, "m h w")
    c = _class_count(num_classes, train_labels, test_masks)
    fitted = fit_linear(train_tokens, train_labels, strengths=strengths, seed=seed)
    height, width = int(test_masks.shape[1]), int(test_masks.shape[2])
    block = block_length(4 * 3 * c * height * width, test_tokens.device)
    total = torch.zeros(c, c, dtype=torch.int64)
    for part in slices(len(test_tokens), block):
        scores = upsample_scores(fitted.scores(test_tokens[part]), grid, view_size, (height, width))
        total += confusion_matrix(fitted.classes[scores.argmax(1)], test_masks[part], c)
    return DenseScores.of(total)


def majority_scores(
    train_labels: Tensor, test_labels: Tensor, *, num_classes: int | None = None
) -> DenseScores:
    """What it scores to answer the commonest training class everywhere: the level of no features.

    Args:
        train_labels: class ids, any shape; 255 takes no part.
        test_labels: class ids, any shape; 255 takes no part.
        num_classes: class ids there are; None: the largest label's and one.

    Returns:
        `DenseScores`.

    Example:
        >>> majority_scores(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 255, 1])).accuracy
        0.3333333432674408
    """
    c = _class_count(num_classes, train_labels, test_labels)
    common = torch.bincount(train_labels[train_labels != IGNORED].long(), minlength=c).argmax()
    return DenseScores.of(
        confusion_matrix(common.expand(test_labels.shape).to(test_labels.device), test_labels, c)
    )


def _counted(name: str, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    axes = Axes()
    axes.bind(f"{name}_tokens", tokens, "n d")
    axes.bind(f"{name}_labels", labels, "n")
    kept = labels != IGNORED
    if not bool(kept.any()):
        raise ShapeError(f"`{name}_labels` has no label other than 255, the ignored one")
    return tokens[kept], labels[kept].long()


def _class_count(given: int | None, *labels: Tensor) -> int:
    if given is not None:
        return given
    kept = [part[part != IGNORED] for part in labels]
    return 1 + max((int(part.max()) for part in kept if part.numel()), default=0)
