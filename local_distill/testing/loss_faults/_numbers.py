"""Precisions, sizes and temperatures."""

from __future__ import annotations

from collections.abc import Callable

import torch

from local_distill.errors import LocalDistillError
from local_distill.testing.fault_tables import NotApplicable
from local_distill.testing.loss_faults._cases import CASES
from local_distill.testing.loss_faults._comparing import (
    Outcome,
    ensure_equal,
    ensure_right,
    ensure_right_as_rounded,
    ensure_true,
    looks_at_temp,
    measured,
    needs_teacher,
    new,
    slopes_of,
    value_of,
    with_leaves,
)
from local_distill.testing.loss_faults._subject import LossSubject, cast, drawn, mapped
from local_distill.testing.loss_properties._running import state_of
from local_distill.testing.properties import ensure


def _precision(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")

    @CASES.case("numbers", name)
    def case(subject: LossSubject) -> None:
        for seed in (1, 2):
            ensure_right(subject, cast(drawn(subject, seed), dtype), name)


for _dtype in (torch.float16, torch.bfloat16, torch.float32):
    _precision(_dtype)


@CASES.case("numbers", "float64 is kept")
def _float64(subject: LossSubject) -> None:
    step = cast(drawn(subject, 1), torch.float64)
    outcome = ensure_right(subject, step, "float64")
    if subject.oracle is not None:
        return
    # Differences in place of an oracle: float32 on the way would be noise here.
    generator = torch.Generator().manual_seed(0)
    ways = [torch.randn(view.shape, generator=generator).double() for view in step.student]
    width = 1e-6

    def moved(by: float) -> float:
        views = [view + by * way for view, way in zip(step.student, ways, strict=True)]
        loss = new(subject, dtype=torch.float64)
        return float(measured(subject, loss, step._replace(student=views)).value)

    found = sum(float((slope * way).sum()) for slope, way in zip(outcome.slopes, ways, strict=True))
    wanted = (moved(width) - moved(-width)) / (2 * width)
    ensure(
        abs(found - wanted) <= 1e-5 * max(1.0, abs(wanted)),
        f"the gradient says {found:.9g} along a line where differences say {wanted:.9g}",
    )


def _size(title: str, factor: float, dtype: torch.dtype = torch.float32) -> None:
    @CASES.case("numbers", title)
    def case(subject: LossSubject) -> None:
        step = mapped(drawn(subject, 3, factor=factor), lambda view: view.clamp(-6e4, 6e4))
        ensure_right_as_rounded(subject, cast(step, dtype), title)


for _factor in (10, 100, 2000):
    _size(f"values × {_factor:,}", _factor)
_size("float16 values up to ±60,000", 3e4, torch.float16)


@CASES.case("numbers", "autocast")
def _autocast(subject: LossSubject) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        step = cast(drawn(subject, 4), dtype)
        wanted = measured(subject, new(subject), step)
        leaves = with_leaves(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = value_of(subject, new(subject), leaves)
        # Backward belongs outside: autocast would round its products, whatever the forward did.
        found = Outcome(value.detach(), slopes_of(value, leaves.student))
        ensure_equal(found, wanted, f"{dtype} under autocast", share=1e-6)


@CASES.case("numbers", "float16 sums over 12,544 tokens of mean 8")
def _long_sums(subject: LossSubject) -> None:
    images, sizes = (64, (196, 196)) if subject.tokens else (12_544, (1, 1))
    step = drawn(subject, 5, images=images, sizes=sizes, dim=4)
    half = cast(mapped(step, lambda view: view + 8.0), torch.float16)
    outcomes: list[Outcome] = []
    states = []
    for dtype in (torch.float16, torch.float64):
        loss = new(subject, 4, dtype)
        outcomes.append(measured(subject, loss, cast(half, dtype)))
        states.append(state_of(loss))
    ensure_true(outcomes[0], outcomes[1], half, "float16")
    for name, part in states[0].items():
        close = torch.allclose(part.double(), states[1][name].double(), rtol=1e-5, atol=1e-5)
        ensure(close, f"`{name}` of the state is off")


@CASES.case("numbers", "values of 6 and more at temperature 0.04")
def _sharp(subject: LossSubject) -> None:
    if not looks_at_temp(subject):
        raise NotApplicable("takes no temperature at each step")
    step = drawn(subject, 6, factor=6.0, temp=0.04)
    ensure_right(subject, mapped(step, lambda view: view + 6.0), "temperature 0.04")


@CASES.case("numbers", "temperature 0 and below")
def _cold(subject: LossSubject) -> None:
    ways: list[Callable[[float], object]] = []
    if looks_at_temp(subject):
        step = drawn(subject)
        ways.append(lambda temp: subject.call(new(subject), step._replace(temp=temp)))
    if subject.with_temp is not None:
        ways.append(subject.with_temp)
    if not ways:
        raise NotApplicable("has no temperature")
    refusals: list[LocalDistillError] = []
    for temp in (0.0, -0.1, float("nan")):
        for way in ways:
            try:
                way(temp)
            except LocalDistillError as error:
                refusals.append(error)
                continue
            raise AssertionError(f"a temperature of {temp} was taken")
    raise refusals[0]


@CASES.case("numbers", "c = 1")
def _one(subject: LossSubject) -> None:
    ensure_right(subject, drawn(subject, 7, dim=1), "c = 1")


@CASES.case("numbers", "teacher in another precision")
def _mixed(subject: LossSubject) -> None:
    needs_teacher(subject)
    for ours, theirs in ((torch.float32, torch.bfloat16), (torch.float64, torch.float32)):
        step = cast(drawn(subject, 8), theirs)
        mixed = step._replace(student=[view.to(ours) for view in step.student])
        ensure_right(subject, mixed, f"a teacher in {theirs} for a student in {ours}")
