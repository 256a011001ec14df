"""Where the gradient goes, and what it says."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from local_distill.structures import TeacherTargets
from local_distill.testing.loss_properties._changing import (
    doubled,
    matches_of,
    pairs_of,
    unmatched,
    with_pairs,
)
from local_distill.testing.loss_properties._registry import (
    ANY,
    LOCAL,
    LossExample,
    LossFactory,
    Pair,
    loss_property,
)
from local_distill.testing.loss_properties._running import (
    call,
    ensure_alike,
    first_gradients,
    make,
    student_gradients,
    with_leaves,
)
from local_distill.testing.properties import ensure

__all__ = [
    "every_matched_token_learns",
    "gradients_agree_with_finite_differences",
    "images_learn_apart",
    "the_target_is_the_minimum",
    "the_teacher_receives_no_gradient",
]


@loss_property(kinds=ANY)
def the_teacher_receives_no_gradient(factory: LossFactory, example: LossExample) -> None:
    """Teacher logits that ask for a gradient receive none at all, not even zeros."""
    asking = [logits.clone().requires_grad_() for logits in example.teacher_logits]
    step = with_leaves(example)._replace(teacher_logits=asking)
    torch.autograd.backward(call(make(factory, example), step).sum())
    for q, logits in enumerate(asking):
        ensure(logits.grad is None, f"teacher_logits[{q}] received a gradient")


@loss_property(kinds=ANY)
def every_matched_token_learns(factory: LossFactory, example: LossExample) -> None:
    """The gradient reaches every student row that a pair gives a target."""
    example = doubled(example)
    _, gradients = first_gradients(factory, example)
    for v in sorted({v for v, _ in pairs_of(example)}):
        silent = (gradients[v] == 0).all(-1)
        if example.matches is not None:
            silent = silent & ~unmatched(example)[v]
        if bool(silent.any()):
            place = silent.nonzero()[0].tolist()
            ensure(False, f"no gradient reaches student_logits[{v}] at {place}")


@loss_property(kinds=ANY, max_examples=10)
def gradients_agree_with_finite_differences(factory: LossFactory, example: LossExample) -> None:
    """In float64 the gradient is the slope of the loss, along the gradient and elsewhere."""
    example = doubled(example)
    _, gradients = student_gradients(make(factory, example).eval(), example)
    generator = example.generator()
    ways = [
        gradients,
        [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in gradients],
    ]
    for way in ways:
        length = float(sum((part * part).sum() for part in way)) ** 0.5
        ensure(length > 0, "no gradient reaches the student")
        unit = [part / length for part in way]
        wanted = float(sum((u * g).sum() for u, g in zip(unit, gradients, strict=True)))
        # two steps: their extrapolation leaves an error of the fourth order in the step
        near, far = (_slope(factory, example, unit, step) for step in (5e-4, 1e-3))
        slope = (4 * near - far) / 3
        ensure(
            abs(slope - wanted) <= 1e-6 + 1e-5 * abs(wanted),
            f"along a direction the gradient is {wanted:.9g}, the slope of the loss {slope:.9g}",
        )


@loss_property(kinds=ANY)
def the_target_is_the_minimum(factory: LossFactory, example: LossExample) -> None:
    """A student whose distribution is its target's has no gradient, and any other costs more.

    The target is that of the loss's ``targets``, or softmax(t / teacher_temp) where it has none. A
    loss without ``student_temp`` is only asked whether a flat student is drawn to the target.
    """
    example = doubled(example)
    pair = pairs_of(example)[0]
    example = with_pairs(example, [pair])
    loss = make(factory, example).eval()
    target, matched = _target(loss, example, pair)
    temp = getattr(loss, "student_temp", None)
    if temp is None:
        flat = _with_student(example, pair[0], target * 0)
        _, gradients = student_gradients(make(factory, example).eval(), flat)
        drawn = -_centred(gradients[pair[0]])[matched]
        wanted = _centred(target)[matched]
        ensure_alike(_unit(drawn), _unit(wanted), "direction of the gradient at a flat student")
        return
    best = temp * target.log()
    step = _with_student(example, pair[0], best)
    value, gradients = student_gradients(make(factory, example).eval(), step)
    steepest = float(gradients[pair[0]].abs().max()) * temp
    ensure(steepest <= 1e-6, f"at the target's own logits the gradient is {steepest:.6g} / τ")
    shift = torch.randn(best.shape, generator=example.generator(), dtype=best.dtype)
    other = call(
        make(factory, example).eval(),
        _with_student(example, pair[0], best + temp * _centred(shift)),
    )
    ensure(float(other) > value, f"the target costs {value:.9g}, another {float(other):.9g}")


@loss_property(kinds=LOCAL)
def images_learn_apart(factory: LossFactory, example: LossExample) -> None:
    """An image's gradient does not depend on the student's logits of another image."""
    example = doubled(example)
    _, wanted = first_gradients(factory, example)
    generator = example.generator()
    changed = []
    for logits in example.student_logits:
        other = logits.clone()
        other[0] = torch.randn(other[0].shape, generator=generator, dtype=other.dtype)
        changed.append(other)
    _, found = first_gradients(factory, example._replace(student_logits=changed))
    for v, (one, two) in enumerate(zip(found, wanted, strict=True)):
        what = f"gradient of student_logits[{v}][1:] beside another first image"
        ensure_alike(one[1:], two[1:], what)


def _slope(factory: LossFactory, example: LossExample, way: list[Tensor], step: float) -> float:
    ends = []
    for sign in (1.0, -1.0):
        moved = [
            logits + sign * step * part
            for logits, part in zip(example.student_logits, way, strict=True)
        ]
        loss = make(factory, example).eval()
        ends.append(float(call(loss, example._replace(student_logits=moved)).detach()))
    return (ends[0] - ends[1]) / (2 * step)


def _target(loss: nn.Module, example: LossExample, pair: Pair) -> tuple[Tensor, Tensor]:
    """What the student view of the pair is to become, and which of its rows have a target."""
    made = getattr(loss, "targets", None)
    if made is not None:
        target = made(example.teacher_logits, teacher_temp=example.teacher_temp)[pair[1]]
    else:
        logits = example.teacher_logits[pair[1]]
        target = TeacherTargets(logits, None, example.teacher_temp)
    probs = target.probs().detach()
    if example.matches is None:
        return probs, torch.ones(probs.shape[:1], dtype=torch.bool)
    found = matches_of(example)[pair]
    mixed = torch.zeros_like(example.student_logits[pair[0]])
    for k in range(found.weight.shape[-1]):
        index = found.teacher_index[..., k, None].expand(mixed.shape)
        mixed = mixed + found.weight[..., k, None] * probs.gather(1, index)
    mass = found.weight.sum(-1, keepdim=True)
    flat = torch.full_like(mixed, 1.0 / mixed.shape[-1])
    return torch.where(mass > 0, mixed / mass, flat), found.matched


def _with_student(example: LossExample, view: int, logits: Tensor) -> LossExample:
    views = list(example.student_logits)
    views[view] = logits
    return example._replace(student_logits=views)


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(-1, keepdim=True)


def _unit(values: Tensor) -> Tensor:
    return torch.nn.functional.normalize(values, dim=-1, eps=0.0)
