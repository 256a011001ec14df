"""Projection heads: features → prototype logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from local_distill._check import check_at_least, check_sequence
from local_distill._finite_sequential import FiniteSequential
from local_distill._precision import at_least_float32
from local_distill.errors import ShapeError
from local_distill.structures import PrototypeLogits

__all__ = ["ProjectionHead"]


class ProjectionHead(nn.Module):
    """DINO's head: an MLP to a bottleneck, l2-normalised, times weight-normalised prototypes.

    .. math:: logits = W·(z / ‖z‖), z = MLP(x), each row of W of norm g

    Convention: it takes any leading axes, so one head serves a global token (b, d) and patch tokens
    (b, n, d). The normalisation is done in at least float32.

    Args:
        in_dim: d, the features' dimension.
        num_prototypes: c.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: dimension before the prototypes.
        num_layers: linear layers of the MLP; 1: a single one, without a hidden layer.
        batch_norm: BatchNorm after the hidden layers, which then have no bias. A batch that would
            leave a running statistic not finite leaves all of them as they were, without a host
            sync; ``mlp.skipped`` counts it.
        frozen_magnitude: keep every prototype's norm g at 1 instead of learning it; DINO's
            ``norm_last_layer``.

    Raises:
        ConfigError: a dimension below 1.
        ShapeError: at forward, features of another dimension.

    Example:
        >>> import torch
        >>> head = ProjectionHead(8, num_prototypes=16, hidden_dim=32, bottleneck_dim=4)
        >>> head(torch.randn(2, 9, 8)).shape
        torch.Size([2, 9, 16])

    Source: DINO (ICCV 2021), appendix C.

    Deviations from the authors' code: weights start by Xavier's rule instead of with a fixed
    standard deviation of 0.02, which is about the same at 2,048 hidden units and too small for
    narrow heads.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        batch_norm: bool = False,
        frozen_magnitude: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_dim", in_dim),
            ("num_prototypes", num_prototypes),
            ("hidden_dim", hidden_dim),
            ("bottleneck_dim", bottleneck_dim),
            ("num_layers", num_layers),
        ):
            check_at_least(name, value, 1)
        self.in_dim = in_dim
        self.num_prototypes = num_prototypes
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for position, (before, after) in enumerate(pairwise(widths)):
            last = position == num_layers - 1
            layers.append(nn.Linear(before, after, bias=last or not batch_norm))
            if not last:
                if batch_norm:
                    layers.append(nn.BatchNorm1d(after))
                layers.append(nn.GELU())
        self.mlp = FiniteSequential(*layers) if batch_norm else nn.Sequential(*layers)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                # About DINO's standard deviation of 0.02 at its 2,048 hidden units. At narrower
                # ones a fixed 0.02 would shrink the signal from layer to layer.
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        prototypes = nn.Linear(bottleneck_dim, num_prototypes, bias=False)
        self.prototypes = weight_norm(prototypes)
        magnitude = self.prototypes.parametrizations.weight.original0
        assert isinstance(magnitude, nn.Parameter)
        nn.init.ones_(magnitude)
        magnitude.requires_grad_(not frozen_magnitude)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (…, d) to logits (…, c)."""
        logits: Tensor = self.prototypes(self._bottleneck(features))
        return logits

    def prototype_logits(self, views: Sequence[Tensor]) -> list[PrototypeLogits]:
        """Of each view what `forward` gives, not yet multiplied with the prototypes.

        The losses and targets take these where they take logits, and never hold the table of tokens
        and prototypes. One call for all views of a step: they share the prototypes' tensor, and are
        worked on together.

        Args:
            views: features (…, d) of each view.

        Example:
            >>> import torch
            >>> head = ProjectionHead(8, num_prototypes=16, hidden_dim=32, bottleneck_dim=4)
            >>> views = [torch.randn(2, 9, 8), torch.randn(2, 4, 8)]
            >>> [tuple(scores.features.shape) for scores in head.prototype_logits(views)]
            [(2, 9, 4), (2, 4, 4)]
        """
        check_sequence("views", views, "a tensor of features")
        weight = self.prototypes.weight
        return [PrototypeLogits(self._bottleneck(view), weight) for view in views]

    def _bottleneck(self, features: Tensor) -> Tensor:
        """(…, bottleneck_dim) of length 1, what the prototypes take."""
        if features.shape[-1] != self.in_dim:
            raise ShapeError(
                f"axis `d` is {features.shape[-1]} in `features` (shape {tuple(features.shape)}) "
                f"but this head was made for in_dim={self.in_dim}"
            )
        flat = features.reshape(-1, self.in_dim)
        z = self.mlp(flat)
        # 1 / norm is a factor of the gradient: it has to fit into z's dtype (float16: 65,504).
        eps = max(1e-12, 4 / torch.finfo(z.dtype).max)
        normal = nn.functional.normalize(at_least_float32(z), dim=-1, eps=eps).to(z.dtype)
        return normal.reshape(*features.shape[:-1], normal.shape[-1])
