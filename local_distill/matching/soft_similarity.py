"""The soft similarity match: every teacher token, by a softmax over the similarities."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from local_distill._check import check_positive
from local_distill._precision import no_autocast
from local_distill.kernels import block_length
from local_distill.kernels.most_similar import near_unit, score_table, teacher_block
from local_distill.matching._inputs import check_same_axes, common_dtype, feature_side
from local_distill.matching._results import dense_matches, no_matches
from local_distill.structures import Matches, Tokens

__all__ = ["SoftSimilarityMatcher", "soft_similarity_matches"]

# (s, t) tables alive at once while a block is worked on: cosines, what goes into the exponential,
# and the weights, which are kept.
_TABLES = 3


def soft_similarity_matches(
    student: Tokens, teacher: Tokens, *, temperature: float = 0.1
) -> Matches:
    r"""Match each student token to all teacher tokens, by a softmax over their similarities.

    .. math:: w_{ij} = softmax_j(cos(f_i, g_j) / T), cost_i = \sum_j w_{ij} (1 - cos(f_i, g_j))

    with the softmax over the teacher tokens that may be matched.

    Convention: computed in at least float32, whatever the features' dtype and autocast say. A
    cosine is good to about 1e-7 in float32, a weight therefore to about 1e-7 / T, relatively. No
    gradient flows through the match.

    Args:
        student: `Tokens` with features (b, s, d). Geometry and grid are looked at where both are
            given.
        teacher: `Tokens` with features (b, t, d); likewise.
        temperature: T, above 0, in units of the cosine. Small: the most similar token alone; large:
            even weights.

    Returns:
        `Matches` with k = t: every teacher token in order, the weights of a matched token sum to 1.
        Tokens that are not finite, of zero norm, or (where geometry is given) centred outside the
        source are never matched and never capture a match.

    Raises:
        ConfigError: a temperature that is not a finite number above 0.
        ShapeError: no features, or axes b or d that differ.
        GeometryError: a singular, non-finite or half-precision geometry, where one is given.

    Example:
        >>> one = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]]])
        >>> two = torch.tensor([[[0.0, 1.0], [1.0, 1.0]]])
        >>> matches = soft_similarity_matches(Tokens(one), Tokens(two), temperature=0.5)
        >>> matches.weight
        tensor([[[0.1956, 0.8044],
                 [0.6424, 0.3576],
                 [0.0000, 0.0000]]])
        >>> matches.cost
        tensor([[0.4312, 0.1047,    inf]])

    Source: scaled dot-product attention, "Attention Is All You Need" (NeurIPS 2017), equation 1,
    with cosines for dot products and T for √d.

    Deviations from the authors' code: no learned projections, and tokens without a direction or
    outside the image take no part.
    """
    check_positive("temperature", temperature)
    one, two = feature_side("student", student), feature_side("teacher", teacher)
    f, g = one.features, two.features
    check_same_axes("student", f, "teacher", g)
    dtype = common_dtype(f, g)
    (b, s, d), t = f.shape, g.shape[1]
    if f.numel() == 0 or g.numel() == 0:
        return no_matches(b, s, t, f.new_empty(0, dtype=dtype))
    item = torch.finfo(dtype).bits // 8
    token_bytes = item * (d + _TABLES * t)
    images = min(b, block_length(item * t * d + s * token_bytes, f.device))
    tokens = min(s, block_length(images * token_bytes, f.device))
    weights: list[Tensor] = []
    costs: list[Tensor] = []
    with no_autocast(f):
        for first in range(0, b, images):
            rows = slice(first, first + images)
            valid = None if two.inside is None else two.inside[rows]
            ready = teacher_block(g[rows].to(dtype), valid, "cosine")
            parts = []
            for start in range(0, s, tokens):
                scaled, norm = near_unit(f[rows, start : start + tokens].to(dtype))
                # No cosine is above 1, so rounding must not say so either.
                cosine = (score_table(scaled, ready) / norm).clamp_max(1.0)
                parts.append(_weights_and_cost(cosine, temperature))
            weights.append(_joined([weight for weight, _ in parts], 1))
            costs.append(_joined([cost for _, cost in parts], 1))
    weight, cost = _joined(weights, 0), _joined(costs, 0)
    if one.inside is not None:
        weight = torch.where(one.inside[..., None], weight, 0.0)
    return dense_matches(weight, cost)


class SoftSimilarityMatcher(nn.Module):
    """Module form of `soft_similarity_matches`.

    Args:
        temperature: of the softmax, above 0.

    Raises:
        ConfigError: a temperature that is not a finite number above 0.

    Example:
        >>> SoftSimilarityMatcher()
        SoftSimilarityMatcher(temperature=0.1)
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = check_positive("temperature", temperature)

    def forward(self, student: Tokens, teacher: Tokens) -> Matches:
        """See `soft_similarity_matches`."""
        return soft_similarity_matches(student, teacher, temperature=self.temperature)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"temperature={self.temperature}"


def _weights_and_cost(cosine: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(n, s, t) weights, 0 in rows without a candidate, and (n, s) costs; −inf is no candidate."""
    found = cosine.amax(-1, keepdim=True) > -torch.inf  # False for NaN
    # No cosine becomes infinite by this division; a temperature below the dtype's range would be 0.
    logits = cosine / max(temperature, torch.finfo(cosine.dtype).tiny)
    weight = torch.where(found, logits.softmax(-1), 0.0)
    # clamp: 0 · −inf is NaN
    cost = (weight * (1 - cosine.clamp_min(-1.0))).sum(-1)
    return weight, cost


def _joined(blocks: list[Tensor], axis: int) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, axis)
