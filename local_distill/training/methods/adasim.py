"""AdaSim: DINO between an image and, where features can be trusted, a neighbour of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from local_distill.backbones import TimmBackbone
from local_distill.neighbour_sampler import NeighbourSampler
from local_distill.recipes.adasim import adasim
from local_distill.training.loading import ViewBatch
from local_distill.training.methods.dino import Dino
from local_distill.training.methods.method import Models, StepTerms
from local_distill.training.methods.two_sides import global_targets, two_sides
from local_distill.training.network import DistillationNetwork
from local_distill.training.options import HeadOptions, TemperatureOptions
from local_distill.training.progress import Progress

__all__ = ["Adasim"]


class Adasim(Dino):
    """AdaSim, see `recipes.adasim`; published with two global views and no small ones.

    Args:
        head: the projection head.
        temps: temperatures.
        center_momentum: of the center.
        fused: never multiply the table of logits out, see `PrototypeLogits`.
        top_k: neighbours of a vote.
        votes: epochs that are summed; so many pass before the first neighbour is shown.
        neighbour_temp: temperature of the choice.
    """

    has_partners = True

    def __init__(
        self,
        head: HeadOptions = HeadOptions(),
        temps: TemperatureOptions = TemperatureOptions(),
        center_momentum: float = 0.9,
        fused: bool = True,
        top_k: int = 10,
        votes: int = 50,
        neighbour_temp: float = 0.001,
    ) -> None:
        super().__init__(head, temps, center_momentum, fused)
        self.top_k, self.votes, self.neighbour_temp = top_k, votes, neighbour_temp

    def build(self, backbone: TimmBackbone, num_images: int) -> tuple[nn.Module, nn.Module]:
        """See `Method.build`."""
        loss = adasim(
            num_images,
            backbone.embed_dim,
            self.head.num_prototypes,
            top_k=self.top_k,
            votes=self.votes,
            neighbour_temp=self.neighbour_temp,
            student_temp=self.temps.student,
            center_momentum=self.center_momentum,
        )
        return DistillationNetwork(backbone, self._head(backbone), fused=self.fused), loss

    def step(self, models: Models, batch: ViewBatch, now: Progress) -> StepTerms:
        """See `Method.step`."""
        student, teacher, features = two_sides(models, batch)
        temp = self._teacher_temp(now)
        targets = global_targets(models, [view.global_logits for view in teacher], temp)
        terms = models.criterion(
            student, teacher, teacher_temp=temp, index=batch.images, features=features[0]
        )
        values = {"global_loss": terms.global_loss, "teacher_temp": temp}
        return StepTerms(terms.loss, values, {}, targets, features)

    def draw_partners(self, criterion: nn.Module, images: Tensor, seed: int) -> Tensor:
        """See `Method.draw_partners`."""
        sampler = _sampler(criterion)
        generator = torch.Generator(sampler.features.device).manual_seed(seed)
        return sampler.draw(images.to(sampler.features.device), generator=generator).cpu()

    def end_epoch(self, criterion: nn.Module) -> None:
        """See `Method.end_epoch`."""
        _sampler(criterion).end_epoch()


def _sampler(criterion: Any) -> NeighbourSampler:
    found: NeighbourSampler = criterion.sampler
    return found
