"""What the joint clusterings share: both views' tokens in one row, and tokens against centroids."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from local_distill._check import check_at_least, check_positive, check_weight, values_visible
from local_distill._geometric_inputs import geometric_inputs
from local_distill._precision import no_autocast
from local_distill.errors import ConfigError, ShapeError
from local_distill.geometry import wide_centers
from local_distill.kernels.log_sinkhorn import log_sinkhorn
from local_distill.matching._inputs import feature_inputs
from local_distill.matching._unit_features import unit_side
from local_distill.matching.clusters import Clusters
from local_distill.structures import Tokens

CostScale = Literal["image", "batch"]


class JointTokens(NamedTuple):
    """The tokens of both views, one after the other: the student's s, then the teacher's t."""

    features: Tensor  # (b, n, d) of length 1, or 0
    valid: Tensor  # (b, n) bool
    positions: Tensor | None  # (b, n, 2) in source pixels; None where they cost nothing
    s: int

    @classmethod
    def of(cls, student: Tokens, teacher: Tokens, position_weight: float) -> JointTokens:
        sides = (unit_side(side) for side in feature_inputs(student, teacher))
        units, valids = zip(*sides, strict=True)
        valid = torch.cat(valids, 1)
        positions = None
        if position_weight > 0:
            s_geometry, s_grid, t_geometry, t_grid = geometric_inputs(
                student, teacher, user="a joint clustering with position_weight > 0"
            )
            centers = (wide_centers(s_geometry, s_grid), wide_centers(t_geometry, t_grid))
            # beyond a perspective's horizon a centre is NaN, and its token is not valid
            positions = torch.where(valid[..., None], torch.cat(centers, 1).detach(), 0.0)
        features = torch.where(valid[..., None], torch.cat(units, 1), 0.0)
        return cls(features, valid, positions, units[0].shape[1])


def check_clustering(
    position_weight: float, epsilon: float, sinkhorn_iterations: int, cost_scale: str
) -> tuple[float, float]:
    """The settings that the joint clusterings share, checked."""
    check_weight("position_weight", position_weight)
    check_at_least("sinkhorn_iterations", sinkhorn_iterations, 1)
    if cost_scale not in ("image", "batch"):
        raise ConfigError(f'`cost_scale` must be "image" or "batch", got {cost_scale!r}')
    return float(position_weight), check_positive("epsilon", epsilon)


def initial_tokens(
    log_chance: Tensor, count: int, initial: Tensor | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Tokens that the clusters start from, (b, count), and which of them exist, (b, count) bool.

    Drawn without replacement, with chances exp(log_chance) (b, n), -inf for tokens not to be drawn;
    or as ``initial`` says.
    """
    b, n = log_chance.shape
    if initial is None:
        # The largest of chance / exponential noise: a draw without replacement, with no host sync.
        noise = torch.empty_like(log_chance).exponential_(generator=generator)
        keys = torch.where(log_chance > -torch.inf, log_chance - noise.log(), -torch.inf)
        index = keys.topk(min(count, n), -1).indices
        missing = count - index.shape[1]
        padding = torch.full((b, missing), n, dtype=torch.int64, device=index.device)
        index = torch.cat((index, padding), 1)
    else:
        _check_initial(initial, b, n, count)
        index = initial
    there = (index >= 0) & (index < n)
    index = torch.where(there, index, 0)
    if n == 0:
        return index, there
    return index, there & (log_chance.gather(1, index) > -torch.inf)


def transport(
    tokens: JointTokens,
    centroids: Tensor,
    distances: Tensor | None,
    log_tokens: Tensor,
    log_clusters: Tensor,
    *,
    position_weight: float,
    epsilon: float,
    sinkhorn_iterations: int,
    cost_scale: CostScale,
) -> tuple[Tensor, Tensor]:
    """The plan (b, n, k) between tokens and clusters, and what it costs, (b).

    The cost is minus the similarity plus the weighted distance, the latter as a part of the image's
    largest; then it is brought to [0, 1].

    Args:
        tokens: both views'.
        centroids: (b, k, d).
        distances: (b, n, k) in any unit, or None.
        log_tokens: (b, n) log masses, -inf for tokens that are not valid.
        log_clusters: (b, k) log masses, -inf for clusters that do not exist.
        position_weight: of the distances.
        epsilon: weight of the entropy.
        sinkhorn_iterations: token step and cluster step each.
        cost_scale: over what the smallest and the largest cost are taken.
    """
    with no_autocast(centroids):
        cost = -(tokens.features @ centroids.mT)
    live = (log_tokens > -torch.inf)[..., None] & (log_clusters > -torch.inf)[:, None]
    if distances is not None:
        largest = torch.where(live, distances, 0.0).amax((1, 2), keepdim=True)
        parts = distances / torch.where(largest > 0, largest, 1.0)
        cost = cost + position_weight * parts.to(cost.dtype)
    axes = (1, 2) if cost_scale == "image" else (0, 1, 2)
    least = torch.where(live, cost, torch.inf).amin(axes, keepdim=True)
    most = torch.where(live, cost, -torch.inf).amax(axes, keepdim=True)
    cost = torch.where(live, (cost - least) / torch.where(most > least, most - least, 1.0), 0.0)
    plan = log_sinkhorn(
        -cost / epsilon, log_tokens, log_clusters, iterations=sinkhorn_iterations
    ).exp()
    return plan, (plan * cost).sum((1, 2))


def column_shares(parts: Tensor) -> Tensor:
    """(b, n, k), each cluster's parts brought to the sum 1; empty clusters stay 0."""
    total = parts.sum(1, keepdim=True)
    return parts / torch.where(total > 0, total, 1.0)


def only_largest(parts: Tensor) -> Tensor:
    """(b, n, k) with each token's largest part alone; ties go to the lowest cluster."""
    best = parts.argmax(-1, keepdim=True)
    clusters = torch.arange(parts.shape[-1], device=parts.device)
    return torch.where(clusters == best, parts, 0.0)


def split_views(student: Tensor, teacher: Tensor) -> tuple[Clusters, Clusters]:
    """Both views' `Clusters` from their parts (b, s, k) and (b, t, k)."""
    valid = (student > 0).any(1) & (teacher > 0).any(1)
    return Clusters(column_shares(student), valid), Clusters(column_shares(teacher), valid)


def _check_initial(initial: Tensor, b: int, n: int, count: int) -> None:
    if not isinstance(initial, Tensor) or initial.dtype != torch.int64:
        got = initial.dtype if isinstance(initial, Tensor) else type(initial).__name__
        raise ShapeError(f"`initial` must be an int64 tensor of shape ({b}, {count}), got {got}")
    if tuple(initial.shape) != (b, count):
        raise ShapeError(
            f"`initial` must have shape (b, clusters) = ({b}, {count}), got {tuple(initial.shape)}"
        )
    if values_visible(initial) and initial.numel() > 0:
        low, high = int(initial.min()), int(initial.max())
        if low < 0 or high >= n:
            raise ShapeError(
                f"`initial` must hold token indices in [0, s + t) = [0, {n}), the student's tokens "
                f"first, got {low} to {high}"
            )


def no_clusters(tokens: JointTokens, k: int) -> tuple[Clusters, Clusters]:
    """What stands for the clusters where there is no image or no token."""
    b, n = tokens.valid.shape
    parts = tokens.features.new_zeros(b, n, k)
    valid = torch.zeros((b, k), dtype=torch.bool, device=parts.device)
    return Clusters(parts[:, : tokens.s], valid), Clusters(parts[:, tokens.s :], valid)
