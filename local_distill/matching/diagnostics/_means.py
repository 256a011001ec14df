"""Means that are 0 where there is nothing to average, and never look at values to find out."""

from __future__ import annotations

import torch
from torch import Tensor

from local_distill._precision import at_least_float32
from local_distill.structures import Matches


def matched_tokens(matches: Matches) -> Tensor:
    """``matches.matched``, in a form that torch 2.6 can trace for matches made in the graph."""
    return (matches.weight > 0).any(-1)


def share(part: Tensor, whole: Tensor, dtype: torch.dtype) -> Tensor:
    """How much of ``whole`` is in ``part`` too, both bool of one shape; 0-d."""
    return (part & whole).sum().to(dtype) / whole.sum().clamp_min(1)


def mean_of(values: Tensor, keep: Tensor) -> Tensor:
    """Mean of the values that ``keep`` marks, bool of the same shape; 0-d, at least float32."""
    kept = torch.where(keep, at_least_float32(values), 0.0)
    return kept.sum() / keep.sum().clamp_min(1)
