"""Precision, extreme values, and the ways in which torch runs the same code."""

from __future__ import annotations

import torch

from local_distill.structures import CropGeometry, Matcher, Matches, Tokens
from local_distill.testing.matcher_properties._changing import parts, with_features
from local_distill.testing.matcher_properties._comparing import (
    ensure_same,
    run,
    weight_table,
)
from local_distill.testing.matcher_properties._registry import (
    SIMILARITY,
    MatcherExample,
    matcher_property,
)
from local_distill.testing.properties import ensure

__all__ = [
    "autocast_changes_nothing",
    "compiles_without_graph_breaks",
    "extreme_features_stay_finite",
    "float64_agrees_with_float32",
    "float64_stays_float64",
    "half_precision_features_match_as_float32",
    "vmap_works",
]

# Room for another order of float32 sums, and far less than one bfloat16 rounding is.
_FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}


@matcher_property(kinds=SIMILARITY)
def half_precision_features_match_as_float32(matcher: Matcher, example: MatcherExample) -> None:
    """bfloat16 and float16 features give the matches of float32 on the same values."""
    for dtype in (torch.bfloat16, torch.float16):
        halves = [_near_ties(view, example.seed).to(dtype) for view in example[:2]]
        half = [with_features(v, f) for v, f in zip(example[:2], halves, strict=True)]
        full = [with_features(v, f.float()) for v, f in zip(example[:2], halves, strict=True)]
        ensure_same(run(matcher, *half), run(matcher, *full), f"{dtype} features", **_FLOAT32)


@matcher_property()
def autocast_changes_nothing(matcher: Matcher, example: MatcherExample) -> None:
    """Under autocast the matches are the same: it must not round what is compared."""
    views = [with_features(v, _near_ties(v, example.seed)) for v in example[:2]]
    wanted = run(matcher, *views)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(matcher, *views)
    ensure_same(found, wanted, "under autocast", **_FLOAT32)


@matcher_property()
def float64_stays_float64(matcher: Matcher, example: MatcherExample) -> None:
    """float64 inputs give float64 weights and costs."""
    found = matcher(*(_double(view) for view in example[:2]))
    for name in ("weight", "cost"):
        kind = getattr(found, name).dtype
        ensure(kind == torch.float64, f"{name} is {kind} for float64 inputs")


@matcher_property()
def float64_agrees_with_float32(matcher: Matcher, example: MatcherExample) -> None:
    """The same values in float64 give the same matches, up to rounding."""
    student, teacher, _ = example
    wanted = run(matcher, student, teacher)
    found = run(matcher, _double(student), _double(teacher))
    ensure_same(found, wanted, "float64 inputs")


@matcher_property(kinds=SIMILARITY)
def extreme_features_stay_finite(matcher: Matcher, example: MatcherExample) -> None:
    """Features of size 1e18 or 1e-18 give finite weights and no NaN."""
    for scale in (1e18, 1e-18):
        views = [with_features(v, parts(v)[0] * scale) for v in example[:2]]
        weights, costs = run(matcher, *views)
        ensure(bool(weights.isfinite().all()), f"a weight is not finite at {scale:g}")
        ensure(not bool(costs.isnan().any()), f"a cost is NaN at {scale:g}")
        ensure(
            bool((costs.isfinite() == (weights.sum(-1) > 0)).all()),
            f"cost and weight disagree at {scale:g}",
        )


@matcher_property(max_examples=2)
def compiles_without_graph_breaks(matcher: Matcher, example: MatcherExample) -> None:
    """torch.compile(fullgraph=True) gives the same matches."""
    student, teacher, _ = example
    wanted = run(matcher, student, teacher)
    torch.compiler.reset()
    compiled = torch.compile(lambda s, t: matcher(s, t), fullgraph=True, backend="aot_eager")
    found = compiled(student, teacher)
    table = weight_table(found, teacher.num_tokens)
    ensure_same((table, found.cost.double()), wanted, "compiled")


@matcher_property(max_examples=3)
def vmap_works(matcher: Matcher, example: MatcherExample) -> None:
    """torch.vmap over a further leading axis gives what one call after another gives."""
    student, teacher, _ = example
    order = list(range(parts(student)[0].shape[0]))[::-1]

    def one(s: tuple[torch.Tensor, ...], t: tuple[torch.Tensor, ...]) -> Matches:
        return matcher(
            Tokens(s[0], CropGeometry(*s[1:]), student.grid),
            Tokens(t[0], CropGeometry(*t[1:]), teacher.grid),
        )

    stacked = []
    for view in (student, teacher):
        features, geometry, _ = parts(view)
        stacked.append(tuple(torch.stack((p, p[order])) for p in (features, *geometry)))
    found = torch.vmap(one)(*stacked)
    for place in range(2):
        single = Matches(*(part[place] for part in found))
        wanted = one(*(tuple(part[place] for part in side) for side in stacked))
        t = teacher.num_tokens
        ensure_same(
            (weight_table(single, t), single.cost.double()),
            (weight_table(wanted, t), wanted.cost.double()),
            "under vmap",
        )


def _near_ties(view: Tokens, seed: int) -> torch.Tensor:
    """Features about one direction, closer to each other than bfloat16 can tell in a product."""
    features = parts(view)[0]
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(features.shape[0], 1, features.shape[2], generator=generator) + 2.0
    return middle + 0.05 * features


def _double(view: Tokens) -> Tokens:
    features, geometry, grid = parts(view)
    return Tokens(features.double(), geometry._replace(matrix=geometry.matrix.double()), grid)
