"""CrOC's clusters: both views' tokens clustered together, merging the most similar clusters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from local_distill._check import Axes, check_at_least, check_floating, check_positive
from local_distill._precision import no_autocast
from local_distill.errors import ConfigError, ShapeError
from local_distill.kernels.log_sinkhorn import log_uniform
from local_distill.matching._joint_tokens import (
    CostScale,
    JointTokens,
    check_clustering,
    column_shares,
    initial_tokens,
    no_clusters,
    only_largest,
    split_views,
    transport,
)
from local_distill.matching._unit_features import unit_features
from local_distill.matching.clusters import Clusters
from local_distill.structures import Tokens

__all__ = ["JointClusters"]

TokenScores = tuple[Tensor, Tensor]


class JointClusters(nn.Module):
    """Cluster the tokens of two views together, so that both views share their objects.

    .. math:: P = argmin_P <P, C> - ε H(P), C_{nk} = -cos(z_n, c_k) + λ |p_n - p_k| / max |p - p|

    with C brought to [0, 1], P's rows of the tokens' masses, its columns of the clusters'.
    ``start_clusters`` tokens are the first centroids; then, down to two clusters: transport, take
    the plan's means as centroids, join the two clusters of most similar centroids, take new
    centroids, places and masses. Of the numbers of clusters from ``max_clusters`` down to 2 each
    image keeps the one of least transport cost <P, C>. Each token goes to the cluster in which it
    has the largest part, parts being counted as shares of the cluster within the token's view.

    Convention: places are token centres in source pixels; as only their distances count, each as a
    part of the image's largest, no unit is left, and images of any size are alike. The number k of
    clusters is always ``max_clusters``; those that an image does not need are not valid. Computed
    in at least float32, without gradient and without host sync.

    How the parts go together: cluster the teacher's tokens of both views; pool the *teacher's*
    tokens with one view's clusters and the *student's* with the other's; then come the projection
    heads; cluster j answers cluster j, ``Matches.identity(valid)``. CrOC brings pooled features to
    the mean norm of the [CLS] tokens before the heads. It clusters each attention head's keys
    apart: fold the heads into the batch, (b·heads, n, d), and repeat geometry and features alike.

    Args:
        start_clusters: clusters to begin with, at least 2. ``n_tokens`` in CrOC's code.
        max_clusters: k, the most clusters an image may keep, from 2 to ``start_clusters``.
        epsilon: ε, weight of the entropy, for costs in [0, 1].
        sinkhorn_iterations: steps of each side; the clusters' come last.
        position_weight: λ; 0 asks for no geometry. May be set anew as training goes on.
        token_temp: temperature of the tokens' scores, where there are any.
        cluster_temp: temperature of the first clusters' scores, where there are any.
        cost_scale: ``"image"``: the cost is brought to [0, 1] image by image; ``"batch"``: over the
            whole batch, as published, so that an image's clusters depend on its batch.

    Raises:
        ConfigError: a setting outside of its range.

    Example:
        >>> from local_distill import Matches, TokenGrid, from_box
        >>> grid = TokenGrid.tiling(1, 4, view_size=(16, 64))
        >>> box = torch.tensor([[0.0, 0, 64, 16], [0, 0, 64, 16]])
        >>> geometry = from_box(box, (16, 64), (16, 64))
        >>> left_right = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]).expand(2, 4, 2)
        >>> view = Tokens(left_right, geometry, grid)
        >>> joint = JointClusters(start_clusters=3, max_clusters=2)
        >>> one, two = joint(view, view, initial=torch.tensor([[0, 1, 3], [1, 2, 3]]))
        >>> one.assignment[0].argmax(-1)  # the two most similar of three were joined
        tensor([1, 1, 0, 0])
        >>> student_objects = one.pool(left_right)  # then the student's head
        >>> teacher_objects = two.pool(left_right)  # then the teacher's
        >>> matches = Matches.identity(one.valid)
        >>> matches.gather(teacher_objects)[0]  # a target for each of the student's objects
        tensor([[0., 1.],
                [1., 0.]])

    Source: "CrOC: Cross-View Online Clustering for Dense Visual Representation Learning" (CVPR
    2023, arXiv 2303.13245), its clustering algorithm; the order of steps and the defaults are those
    of the authors' code.

    Deviations from the authors' code: the cost is scaled image by image (``cost_scale="batch"``
    gives theirs); Sinkhorn runs in the log domain; tokens that are not finite, of zero norm, or
    centred outside the source belong to no cluster, and a cluster without a token to start from
    stays empty and is joined first; a token with two equal largest parts goes to the lowest
    cluster, not to both; positions are exact centres, not means of a bicubically resized map; a
    cluster that lives in one view alone is marked instead of removed, so that shapes are fixed and
    nothing syncs. Without scores all marginals are uniform (their ``uniform_marginals``); with the
    cosines to each view's [CLS] as scores they are those of the paper.
    """

    def __init__(
        self,
        start_clusters: int = 5,
        max_clusters: int = 4,
        *,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 5,
        position_weight: float = 4.0,
        token_temp: float = 2.0,
        cluster_temp: float = 2.0,
        cost_scale: CostScale = "image",
    ) -> None:
        super().__init__()
        self.start_clusters = check_at_least("start_clusters", start_clusters, 2)
        self.max_clusters = check_at_least("max_clusters", max_clusters, 2)
        if max_clusters > start_clusters:
            raise ConfigError(
                f"`max_clusters` must not be above `start_clusters` = {start_clusters}, "
                f"got {max_clusters}"
            )
        self.position_weight, self.epsilon = check_clustering(
            position_weight, epsilon, sinkhorn_iterations, cost_scale
        )
        self.sinkhorn_iterations = sinkhorn_iterations
        self.token_temp = check_positive("token_temp", token_temp)
        self.cluster_temp = check_positive("cluster_temp", cluster_temp)
        self.cost_scale: CostScale = cost_scale

    @torch.no_grad()
    def forward(
        self,
        student: Tokens,
        teacher: Tokens,
        *,
        token_scores: TokenScores | None = None,
        initial: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Clusters, Clusters]:
        """Cluster two views of the same images.

        Args:
            student: `Tokens` of one view, features (b, s, d); with geometry and grid unless the
                position weight is 0.
            teacher: `Tokens` of the other view, features (b, t, d). As published both are the
                teacher network's.
            token_scores: (b, s) and (b, t), how much each token counts: as published its cosine to
                its view's [CLS]. Softmaxes of them are the chances to be drawn and the masses.
                None: all tokens count the same.
            initial: (b, start_clusters) int64 tokens to start from, the student's first, then the
                teacher's. None: drawn without replacement.
            generator: for the draw, on the features' device.

        Returns:
            The `Clusters` of the student's and of the teacher's view.

        Raises:
            ShapeError: axes that differ, no features, or no geometry where it is needed.
            GeometryError: as `nearest_matches`.
        """
        tokens = JointTokens.of(student, teacher, self.position_weight)
        b, n = tokens.valid.shape
        scores, tokens = self._scores(token_scores, tokens)
        if b == 0 or n == 0:
            return no_clusters(tokens, self.max_clusters)
        dtype = tokens.features.dtype
        log_tokens = _log_masses(scores, self.token_temp, tokens.valid, dtype)
        index, exists = initial_tokens(log_tokens, self.start_clusters, initial, generator)
        first_scores = None if scores is None else scores.gather(1, index)
        log_clusters = _log_masses(first_scores, self.cluster_temp, exists, dtype)
        centroids = _rows(tokens.features, index)
        places = None if tokens.positions is None else _rows(tokens.positions, index)
        levels: list[Tensor] = []
        costs: list[Tensor] = []
        for count in range(self.start_clusters, 1, -1):
            plan, cost = transport(
                tokens,
                unit_features(centroids)[0],
                _distances(tokens, places),
                log_tokens,
                log_clusters,
                position_weight=self.position_weight,
                epsilon=self.epsilon,
                sinkhorn_iterations=self.sinkhorn_iterations,
                cost_scale=self.cost_scale,
            )
            if count <= self.max_clusters:
                levels.append(nn.functional.pad(plan, (0, self.max_clusters - count)))
                costs.append(cost)
            if count == 2:
                break
            shares = column_shares(_merge_most_similar(plan, tokens.features))
            centroids = _means(shares, tokens.features)
            places = None if tokens.positions is None else _means(shares, tokens.positions)
            masses = (log_tokens.exp()[..., None] * shares).sum(1)
            log_clusters = (masses / masses.sum(-1, keepdim=True)).log()
            # no valid token at all: 0 / 0
            log_clusters = torch.where(masses > 0, log_clusters, -torch.inf)
        plan = _of_least_cost(levels, costs)
        return split_views(
            only_largest(column_shares(plan[:, : tokens.s])),
            only_largest(column_shares(plan[:, tokens.s :])),
        )

    def extra_repr(self) -> str:
        """The settings, for print."""
        return (
            f"start_clusters={self.start_clusters}, max_clusters={self.max_clusters}, "
            f"epsilon={self.epsilon}, sinkhorn_iterations={self.sinkhorn_iterations}, "
            f"position_weight={self.position_weight}, token_temp={self.token_temp}, "
            f"cluster_temp={self.cluster_temp}, cost_scale={self.cost_scale!r}"
        )

    def _scores(
        self, token_scores: TokenScores | None, tokens: JointTokens
    ) -> tuple[Tensor | None, JointTokens]:
        """Both views' scores (b, n), and the tokens without those of no finite score."""
        if token_scores is None:
            return None, tokens
        if not isinstance(token_scores, (tuple, list)) or len(token_scores) != 2:
            raise ShapeError(
                "`token_scores` must be two tensors, the student view's (b, s) and the teacher "
                f"view's (b, t), got {type(token_scores).__name__}"
            )
        b, n = tokens.valid.shape
        parts = []
        for view, (part, length) in enumerate(
            zip(token_scores, (tokens.s, n - tokens.s), strict=True)
        ):
            name = f"token_scores[{view}]"
            check_floating(name, Axes().bind(name, part, f"{b} {length}"))
            parts.append(part.detach().to(tokens.features.dtype))
        scores = torch.cat(parts, 1)
        finite = scores.isfinite()
        tokens = tokens._replace(valid=tokens.valid & finite)
        return torch.where(finite, scores, 0.0), tokens


