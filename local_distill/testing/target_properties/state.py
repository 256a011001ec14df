"""What targets remember, and what they must not."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch

from local_distill.testing.properties import ensure
from local_distill.testing.target_properties._registry import (
    TargetsExample,
    TargetsFactory,
    ensure_same_probs,
    ensure_same_state,
    make,
    numbers_of,
    probs_of,
    state_of,
    targets_property,
    updated,
)

__all__ = [
    "a_bad_update_is_skipped_whole",
    "a_checkpoint_goes_on_alike",
    "a_checkpoint_within_accumulation_goes_on_alike",
    "a_copy_learns_for_itself",
    "accumulated_updates_are_one",
    "accumulation_may_be_switched_off",
    "an_empty_batch_leaves_the_state_alone",
    "casting_does_not_round_the_state",
    "half_precision_sums_do_not_overflow",
    "nan_never_enters_the_state",
    "nothing_moves_within_accumulation",
    "order_of_rows_does_not_matter",
    "order_of_views_does_not_matter",
    "rows_that_are_not_valid_do_not_matter",
    "rows_that_are_not_valid_may_be_nan",
    "skipped_updates_are_counted",
    "targets_made_before_an_update_stay",
    "updates_compile_without_graph_breaks",
]


@targets_property()
def targets_made_before_an_update_stay(factory: TargetsFactory, example: TargetsExample) -> None:
    """Targets that were made before an update do not change after it."""
    targets = updated(factory, example)
    made = targets(example.later, teacher_temp=example.teacher_temp)
    wanted = [each.probs().clone() for each in made]
    targets.update(example.later)
    ensure_same_probs([each.probs() for each in made], wanted, "after an update")


@targets_property()
def nan_never_enters_the_state(factory: TargetsFactory, example: TargetsExample) -> None:
    """After an update with NaN or infinity the state is finite."""
    for bad in (torch.nan, torch.inf, -torch.inf):
        targets = updated(factory, example)
        targets.update(_spoilt(example, bad))
        with targets.accumulate():
            targets.update(_spoilt(example, bad))
        for name, part in state_of(targets).items():
            ensure(bool(part.isfinite().all()), f"`{name}` is not finite after {bad}")


@targets_property()
def a_bad_update_is_skipped_whole(factory: TargetsFactory, example: TargetsExample) -> None:
    """An update with NaN or infinity changes nothing but counters, and the next one works."""
    clean = updated(factory, example)
    clean.update(example.later)
    for bad in (torch.nan, torch.inf, -torch.inf):
        targets = updated(factory, example)
        before = numbers_of(targets)
        targets.update(_spoilt(example, bad))
        # A state with NaN is for `nan_never_enters_the_state` to report; here: part of a step.
        if all(bool(part.isfinite().all()) for part in numbers_of(targets).values()):
            ensure_same_state(numbers_of(targets), before, f"after an update with {bad}")
            targets.update(example.later)
            ensure_same_state(numbers_of(targets), numbers_of(clean), "the next update", atol=1e-6)


@targets_property()
def skipped_updates_are_counted(factory: TargetsFactory, example: TargetsExample) -> None:
    """Targets with a state count the updates that they skipped in `skipped`."""
    targets = updated(factory, example)
    if not numbers_of(targets):
        return
    count = getattr(targets, "skipped", None)
    ensure(count is not None, "there is no `skipped`")
    before = int(targets.skipped)
    targets.update(_spoilt(example, torch.nan))
    targets.update(example.later)
    ensure(int(targets.skipped) == before + 1, f"`skipped` went {before} to {int(targets.skipped)}")


@targets_property()
def rows_that_are_not_valid_do_not_matter(factory: TargetsFactory, example: TargetsExample) -> None:
    """What stands in rows that `valid` leaves out does not change what an update makes."""
    valid = [torch.rand(part.shape[:-1], generator=example.generator()) > 0.5
             for part in example.later]  # fmt: skip
    states = []
    for extra in (0.0, 7.0):
        targets = updated(factory, example)
        logits = [
            torch.where(keep[..., None], part, part + extra)
            for part, keep in zip(example.later, valid, strict=True)
        ]
        targets.update(logits, valid)
        states.append(state_of(targets))
    ensure_same_state(states[1], states[0], "with other rows that are not valid", atol=1e-6)


@targets_property()
def rows_that_are_not_valid_may_be_nan(factory: TargetsFactory, example: TargetsExample) -> None:
    """An update whose NaN all stand in rows that `valid` leaves out is that of the other rows."""
    wanted = updated(factory, example)
    wanted.update([part[:, :-1] if part.dim() == 3 else part[:-1] for part in example.later])
    targets = updated(factory, example)
    valid = [torch.ones(part.shape[:-1], dtype=torch.bool) for part in example.later]
    for keep in valid:
        (keep.T if keep.dim() == 2 else keep)[-1] = False
    logits = [
        torch.where(keep[..., None], part, torch.nan)
        for part, keep in zip(example.later, valid, strict=True)
    ]
    targets.update(logits, valid)
    ensure_same_state(state_of(targets), state_of(wanted), "beside NaN", atol=1e-6)


@targets_property()
def order_of_rows_does_not_matter(factory: TargetsFactory, example: TargetsExample) -> None:
    """Images and tokens in reverse order make the same update."""
    one, two = updated(factory, example), updated(factory, example)
    one.update(example.later)
    two.update([part.flip(tuple(range(part.dim() - 1))) for part in example.later])
    ensure_same_state(state_of(two), state_of(one), "rows in reverse order", atol=1e-6)


@targets_property()
def order_of_views_does_not_matter(factory: TargetsFactory, example: TargetsExample) -> None:
    """Views in reverse order make the same update, and the same targets in that order."""
    one, two = updated(factory, example), updated(factory, example)
    for targets, logits in ((one, example.later), (two, example.later[::-1])):
        targets.update(logits)
    ensure_same_state(state_of(two), state_of(one), "views in reverse order", atol=1e-6)
    wanted = probs_of(one, example.later, example.teacher_temp)
    found = probs_of(two, example.later[::-1], example.teacher_temp)
    ensure_same_probs(found[::-1], wanted, "views in reverse order")


@targets_property()
def accumulated_updates_are_one(factory: TargetsFactory, example: TargetsExample) -> None:
    """Updates within accumulate(), and the one that ends them, are one on all images together."""
    whole, parts = updated(factory, example), updated(factory, example)
    few = [part[:1] for part in example.teacher_logits]
    joined = [torch.cat(views) for views in zip(few, example.later, strict=True)]
    whole.update(joined)
    with parts.accumulate():
        parts.update(few)
    parts.update(example.later)
    ensure_same_state(numbers_of(parts), numbers_of(whole), "accumulated", atol=1e-5)


@targets_property()
def nothing_moves_within_accumulation(factory: TargetsFactory, example: TargetsExample) -> None:
    """Within accumulate() an update leaves the targets as they are."""
    targets = updated(factory, example)
    wanted = probs_of(targets, example.later, example.teacher_temp)
    with targets.accumulate():
        targets.update(example.later)
        found = probs_of(targets, example.later, example.teacher_temp)
    ensure_same_probs(found, wanted, "within accumulate()")


@targets_property()
def accumulation_may_be_switched_off(factory: TargetsFactory, example: TargetsExample) -> None:
    """Within accumulate(False) an update is an update."""
    plain, off = updated(factory, example), updated(factory, example)
    plain.update(example.later)
    with off.accumulate(False):
        off.update(example.later)
    ensure_same_state(state_of(off), state_of(plain), "within accumulate(False)")


@targets_property()
def a_checkpoint_goes_on_alike(factory: TargetsFactory, example: TargetsExample) -> None:
    """Targets that take over a state_dict go on as the first ones."""
    first = updated(factory, example)
    _ensure_goes_on(factory, first, example)


@targets_property()
def a_checkpoint_within_accumulation_goes_on_alike(
    factory: TargetsFactory, example: TargetsExample
) -> None:
    """A state_dict from the middle of an accumulation holds what has been summed."""
    first = make(factory, example)
    with first.accumulate():
        first.update(example.teacher_logits)
    _ensure_goes_on(factory, first, example)


@targets_property()
def a_copy_learns_for_itself(factory: TargetsFactory, example: TargetsExample) -> None:
    """A deep copy starts from the same state, and its updates leave the original alone."""
    targets = updated(factory, example)
    before = state_of(targets)
    other = copy.deepcopy(targets)
    ensure_same_state(state_of(other), before, "a deep copy")
    other.update(example.later)
    ensure_same_state(state_of(targets), before, "after an update of a deep copy")


@targets_property()
def casting_does_not_round_the_state(factory: TargetsFactory, example: TargetsExample) -> None:
    """half() and to(bfloat16), meant for a network around them, leave the state's numbers alone."""
    for dtype in (torch.float16, torch.bfloat16):
        targets = updated(factory, example)
        before = _buffers(targets)
        targets.to(dtype)
        ensure_same_state(_buffers(targets), before, f"after to({dtype})")


