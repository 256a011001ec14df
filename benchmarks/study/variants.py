"""The variants: methods of the trainer that differ in nothing but what is compared."""

from __future__ import annotations

from benchmarks.study.settings import Recipe
from benchmarks.study.watched_matcher import WatchedMatcher
from local_distill.matching import GatedSimilarityMatcher, NearestMatcher, SimilarityMatcher
from local_distill.structures import Matcher
from local_distill.training.methods import Dino, Glsd, Method, SdsslMoco
from local_distill.training.options import HeadOptions, TemperatureOptions

__all__ = ["LAYERS", "MATCHING", "build_method"]

# The first of each is the one without what the paper adds.
MATCHING = ("vanilla", "similarity", "geometric", "hybrid")
LAYERS = ("last", "every")

_MATCHERS: dict[str, type[Matcher]] = {
    "similarity": SimilarityMatcher,
    "geometric": NearestMatcher,
    "hybrid": GatedSimilarityMatcher,
}


def build_method(variant: str, recipe: Recipe, temp: float) -> tuple[Method, WatchedMatcher | None]:
    """The trainer's method, and its matcher where there is one.

    Args:
        variant: of `MATCHING` or `LAYERS`.
        recipe: its ``head``.
        temp: of the teacher, or of the contrast.
    """
    if variant in LAYERS:
        ratio = 1.0 if variant == "every" else 0.0  # as published, or MoCo v3 alone
        return SdsslMoco(**recipe.head, ratio=ratio, temp=temp), None
    head = HeadOptions(**recipe.head)
    temps = TemperatureOptions(teacher=temp, teacher_start=temp)
    # Small heads: the tables are smaller than what it takes to avoid them.
    if variant == "vanilla":
        return Dino(head, temps, fused=False), None
    watched = WatchedMatcher(_MATCHERS[variant](), every=max(1, recipe.steps // 20))
    return Glsd(head, temps, fused=False, matcher=watched, normalize="matched"), watched
