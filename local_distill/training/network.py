"""The network that is trained: a backbone with a global and a local projection head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from local_distill._check import check_sequence
from local_distill.backbones import BackboneOutput, TimmBackbone
from local_distill.heads import ProjectionHead
from local_distill.structures import CropGeometry, Tokens, ViewOutput

__all__ = ["DistillationNetwork", "NetworkOutput", "view_outputs"]


class NetworkOutput(NamedTuple):
    """What the network says of one view.

    Attributes:
        global_logits: (b, c).
        token_logits: (b, n, c), or None without a local head.
        patch_tokens: (b, n, d), the backbone's, which a similarity matcher compares.
    """

    global_logits: Tensor
    token_logits: Tensor | None
    patch_tokens: Tensor


class DistillationNetwork(nn.Module):
    """Backbone, global head and, for local distillation, a local head of its own.

    Views of one size go through the backbone together. No geometry passes through it: a precision
    plugin would round it by pixels.

    Args:
        backbone: gives `BackboneOutput`.
        num_prototypes: of each head.
        local: whether there is a local head.
        hidden_dim: see `ProjectionHead`.
        bottleneck_dim: see `ProjectionHead`.

    Example:
        >>> from local_distill.backbones import tiny_vit
        >>> network = DistillationNetwork(tiny_vit(), num_prototypes=16, hidden_dim=32)
        >>> big, small = network([torch.zeros(2, 3, 48, 48), torch.zeros(2, 3, 24, 24)])
        >>> big.token_logits.shape, small.token_logits.shape
        (torch.Size([2, 36, 16]), torch.Size([2, 9, 16]))
    """

    def __init__(
        self,
        backbone: TimmBackbone,
        *,
        num_prototypes: int,
        local: bool = True,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        self.backbone = backbone

        def head() -> ProjectionHead:
            return ProjectionHead(
                backbone.embed_dim,
                num_prototypes,
                hidden_dim=hidden_dim,
                bottleneck_dim=bottleneck_dim,
            )

        self.global_head = head()
        self.local_head = head() if local else None

    def forward(self, views: Sequence[Tensor]) -> list[NetworkOutput]:
        """Map views (b, 3, h_v, w_v) to one `NetworkOutput` each."""
        check_sequence("views", views, "a batch of images")
        outputs: dict[int, NetworkOutput] = {}
        for numbers in _by_size(views).values():
            batch: BackboneOutput = self.backbone(torch.cat([views[v] for v in numbers]))
            global_logits = self.global_head(batch.global_token)
            token_logits = None if self.local_head is None else self.local_head(batch.patch_tokens)
            sizes = [views[v].shape[0] for v in numbers]
            parts = (
                torch.split(global_logits, sizes),
                [None] * len(numbers) if token_logits is None else torch.split(token_logits, sizes),
                torch.split(batch.patch_tokens, sizes),
            )
            for v, whole, local, patches in zip(numbers, *parts, strict=True):
                outputs[v] = NetworkOutput(whole, local, patches)
        return [outputs[v] for v in range(len(views))]


def view_outputs(
    outputs: Sequence[NetworkOutput],
    views: Sequence[Tensor],
    geometries: Sequence[CropGeometry],
    backbone: TimmBackbone,
) -> list[ViewOutput]:
    """Join what the network said with where the views lie, as the losses take it."""
    joined = []
    for output, view, geometry in zip(outputs, views, geometries, strict=False):
        grid = backbone.token_grid((int(view.shape[-2]), int(view.shape[-1])))
        tokens = Tokens(output.patch_tokens.detach(), geometry, grid)
        joined.append(ViewOutput(output.global_logits, output.token_logits, tokens))
    return joined


def _by_size(views: Sequence[Tensor]) -> dict[torch.Size, list[int]]:
    groups: dict[torch.Size, list[int]] = {}
    for number, view in enumerate(views):
        groups.setdefault(view.shape[1:], []).append(number)
    return groups
