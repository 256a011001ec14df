"""`Matches` of the few forms that matchers give: none, one candidate a token, or all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from local_distill.structures import Matches


def no_matches(b: int, s: int, k: int, like: Tensor) -> Matches:
    """Nothing matched: (b, s, k) of weight 0, in ``like``'s dtype and on its device."""
    index = torch.zeros((b, s, k), dtype=torch.int64, device=like.device)
    return Matches(index, like.new_zeros(b, s, k), like.new_full((b, s), torch.inf))


def hard_matches(index: Tensor, keep: Tensor, cost: Tensor) -> Matches:
    """One candidate a token: index (b, s) where keep (b, s); cost (b, s) sets the dtype."""
    cost = torch.where(keep, cost, torch.inf)
    return Matches(index[..., None], keep[..., None].to(cost.dtype), cost)


def dense_matches(weight: Tensor, cost: Tensor) -> Matches:
    """Every teacher token a candidate: weight (b, s, t); cost (b, s) counts where any is > 0."""
    index = torch.arange(weight.shape[2], device=weight.device).expand(weight.shape)
    return Matches(index, weight, torch.where((weight > 0).any(-1), cost, torch.inf))
