"""What a joint clustering of two views gives: which tokens make up which object."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from local_distill._check import Axes, check_floating
from local_distill._precision import at_least_float32, no_autocast

__all__ = ["Clusters"]


class Clusters(NamedTuple):
    """How the tokens of one view are shared out among k clusters that both views have in common.

    Cluster j of one view and cluster j of the other are the same object, so after pooling
    ``Matches.identity(valid)`` says which pooled feature answers which.

    Attributes:
        assignment: (b, n, k) ≥ 0, a token's part in each cluster; a cluster's parts sum to 1, or
            are all 0 where the view has none of it.
        valid: (b, k) bool, the cluster has tokens in both views; the same on both sides.

    Example:
        >>> clusters = Clusters(
        ...     assignment=torch.tensor([[[0.5, 0.0], [0.5, 0.0], [0.0, 1.0]]]),
        ...     valid=torch.tensor([[True, False]]),
        ... )
        >>> clusters.pool(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]]))
        tensor([[[2., 3.],
                 [0., 0.]]])
    """

    assignment: Tensor
    valid: Tensor

    def pool(self, features: Tensor) -> Tensor:
        """The features of each cluster: the mean of its tokens, weighted by the assignment.

        .. math:: c_k = Σ_n a_{nk} z_n / Σ_n a_{nk}

        Differentiable in ``features``. Clusters that are not valid are 0, which no matcher matches.
        A token that belongs to no valid cluster is never read, so NaN in it stays there. Computed
        in at least float32.

        Args:
            features: (b, n, d) of the same n tokens that were clustered: the same network's, or
                another's, or those before a head.

        Returns:
            (b, k, d).

        Raises:
            ShapeError: axes b or n that differ.
        """
        axes = Axes()
        axes.bind("clusters.assignment", self.assignment, "b n k")
        axes.bind("clusters.valid", self.valid, "b k")
        features = at_least_float32(
            check_floating("features", axes.bind("features", features, "b n d"))
        )
        share = torch.where(self.valid[:, None], self.assignment, 0.0).to(features.dtype)
        read = (share > 0).any(-1, keepdim=True)
        total = share.sum(1, keepdim=True)
        share = share / torch.where(total > 0, total, 1.0)
        with no_autocast(features):
            # where, not only a product: 0 · NaN is NaN
            return share.mT @ torch.where(read, features, 0.0)


torch.serialization.add_safe_globals([Clusters])
