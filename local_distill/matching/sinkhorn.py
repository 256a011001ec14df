"""The transport match: all tokens at once, so that no teacher token answers too many."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from local_distill._check import check_at_least, check_positive, check_weight
from local_distill._geometric_inputs import geometric_inputs
from local_distill._precision import no_autocast
from local_distill.geometry import wide_centers, wide_diagonals
from local_distill.kernels import block_length
from local_distill.kernels.log_sinkhorn import log_sinkhorn, log_uniform
from local_distill.matching._inputs import feature_inputs
from local_distill.matching._results import dense_matches, no_matches
from local_distill.matching._unit_features import unit_side
from local_distill.structures import Matches, Tokens

__all__ = ["SinkhornMatcher", "sinkhorn_matches"]

# (s, t) tables that are alive at once while one image is worked on: cost, scores, the exponentials
# in a logsumexp and their sum; with distances four more of twice the width.
_TABLES, _TABLES_WITH_DISTANCE = 4, 12


@torch.no_grad()
def sinkhorn_matches(
    student: Tokens,
    teacher: Tokens,
    *,
    epsilon: float = 0.05,
    iterations: int = 10,
    distance_weight: float = 0.0,
) -> Matches:
    """Match by entropic optimal transport between the valid tokens of both views.

    .. math:: P = argmin_P <P, C> - ε H(P), P 1 = 1/s, P^T 1 = 1/t

    .. math:: C_{ij} = 1 - cos(f_i, g_j) + λ |p_i - p_j| / max(D_i, D_j)

    with p the tokens' centres in the source, D the cells' diagonals there and s, t the numbers of
    *valid* tokens. The weights are w_ij = s·P_ij, the cost is Σ_j w_ij C_ij.

    Convention: the last step scales the rows, so a student token's weights sum to 1; the teacher
    tokens' masses come out as s/t each the more exactly, the more iterations and the larger ε.
    Computed in at least float32, in the log domain: finite at any ε. No gradient flows through it.

    Args:
        student: `Tokens` with features (b, s, d); geometry and grid where ``distance_weight`` > 0.
        teacher: `Tokens` with features (b, t, d); likewise.
        epsilon: ε, weight of the entropy, above 0, in the cost's unit. Small: near to one another's
            best; large: even weights.
        iterations: how many times columns and rows are scaled. 10 bring the teacher tokens' masses
            to within a percent at ε = 0.05; smaller ε needs more.
        distance_weight: λ, cost of one larger cell diagonal between the centres; 0 asks for no
            geometry.

    Returns:
        `Matches` with k = t. Tokens that are not finite, of zero norm, or (where geometry is given)
        centred outside the source are never matched and never capture a match; where one side has
        no valid token at all, none is matched.

    Raises:
        ConfigError: an ε not above 0, iterations below 1, a negative distance weight.
        ShapeError: no features, axes b or d that differ, no geometry where it is needed.
        GeometryError: a singular, non-finite or half-precision geometry, different source sizes.

    Example:
        >>> one = torch.tensor([[[1.0, 0.0], [0.8, 0.6]]])
        >>> two = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # both would choose the first of them
        >>> sinkhorn_matches(Tokens(one), Tokens(two), epsilon=0.1).weight
        tensor([[[0.9918, 0.0082],
                 [0.0391, 0.9609]]])

    Source: Cuturi, "Sinkhorn Distances" (NeurIPS 2013); cost of similarity and place in the manner
    of CrOC (CVPR 2023), where it stands between tokens and centroids (`JointClusters`).

    Deviations from CrOC's code: the cost is not rescaled to [0, 1] over the batch, so ε and λ mean
    the same in every batch; distances are in cells, not parts of the largest; the last step scales
    the rows, not the columns.
    """
    epsilon, distance_weight = _check_settings(epsilon, iterations, distance_weight)
    one, two = feature_inputs(student, teacher)
    places = _places(student, teacher) if distance_weight > 0 else None
    (b, s, _), t = one.features.shape, two.features.shape[1]
    if b == 0 or s == 0 or t == 0:
        return no_matches(b, s, t, one.features)
    f, f_valid = unit_side(one)
    g, g_valid = unit_side(two)
    weights, costs = [], []
    tables = _TABLES if places is None else _TABLES_WITH_DISTANCE
    block = block_length(s * t * f.element_size() * tables, f.device)
    for start in range(0, b, block):
        images = slice(start, start + block)
        with no_autocast(f):
            cost = (1 - f[images] @ g[images].mT).clamp_min(0.0)
        if places is not None:
            cost = cost + distance_weight * _distances(*(part[images] for part in places)).to(cost)
        live = f_valid[images, :, None] & g_valid[images, None]
        # A centre beyond a perspective's horizon is NaN; its token is not valid.
        cost = torch.where(live, cost, 0.0)
        weight = _plan(-cost / epsilon, f_valid[images], g_valid[images], iterations)
        weights.append(weight)
        costs.append((weight * cost).sum(-1))
    return dense_matches(torch.cat(weights), torch.cat(costs))


class SinkhornMatcher(nn.Module):
    """Module form of `sinkhorn_matches`.

    Args:
        epsilon: weight of the entropy, above 0.
        iterations: how many times columns and rows are scaled, at least 1.
        distance_weight: cost of one larger cell diagonal between the centres; 0: no geometry.

    Raises:
        ConfigError: a setting outside of its range.

    Example:
        >>> SinkhornMatcher(epsilon=0.1)
        SinkhornMatcher(epsilon=0.1, iterations=10, distance_weight=0.0)
    """

    def __init__(
        self, epsilon: float = 0.05, iterations: int = 10, distance_weight: float = 0.0
    ) -> None:
        super().__init__()
        self.epsilon, self.distance_weight = _check_settings(epsilon, iterations, distance_weight)
        self.iterations = iterations

    def forward(self, student: Tokens, teacher: Tokens) -> Matches:
        """See `sinkhorn_matches`."""
        return sinkhorn_matches(
            student,
            teacher,
            epsilon=self.epsilon,
            iterations=self.iterations,
            distance_weight=self.distance_weight,
        )

    def extra_repr(self) -> str:
        """The settings, for print."""
        return (
            f"epsilon={self.epsilon}, iterations={self.iterations}, "
            f"distance_weight={self.distance_weight}"
        )


def _check_settings(epsilon: float, iterations: int, distance_weight: float) -> tuple[float, float]:
    check_at_least("iterations", iterations, 1)
    weight = check_weight("distance_weight", distance_weight)
    return check_positive("epsilon", epsilon), weight


def _places(student: Tokens, teacher: Tokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centres (b, n, 2) and diagonals (b, n) of both sides, in source pixels."""
    s_geometry, s_grid, t_geometry, t_grid = geometric_inputs(
        student, teacher, user="a SinkhornMatcher with distance_weight > 0"
    )
    return (
        wide_centers(s_geometry, s_grid),
        wide_diagonals(s_geometry, s_grid),
        wide_centers(t_geometry, t_grid),
        wide_diagonals(t_geometry, t_grid),
    )


def _distances(p: Tensor, p_diagonal: Tensor, q: Tensor, q_diagonal: Tensor) -> Tensor:
    """(b, s, t) distance of the centres in larger cell diagonals."""
    across = p[:, :, None, 0] - q[:, None, :, 0]
    down = p[:, :, None, 1] - q[:, None, :, 1]
    pixels = (across.square() + down.square()).sqrt()
    return pixels / torch.maximum(p_diagonal[:, :, None], q_diagonal[:, None])


def _plan(scores: Tensor, s_valid: Tensor, t_valid: Tensor, iterations: int) -> Tensor:
    """(b, s, t) rows of the transport plan, each brought to the sum 1, or 0 where not matched."""
    log_row = log_uniform(s_valid, scores.dtype)
    log_col = log_uniform(t_valid, scores.dtype)
    log_plan = log_sinkhorn(scores, log_row, log_col, iterations=iterations, last="row")
    matched = s_valid & t_valid.any(1, keepdim=True)
    return torch.where(matched[..., None], log_plan - log_row[..., None], -torch.inf).exp()
