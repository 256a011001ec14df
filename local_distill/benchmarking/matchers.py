"""The suite `matchers`: all pairs of a step, by place and by features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from local_distill.benchmarking.by_path import works_without_features
from local_distill.benchmarking.cases import Case, Settings, Way
from local_distill.benchmarking.others import feature_ways, place_ways
from local_distill.benchmarking.plain_forms import (
    cdist_distances,
    match_by_table,
    plain_centers,
    plain_distances,
    plain_similarities,
)
from local_distill.benchmarking.sizes import Step, named_size, step
from local_distill.benchmarking.work import nearest_work, similarity_work
from local_distill.matching.bilinear import BilinearMatcher
from local_distill.matching.gated_similarity import GatedSimilarityMatcher
from local_distill.matching.keep_best import KeepBest
from local_distill.matching.match_views import match_views
from local_distill.matching.mutual import Mutual
from local_distill.matching.nearest import NearestMatcher
from local_distill.matching.overlap import OverlapMatcher
from local_distill.matching.radius import RadiusMatcher
from local_distill.matching.similarity import SimilarityMatcher
from local_distill.matching.sinkhorn import SinkhornMatcher
from local_distill.matching.soft_similarity import SoftSimilarityMatcher
from local_distill.structures import Matcher, Tokens

__all__ = ["matcher_cases"]

_DEFAULT_SIZES = ("Swin", "S/16", "S/8")
_APART = 1e-3  # source px, and of a cosine: by how much a match may miss the plain one


def matcher_cases(settings: Settings) -> Iterator[Case]:
    """By place and by features, for each size; the user's matchers where they belong."""
    own: dict[str, Matcher] = {
        name: matcher.to(settings.device) if isinstance(matcher, nn.Module) else matcher
        for name, matcher in settings.matchers.items()
    }
    default = _DEFAULT_SIZES[:1] if settings.quick else _DEFAULT_SIZES
    for name in settings.sizes or default:
        made = step(named_size(name), settings.batch, device=settings.device, dtype=settings.dtype)
        alone = [key for key, matcher in own.items() if works_without_features(key, matcher, made)]
        by_place = {key: own[key] for key in alone}
        by_features = {key: matcher for key, matcher in own.items() if key not in alone}
        label = f"{name}, b = {settings.batch}"
        yield _by_place(f"{label}: by place", made.without_features(), settings.batch, by_place)
        yield _by_features(f"{label}: by features", made, settings.batch, by_features)


def _by_place(name: str, made: Step, batch: int, own: Mapping[str, Matcher]) -> Case:
    plain = "plain: table of squared distances, min"
    ways: dict[str, Way] = {
        plain: lambda: match_by_table(plain_distances, made),
        "torch.cdist, min": lambda: match_by_table(cdist_distances, made),
        **place_ways(made),
        **_ours(
            [
                NearestMatcher(),
                NearestMatcher(method="search"),
                BilinearMatcher(),
                OverlapMatcher(),
                RadiusMatcher(),
            ],
            made,
        ),
        **{key: _way(matcher, made) for key, matcher in own.items()},
    }
    work = nearest_work(made, batch)
    return Case("matchers", name, ways, plain, work, lambda: _check_places(made))


def _by_features(name: str, made: Step, batch: int, own: Mapping[str, Matcher]) -> Case:
    plain = "plain: normalise, multiply, max"
    ways: dict[str, Way] = {
        plain: lambda: match_by_table(plain_similarities, made),
        **feature_ways(made),
        **_ours(
            [
                SimilarityMatcher(),
                SimilarityMatcher("l2"),
                SoftSimilarityMatcher(),
                SinkhornMatcher(),
                Mutual(SimilarityMatcher()),
                KeepBest(SimilarityMatcher(), count=4),
            ],
            made.without_geometry(),
        ),
        # where places are known too, tokens in padding are left out
        "SimilarityMatcher, places known": _way(SimilarityMatcher(), made),
        **_ours([GatedSimilarityMatcher()], made),
        **{key: _way(matcher, made) for key, matcher in own.items()},
    }
    work = similarity_work(made, batch)
    return Case("matchers", name, ways, plain, work, lambda: _check_features(made))


def _ours(matchers: Iterable[Matcher], made: Step) -> dict[str, Way]:
    return {_label(matcher): _way(matcher, made) for matcher in matchers}


def _way(matcher: Matcher, made: Step) -> Way:
    return lambda: match_views(matcher, made.student, made.teacher, made.pairs)


def _label(matcher: Matcher) -> str:
    """How a reader would write it down."""
    if isinstance(matcher, NearestMatcher):
        return f"NearestMatcher({matcher.method!r})"
    if isinstance(matcher, SimilarityMatcher):
        return f"SimilarityMatcher({matcher.metric!r})"
    if isinstance(matcher, Mutual | KeepBest):
        return f"{type(matcher).__name__}({type(matcher.matcher).__name__})"
    return type(matcher).__name__


def _check_places(made: Step) -> dict[str, str]:
    """The closed form reaches tokens as near as the plain table does."""
    farther = []
    ours = match_views(NearestMatcher(None), made.student, made.teacher, made.pairs)
    for (v, q), (cost, _) in match_by_table(plain_distances, made).items():
        s, t = plain_centers(made.student[v]), plain_centers(made.teacher[q])
        chosen = t.gather(1, ours[v, q].teacher_index.expand(-1, -1, 2))
        distance = torch.linalg.vector_norm(s - chosen, dim=-1)
        farther.append((distance - cost.sqrt()).max())
    return _beyond(_label(NearestMatcher()), farther, "source px")


def _check_features(made: Step) -> dict[str, str]:
    """The matcher reaches features as similar as the plain product does, in float32."""
    wide = Step(_in_float32(made.student), _in_float32(made.teacher), made.pairs)
    apart = []
    ours = match_views(SimilarityMatcher(), wide.student, wide.teacher, wide.pairs)
    for (v, q), (cost, _) in match_by_table(plain_similarities, wide).items():
        apart.append((ours[v, q].cost - cost).abs().max())
    return _beyond(_label(SimilarityMatcher()), apart, "of a cosine")


def _in_float32(views: Iterable[Tokens]) -> list[Tokens]:
    found = []
    for view in views:
        assert view.features is not None
        found.append(Tokens(view.features.to(torch.float32)))
    return found


def _beyond(name: str, apart: list[Tensor], unit: str) -> dict[str, str]:
    most = float(torch.stack(apart).max())
    return {} if most <= _APART else {name: f"misses the plain match by {most:.2g} {unit}"}
