"""What every call of a loss returns, and what it leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from local_distill.structures import Matches
from local_distill.testing.loss_properties._changing import doubled, pairs_of, with_pairs
from local_distill.testing.loss_properties._registry import (
    ANY,
    GLOBAL,
    LOCAL,
    LossExample,
    LossFactory,
    loss_property,
)
from local_distill.testing.loss_properties._running import (
    call,
    ensure_alike,
    ensure_close,
    first_value,
    make,
    student_gradients,
    with_leaves,
)
from local_distill.testing.properties import ensure

__all__ = [
    "default_pairs_are_those_of_different_views",
    "float64_stays_float64",
    "inference_mode_works",
    "inputs_are_left_alone",
    "layout_does_not_matter",
    "new_tensors_follow_the_inputs_device",
    "pairs_are_averaged",
    "returns_a_finite_scalar",
    "the_same_state_gives_the_same",
    "views_without_a_pair_may_be_none",
]


@loss_property(kinds=ANY)
def returns_a_finite_scalar(factory: LossFactory, example: LossExample) -> None:
    """A loss returns a finite tensor of no axes, in at least float32."""
    value = call(make(factory, example), example)
    ensure(value.dim() == 0, f"the loss has shape {tuple(value.shape)}")
    ensure(bool(value.isfinite()), f"the loss is {float(value)}")
    ensure(value.dtype in (torch.float32, torch.float64), f"the loss is {value.dtype}")


@loss_property(kinds=ANY)
def float64_stays_float64(factory: LossFactory, example: LossExample) -> None:
    """float64 logits give a float64 loss, with a graph and without."""
    example = doubled(example)
    for step, what in ((example, "without a graph"), (with_leaves(example), "with a graph")):
        kind = call(make(factory, example), step).dtype
        ensure(kind == torch.float64, f"the loss is {kind} for float64 logits {what}")


@loss_property(kinds=ANY)
def the_same_state_gives_the_same(factory: LossFactory, example: LossExample) -> None:
    """Two losses of the same state give the same to the bit."""
    one, two = first_value(factory, example), first_value(factory, example)
    ensure(one == two, f"first {one!r}, then {two!r}")


@loss_property(kinds=ANY)
def inputs_are_left_alone(factory: LossFactory, example: LossExample) -> None:
    """No input tensor is written to, and no list or mapping changes."""
    tensors = _tensors(example)
    before = copy.deepcopy(tensors)
    call(make(factory, example), example)
    after = _tensors(example)
    ensure(len(after) == len(tensors), "a list or a mapping of the inputs was changed")
    for part, same, old in zip(after, tensors, before, strict=True):
        ensure(part is same, f"an input of shape {tuple(old.shape)} was replaced")
        ensure(torch.equal(part, old), f"an input of shape {tuple(old.shape)} was changed")


@loss_property(kinds=ANY)
def layout_does_not_matter(factory: LossFactory, example: LossExample) -> None:
    """Strided, transposed and expanded inputs give what contiguous ones give."""
    wanted = first_value(factory, example)
    for what, layout in (("strided", _strided), ("transposed", _transposed)):
        other = _laid_out(example, layout)
        ensure_close(first_value(factory, other), wanted, f"{what} inputs")
    expanded, whole = _first_image_expanded(example)
    ensure_close(first_value(factory, expanded), first_value(factory, whole), "expanded inputs")


@loss_property(kinds=ANY)
def new_tensors_follow_the_inputs_device(factory: LossFactory, example: LossExample) -> None:
    """The loss is on the inputs' device, whatever the default device is."""
    wanted = first_value(factory, example)
    loss = make(factory, example)
    # A tensor made without `device=` lands on the default device: here it shows without a GPU.
    with torch.device("meta"):
        value = call(loss, example)
    ensure(value.device.type == "cpu", f"the loss is on {value.device}, the inputs on cpu")
    ensure_close(float(value), wanted, "another default device")


