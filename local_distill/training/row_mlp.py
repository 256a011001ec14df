"""Plain heads of the contrastive methods: an MLP over the last axis."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from local_distill._finite_sequential import FiniteSequential
from local_distill.errors import ShapeError

__all__ = ["RowMlp"]


class RowMlp(nn.Module):
    """Linear layers with ReLU between, over features of any leading axes.

    Args:
        widths: of the input, of the hidden layers and of the output.
        batch_norm: BatchNorm before each ReLU, over all rows of all leading axes; a batch that is
            not finite leaves its statistics alone.
        last_bias: whether the last layer has a bias.

    Example:
        >>> import torch
        >>> RowMlp((8, 16, 4), batch_norm=True)(torch.randn(2, 9, 8)).shape
        torch.Size([2, 9, 4])
    """

    def __init__(
        self, widths: Sequence[int], *, batch_norm: bool = False, last_bias: bool = True
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for position, (before, after) in enumerate(pairwise(widths)):
            last = position == len(widths) - 2
            layers.append(nn.Linear(before, after, bias=last_bias if last else not batch_norm))
            if not last:
                layers += [nn.BatchNorm1d(after)] * batch_norm + [nn.ReLU(inplace=True)]
        self.in_dim = widths[0]
        self.layers = FiniteSequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (…, d) to (…, o)."""
        if features.shape[-1] != self.in_dim:
            raise ShapeError(
                f"axis `d` is {features.shape[-1]} in `features` (shape {tuple(features.shape)}) "
                f"but this head was made for {self.in_dim}"
            )
        rows: Tensor = self.layers(features.reshape(-1, self.in_dim))
        return rows.reshape(*features.shape[:-1], rows.shape[-1])