def _log_masses(scores: Tensor | None, temp: float, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """(…, n) log of a distribution over what is valid: even, or a softmax of the scores."""
    if scores is None:
        return log_uniform(valid, dtype)
    masses = torch.where(valid, scores / temp, -torch.inf).log_softmax(-1)
    return torch.where(valid, masses, -torch.inf)  # none valid: NaN


def _rows(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))


def _means(shares: Tensor, values: Tensor) -> Tensor:
    """(b, k, d) the clusters' means, in the dtype of the values."""
    with no_autocast(values):
        return shares.to(values.dtype).mT @ values


def _distances(tokens: JointTokens, places: Tensor | None) -> Tensor | None:
    """(b, n, k) from tokens to clusters, in source pixels."""
    if tokens.positions is None or places is None:
        return None
    across, down = (tokens.positions[:, :, None] - places[:, None]).unbind(-1)
    return (across.square() + down.square()).sqrt()


def _merge_most_similar(plan: Tensor, features: Tensor) -> Tensor:
    """(b, n, k) → (b, n, k - 1): the two clusters of most similar means joined, as the last one."""
    b, n, k = plan.shape
    means = _means(column_shares(plan), features)
    with no_autocast(means):
        similarity = means @ means.mT
    exists = (plan > 0).any(1)
    both = exists[:, :, None] & exists[:, None]
    # Joining an empty cluster to anything changes nothing, so these go first.
    similarity = torch.where(both, similarity, torch.inf)
    own = torch.eye(k, dtype=torch.bool, device=plan.device)
    best = torch.where(own, -torch.inf, similarity).reshape(b, k * k).argmax(-1, keepdim=True)
    clusters = torch.arange(k, device=plan.device)
    joined = (clusters == best // k) | (clusters == best % k)
    kept = joined.to(torch.int64).argsort(dim=-1, stable=True)[:, : k - 2]
    rest = plan.gather(2, kept[:, None].expand(-1, n, -1))
    merged = torch.where(joined[:, None], plan, 0.0).sum(-1, keepdim=True)
    return torch.cat((rest, merged), -1)


def _of_least_cost(levels: list[Tensor], costs: list[Tensor]) -> Tensor:
    """(b, n, k) each image's plan of least cost; ties go to the most clusters."""
    plans = torch.stack(levels, 1)
    best = torch.stack(costs, 1).argmin(1)
    index = best[:, None, None, None].expand(-1, 1, *plans.shape[2:])
    return plans.gather(1, index)[:, 0]
