"""Accuracy by layer: how well an early exit would do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from local_distill.errors import ShapeError
from local_distill.training.evaluation.knn import knn_accuracy
from local_distill.training.evaluation.linear_probe import linear_probe

__all__ = ["layer_accuracies"]


def layer_accuracies(
    train_layers: Sequence[Tensor],
    train_labels: Tensor,
    test_layers: Sequence[Tensor],
    test_labels: Tensor,
    *,
    linear: bool = False,
    k: int = 20,
    temp: float = 0.07,
    seed: int = 0,
) -> list[float]:
    """k-NN or linear accuracy of each layer's features: the "early exit" curve.

    Args:
        train_layers: by layer (n, d_l).
        train_labels: (n,).
        test_layers: by layer (m, d_l).
        test_labels: (m,).
        linear: a linear probe (`linear_probe`) instead of the k-NN vote (`knn_accuracy`).
        k: neighbours.
        temp: temperature of their weights.
        seed: of the probe's split.

    Returns:
        Accuracies in [0, 1], the first layer first.

    Raises:
        ShapeError: another number of layers to be tested, or features that do not fit.

    Example:
        >>> import torch
        >>> flat, told = torch.ones(4, 1), torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> layer_accuracies([flat, told], labels, [flat, told], labels, k=1)
        [0.5, 1.0]

    Source: "Self-Distilled Self-supervised Representation Learning" (WACV 2023).
    """
    if len(train_layers) != len(test_layers):
        raise ShapeError(
            f"`train_layers` has {len(train_layers)} layers but `test_layers` {len(test_layers)}"
        )
    accuracies = []
    for voters, tested in zip(train_layers, test_layers, strict=True):
        if linear:
            probe = linear_probe(voters, train_labels, tested, test_labels, seed=seed)
            accuracies.append(probe.accuracy)
        else:
            accuracies.append(
                knn_accuracy(voters, train_labels, tested, test_labels, k=k, temp=temp)
            )
    return accuracies
