"""CrIBo: objects of two views agree, and with the objects most like them in other images."""

from __future__ import annotations

from torch import nn

from local_distill.backbones import TimmBackbone
from local_distill.recipes.cribo import cribo
from local_distill.training.cluster_network import ClusterNetwork
from local_distill.training.loading import ViewBatch
from local_distill.training.methods.dino import Dino
from local_distill.training.methods.method import Models, StepTerms
from local_distill.training.methods.two_sides import global_targets, join_sides, unwrapped
from local_distill.training.options import HeadOptions, TemperatureOptions
from local_distill.training.progress import Progress

__all__ = ["Cribo"]


class Cribo(Dino):
    """CrIBo, see `recipes.cribo`; with two global views and no small ones.

    Args:
        head: projection head of whole views.
        cluster_head: projection head of objects.
        temps: temperatures.
        center_momentum: of both centers.
        num_clusters: objects in an image.
        queue_images: how many images are remembered.
        neighbours_after: the neighbours' loss starts after so long: in epochs where the run is
            given in epochs, else in steps.
    """

    def __init__(
        self,
        head: HeadOptions = HeadOptions(),
        cluster_head: HeadOptions = HeadOptions(),
        temps: TemperatureOptions = TemperatureOptions(),
        center_momentum: float = 0.9,
        num_clusters: int = 32,
        queue_images: int = 25_000,
        neighbours_after: float = 1.0,
    ) -> None:
        super().__init__(head, temps, center_momentum, fused=False)
        self.cluster_head, self.num_clusters = cluster_head, num_clusters
        self.queue_images, self.neighbours_after = queue_images, neighbours_after

    def build(self, backbone: TimmBackbone, num_images: int) -> tuple[nn.Module, nn.Module]:
        """See `Method.build`."""
        clusters = self._head(backbone, self.cluster_head)
        loss = cribo(
            backbone.embed_dim,
            self.head.num_prototypes,
            self.cluster_head.num_prototypes,
            num_clusters=self.num_clusters,
            queue_images=self.queue_images,
            student_temp=self.temps.student,
            cluster_student_temp=self.temps.student,
            center_momentum=self.center_momentum,
        )
        return ClusterNetwork(backbone, self._head(backbone), clusters), loss

    def step(self, models: Models, batch: ViewBatch, now: Progress) -> StepTerms:
        """See `Method.step`."""
        assert models.teacher is not None
        batch = batch._replace(views=batch.views[:2], geometries=batch.geometries[:2])
        teachers = models.teacher(batch.views)
        temp = self._teacher_temp(now)
        targets = global_targets(models, [view.global_logits for view in teachers], temp)
        terms = models.criterion(
            *join_sides(models, batch, models.student(batch.views), teachers, learned=True),
            student_head=unwrapped(models.student).cluster_head,
            teacher_head=models.teacher.module.cluster_head,
            teacher_temp=temp,
            neighbour_weight=0.0 if now.within(self.neighbours_after) else 1.0,
            image_id=batch.images,
        )
        values = {
            "global_loss": terms.global_loss,
            "local_loss": terms.cluster_loss,
            "neighbour_loss": terms.neighbour_loss,
            "teacher_temp": temp,
        }
        features = [view.global_token for view in teachers]
        return StepTerms(terms.loss, values, {}, targets, features)
