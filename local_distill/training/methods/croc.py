"""CrOC: two views are clustered together, and their clusters agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from local_distill.backbones import BackboneOutput, TimmBackbone
from local_distill.heads import ProjectionHead
from local_distill.recipes.croc import CrocView, croc
from local_distill.structures import CropGeometry, Tokens
from local_distill.training.attention_keys import AttentionKeys
from local_distill.training.cluster_network import ClusterNetwork
from local_distill.training.loading import ViewBatch
from local_distill.training.methods.dino import Dino
from local_distill.training.methods.method import Models, StepTerms
from local_distill.training.methods.two_sides import global_targets, unwrapped, view_sizes
from local_distill.training.options import HeadOptions, TemperatureOptions
from local_distill.training.progress import Progress

__all__ = ["Croc", "CrocNetwork", "CrocOutput"]

_CLUSTER_HEAD = HeadOptions(num_prototypes=8_192)


class CrocOutput(NamedTuple):
    """What the network says of one view.

    Attributes:
        global_logits: (b, c).
        out: the backbone's tokens.
        keys: (b, h, n, e) of the patches in the last attention.
        cls_keys: (b, h, e) of the class token there.
    """

    global_logits: Tensor
    out: BackboneOutput
    keys: Tensor
    cls_keys: Tensor


class CrocNetwork(ClusterNetwork):
    """`ClusterNetwork` of a ViT with a class token, which also gives its last attention's keys."""

    def __init__(
        self, backbone: TimmBackbone, global_head: ProjectionHead, cluster_head: ProjectionHead
    ) -> None:
        super().__init__(backbone, global_head, cluster_head)
        self.attention_keys = AttentionKeys(backbone)

    def forward(  # type: ignore[override] # it says more of a view
        self, views: Sequence[Tensor]
    ) -> list[CrocOutput]:
        """Map views (b, 3, h_v, w_v) to one `CrocOutput` each."""
        assert self.global_head is not None
        outputs = []
        for view in views:
            with self.attention_keys.watch() as seen:
                out = self.backbone(view)
            patches, whole = self.attention_keys.split(seen[-1])
            outputs.append(CrocOutput(self.global_head(out.global_token), out, patches, whole))
        return outputs


class Croc(Dino):
    """CrOC, see `recipes.croc`; for ViTs, with two global views and no small ones.

    Args:
        head: projection head of whole views.
        cluster_head: projection head of clusters.
        temps: temperatures.
        center_momentum: of both centers.
        start_clusters: clusters that a pair of views starts with.
        max_clusters: clusters that it ends with, at most.
        cluster_weight: of the clusters' loss.
    """

    def __init__(
        self,
        head: HeadOptions = HeadOptions(),
        cluster_head: HeadOptions = _CLUSTER_HEAD,
        temps: TemperatureOptions = TemperatureOptions(),
        center_momentum: float = 0.9,
        start_clusters: int = 5,
        max_clusters: int = 4,
        cluster_weight: float = 1.0,
    ) -> None:
        super().__init__(head, temps, center_momentum, fused=False)
        self.cluster_head = cluster_head
        self.start_clusters, self.max_clusters = start_clusters, max_clusters
        self.cluster_weight = cluster_weight

    def build(self, backbone: TimmBackbone, num_images: int) -> tuple[nn.Module, nn.Module]:
        """See `Method.build`."""
        clusters = self._head(backbone, self.cluster_head)
        loss = croc(
            self.head.num_prototypes,
            self.cluster_head.num_prototypes,
            start_clusters=self.start_clusters,
            max_clusters=self.max_clusters,
            student_temp=self.temps.student,
            center_momentum=self.center_momentum,
            cluster_weight=self.cluster_weight,
        )
        return CrocNetwork(backbone, self._head(backbone), clusters), loss

    def step(self, models: Models, batch: ViewBatch, now: Progress) -> StepTerms:
        """See `Method.step`."""
        assert models.teacher is not None
        views = batch.views[:2]
        students, teachers = models.student(views), models.teacher(views)
        sizes = view_sizes(views)
        temp = self._teacher_temp(now)
        targets = global_targets(models, [view.global_logits for view in teachers], temp)
        terms = models.criterion(
            [
                _view(out, None, size, models.backbone)
                for out, size in zip(students, sizes, strict=True)
            ],
            [
                _view(out, geometry, size, models.backbone)
                for out, geometry, size in zip(teachers, batch.geometries, sizes, strict=False)
            ],
            student_head=unwrapped(models.student).cluster_head,
            teacher_head=models.teacher.module.cluster_head,
            teacher_temp=temp,
        )
        values = {
            "global_loss": terms.global_loss,
            "local_loss": terms.cluster_loss,
            "valid_clusters": terms.valid.float().mean(),
            "teacher_temp": temp,
        }
        features = [view.out.global_token for view in teachers]
        return StepTerms(terms.loss, values, {}, targets, features)


def _view(
    output: CrocOutput, geometry: CropGeometry | None, size: tuple[int, int], backbone: TimmBackbone
) -> CrocView:
    out = output.out
    if geometry is None:  # the student's, whose keys are not looked at
        return CrocView(output.global_logits, out.global_token, Tokens(out.patch_tokens))
    tokens = Tokens(out.patch_tokens, geometry, backbone.token_grid(size))
    return CrocView(output.global_logits, out.global_token, tokens, output.keys, output.cls_keys)
