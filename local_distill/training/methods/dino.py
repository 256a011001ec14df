"""DINO: whole views alone."""

from __future__ import annotations

import dataclasses

from torch import nn

from local_distill.backbones import TimmBackbone
from local_distill.heads import ProjectionHead
from local_distill.recipes.dino import dino
from local_distill.training.loading import ViewBatch
from local_distill.training.methods.method import Method, Models, StepTerms
from local_distill.training.methods.two_sides import global_targets, two_sides
from local_distill.training.network import DistillationNetwork
from local_distill.training.options import HeadOptions, TemperatureOptions
from local_distill.training.progress import Progress

__all__ = ["Dino"]


class Dino(Method):
    """DINO, see `recipes.dino`.

    Args:
        head: the projection head.
        temps: temperatures.
        center_momentum: of the center.
        fused: never multiply the table of logits out, see `PrototypeLogits`.
    """

    def __init__(
        self,
        head: HeadOptions = HeadOptions(),
        temps: TemperatureOptions = TemperatureOptions(),
        center_momentum: float = 0.9,
        fused: bool = True,
    ) -> None:
        self.head, self.temps = head, temps
        self.center_momentum, self.fused = center_momentum, fused

    def build(self, backbone: TimmBackbone, num_images: int) -> tuple[nn.Module, nn.Module]:
        """See `Method.build`."""
        return DistillationNetwork(backbone, self._head(backbone), fused=self.fused), dino(
            self.head.num_prototypes,
            student_temp=self.temps.student,
            center_momentum=self.center_momentum,
        )

    def step(self, models: Models, batch: ViewBatch, now: Progress) -> StepTerms:
        """See `Method.step`."""
        student, teacher, features = two_sides(models, batch)
        temp = self._teacher_temp(now)
        targets = global_targets(models, [view.global_logits for view in teacher], temp)
        terms = models.criterion(student, teacher, teacher_temp=temp)
        values = {"global_loss": terms.global_loss}
        if terms.matches:
            values["local_loss"] = terms.local_loss
        values["teacher_temp"] = temp
        return StepTerms(terms.loss, values, terms.matches, targets, features)

    def _head(self, backbone: TimmBackbone, options: HeadOptions | None = None) -> ProjectionHead:
        settings = self.head if options is None else options
        return ProjectionHead(backbone.embed_dim, **dataclasses.asdict(settings))

    def _teacher_temp(self, now: Progress) -> float:
        temps = self.temps
        rise = now.stairs if temps.whole_epochs else now.linear
        return rise(temps.teacher_start, temps.teacher, over=temps.teacher_warmup)
