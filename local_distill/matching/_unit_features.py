"""Features brought to length 1, for everything that compares them by their cosine."""

from __future__ import annotations

import torch
from torch import Tensor

from local_distill.matching._inputs import FeatureSide


def unit_features(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features (…, d) of length 1, and (…) bool: which have a direction at all.

    Rows that are not finite or of zero norm have none; they are 0 in the result.
    """
    if features.shape[-1] == 0:
        return features, torch.zeros_like(features[..., 0:0].sum(-1), dtype=torch.bool)
    largest = features.abs().amax(-1, keepdim=True)
    valid = largest.isfinite() & (largest > 0)
    # Two steps, as the square of 1e30 overflows and that of 1e-30 vanishes in float32.
    scaled = torch.where(valid, features / largest, 0.0)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return torch.where(valid, scaled / length, 0.0), valid[..., 0]


def unit_side(side: FeatureSide, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """`unit_features` of one side, (b, n, d), and which of its tokens may be matched, (b, n).

    Args:
        side: features, and where known which tokens lie inside the source.
        dtype: what to work in; None: the features' own.
    """
    units, valid = unit_features(side.features if dtype is None else side.features.to(dtype))
    return units, valid if side.inside is None else valid & side.inside
