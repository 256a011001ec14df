"""A network whose second head sees what the loss has pooled."""

from __future__ import annotations

from torch import nn

from local_distill.backbones import TimmBackbone
from local_distill.heads import ProjectionHead
from local_distill.training.network import DistillationNetwork

__all__ = ["ClusterNetwork"]


class ClusterNetwork(DistillationNetwork):
    """Backbone and a head for whole views, and a head for clusters, which the loss calls itself.

    Args:
        backbone: gives `BackboneOutput`.
        global_head: (b, d) → (b, c).
        cluster_head: (b, k, d) → (b, k, c').
    """

    def __init__(
        self, backbone: TimmBackbone, global_head: ProjectionHead, cluster_head: ProjectionHead
    ) -> None:
        super().__init__(backbone, global_head)
        self.cluster_head = cluster_head

    def prototypes(self) -> list[nn.Parameter]:
        """The parameters that stand still where the last layers are frozen."""
        return [*super().prototypes(), *self.cluster_head.prototypes.parameters()]
