"""GLSD and EsViT: whole views, and tokens that were matched by place or by features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

from torch import nn

from local_distill.backbones import TimmBackbone
from local_distill.losses._pairs import check_normalize
from local_distill.matching import NearestMatcher, SimilarityMatcher
from local_distill.recipes.glsd import glsd
from local_distill.structures import Matcher, Matches, Tokens
from local_distill.training.methods.dino import Dino
from local_distill.training.network import DistillationNetwork
from local_distill.training.options import HeadOptions, TemperatureOptions

__all__ = ["Esvit", "Glsd"]


class Glsd(Dino):
    """GLSD, see `recipes.glsd`, with any matcher.

    Args:
        head: both projection heads, that of whole views and that of tokens.
        temps: temperatures.
        center_momentum: of both centers.
        fused: never multiply the tables of logits out, see `PrototypeLogits`.
        matcher: pairs the tokens, by its import path; null: `NearestMatcher`, as published.
        normalize: "all" as published; "matched" and "image": see `LocalDistillationLoss`.
        global_weight: of the loss of whole views.
        local_weight: of the loss of tokens.
    """

    def __init__(
        self,
        head: HeadOptions = HeadOptions(),
        temps: TemperatureOptions = TemperatureOptions(),
        center_momentum: float = 0.9,
        fused: bool = True,
        matcher: Callable[[Tokens, Tokens], Matches] | None = None,
        normalize: Literal["all", "matched", "image"] = "all",
        global_weight: float = 0.5,
        local_weight: float = 0.5,
    ) -> None:
        super().__init__(head, temps, center_momentum, fused)
        self.matcher = cast("Matcher", self._published() if matcher is None else matcher)
        self.normalize = check_normalize(normalize)
        self.global_weight, self.local_weight = global_weight, local_weight

    def build(self, backbone: TimmBackbone, num_images: int) -> tuple[nn.Module, nn.Module]:
        """See `Method.build`."""
        heads = self._head(backbone), self._head(backbone)
        loss = glsd(
            self.head.num_prototypes,
            student_temp=self.temps.student,
            center_momentum=self.center_momentum,
        )
        loss.matcher = self.matcher
        loss.local_loss.normalize = self.normalize
        loss.global_weight, loss.local_weight = self.global_weight, self.local_weight
        return DistillationNetwork(backbone, *heads, fused=self.fused), loss

    def _published(self) -> Callable[[Tokens, Tokens], Matches]:
        return NearestMatcher()


class Esvit(Glsd):
    """EsViT, see `recipes.esvit`: `Glsd` with tokens matched by their features.

    Args:
        head: both projection heads, that of whole views and that of regions.
        temps: temperatures.
        center_momentum: of both centers.
        fused: never multiply the tables of logits out, see `PrototypeLogits`.
        matcher: pairs the regions; null: `SimilarityMatcher`, as published.
        normalize: "all" as published; "matched" and "image": see `LocalDistillationLoss`.
        global_weight: of the loss of whole views.
        local_weight: of the loss of regions.
    """

    def _published(self) -> Callable[[Tokens, Tokens], Matches]:
        return SimilarityMatcher()
