"""What every call of a matcher returns, and what it leaves alone."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor, nn

from local_distill.matching.match_views import match_views
from local_distill.structures import CropGeometry, Matcher, Matches, Tokens
from local_distill.testing.matcher_properties._changing import parts, with_features
from local_distill.testing.matcher_properties._comparing import ensure_exact, ensure_same, run
from local_distill.testing.matcher_properties._registry import MatcherExample, matcher_property
from local_distill.testing.properties import ensure

__all__ = [
    "calls_do_not_remember",
    "copies_work_alike",
    "cost_is_infinite_where_nothing_matched",
    "indices_are_in_range",
    "inference_mode_works",
    "inputs_are_left_alone",
    "layout_does_not_matter",
    "match_views_agrees_with_single_calls",
    "new_tensors_follow_the_inputs_device",
    "no_gradient_flows",
    "returns_matches_of_fitting_shapes",
    "the_same_call_gives_the_same",
    "weights_and_costs_are_at_least_float32",
    "weights_are_shares",
]


@matcher_property()
def returns_matches_of_fitting_shapes(matcher: Matcher, example: MatcherExample) -> None:
    """A matcher returns Matches with teacher_index and weight (b, s, k) and cost (b, s)."""
    student, teacher, _ = example
    found = matcher(student, teacher)
    ensure(isinstance(found, Matches), f"got {type(found).__name__}, not Matches")
    features, _, _ = parts(student)
    b, s = features.shape[:2]
    index, weight, cost = found.teacher_index, found.weight, found.cost
    shapes = f"{tuple(index.shape)}, {tuple(weight.shape)} and {tuple(cost.shape)}"
    ensure(
        index.shape == weight.shape
        and index.dim() == 3
        and tuple(index.shape[:2]) == (b, s)
        and tuple(cost.shape) == (b, s),
        f"teacher_index, weight and cost have shapes {shapes} for b = {b} and s = {s}",
    )


@matcher_property()
def indices_are_in_range(matcher: Matcher, example: MatcherExample) -> None:
    """teacher_index is int64 in [0, t), also where the weight is 0: losses gather with it."""
    student, teacher, _ = example
    index = matcher(student, teacher).teacher_index
    ensure(index.dtype == torch.int64, f"teacher_index is {index.dtype}")
    t = teacher.num_tokens
    if index.numel():
        low, high = int(index.min()), int(index.max())
        ensure(low >= 0 and high < t, f"teacher_index reaches from {low} to {high}, t = {t}")


@matcher_property()
def weights_are_shares(matcher: Matcher, example: MatcherExample) -> None:
    """Weights are finite, not negative, and sum to at most 1 over a token's candidates."""
    student, teacher, _ = example
    weight = matcher(student, teacher).weight.double()
    ensure(bool(weight.isfinite().all()), "a weight is not finite")
    ensure(bool((weight >= 0).all()), f"a weight is {float(weight.min()):.6g}")
    most = float(weight.sum(-1).max()) if weight.numel() else 0.0
    ensure(most <= 1 + 1e-5, f"the weights of a token sum to {most:.6g}")


@matcher_property(padding=9.0)
def cost_is_infinite_where_nothing_matched(matcher: Matcher, example: MatcherExample) -> None:
    """Cost is +inf exactly where all weights are 0, and finite elsewhere."""
    student, teacher, _ = example
    found = matcher(student, teacher)
    ensure(not bool(found.cost.isnan().any()), "a cost is NaN")
    matched = found.weight.gt(0).any(-1)
    ensure(bool(found.cost[matched].isfinite().all()), "a matched token's cost is not finite")
    free = found.cost[~matched]
    ensure(bool((free == torch.inf).all()), "an unmatched token's cost is not +inf")


@matcher_property()
def weights_and_costs_are_at_least_float32(matcher: Matcher, example: MatcherExample) -> None:
    """Weight and cost are float32 or float64, whatever the features' dtype."""
    student, teacher, _ = example
    for dtype in (torch.float32, torch.bfloat16):
        s, t = (with_features(v, parts(v)[0].to(dtype)) for v in (student, teacher))
        found = matcher(s, t)
        for name in ("weight", "cost"):
            kind = getattr(found, name).dtype
            ensure(kind in (torch.float32, torch.float64), f"{name} is {kind} for {dtype} features")


@matcher_property()
def new_tensors_follow_the_inputs_device(matcher: Matcher, example: MatcherExample) -> None:
    """Outputs are on the inputs' device, whatever the default device is."""
    student, teacher, _ = example
    wanted = run(matcher, student, teacher)
    # A tensor made without `device=` lands on the default device: here it shows without a GPU.
    with torch.device("meta"):
        found = matcher(student, teacher)
    for name, part in zip(Matches._fields, found, strict=True):
        ensure(part.device.type == "cpu", f"{name} is on {part.device}, the inputs on cpu")
    ensure_same(run(lambda *_: found, student, teacher), wanted, "another default device")
    if torch.cuda.is_available():
        on_gpu = matcher(*(_to(view, torch.device("cuda")) for view in (student, teacher)))
        for name, part in zip(Matches._fields, on_gpu, strict=True):
            ensure(part.device.type == "cuda", f"{name} is on {part.device}, the inputs on cuda")