@loss_property(kinds=ANY)
def inference_mode_works(factory: LossFactory, example: LossExample) -> None:
    """Teacher logits made under inference_mode are served, inside it and outside."""
    with torch.no_grad():
        quiet = float(call(make(factory, example), example))
    with torch.inference_mode():
        made = example._replace(teacher_logits=[part.clone() for part in example.teacher_logits])
        ensure_close(float(call(make(factory, example), made)), quiet, "under inference_mode")
    wanted, gradients = student_gradients(make(factory, example), example)
    value, found = student_gradients(make(factory, example), made)
    ensure_close(value, wanted, "with a teacher from inference_mode")
    for one, two in zip(found, gradients, strict=True):
        ensure_alike(one, two, "gradient with a teacher from inference_mode")


@loss_property(kinds=ANY)
def pairs_are_averaged(factory: LossFactory, example: LossExample) -> None:
    """The loss of several pairs of views is the mean of their losses, however many there are."""
    example = doubled(example)
    pairs = pairs_of(example)
    single = [first_value(factory, with_pairs(example, [pair])) for pair in pairs]
    whole = first_value(factory, with_pairs(example, pairs))
    ensure_close(whole, sum(single) / len(single), f"{len(pairs)} pairs of views")


@loss_property(kinds=GLOBAL)
def default_pairs_are_those_of_different_views(factory: LossFactory, example: LossExample) -> None:
    """Without `pairs` all views meet all others, and none meets itself."""
    example = doubled(example)
    listed = with_pairs(example, pairs_of(example))
    ensure_close(first_value(factory, example), first_value(factory, listed), "default pairs")


@loss_property(kinds=LOCAL)
def views_without_a_pair_may_be_none(factory: LossFactory, example: LossExample) -> None:
    """A student view of which no pair speaks may be None."""
    example = doubled(example)
    first = with_pairs(example, pairs_of(example)[:1])
    ((named, _),) = pairs_of(first)
    views = [logits if v == named else None for v, logits in enumerate(example.student_logits)]
    loss = make(factory, example)
    value = call(loss, first._replace(student_logits=[*views, None]))  # type: ignore[list-item]
    ensure_close(float(value.detach()), first_value(factory, first), "unused views as None")


def _tensors(example: LossExample) -> list[Tensor]:
    found = [*example.student_logits, *example.teacher_logits]
    for matches in (example.matches or {}).values():
        found += matches
    return found


def _laid_out(example: LossExample, layout: Callable[[Tensor], Tensor]) -> LossExample:
    return example._replace(
        student_logits=[layout(logits) for logits in example.student_logits],
        teacher_logits=[layout(logits) for logits in example.teacher_logits],
    )


def _strided(logits: Tensor) -> Tensor:
    far = torch.full((*logits.shape, 2), torch.nan)
    far[..., 0] = logits
    return far[..., 0]


def _transposed(logits: Tensor) -> Tensor:
    return logits.mT.contiguous().mT


def _first_image_expanded(example: LossExample) -> tuple[LossExample, LossExample]:
    """The first image alone in every place of the batch: expanded, and written out."""

    def expand(part: Tensor) -> Tensor:
        return part[:1].expand_as(part)

    expanded = example._replace(
        student_logits=[expand(logits) for logits in example.student_logits],
        teacher_logits=[expand(logits) for logits in example.teacher_logits],
        matches=None
        if example.matches is None
        else {p: Matches(*(expand(part) for part in m)) for p, m in example.matches.items()},
    )
    whole = expanded._replace(
        student_logits=[logits.contiguous() for logits in expanded.student_logits],
        teacher_logits=[logits.contiguous() for logits in expanded.teacher_logits],
        matches=None
        if expanded.matches is None
        else {p: Matches(*(part.contiguous() for part in m)) for p, m in expanded.matches.items()},
    )
    return expanded, whole
