"""PixPro: tokens that propagate, consistent with the teacher's within a radius."""

from __future__ import annotations

from torch import nn

from local_distill.backbones import TimmBackbone
from local_distill.recipes.pixpro import pixpro
from local_distill.training.loading import ViewBatch
from local_distill.training.methods.method import Method, Models, StepTerms
from local_distill.training.methods.two_sides import two_sides
from local_distill.training.network import DistillationNetwork
from local_distill.training.progress import Progress
from local_distill.training.row_mlp import RowMlp

__all__ = ["Pixpro"]


class Pixpro(Method):
    """PixPro, see `recipes.pixpro`, without its instance branch.

    Args:
        dim: of the projected features.
        hidden_dim: width of the projector's hidden layer.
        gamma: exponent of the propagation.
        num_layers: linear layers of the propagation.
        radius: in larger cell diagonals: nearer tokens are to agree.
    """

    def __init__(
        self,
        dim: int = 256,
        hidden_dim: int = 4_096,
        gamma: float = 2.0,
        num_layers: int = 1,
        radius: float = 0.7,
    ) -> None:
        self.dim, self.hidden_dim = dim, hidden_dim
        self.gamma, self.num_layers, self.radius = gamma, num_layers, radius

    def build(self, backbone: TimmBackbone, num_images: int) -> tuple[nn.Module, nn.Module]:
        """See `Method.build`."""
        loss = pixpro(self.dim, gamma=self.gamma, num_layers=self.num_layers, radius=self.radius)
        # It is trained: its place is in the network, which the processes keep in step.
        propagation = loss.propagation
        setattr(loss, "propagation", nn.Identity())  # noqa: B010 - the type is the recipe's
        head = RowMlp((backbone.embed_dim, self.hidden_dim, self.dim), batch_norm=True)
        return DistillationNetwork(backbone, None, head, propagation=propagation), loss

    def step(self, models: Models, batch: ViewBatch, now: Progress) -> StepTerms:
        """See `Method.step`."""
        student, teacher, features = two_sides(models, batch)
        terms = models.criterion(student, teacher)
        return StepTerms(terms.loss, {"local_loss": terms.local_loss}, terms.matches, (), features)
