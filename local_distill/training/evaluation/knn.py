"""Weighted k-nearest-neighbour votes on frozen features: nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from local_distill._check import check_at_least, check_positive
from local_distill.errors import ConfigError, ShapeError
from local_distill.kernels.byte_budget import block_length, slices

__all__ = ["knn_accuracies", "knn_accuracy", "knn_predictions"]


def knn_predictions(
    train_features: Tensor,
    train_labels: Sequence[int] | Tensor,
    test_features: Tensor,
    *,
    ks: Sequence[int] = (20,),
    temp: float = 0.07,
) -> Tensor:
    r"""What the k nearest neighbours vote for, for several k at once.

    .. math:: \hat y = \arg\max_c \sum_{i \in N_k,\, y_i = c} \exp(\cos(x, x_i) / \tau)

    Convention: of labels with equal votes the lower one wins. The table of similarities is made in
    blocks, so that many test samples need no more memory than a few.

    Args:
        train_features: (n, d), those that vote.
        train_labels: (n,).
        test_features: (m, d).
        ks: numbers of neighbours, each at least 1; those above n count as n.
        temp: temperature of the weights, above 0.

    Returns:
        (len(ks), m) int64 labels.

    Raises:
        ShapeError: features that are not (n, d), of other dimensions, or labels of other lengths.
        ConfigError: no k, one below 1, a temperature not above 0.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> knn_predictions(features, [7, 3, 3], torch.tensor([[2.0, 0.1]]), ks=[1, 3], temp=1.0)
        tensor([[7],
                [3]])

    Source: "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018);
    DINO (ICCV 2021).
    """
    known = _labels("train_features", train_features, train_labels)
    check_samples("test_features", test_features, len(test_features))
    check_dimensions(train_features, test_features)
    check_positive("temp", temp)
    if len(ks) == 0:
        raise ConfigError("`ks` is empty; give at least one number of neighbours, such as 20")
    n = len(train_features)
    counts = [min(check_at_least("k", k, 1), n) for k in ks]
    voters = F.normalize(train_features.float(), dim=1)
    # numbered 0, 1, ... without gaps, so that a vote is a sum into a column
    names, columns = torch.unique(known.to(voters.device), return_inverse=True)
    block = block_length(4 * 3 * n, voters.device)
    found: list[Tensor] = []
    tested = F.normalize(test_features.float(), dim=1)
    for rows in slices(len(tested), block):
        part = tested[rows]
        cosine, index = (part @ voters.T).topk(max(counts), dim=1)
        # the largest is taken off, a common factor: no vote underflows
        weight = ((cosine - cosine[:, :1]) / temp).exp()
        column = columns[index]
        votes = [
            weight.new_zeros(len(part), len(names)).scatter_add_(1, column[:, :k], weight[:, :k])
            for k in counts
        ]
        found.append(torch.stack([names[vote.argmax(1)] for vote in votes]))
    return torch.cat(found, 1)


def knn_accuracies(
    train_features: Tensor,
    train_labels: Sequence[int] | Tensor,
    test_features: Tensor,
    test_labels: Sequence[int] | Tensor,
    *,
    ks: Sequence[int] = (1, 5, 20),
    temp: float = 0.07,
) -> dict[int, float]:
    """Top-1 accuracy of `knn_predictions` for several k: one search serves them all.

    Args:
        train_features: (n, d), those that vote.
        train_labels: (n,).
        test_features: (m, d).
        test_labels: (m,).
        ks: numbers of neighbours, each at least 1; those above n count as n.
        temp: temperature of the weights, above 0.

    Returns:
        {k: share of the test samples that are right, in [0, 1]}.

    Raises:
        ShapeError, ConfigError: as `knn_predictions`.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> test = torch.tensor([[2.0, 0.1]])
        >>> knn_accuracies(features, [7, 3, 3], test, [7], ks=[1, 3], temp=1.0)
        {1: 1.0, 3: 0.0}
    """
    truth = _labels("test_features", test_features, test_labels)
    found = knn_predictions(train_features, train_labels, test_features, ks=ks, temp=temp)
    right = (found == truth.to(found.device)).float().mean(1).tolist()
    return dict(zip(ks, right, strict=True))


def knn_accuracy(
    train_features: Tensor,
    train_labels: Sequence[int] | Tensor,
    test_features: Tensor,
    test_labels: Sequence[int] | Tensor,
    *,
    k: int = 20,
    temp: float = 0.07,
) -> float:
    """Top-1 accuracy of a weighted k-nearest-neighbour vote: no training, so it shows the features.

    Each of the k nearest by cosine votes for its label with exp(cos / temp).

    Args:
        train_features: (n, d), those that vote.
        train_labels: (n,).
        test_features: (m, d).
        test_labels: (m,).
        k: neighbours; at most n.
        temp: temperature of the weights, above 0.

    Returns:
        Share of the test samples that are right, in [0, 1].

    Raises:
        ShapeError: features that are not (n, d), of other dimensions, or labels of other lengths.
        ConfigError: k below 1, a temperature not above 0.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> knn_accuracy(features, [0, 0, 1], torch.tensor([[2.0, 0.1], [0.1, 3.0]]), [0, 1], k=1)
        1.0

    Source: "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018);
    DINO (ICCV 2021).
    """
    return knn_accuracies(
        train_features, train_labels, test_features, test_labels, ks=[k], temp=temp
    )[k]


def check_samples(name: str, features: Tensor, count: int) -> None:
    """Refuse what is not (n, d) with n labels, n at least 1."""
    if features.dim() != 2 or features.shape[0] != count or count == 0:
        raise ShapeError(
            f"`{name}` must be (n, d) with n ≥ 1 labels, got {tuple(features.shape)} and "
            f"{count} labels"
        )


def check_dimensions(train_features: Tensor, test_features: Tensor) -> None:
    """Refuse features of two models."""
    if train_features.shape[1] != test_features.shape[1]:
        raise ShapeError(
            f"axis `d` is {train_features.shape[1]} in `train_features` but "
            f"{test_features.shape[1]} in `test_features`"
        )


def _labels(name: str, features: Tensor, labels: Sequence[int] | Tensor) -> Tensor:
    check_samples(name, features, len(labels))
    return torch.as_tensor(labels, dtype=torch.int64)
