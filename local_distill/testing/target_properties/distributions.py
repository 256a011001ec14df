"""What targets are: distributions, one a teacher row."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from local_distill.structures import TeacherTargets
from local_distill.testing.properties import ensure
from local_distill.testing.target_properties._registry import (
    TargetsExample,
    TargetsFactory,
    ensure_same_probs,
    make,
    probs_of,
    state_of,
    targets_property,
    updated,
)

__all__ = [
    "autocast_changes_nothing",
    "float64_stays_float64",
    "forward_changes_no_state",
    "half_precision_logits_agree_with_float32",
    "inference_mode_works",
    "inputs_are_left_alone",
    "large_logits_stay_finite",
    "layout_does_not_matter",
    "lower_temperatures_sharpen",
    "new_tensors_follow_the_inputs_device",
    "one_prototype_is_served",
    "probs_are_distributions",
    "returns_targets_of_fitting_shapes",
    "teacher_logits_receive_no_gradient",
    "the_same_state_gives_the_same",
]


@targets_property()
def returns_targets_of_fitting_shapes(factory: TargetsFactory, example: TargetsExample) -> None:
    """There is one TeacherTargets per view, whose probs have its logits' shape."""
    made = make(factory, example)(example.teacher_logits, teacher_temp=example.teacher_temp)
    views = len(example.teacher_logits)
    ensure(isinstance(made, list), f"got {type(made).__name__}, not a list")
    ensure(len(made) == views, f"got {len(made)} targets for {views} views")
    for view, (each, logits) in enumerate(zip(made, example.teacher_logits, strict=True)):
        ensure(isinstance(each, TeacherTargets), f"view {view}: {type(each).__name__}")
        shape = tuple(each.probs().shape)
        ensure(shape == tuple(logits.shape), f"view {view}: {tuple(logits.shape)} gave {shape}")


@targets_property()
def probs_are_distributions(factory: TargetsFactory, example: TargetsExample) -> None:
    """Probabilities are finite, not negative, and sum to 1 for every row, after an update too."""
    for targets in (make(factory, example), updated(factory, example)):
        for probs in probs_of(targets, example.later, example.teacher_temp):
            ensure(bool(probs.isfinite().all()), "a probability is not finite")
            ensure(bool((probs >= 0).all()), f"a probability is {float(probs.min()):.6g}")
            off = float((probs.double().sum(-1) - 1).abs().max())
            ensure(off <= 1e-5, f"the probabilities of a row miss 1 by {off:.3g}")


@targets_property()
def lower_temperatures_sharpen(factory: TargetsFactory, example: TargetsExample) -> None:
    """At a tenth of the temperature the distributions are less spread out."""
    targets = updated(factory, example)
    wide = _entropy(probs_of(targets, example.later, example.teacher_temp))
    narrow = _entropy(probs_of(targets, example.later, example.teacher_temp / 10))
    ensure(narrow < wide, f"the mean entropy goes from {wide:.6g} to {narrow:.6g}")


@targets_property()
def forward_changes_no_state(factory: TargetsFactory, example: TargetsExample) -> None:
    """Asking for targets changes no state: update alone does."""
    targets = updated(factory, example)
    before = state_of(targets)
    targets(example.later, teacher_temp=example.teacher_temp)
    for name, part in state_of(targets).items():
        ensure(torch.equal(part, before[name]), f"`{name}` was changed by a call")


@targets_property()
def teacher_logits_receive_no_gradient(factory: TargetsFactory, example: TargetsExample) -> None:
    """Teacher logits that ask for a gradient give targets that have none."""
    leaves = [logits.clone().requires_grad_() for logits in example.teacher_logits]
    targets = make(factory, example)
    for view, probs in enumerate(probs_of(targets, leaves, example.teacher_temp)):
        ensure(not probs.requires_grad, f"the probs of view {view} require a gradient")
    targets.update(leaves)
    for name, part in targets.state_dict(keep_vars=True).items():
        grows = isinstance(part, Tensor) and part.grad_fn is not None
        ensure(not grows, f"`{name}` hangs on the teacher's graph after an update")


@targets_property()
def the_same_state_gives_the_same(factory: TargetsFactory, example: TargetsExample) -> None:
    """Targets of the same state are the same to the bit."""
    found = [
        probs_of(updated(factory, example), example.later, example.teacher_temp) for _ in range(2)
    ]
    for one, two in zip(*found, strict=True):
        ensure(torch.equal(one, two), "two calls from the same state differ")


@targets_property()
def inputs_are_left_alone(factory: TargetsFactory, example: TargetsExample) -> None:
    """Neither a call nor an update writes to the logits or to `valid`."""
    logits = [part.clone() for part in example.teacher_logits]
    valid = [part[..., 0] > 0 for part in logits]
    before = copy.deepcopy((logits, valid))
    targets = make(factory, example)
    targets(logits, teacher_temp=example.teacher_temp, valid=valid)
    targets.update(logits, valid)
    for now, old in zip((*logits, *valid), (*before[0], *before[1]), strict=True):
        ensure(torch.equal(now, old), f"an input of shape {tuple(old.shape)} was changed")


