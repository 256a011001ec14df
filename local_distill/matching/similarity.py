"""The similarity match: the teacher token of most similar features."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from local_distill._precision import no_autocast
from local_distill.errors import ConfigError
from local_distill.matching._inputs import feature_inputs
from local_distill.matching._results import hard_matches, no_matches
from local_distill.structures import Matches, Tokens

__all__ = ["SimilarityMatcher", "similarity_matches"]

# Bytes that one block of the (s × t) score table may take.
_BLOCK_BYTES = 64 * 2**20


def similarity_matches(
    student: Tokens, teacher: Tokens, *, metric: Literal["cosine", "l2"] = "cosine"
) -> Matches:
    """Match each student token to the teacher token whose features are most similar.

    .. math:: j(i) = argmax_j cos(f_i, g_j), cost_i = 1 - cos(f_i, g_{j(i)})

    or, with ``metric="l2"``, the least ‖f − g‖, which is then the cost.

    Convention: computed in at least float32, whatever the features' dtype and autocast say. Ties go
    to the lowest teacher index. No gradient flows through the match.

    Args:
        student: `Tokens` with features (b, s, d).
        teacher: `Tokens` with features (b, t, d).
        metric: ``"cosine"`` or ``"l2"``.

    Returns:
        `Matches` with k = 1 (k = 0 where t = 0). Tokens that are not finite, and of zero norm
        under cosine, are never matched and never capture a match.

    Raises:
        ShapeError: no features, or axes b or d that differ.

    Example:
        >>> one = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]]])
        >>> two = torch.tensor([[[0.0, 1.0], [1.0, 1.0]]])
        >>> matches = similarity_matches(Tokens(one), Tokens(two))
        >>> matches.teacher_index[..., 0], matches.cost
        (tensor([[1, 0, 0]]), tensor([[0.2929, 0.0000,    inf]]))

    Source: EsViT (ICLR 2022), DenseCL (CVPR 2021), GLSD's "similarity"; VICRegL (NeurIPS 2022) for
    l2.
    """
    if metric not in ("cosine", "l2"):
        raise ConfigError(f'`metric` must be "cosine" or "l2", got {metric!r}')
    (f, f_inside), (g, g_inside) = feature_inputs(student, teacher)
    b, s, _ = f.shape
    t = g.shape[1]
    if s == 0 or t == 0 or b == 0:
        return no_matches(b, s, min(1, t), f)
    f, f_valid = _prepare(f, metric)
    g, g_valid = _prepare(g, metric)
    if f_inside is not None:
        f_valid = f_valid & f_inside
    if g_inside is not None:
        g_valid = g_valid & g_inside
    index = _most_similar(f, g, g_valid, metric)
    chosen = g.gather(1, index[..., None].expand(-1, -1, g.shape[2]))
    if metric == "cosine":
        cost = (1 - (f * chosen).sum(-1)).clamp_min(0.0)
    else:
        cost = torch.linalg.vector_norm(f - chosen, dim=-1)
    keep = f_valid & g_valid.any(1, keepdim=True)
    return hard_matches(index, keep, cost)


class SimilarityMatcher(nn.Module):
    """Module form of `similarity_matches`.

    Args:
        metric: ``"cosine"`` or ``"l2"``.

    Raises:
        ConfigError: an unknown metric.

    Example:
        >>> SimilarityMatcher()
        SimilarityMatcher(metric='cosine')
    """

    def __init__(self, metric: Literal["cosine", "l2"] = "cosine") -> None:
        super().__init__()
        if metric not in ("cosine", "l2"):
            raise ConfigError(f'`metric` must be "cosine" or "l2", got {metric!r}')
        self.metric: Literal["cosine", "l2"] = metric

    def forward(self, student: Tokens, teacher: Tokens) -> Matches:
        """See `similarity_matches`."""
        return similarity_matches(student, teacher, metric=self.metric)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"metric={self.metric!r}"


def _prepare(features: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Features ready to be multiplied, invalid rows zeroed, and which rows are valid."""
    largest = features.abs().amax(-1, keepdim=True)
    valid = largest.isfinite()
    if metric == "cosine":
        valid = valid & (largest > 0)
        # Two steps, as the square of 1e30 overflows and that of 1e-30 vanishes in float32.
        features = features / largest
        features = features / torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return torch.where(valid, features, 0.0), valid[..., 0]


def _most_similar(f: Tensor, g: Tensor, g_valid: Tensor, metric: str) -> Tensor:
    """(b, s) index of the best valid teacher token, in blocks of student tokens."""
    if metric == "l2":
        # The common mean changes no distance and takes away most of the cancellation in
        # ‖g‖² − 2 f·g, which is ‖f − g‖² but for a constant of the row.
        mean = g.mean(1, keepdim=True)
        f, g = f - mean, g - mean
        bias = -0.5 * g.square().sum(-1)
    else:
        bias = torch.zeros_like(g[..., 0])
    bias = torch.where(g_valid, bias, -torch.inf)[:, None]
    b, s, _ = f.shape
    block = max(1, _BLOCK_BYTES // (b * g.shape[1] * f.element_size()))
    transposed = g.mT
    with no_autocast(f):
        return torch.cat(
            [
                torch.baddbmm(bias, f[:, start : start + block], transposed).argmax(-1)
                for start in range(0, s, block)
            ],
            1,
        )
