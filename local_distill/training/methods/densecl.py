"""DenseCL: whole views and tokens, each against keys of other images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import nn

from local_distill.backbones import TimmBackbone
from local_distill.recipes.densecl import densecl
from local_distill.structures import Matcher, Matches, Tokens, ViewOutput
from local_distill.training.loading import ViewBatch
from local_distill.training.methods.method import Method, Models, StepTerms
from local_distill.training.methods.two_sides import two_sides
from local_distill.training.network import DistillationNetwork
from local_distill.training.progress import Progress
from local_distill.training.row_mlp import RowMlp

__all__ = ["Densecl"]


class Densecl(Method):
    """DenseCL, see `recipes.densecl`.

    Args:
        dim: of both kinds of features.
        hidden_dim: width of both heads' hidden layer.
        num_keys: length of each queue.
        temp: temperature of both contrasts.
        local_weight: weight of the dense contrast; that of whole views is the rest to 1.
        both_ways: each of two views is compared with the other; as published, False: the first
            view alone goes through the student, the second through the teacher.
        matcher: pairs the tokens; null: `SimilarityMatcher`, as published.
    """

    def __init__(
        self,
        dim: int = 128,
        hidden_dim: int = 2_048,
        num_keys: int = 65_536,
        temp: float = 0.2,
        local_weight: float = 0.5,
        both_ways: bool = False,
        matcher: Callable[[Tokens, Tokens], Matches] | None = None,
    ) -> None:
        self.dim, self.hidden_dim, self.num_keys = dim, hidden_dim, num_keys
        self.temp, self.local_weight, self.both_ways = temp, local_weight, both_ways
        self.matcher = matcher

    def build(self, backbone: TimmBackbone, num_images: int) -> tuple[nn.Module, nn.Module]:
        """See `Method.build`."""
        widths = (backbone.embed_dim, self.hidden_dim, self.dim)
        loss = densecl(
            self.dim, num_keys=self.num_keys, temp=self.temp, local_weight=self.local_weight
        )
        if self.matcher is not None:
            loss.matcher = cast("Matcher", self.matcher)
        return DistillationNetwork(backbone, RowMlp(widths), RowMlp(widths)), loss

    def step(self, models: Models, batch: ViewBatch, now: Progress) -> StepTerms:
        """See `Method.step`."""
        if not self.both_ways:
            batch = batch._replace(views=batch.views[:2], geometries=batch.geometries[:2])
        student, teacher, features = two_sides(models, batch)
        if not self.both_ways:
            student, teacher = student[:1], _all_but_first(teacher)
        terms = models.criterion(student, teacher)
        values = {"global_loss": terms.global_loss, "local_loss": terms.local_loss}
        return StepTerms(terms.loss, values, terms.matches, (), features)


def _all_but_first(views: Sequence[ViewOutput]) -> list[ViewOutput]:
    return [ViewOutput(), *views[1:]]  # an empty one keeps the first one's place