@targets_property()
def layout_does_not_matter(factory: TargetsFactory, example: TargetsExample) -> None:
    """Strided and transposed logits give what contiguous ones give, in probs and in state."""
    wanted = _step(updated(factory, example), example.later, example)
    strided = [torch.stack((part, part * torch.nan), -1)[..., 0] for part in example.later]
    columns = [part.mT.contiguous().mT for part in example.later]
    for what, logits in (("strided", strided), ("transposed", columns)):
        found = _step(updated(factory, example), logits, example)
        ensure_same_probs(found, wanted, f"{what} logits")


@targets_property()
def new_tensors_follow_the_inputs_device(factory: TargetsFactory, example: TargetsExample) -> None:
    """The targets are on the logits' device, whatever the default device is."""
    wanted = _step(updated(factory, example), example.later, example)
    targets = updated(factory, example)
    # A tensor made without `device=` lands on the default device: here it shows without a GPU.
    with torch.device("meta"):
        found = _step(targets, example.later, example)
    for probs in found:
        ensure(probs.device.type == "cpu", f"the probs are on {probs.device}, the logits on cpu")
    ensure_same_probs(found, wanted, "another default device")


@targets_property()
def inference_mode_works(factory: TargetsFactory, example: TargetsExample) -> None:
    """Logits made under inference_mode are served, outside it too."""
    wanted = _step(updated(factory, example), example.later, example)
    with torch.inference_mode():
        made = [part.clone() for part in example.later]
    found = _step(updated(factory, example), made, example)
    ensure_same_probs(found, wanted, "logits from inference_mode")


@targets_property()
def half_precision_logits_agree_with_float32(
    factory: TargetsFactory, example: TargetsExample
) -> None:
    """bfloat16 and float16 logits give the probs of float32 on the same values, in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        half = [part.to(dtype) for part in example.later]
        full = [part.float() for part in half]
        temp = example.teacher_temp
        found = probs_of(updated(factory, example), half, temp)
        for probs in found:
            wide = probs.dtype in (torch.float32, torch.float64)
            ensure(wide, f"the probs are {probs.dtype} for {dtype} logits")
        ensure_same_probs(found, probs_of(updated(factory, example), full, temp), f"{dtype}")


@targets_property()
def float64_stays_float64(factory: TargetsFactory, example: TargetsExample) -> None:
    """float64 logits give float64 probs, the same as float32 up to rounding."""
    wide = [part.double() for part in example.later]
    targets = updated(factory, example)
    found = probs_of(targets, wide, example.teacher_temp)
    for probs in found:
        ensure(probs.dtype == torch.float64, f"the probs are {probs.dtype} for float64 logits")
    wanted = probs_of(targets, example.later, example.teacher_temp)
    ensure_same_probs(found, wanted, "float64 logits", atol=1e-4)


@targets_property()
def autocast_changes_nothing(factory: TargetsFactory, example: TargetsExample) -> None:
    """Under autocast probs and state are the same: no product is rounded."""
    wanted = _step(updated(factory, example), example.later, example)
    targets = updated(factory, example)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _step(targets, example.later, example)
    ensure_same_probs(found, wanted, "under autocast")


@targets_property()
def large_logits_stay_finite(factory: TargetsFactory, example: TargetsExample) -> None:
    """Logits of ±60,000 in float16 and float32 give finite probabilities and a finite state."""
    for dtype in (torch.float16, torch.float32):
        large = [torch.where(part >= 0, 6e4, -6e4).to(dtype) for part in example.later]
        targets = make(factory, example)
        for probs in _step(targets, large, example):
            ensure(bool(probs.isfinite().all()), f"a probability is not finite for {dtype} ±60,000")
        for name, part in state_of(targets).items():
            ensure(bool(part.isfinite().all()), f"`{name}` is not finite after {dtype} ±60,000")


@targets_property(max_examples=5)
def one_prototype_is_served(factory: TargetsFactory, example: TargetsExample) -> None:
    """With c = 1 every probability is 1."""
    logits = [part[..., :1] for part in example.teacher_logits]
    targets = make(factory, example, 1)
    for probs in _step(targets, logits, example):
        off = float((probs - 1).abs().nan_to_num(torch.inf).max())
        ensure(off <= 1e-6, f"a probability misses 1 by {off:.3g}")


def _step(targets: Any, logits: list[Tensor], example: TargetsExample) -> list[Tensor]:
    """The distributions before and after an update with the same logits."""
    before = probs_of(targets, logits, example.teacher_temp)
    targets.update(logits)
    return before + probs_of(targets, logits, example.teacher_temp)


def _entropy(views: list[Tensor]) -> float:
    rows = torch.cat([probs.double().reshape(-1, probs.shape[-1]) for probs in views])
    return float(torch.special.entr(rows).sum(-1).mean())