@matcher_property()
def the_same_call_gives_the_same(matcher: Matcher, example: MatcherExample) -> None:
    """Two calls in a row agree to the bit."""
    student, teacher, _ = example
    first = matcher(student, teacher)
    ensure_exact(matcher(student, teacher), first, teacher.num_tokens, "second call")


@matcher_property()
def calls_do_not_remember(matcher: Matcher, example: MatcherExample) -> None:
    """A call on other views in between changes nothing."""
    student, teacher, _ = example
    first = matcher(student, teacher)
    first = Matches(*(part.clone() for part in first))
    matcher(teacher, student)
    ensure_exact(matcher(student, teacher), first, teacher.num_tokens, "after another call")


@matcher_property()
def no_gradient_flows(matcher: Matcher, example: MatcherExample) -> None:
    """No output requires a gradient, even where every input does."""
    views = []
    for view in (example.student, example.teacher):
        features, geometry, grid = parts(view)
        matrix = geometry.matrix.clone().requires_grad_()
        leaf = features.clone().requires_grad_()
        views.append(Tokens(leaf, geometry._replace(matrix=matrix), grid))
    for name, part in zip(Matches._fields, matcher(*views), strict=True):
        ensure(not part.requires_grad, f"{name} requires a gradient")


@matcher_property()
def inputs_are_left_alone(matcher: Matcher, example: MatcherExample) -> None:
    """No input tensor is written to."""
    before = [part.clone() for part in _tensors(example)]
    matcher(example.student, example.teacher)
    for part, old in zip(_tensors(example), before, strict=True):
        ensure(torch.equal(part, old), f"an input of shape {tuple(part.shape)} was changed")


@matcher_property()
def layout_does_not_matter(matcher: Matcher, example: MatcherExample) -> None:
    """Strided and expanded inputs give what contiguous ones give."""
    student, teacher, _ = example
    wanted = run(matcher, student, teacher)
    strided = [_strided(view) for view in (student, teacher)]
    ensure_same(run(matcher, *strided), wanted, "strided inputs")
    alone = [_first_image_expanded(view) for view in (student, teacher)]
    contiguous = [Tokens(*_contiguous(view)) for view in alone]
    ensure_same(run(matcher, *alone), run(matcher, *contiguous), "expanded inputs")


@matcher_property()
def inference_mode_works(matcher: Matcher, example: MatcherExample) -> None:
    """Tensors made under inference_mode are served, inside it and outside."""
    student, teacher, _ = example
    wanted = run(matcher, student, teacher)
    with torch.inference_mode():
        made = [_clone(view) for view in (student, teacher)]
        ensure_same(run(matcher, *made), wanted, "under inference_mode")
    ensure_same(run(matcher, *made), wanted, "with tensors made under inference_mode")


@matcher_property()
def match_views_agrees_with_single_calls(matcher: Matcher, example: MatcherExample) -> None:
    """match_views gives for every pair of views what one call for that pair gives."""
    student, teacher, _ = example
    views = [student, teacher]
    found = match_views(matcher, views, views)
    ensure(list(found) == [(0, 1), (1, 0)], f"the pairs are {list(found)}")
    for (v, q), matches in found.items():
        ensure_same(
            run(lambda *_, matches=matches: matches, views[v], views[q]),
            run(matcher, views[v], views[q]),
            f"match_views[{v, q}]",
        )


@matcher_property(max_examples=5)
def copies_work_alike(matcher: Matcher, example: MatcherExample) -> None:
    """A deep copy, and for a Module a pickled copy, gives what the original gives."""
    student, teacher, _ = example
    wanted = run(matcher, student, teacher)
    ensure_same(run(copy.deepcopy(matcher), student, teacher), wanted, "a deep copy")
    if isinstance(matcher, nn.Module):
        again = pickle.loads(pickle.dumps(matcher))
        ensure_same(run(again, student, teacher), wanted, "a pickled copy")


def _tensors(example: MatcherExample) -> list[Tensor]:
    found: list[Tensor] = []
    for view in (example.student, example.teacher):
        features, geometry, _ = parts(view)
        found += [features, *geometry]
    return found


def _to(view: Tokens, device: torch.device) -> Tokens:
    features, geometry, grid = parts(view)
    return Tokens(features.to(device), geometry.to(device), grid)


def _clone(view: Tokens) -> Tokens:
    features, geometry, grid = parts(view)
    return Tokens(features.clone(), CropGeometry(*(part.clone() for part in geometry)), grid)


def _contiguous(view: Tokens) -> Tokens:
    features, geometry, grid = parts(view)
    return Tokens(
        features.contiguous(), CropGeometry(*(part.contiguous() for part in geometry)), grid
    )


def _strided(view: Tokens) -> Tokens:
    features, geometry, grid = parts(view)
    far = torch.full((*features.shape, 2), torch.nan)
    far[..., 0] = features
    column = geometry.matrix.mT.contiguous().mT
    return Tokens(far[..., 0], geometry._replace(matrix=column), grid)


def _first_image_expanded(view: Tokens) -> Tokens:
    features, geometry, grid = parts(view)
    b = features.shape[0]
    same = CropGeometry(*(part[:1].expand(b, *part.shape[1:]) for part in geometry))
    return Tokens(features[:1].expand(b, -1, -1), same, grid)
