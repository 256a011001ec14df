"""Orders and shifts that mean nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from local_distill.structures import Matches
from local_distill.testing.loss_properties._changing import (
    doubled,
    map_matches,
    matches_of,
    pairs_of,
    permutation,
    with_pairs,
)
from local_distill.testing.loss_properties._registry import (
    ANY,
    LOCAL,
    LossExample,
    LossFactory,
    loss_property,
)
from local_distill.testing.loss_properties._running import ensure_close, first_value
from local_distill.testing.properties import ensure

__all__ = [
    "a_candidate_may_come_in_two_halves",
    "candidates_of_no_weight_do_not_matter",
    "order_of_candidates_does_not_matter",
    "order_of_images_does_not_matter",
    "order_of_prototypes_does_not_matter",
    "order_of_student_tokens_does_not_matter",
    "order_of_teacher_tokens_does_not_matter",
    "order_of_views_does_not_matter",
    "shifts_of_student_logits_do_not_matter",
]


@loss_property(kinds=ANY)
def shifts_of_student_logits_do_not_matter(factory: LossFactory, example: LossExample) -> None:
    """A constant added to all logits of a student row changes nothing."""
    example = doubled(example)
    generator = example.generator()
    shifted = [
        logits + torch.randn(*logits.shape[:-1], 1, generator=generator, dtype=logits.dtype)
        for logits in example.student_logits
    ]
    moved = example._replace(student_logits=shifted)
    ensure_close(first_value(factory, moved), first_value(factory, example), "shifted rows")


@loss_property(kinds=ANY)
def order_of_prototypes_does_not_matter(factory: LossFactory, example: LossExample) -> None:
    """Prototypes in another order, for student and teacher alike, change nothing."""
    example = doubled(example)
    order = permutation(example.student_logits[0].shape[-1], example.generator())
    _ensure_unchanged(
        factory,
        example,
        example._replace(
            student_logits=[logits[..., order] for logits in example.student_logits],
            teacher_logits=[logits[..., order] for logits in example.teacher_logits],
        ),
        "prototypes in another order",
    )


@loss_property(kinds=ANY)
def order_of_images_does_not_matter(factory: LossFactory, example: LossExample) -> None:
    """Images in another order change nothing."""
    example = doubled(example)
    order = permutation(example.student_logits[0].shape[0], example.generator())
    moved = example._replace(
        student_logits=[logits[order] for logits in example.student_logits],
        teacher_logits=[logits[order] for logits in example.teacher_logits],
    )
    if example.matches is not None:
        matches = {p: Matches(*(part[order] for part in m)) for p, m in example.matches.items()}
        moved = moved._replace(matches=matches)
    _ensure_unchanged(factory, example, moved, "images in another order")


@loss_property(kinds=ANY)
def order_of_views_does_not_matter(factory: LossFactory, example: LossExample) -> None:
    """Views in reverse order, with their pairs renamed, change nothing."""
    example = with_pairs(doubled(example), pairs_of(example))
    students, teachers = len(example.student_logits), len(example.teacher_logits)
    names = {(v, q): (students - 1 - v, teachers - 1 - q) for v, q in pairs_of(example)}
    moved = example._replace(
        student_logits=example.student_logits[::-1], teacher_logits=example.teacher_logits[::-1]
    )
    if example.matches is None:
        moved = moved._replace(pairs=list(names.values()))
    else:
        moved = moved._replace(matches={names[p]: m for p, m in example.matches.items()})
    _ensure_unchanged(factory, example, moved, "views in reverse order")


@loss_property(kinds=LOCAL)
def order_of_student_tokens_does_not_matter(factory: LossFactory, example: LossExample) -> None:
    """Student tokens in another order, with their matches, change nothing."""
    example = doubled(example)
    generator = example.generator()
    orders = [permutation(x.shape[1], generator) for x in example.student_logits]
    views = [x[:, order] for x, order in zip(example.student_logits, orders, strict=True)]
    matches = {
        (v, q): Matches(*(part[:, orders[v]] for part in found))
        for (v, q), found in matches_of(example).items()
    }
    moved = example._replace(student_logits=views, matches=matches)
    _ensure_unchanged(factory, example, moved, "student tokens in another order")


@loss_property(kinds=LOCAL)
def order_of_teacher_tokens_does_not_matter(factory: LossFactory, example: LossExample) -> None:
    """Teacher tokens in another order, with the matches that point at them, change nothing."""
    example = doubled(example)
    generator = example.generator()
    orders = [permutation(x.shape[1], generator) for x in example.teacher_logits]
    views = [x[:, order] for x, order in zip(example.teacher_logits, orders, strict=True)]
    places = [order.argsort() for order in orders]
    index = {
        (v, q): places[q][found.teacher_index] for (v, q), found in matches_of(example).items()
    }
    moved = map_matches(example, teacher_index=index)._replace(teacher_logits=views)
    _ensure_unchanged(factory, example, moved, "teacher tokens in another order")


@loss_property(kinds=LOCAL)
def order_of_candidates_does_not_matter(factory: LossFactory, example: LossExample) -> None:
    """The candidates of a token are a set with weights: their order changes nothing."""
    example = doubled(_with_two_candidates(example))
    moved = map_matches(
        example,
        teacher_index={p: m.teacher_index.flip(-1) for p, m in matches_of(example).items()},
        weight={p: m.weight.flip(-1) for p, m in matches_of(example).items()},
    )
    _ensure_unchanged(factory, example, moved, "candidates in reverse order")


@loss_property(kinds=LOCAL)
def candidates_of_no_weight_do_not_matter(factory: LossFactory, example: LossExample) -> None:
    """A further candidate of weight 0 changes nothing."""
    example = doubled(example)
    matches = matches_of(example)
    moved = map_matches(
        example,
        teacher_index={p: torch.cat((m.teacher_index, m.teacher_index[..., :1]), -1)
                       for p, m in matches.items()},
        weight={p: torch.cat((m.weight, m.weight[..., :1] * 0), -1) for p, m in matches.items()},
    )  # fmt: skip
    _ensure_unchanged(factory, example, moved, "a further candidate of weight 0")


@loss_property(kinds=LOCAL)
def a_candidate_may_come_in_two_halves(factory: LossFactory, example: LossExample) -> None:
    """A teacher token named twice with half the weight is the same as named once."""
    example = doubled(example)
    matches = matches_of(example)

    def halved(weight: Tensor) -> Tensor:
        first = weight[..., :1] / 2
        return torch.cat((first, weight[..., 1:], first), -1)

    moved = map_matches(
        example,
        teacher_index={p: torch.cat((m.teacher_index, m.teacher_index[..., :1]), -1)
                       for p, m in matches.items()},
        weight={p: halved(m.weight) for p, m in matches.items()},
    )  # fmt: skip
    _ensure_unchanged(factory, example, moved, "a candidate in two halves")


def _with_two_candidates(example: LossExample) -> LossExample:
    """The example, with a second candidate of its own weight where there is but one."""
    matches = matches_of(example)
    if all(found.weight.shape[-1] > 1 for found in matches.values()):
        return example
    tokens = [logits.shape[1] for logits in example.teacher_logits]
    index, weight = {}, {}
    for (v, q), m in matches.items():
        following = (m.teacher_index + 1) % tokens[q]
        index[v, q] = torch.cat((m.teacher_index, following), -1)
        weight[v, q] = torch.cat((m.weight * 0.7, m.weight * 0.2), -1)
    return map_matches(example, teacher_index=index, weight=weight)


def _ensure_unchanged(
    factory: LossFactory, example: LossExample, moved: LossExample, what: str
) -> None:
    wanted, found = first_value(factory, example), first_value(factory, moved)
    ensure(wanted == wanted, "the loss is NaN")
    ensure_close(found, wanted, what)
