"""VICRegL: VICReg's criterion on whole views and on tokens that match; without a teacher."""

from __future__ import annotations

from torch import Tensor, nn

from local_distill.backbones import TimmBackbone
from local_distill.recipes.vicregl import vicregl
from local_distill.structures import Tokens
from local_distill.training.loading import ViewBatch
from local_distill.training.methods.method import Method, Models, StepTerms
from local_distill.training.methods.two_sides import view_sizes
from local_distill.training.network import DistillationNetwork, NetworkOutput
from local_distill.training.progress import Progress
from local_distill.training.row_mlp import RowMlp

__all__ = ["Vicregl"]


class Vicregl(Method):
    """VICRegL, see `recipes.vicregl`.

    Args:
        dim: of the embeddings of whole views, and the width of their projector.
        token_dim: of the embeddings of tokens, and the width of their projector.
        alpha: weight of whole views; that of tokens is the rest to 1.
        location_counts: matches by place kept from a global view and back to it.
        feature_counts: matches by features kept likewise; null: all.
    """

    has_teacher = False

    def __init__(
        self,
        dim: int = 8_192,
        token_dim: int = 512,
        alpha: float = 0.75,
        location_counts: tuple[int, int] = (20, 4),
        feature_counts: tuple[int, int] | None = (20, 4),
    ) -> None:
        self.dim, self.token_dim, self.alpha = dim, token_dim, alpha
        self.location_counts, self.feature_counts = location_counts, feature_counts

    def build(self, backbone: TimmBackbone, num_images: int) -> tuple[nn.Module, nn.Module]:
        """See `Method.build`."""
        whole, local = (
            RowMlp((backbone.embed_dim, dim, dim, dim), batch_norm=True, last_bias=False)
            for dim in (self.dim, self.token_dim)
        )
        loss = vicregl(
            alpha=self.alpha,
            location_counts=self.location_counts,
            feature_counts=self.feature_counts,
        )
        return DistillationNetwork(backbone, whole, local), loss

    def step(self, models: Models, batch: ViewBatch, now: Progress) -> StepTerms:
        """See `Method.step`."""
        outputs: list[NetworkOutput] = models.student(batch.views)
        tokens = [
            Tokens(None, geometry, models.backbone.token_grid(size))
            for geometry, size in zip(batch.geometries, view_sizes(batch.views), strict=True)
        ]
        terms = models.criterion(
            [_tensor(view.global_logits) for view in outputs],
            [_tensor(view.token_logits) for view in outputs],
            tokens,
            global_views=models.num_global,
        )
        values = {
            "global_loss": terms.global_loss,
            "local_loss": terms.location_loss + terms.feature_loss,
            "location_loss": terms.location_loss,
            "feature_loss": terms.feature_loss,
        }
        features = [view.global_token.detach() for view in outputs[: models.num_global]]
        return StepTerms(terms.loss, values, {}, (), features)


def _tensor(embeddings: object) -> Tensor:
    assert isinstance(embeddings, Tensor)
    return embeddings