@targets_property()
def half_precision_sums_do_not_overflow(factory: TargetsFactory, example: TargetsExample) -> None:
    """float16 logits whose sum float16 does not hold make the update of float32 on them."""
    many = [torch.cat([part + 3000.0] * 20).half() for part in example.later]
    half, full = make(factory, example), make(factory, example)
    half.update(many)
    full.update([part.float() for part in many])
    ensure_same_state(state_of(half), state_of(full), "float16 logits", atol=1e-4)


@targets_property(max_examples=5)
def an_empty_batch_leaves_the_state_alone(factory: TargetsFactory, example: TargetsExample) -> None:
    """An update with no images changes nothing."""
    targets = updated(factory, example)
    before = numbers_of(targets)
    targets.update([part[:0] for part in example.later])
    ensure_same_state(numbers_of(targets), before, "after an update with no images")


@targets_property(max_examples=1)
def updates_compile_without_graph_breaks(factory: TargetsFactory, example: TargetsExample) -> None:
    """torch.compile(fullgraph=True) of an update makes the same state."""
    plain, targets = updated(factory, example), updated(factory, example)
    plain.update(example.later)
    torch.compiler.reset()
    compiled: Any = torch.compile(targets.update, fullgraph=True, backend="aot_eager")
    compiled(example.later)
    ensure_same_state(state_of(targets), state_of(plain), "compiled", atol=1e-5)


def _spoilt(example: TargetsExample, bad: float) -> list[torch.Tensor]:
    logits = [part.clone() for part in example.later]
    first = logits[0].view(-1)
    first[example.seed % first.numel()] = bad
    return logits


def _ensure_goes_on(factory: TargetsFactory, first: Any, example: TargetsExample) -> None:
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(factory, example)
    second.load_state_dict(torch.load(file, weights_only=True))
    for targets in (first, second):
        targets.update(example.later)
    wanted = probs_of(first, example.later, example.teacher_temp)
    found = probs_of(second, example.later, example.teacher_temp)
    ensure_same_probs(found, wanted, "targets from a checkpoint")


def _buffers(targets: Any) -> dict[str, torch.Tensor]:
    return {
        name: part.detach().clone()
        for name, part in targets.named_buffers()
        if part.is_floating_point()
    }
