"""CrIBo's clusters: both views' tokens clustered together in a fixed number of clusters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from local_distill._check import check_at_least
from local_distill._precision import no_autocast
from local_distill.kernels import block_length
from local_distill.kernels.log_sinkhorn import log_uniform
from local_distill.matching._joint_tokens import (
    CostScale,
    JointTokens,
    check_clustering,
    initial_tokens,
    no_clusters,
    split_views,
    transport,
)
from local_distill.matching._unit_features import unit_features
from local_distill.matching.clusters import Clusters
from local_distill.structures import Tokens

__all__ = ["RefinedJointClusters"]

# Added to every cluster's number of tokens, so that an empty one keeps a mass. CrIBo's.
_EMPTY_COUNT = 1e-2


class RefinedJointClusters(nn.Module):
    """Cluster the tokens of two views together in a fixed number of clusters, in rounds.

    .. math:: P = argmin_P <P, C> - ε H(P), C_{nk} = -cos(z_n, c_k) + λ d(n, k) / max d

    with C brought to [0, 1] and d(n, k) the distance from token n to the nearest *other* token that
    cluster k has, in the source. Each round: transport; each token to its largest part; the
    clusters' masses become their shares of the tokens; their centroids the tokens' means.

    Convention: as `JointClusters` (places, parts going together, no gradient, no host sync). A
    token's part in its cluster is 1 / the number of its view's tokens there, so that pooling takes
    plain means. k = ``num_clusters``.

    Args:
        num_clusters: k. CrIBo: 32 on ImageNet, 64 on COCO.
        rounds: how many times the clusters are formed.
        epsilon: ε, weight of the entropy, for costs in [0, 1].
        sinkhorn_iterations: steps of each side; the clusters' come last.
        position_weight: λ; 0 asks for no geometry. CrIBo: 1 on ImageNet, 2 on COCO. May be set anew
            as training goes on.
        update_masses: whether clusters get masses by their size after each round; else all stay
            equal.
        cost_scale: ``"image"`` or ``"batch"`` (as published), see `JointClusters`.

    Raises:
        ConfigError: a setting outside of its range.

    Example:
        >>> left_right = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]).expand(2, 4, 2)
        >>> joint = RefinedJointClusters(num_clusters=2, position_weight=0.0)
        >>> one, two = joint(
        ...     Tokens(left_right), Tokens(left_right), initial=torch.tensor([[0, 7], [3, 1]])
        ... )
        >>> one.assignment[1]  # the second image's first cluster began at token 3
        tensor([[0.0000, 0.5000],
                [0.0000, 0.5000],
                [0.5000, 0.0000],
                [0.5000, 0.0000]])
        >>> two.pool(left_right)[1]
        tensor([[0., 1.],
                [1., 0.]])

    Source: "CrIBo: Self-Supervised Learning via Cross-Image Object-Level Bootstrapping" (ICLR 2024,
    arXiv 2310.07855), joint-space clustering; order of steps and defaults from the authors' code.

    Deviations from the authors' code: as `JointClusters` does from CrOC's. The code's unused switch
    to soft assignments is not offered. An empty cluster, or a token alone in its cluster, costs the
    image's mean distance, as in the code.
    """

    def __init__(
        self,
        num_clusters: int = 32,
        *,
        rounds: int = 5,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 5,
        position_weight: float = 1.0,
        update_masses: bool = True,
        cost_scale: CostScale = "image",
    ) -> None:
        super().__init__()
        self.num_clusters = check_at_least("num_clusters", num_clusters, 1)
        self.rounds = check_at_least("rounds", rounds, 1)
        self.position_weight, self.epsilon = check_clustering(
            position_weight, epsilon, sinkhorn_iterations, cost_scale
        )
        self.sinkhorn_iterations = sinkhorn_iterations
        self.update_masses = bool(update_masses)
        self.cost_scale: CostScale = cost_scale

    @torch.no_grad()
    def forward(
        self,
        student: Tokens,
        teacher: Tokens,
        *,
        initial: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Clusters, Clusters]:
        """Cluster two views of the same images.

        Args:
            student: `Tokens` of one view, features (b, s, d); with geometry and grid unless the
                position weight is 0.
            teacher: `Tokens` of the other view, features (b, t, d).
            initial: (b, num_clusters) int64 tokens to start from, the student's first, then the
                teacher's. None: drawn without replacement, all alike.
            generator: for the draw, on the features' device.

        Returns:
            The `Clusters` of the student's and of the teacher's view.

        Raises:
            ShapeError: axes that differ, no features, or no geometry where it is needed.
            GeometryError: as `nearest_matches`.
        """
        tokens = JointTokens.of(student, teacher, self.position_weight)
        b, n = tokens.valid.shape
        if b == 0 or n == 0:
            return no_clusters(tokens, self.num_clusters)
        dtype, k = tokens.features.dtype, self.num_clusters
        log_tokens = log_uniform(tokens.valid, dtype)
        index, exists = initial_tokens(log_tokens, k, initial, generator)
        log_clusters = log_uniform(exists, dtype)
        live = tokens.valid[..., None] & exists[:, None]
        centroids = tokens.features.gather(
            1, index[..., None].expand(-1, -1, tokens.features.shape[2])
        )
        distances = _to_tokens(tokens.positions, index)
        members = live
        for number in range(self.rounds):
            plan, _cost = transport(
                tokens,
                centroids,
                _with_mean(distances, live),
                log_tokens,
                log_clusters,
                position_weight=self.position_weight,
                epsilon=self.epsilon,
                sinkhorn_iterations=self.sinkhorn_iterations,
                cost_scale=self.cost_scale,
            )
            label = plan.argmax(-1)
            members = live & (label[..., None] == torch.arange(k, device=label.device))
            if number == self.rounds - 1:
                break
            if self.update_masses:
                counts = torch.where(exists, members.sum(1) + _EMPTY_COUNT, 0.0).to(dtype)
                shares = counts / counts.sum(-1, keepdim=True).clamp_min(_EMPTY_COUNT)
                log_clusters = shares.log()
            with no_autocast(plan):
                centroids = unit_features(members.to(dtype).mT @ tokens.features)[0]
            # the label k, of no cluster, for tokens that are not valid
            distances = _to_members(tokens.positions, torch.where(members.any(-1), label, k), k)
        parts = members.to(dtype)
        return split_views(parts[:, : tokens.s], parts[:, tokens.s :])

    def extra_repr(self) -> str:
        """The settings, for print."""
        return (
            f"num_clusters={self.num_clusters}, rounds={self.rounds}, epsilon={self.epsilon}, "
            f"sinkhorn_iterations={self.sinkhorn_iterations}, "
            f"position_weight={self.position_weight}, update_masses={self.update_masses}, "
            f"cost_scale={self.cost_scale!r}"
        )


def _to_tokens(positions: Tensor | None, index: Tensor) -> Tensor | None:
    """(b, n, k) from each token to the one token of each cluster; +inf where they coincide."""
    if positions is None:
        return None
    return _distances(positions, positions.gather(1, index[..., None].expand(-1, -1, 2)))


def _to_members(positions: Tensor | None, label: Tensor, k: int) -> Tensor | None:
    """(b, n, k) from each token to its nearest neighbour in each cluster; +inf for none."""
    if positions is None:
        return None
    b, n = label.shape
    # (n, n): differences in x and y, their squares, the distance and the labels
    block = block_length(n * n * positions.element_size() * 6, positions.device)
    nearest = []
    for start in range(0, b, block):
        places, labels = positions[start : start + block], label[start : start + block]
        between = _distances(places, places)
        least = torch.full_like(between[..., :1], torch.inf).expand(-1, -1, k + 1)
        labels = labels[:, None].expand_as(between)
        nearest.append(least.scatter_reduce(2, labels, between, "amin")[..., :k])
    return torch.cat(nearest)


def _distances(positions: Tensor, others: Tensor) -> Tensor:
    """(b, n, m) in source pixels; +inf for the same place: a token is no neighbour of itself."""
    across, down = (positions[:, :, None] - others[:, None]).unbind(-1)
    between = (across.square() + down.square()).sqrt()
    return torch.where(between > 0, between, torch.inf)


def _with_mean(distances: Tensor | None, live: Tensor) -> Tensor | None:
    """The distances, and the image's mean where there is none (which counts as 0 in the mean)."""
    if distances is None:
        return None
    found = distances < torch.inf
    total = torch.where(live & found, distances, 0.0).sum((1, 2), keepdim=True)
    mean = total / live.sum((1, 2), keepdim=True).clamp_min(1)
    return torch.where(found, distances, mean)
