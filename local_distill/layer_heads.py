"""Heads of every layer: projectors and predictors as SDSSL has them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from local_distill._check import check_at_least
from local_distill._finite_sequential import FiniteSequential
from local_distill._precision import no_autocast
from local_distill.errors import ConfigError, ShapeError

__all__ = ["LayerHeads", "LayerOutputs"]

Method = Literal["byol", "moco", "simclr"]


class LayerOutputs(NamedTuple):
    """What the heads make of every layer, the last layer last.

    Attributes:
        projections: (depth, …, o).
        predictions: (depth, …, o), what the student is compared by; the projections themselves
            where there are no predictors.
        detached: (depth, …, o), predictions of detached projections, whose gradient reaches the
            predictors alone; None without predictors and where no gradient is taken.
    """

    projections: Tensor
    predictions: Tensor
    detached: Tensor | None


class LayerHeads(nn.Module):
    """A projector, and a predictor where the method has one, for every layer.

    .. math:: z^l = proj_l(x^l), p^l = pred_l(z^l), detached^l = pred_l(sg z^l)

    Linear layers have no bias; hidden ones are followed by BatchNorm and ReLU. A projector has
    three, a predictor two. The last is followed by a BatchNorm without weights, but for BYOL.

    Convention: layers come in order, the last one last. Features have any leading axes, so one head
    serves global tokens (b, d) and patch tokens (b, n, d); BatchNorm goes over all of them. On
    several processes convert with ``nn.SyncBatchNorm.convert_sync_batchnorm``, as published. MoCo
    v3's and BYOL's views go through one by one; SimCLR's together, as one batch, so that BatchNorm
    takes its statistics over both. A teacher needs `project_last` alone. A pass of a projector or
    predictor that would leave a running statistic not finite leaves all of its statistics as they
    were, before and after that conversion, without a host sync; ``skipped`` counts it.

    Args:
        embed_dim: d of every layer's features, or one number a layer: Swin, ConvNeXt, ResNet.
        depth: the number of layers, the last included.
        method: ``"moco"``: projectors and predictors; ``"byol"``: the same without the last
            BatchNorm; ``"simclr"``: projectors alone.
        hidden_dim: width of the lower layers' projectors.
        last_hidden_dim: width of the last layer's projector, and of all predictors.
        out_dim: o.

    Raises:
        ConfigError: a size below 1, as many ``embed_dim`` as there are no layers, an unknown
            method.
        ShapeError: at forward, another number of layers, features of another dimension, or a single
            row in training, which BatchNorm cannot take.

    Example:
        >>> heads = LayerHeads((4, 8), depth=2, hidden_dim=16, last_hidden_dim=32, out_dim=3)
        >>> out = heads([torch.randn(5, 4), torch.randn(5, 8)])
        >>> out.projections.shape, out.predictions.shape, out.detached.shape
        (torch.Size([2, 5, 3]), torch.Size([2, 5, 3]), torch.Size([2, 5, 3]))
        >>> heads.project_last(torch.randn(5, 8)).shape  # what a teacher says
        torch.Size([5, 3])

    Source: "Self-Distilled Self-Supervised Representation Learning" (SDSSL, WACV 2023); MoCo v3
    (ICCV 2021) for the last BatchNorm without weights.

    Deviations from the authors' code: any depth and a dimension for each layer, where theirs is
    written for 12 blocks of a ViT. Their projectors' hidden width is half of the last one's; here
    it is a number of its own, by default the same.
    """

    def __init__(
        self,
        embed_dim: int | Sequence[int],
        depth: int,
        *,
        method: Method = "moco",
        hidden_dim: int = 2048,
        last_hidden_dim: int = 4096,
        out_dim: int = 256,
    ) -> None:
        super().__init__()
        self.depth = check_at_least("depth", depth, 1)
        given = [embed_dim] * depth if isinstance(embed_dim, int) else list(embed_dim)
        if len(given) != depth:
            raise ConfigError(
                f"`embed_dim` must be one number or one for each of the {depth} layers, got "
                f"{len(given)} numbers"
            )
        self.embed_dims = tuple(check_at_least("embed_dim", dim, 1) for dim in given)
        if method not in get_args(Method):
            raise ConfigError(
                f"`method` must be one of {', '.join(get_args(Method))}, got {method!r}"
            )
        self.method: Method = method
        for name, value in (
            ("hidden_dim", hidden_dim),
            ("last_hidden_dim", last_hidden_dim),
            ("out_dim", out_dim),
        ):
            check_at_least(name, value, 1)
        self.out_dim = out_dim
        last_norm = method != "byol"
        hidden = [hidden_dim] * (depth - 1) + [last_hidden_dim]
        self.projectors = nn.ModuleList(
            _mlp((dim, width, width, out_dim), last_norm)
            for dim, width in zip(self.embed_dims, hidden, strict=True)
        )
        self.predictors = nn.ModuleList(
            _mlp((out_dim, last_hidden_dim, out_dim), last_norm)
            for _ in range(0 if method == "simclr" else depth)
        )

    def forward(self, layers: Tensor | Sequence[Tensor]) -> LayerOutputs:
        """Project and predict every layer.

        Args:
            layers: (depth, …, d), or a sequence of (…, d_l); the axes before d agree.
        """
        if len(layers) != self.depth:
            raise ShapeError(
                f"`layers` has {len(layers)} layers but these heads were made for "
                f"depth={self.depth}"
            )
        leading = layers[0].shape[:-1]
        flat = []
        for position, features in enumerate(layers):
            if features.shape[:-1] != leading:
                raise ShapeError(
                    f"`layers[{position}]` has shape {tuple(features.shape)} but `layers[0]` has "
                    f"{tuple(layers[0].shape)}: all axes but the last must agree"
                )
            flat.append(self._rows(f"layers[{position}]", features, position))
        projected = [project(rows) for project, rows in zip(self.projectors, flat, strict=True)]
        projections = _stacked(projected).reshape(self.depth, *leading, self.out_dim)
        if not self.predictors:
            return LayerOutputs(projections, projections, None)
        predictions = self._predict(projected).reshape(projections.shape)
        if not torch.is_grad_enabled():
            return LayerOutputs(projections, predictions, None)
        detached = self._predict([rows.detach() for rows in projected])
        return LayerOutputs(projections, predictions, detached.reshape(projections.shape))

    def project_last(self, features: Tensor) -> Tensor:
        """The last layer's features (…, d) → its projections (…, o): a teacher's answer."""
        rows = self._rows("features", features, self.depth - 1)
        projected: Tensor = self.projectors[-1](rows)
        return projected.reshape(*features.shape[:-1], self.out_dim)

    @property
    def skipped(self) -> Tensor:
        """How many passes of a projector or predictor left its running statistics alone."""
        heads = [*self.projectors, *self.predictors]
        return torch.stack([head.get_buffer("skipped") for head in heads]).sum()

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"embed_dims={self.embed_dims}, depth={self.depth}, method={self.method!r}"

    def _predict(self, projected: Sequence[Tensor]) -> Tensor:
        return _stacked(
            [predict(rows) for predict, rows in zip(self.predictors, projected, strict=True)]
        )

    def _rows(self, name: str, features: Tensor, position: int) -> Tensor:
        dim = self.embed_dims[position]
        if features.shape[-1] != dim:
            raise ShapeError(
                f"axis `d` is {features.shape[-1]} in `{name}` (shape {tuple(features.shape)}) "
                f"but this layer's head was made for embed_dim={dim}"
            )
        rows = features.reshape(-1, dim)
        if self.training and rows.shape[0] == 1 and self._normalizes_alone():
            raise ShapeError(
                f"`{name}` holds a single row, of which BatchNorm has no variance: give at least "
                "two, or nn.SyncBatchNorm over several processes"
            )
        return rows

    def _normalizes_alone(self) -> bool:
        return any(isinstance(layer, nn.BatchNorm1d) for layer in self.modules())


def _stacked(layers: Sequence[Tensor]) -> Tensor:
    # Autocast to one half precision refuses to put tensors of the other one together.
    with no_autocast(layers[0]):
        return torch.stack(list(layers))


def _mlp(widths: Sequence[int], last_norm: bool) -> FiniteSequential:
    layers: list[nn.Module] = []
    for position, (before, after) in enumerate(pairwise(widths)):
        # The BatchNorm behind would take a bias away; BYOL's last layer has none either.
        layers.append(nn.Linear(before, after, bias=False))
        if position < len(widths) - 2:
            layers += [nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(nn.BatchNorm1d(after, affine=False))
    return FiniteSequential(*layers)
