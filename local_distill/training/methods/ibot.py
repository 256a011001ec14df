"""iBOT: whole views, and tokens that were hidden from the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from local_distill.backbones import TimmBackbone
from local_distill.masking import random_block_mask
from local_distill.recipes.ibot import ibot
from local_distill.training.loading import ViewBatch
from local_distill.training.methods.dino import Dino
from local_distill.training.methods.method import Models, StepTerms
from local_distill.training.methods.two_sides import global_targets, two_sides
from local_distill.training.network import DistillationNetwork
from local_distill.training.options import HeadOptions, TemperatureOptions
from local_distill.training.progress import Progress

__all__ = ["Ibot"]

_PUBLISHED_HEAD = HeadOptions(num_prototypes=8_192)


class Ibot(Dino):
    """iBOT, see `recipes.ibot`; for ViTs and Swins.

    Args:
        head: the projection head.
        temps: temperatures, the same for whole views and tokens.
        center_momentum: of both centers.
        fused: never multiply the tables of logits out, see `PrototypeLogits`.
        shared_head: one head for whole views and tokens, as published.
        mask_ratios: for each image one of these ranges of masked shares is picked.
        global_weight: of the loss of whole views.
        local_weight: of the loss of masked tokens.
    """

    def __init__(
        self,
        head: HeadOptions = _PUBLISHED_HEAD,
        temps: TemperatureOptions = TemperatureOptions(),
        center_momentum: float = 0.9,
        fused: bool = True,
        shared_head: bool = True,
        mask_ratios: Sequence[tuple[float, float]] = ((0.0, 0.0), (0.1, 0.5)),
        global_weight: float = 1.0,
        local_weight: float = 1.0,
    ) -> None:
        super().__init__(head, temps, center_momentum, fused)
        self.shared_head, self.mask_ratios = shared_head, tuple(map(tuple, mask_ratios))
        self.global_weight, self.local_weight = global_weight, local_weight

    def build(self, backbone: TimmBackbone, num_images: int) -> tuple[nn.Module, nn.Module]:
        """See `Method.build`."""
        whole = self._head(backbone)
        local = whole if self.shared_head else self._head(backbone)
        loss = ibot(
            self.head.num_prototypes,
            student_temp=self.temps.student,
            center_momentum=self.center_momentum,
        )
        loss.global_weight, loss.local_weight = self.global_weight, self.local_weight
        network = DistillationNetwork(backbone, whole, local, mask_token=True, fused=self.fused)
        return network, loss

    def extras(
        self, backbone: TimmBackbone, sizes: Sequence[tuple[int, int]], num_global: int
    ) -> Callable[[Sequence[Tensor]], dict[str, Any]]:
        """The masks of the global views; small ones have none."""
        grids = [backbone.token_grid(size) for size in sizes[:num_global]]
        return _DrawMasks([(grid.rows, grid.cols) for grid in grids], self.mask_ratios)

    def step(self, models: Models, batch: ViewBatch, now: Progress) -> StepTerms:
        """See `Method.step`."""
        masks: list[Tensor] = batch.extras["masks"]
        valid = [*masks, *[None] * (len(batch.views) - len(masks))]
        student, teacher, features = two_sides(models, batch, valid)
        temp = self._teacher_temp(now)
        targets = global_targets(models, [view.global_logits for view in teacher], temp)
        terms = models.criterion(student, teacher, valid, teacher_temp=temp)
        values = {
            "global_loss": terms.global_loss,
            "local_loss": terms.local_loss,
            "teacher_temp": temp,
            "masked": torch.cat([mask.flatten() for mask in masks]).float().mean(),
        }
        return StepTerms(terms.loss, values, {}, targets, features)


class _DrawMasks:
    """A class and not a closure, so that workers started anew can be sent it."""

    def __init__(
        self, shapes: Sequence[tuple[int, int]], ratios: Sequence[tuple[float, ...]]
    ) -> None:
        self.shapes, self.ratios = list(shapes), [(low, high) for low, high in ratios]

    def __call__(self, views: Sequence[Tensor]) -> dict[str, Any]:
        return {
            "masks": [
                random_block_mask(1, rows, cols, ratio_ranges=self.ratios)[0]
                for rows, cols in self.shapes
            ]
        }
