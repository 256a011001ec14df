"""Images of a batch do not know of one another, and a batch may hold any number of them."""

from __future__ import annotations

import torch

from local_distill.structures import Matcher, TokenGrid, Tokens
from local_distill.testing.matcher_properties._changing import images, parts, with_features
from local_distill.testing.matcher_properties._comparing import ensure_same, run
from local_distill.testing.matcher_properties._registry import (
    SIMILARITY,
    MatcherExample,
    matcher_property,
)
from local_distill.testing.properties import ensure

__all__ = [
    "a_bad_image_stays_alone",
    "a_student_without_tokens_is_served",
    "a_teacher_without_tokens_is_served",
    "an_empty_batch_is_served",
    "grids_of_one_token_are_served",
    "images_added_change_nothing",
    "order_of_images_does_not_matter",
]


@matcher_property()
def images_added_change_nothing(matcher: Matcher, example: MatcherExample) -> None:
    """The first images of a batch have the matches that they have without the later ones."""
    student, teacher, _ = example
    weights, costs = run(matcher, student, teacher)
    for count in range(1, weights.shape[0]):
        first = list(range(count))
        found = run(matcher, images(student, first), images(teacher, first))
        ensure_same(found, (weights[:count], costs[:count]), f"the first {count} images alone")


@matcher_property()
def order_of_images_does_not_matter(matcher: Matcher, example: MatcherExample) -> None:
    """Images in another order give the same matches in that order."""
    student, teacher, _ = example
    order = list(range(parts(student)[0].shape[0]))[::-1]
    weights, costs = run(matcher, student, teacher)
    found = run(matcher, images(student, order), images(teacher, order))
    ensure_same(found, (weights[order], costs[order]), "images in reverse order")


@matcher_property(kinds=SIMILARITY)
def a_bad_image_stays_alone(matcher: Matcher, example: MatcherExample) -> None:
    """An image whose features are all NaN changes nothing for the other images."""
    student, teacher, _ = example
    wanted = run(matcher, student, teacher)
    views = []
    for view in (student, teacher):
        features = parts(view)[0].clone()
        features[0] = torch.nan
        views.append(with_features(view, features))
    found = run(matcher, *views)
    ensure_same(
        (found[0][1:], found[1][1:]), (wanted[0][1:], wanted[1][1:]), "images beside a bad one"
    )


@matcher_property(max_examples=3)
def an_empty_batch_is_served(matcher: Matcher, example: MatcherExample) -> None:
    """A batch of no images gives matches of shape (0, s, k)."""
    student, teacher = (images(view, []) for view in example[:2])
    found = matcher(student, teacher)
    shape = tuple(found.weight.shape[:2])
    ensure(
        shape == (0, student.num_tokens) == tuple(found.cost.shape),
        f"an empty batch of {student.num_tokens} tokens gave weights of shape {shape}",
    )


@matcher_property(max_examples=3)
def a_teacher_without_tokens_is_served(matcher: Matcher, example: MatcherExample) -> None:
    """With t = 0 there are no candidates, k = 0, and every cost is +inf."""
    student, teacher, _ = example
    found = matcher(student, _without_tokens(teacher))
    b, s = parts(student)[0].shape[:2]
    shape = tuple(found.weight.shape)
    ensure(shape == (b, s, 0), f"weights of shape {shape} instead of {(b, s, 0)}")
    ensure(bool((found.cost == torch.inf).all()), "a cost is not +inf")


@matcher_property(max_examples=3)
def a_student_without_tokens_is_served(matcher: Matcher, example: MatcherExample) -> None:
    """With s = 0 the matches have shape (b, 0, k)."""
    student, teacher, _ = example
    found = matcher(_without_tokens(student), teacher)
    b = parts(student)[0].shape[0]
    shape = tuple(found.weight.shape)
    ensure(len(shape) == 3 and shape[:2] == (b, 0), f"weights of shape {shape}")
    ensure(tuple(found.cost.shape) == (b, 0), f"cost of shape {tuple(found.cost.shape)}")


@matcher_property()
def grids_of_one_token_are_served(matcher: Matcher, example: MatcherExample) -> None:
    """A view of 1 × 1 tokens matches itself."""
    features, geometry, _ = parts(example.student)
    height, width = geometry.view_size[0].tolist()
    view = Tokens(features[:, :1], geometry, TokenGrid.tiling(1, 1, (height, width)))
    weights, _ = run(matcher, view, view)
    ensure(weights.shape[1:] == (1, 1), f"weights of shape {tuple(weights.shape)}")
    ensure(bool((weights > 0).all()), f"the weights of the images' one token: {_flat(weights)}")


def _flat(values: torch.Tensor) -> list[float]:
    return [float(value) for value in values.flatten()]


def _without_tokens(view: Tokens) -> Tokens:
    features, geometry, grid = parts(view)
    return Tokens(features[:, :0], geometry, grid._replace(rows=0))
