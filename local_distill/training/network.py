"""The network of most methods: a backbone with a head for whole views and one for tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from local_distill._check import check_sequence
from local_distill._logits import Logits
from local_distill.backbones import BackboneOutput, TimmBackbone
from local_distill.heads import ProjectionHead
from local_distill.structures import CropGeometry, Tokens, ViewOutput
from local_distill.training.masked_patches import MaskedPatches

__all__ = ["DistillationNetwork", "NetworkOutput", "view_outputs"]


class NetworkOutput(NamedTuple):
    """What the network says of one view.

    Attributes:
        global_logits: (b, c) of the global head, or None without one.
        token_logits: (b, n, c) of the local head, or None without one.
        patch_tokens: (b, n, d), the backbone's, which a similarity matcher compares.
        global_token: (b, d), the backbone's.
    """

    global_logits: Logits | None
    token_logits: Logits | None
    patch_tokens: Tensor
    global_token: Tensor


class DistillationNetwork(nn.Module):
    """Backbone, a head for whole views and a head for tokens; either head may be missing.

    Views of one size go through the backbone together. A `ProjectionHead` takes all views as one
    batch, and says `PrototypeLogits` where ``fused``; any other head takes view by view, so that
    its BatchNorm has the statistics of one view. No geometry passes through a network: a precision
    plugin would round it by pixels.

    Args:
        backbone: gives `BackboneOutput`.
        global_head: (b, d) → (b, c).
        local_head: (b, n, d) → (b, n, c).
        propagation: of a student's token features, PixPro's; left out where ``teacher``.
        mask_token: whether tokens can be masked before the backbone sees them, for iBOT.
        fused: projection heads give `PrototypeLogits`, never multiplied out.

    Example:
        >>> from local_distill.backbones import tiny_vit
        >>> heads = [ProjectionHead(96, num_prototypes=16, hidden_dim=32) for _ in range(2)]
        >>> network = DistillationNetwork(tiny_vit(), *heads)
        >>> big, small = network([torch.zeros(2, 3, 48, 48), torch.zeros(2, 3, 24, 24)])
        >>> big.token_logits.shape, small.token_logits.shape
        (torch.Size([2, 36, 16]), torch.Size([2, 9, 16]))
    """

    def __init__(
        self,
        backbone: TimmBackbone,
        global_head: nn.Module | None = None,
        local_head: nn.Module | None = None,
        *,
        propagation: nn.Module | None = None,
        mask_token: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.global_head = global_head
        self.local_head = local_head
        self.propagation = propagation
        self.masked_patches = MaskedPatches(backbone) if mask_token else None
        self.fused = fused

    def forward(
        self,
        views: Sequence[Tensor],
        valid: Sequence[Tensor | None] | None = None,
        *,
        teacher: bool = False,
    ) -> list[NetworkOutput]:
        """Map views (b, 3, h_v, w_v) to one `NetworkOutput` each.

        Args:
            views: the views.
            valid: per view (b, n_v) bool, True where a token is masked, or None.
            teacher: leave out what only a student has.
        """
        check_sequence("views", views, "a batch of images")
        outputs = self._backbone_outputs(views, valid)
        whole = _headed(self.global_head, [out.global_token for out in outputs], self.fused)
        local = _headed(self.local_head, [out.patch_tokens for out in outputs], self.fused)
        if self.propagation is not None and not teacher:
            local = [None if view is None else self.propagation(view) for view in local]
        return [
            NetworkOutput(logits, token_logits, out.patch_tokens, out.global_token)
            for out, logits, token_logits in zip(outputs, whole, local, strict=True)
        ]

    def prototypes(self) -> list[nn.Parameter]:
        """The parameters that stand still where the last layers are frozen."""
        heads = [head for head in (self.global_head, self.local_head) if head is not None]
        return [
            parameter
            for head in heads
            if isinstance(head, ProjectionHead)
            for parameter in head.prototypes.parameters()
        ]

    def _backbone_outputs(
        self, views: Sequence[Tensor], valid: Sequence[Tensor | None] | None
    ) -> list[BackboneOutput]:
        outputs: dict[int, BackboneOutput] = {}
        hidden = [None] * len(views) if valid is None else list(valid)
        for numbers in _alike(views, hidden).values():
            images = torch.cat([views[v] for v in numbers])
            masks = [hidden[v] for v in numbers]
            if self.masked_patches is not None and masks[0] is not None:
                joined = torch.cat([mask for mask in masks if mask is not None])
                with self.masked_patches.hide(joined):
                    batch: BackboneOutput = self.backbone(images)
            else:
                batch = self.backbone(images)
            sizes = [views[v].shape[0] for v in numbers]
            parts = (torch.split(batch.global_token, sizes), torch.split(batch.patch_tokens, sizes))
            for v, whole, patches in zip(numbers, *parts, strict=True):
                outputs[v] = BackboneOutput(whole, patches)
        return [outputs[v] for v in range(len(views))]


def view_outputs(
    outputs: Sequence[NetworkOutput],
    geometries: Sequence[CropGeometry],
    sizes: Sequence[tuple[int, int]],
    backbone: TimmBackbone,
    *,
    learned: bool = False,
) -> list[ViewOutput]:
    """Join what the network said with where the views lie, as the losses take it.

    Args:
        outputs: of the network, view by view.
        geometries: of at least as many views.
        sizes: (height, width) of as many views, in pixels.
        backbone: knows where its tokens lie.
        learned: keep the patch tokens' graph, where what is pooled from them is what learns.
    """
    joined = []
    for output, geometry, size in zip(outputs, geometries, sizes, strict=False):
        features = output.patch_tokens if learned else output.patch_tokens.detach()
        tokens = Tokens(features, geometry, backbone.token_grid(size))
        joined.append(ViewOutput(output.global_logits, output.token_logits, tokens))
    return joined


def _headed(
    head: nn.Module | None, features: Sequence[Tensor], fused: bool
) -> Sequence[Logits | None]:
    if head is None:
        return [None] * len(features)
    if not isinstance(head, ProjectionHead):
        return [head(view) for view in features]
    if fused:
        return head.prototype_logits(features)
    # Rows do not meet in this head: all views in one product.
    rows = [view.reshape(-1, view.shape[-1]) for view in features]
    logits: Tensor = head(torch.cat(rows))
    parts = torch.split(logits, [len(part) for part in rows])
    return [
        part.reshape(*view.shape[:-1], part.shape[-1])
        for part, view in zip(parts, features, strict=True)
    ]


def _alike(
    views: Sequence[Tensor], hidden: Sequence[Tensor | None]
) -> dict[tuple[torch.Size, bool], list[int]]:
    groups: dict[tuple[torch.Size, bool], list[int]] = {}
    for number, (view, mask) in enumerate(zip(views, hidden, strict=True)):
        groups.setdefault((view.shape[1:], mask is None), []).append(number)
    return groups
