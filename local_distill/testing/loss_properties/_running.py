"""Making a loss, calling it on an example, and comparing what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from local_distill.testing.loss_properties._registry import LossExample, LossFactory
from local_distill.testing.properties import ensure


def num_prototypes(example: LossExample) -> int:
    return int(example.student_logits[0].shape[-1])


def make(factory: LossFactory, example: LossExample, c: int | None = None) -> nn.Module:
    """A loss in its first state, always the same; in float64 where the example is.

    Every call gets one of its own, so that no state of one comes into the other.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(example.seed)
        loss = factory(num_prototypes(example) if c is None else c)
    ensure(isinstance(loss, nn.Module), f"the factory returned {type(loss).__name__}, no Module")
    return loss.double() if example.student_logits[0].dtype == torch.float64 else loss


def call(loss: Callable[..., Any], example: LossExample) -> Tensor:
    """The loss of the example's step."""
    more: dict[str, Any] = {"teacher_temp": example.teacher_temp}
    views: list[Any] = [example.student_logits, example.teacher_logits]
    if example.matches is not None:
        views.append(example.matches)
    elif example.pairs is not None:
        more["pairs"] = example.pairs
    value: Tensor = loss(*views, **more)
    ensure(isinstance(value, Tensor), f"got {type(value).__name__}, not a tensor")
    ensure(value.numel() == 1, f"got a tensor of shape {tuple(value.shape)}, not a scalar")
    return value


def first_value(factory: LossFactory, example: LossExample) -> float:
    """The loss of a first training step."""
    return float(call(make(factory, example), example).detach())


def with_leaves(example: LossExample) -> LossExample:
    """The example with students that ask for a gradient."""
    leaves = [logits.detach().clone().requires_grad_() for logits in example.student_logits]
    return example._replace(student_logits=leaves)


def student_gradients(loss: nn.Module, example: LossExample) -> tuple[float, list[Tensor]]:
    """The loss, and its gradient by each student view's logits; zeros where there is none."""
    example = with_leaves(example)
    value = call(loss, example)
    torch.autograd.backward(value.sum())
    gradients = [
        torch.zeros_like(logits) if logits.grad is None else logits.grad
        for logits in example.student_logits
    ]
    return float(value.detach()), gradients


def first_gradients(factory: LossFactory, example: LossExample) -> tuple[float, list[Tensor]]:
    """`student_gradients` of a first training step."""
    return student_gradients(make(factory, example), example)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all tensors that a checkpoint would hold."""
    return {
        name: part.detach().clone()
        for name, part in module.state_dict().items()
        if isinstance(part, Tensor)
    }


def ensure_close(
    found: float, wanted: float, what: str, *, rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """Refuse losses that differ by more than rounding, and those that are NaN."""
    ensure(
        abs(found - wanted) <= atol + rtol * abs(wanted),
        f"{what}: the loss is {found:.9g} instead of {wanted:.9g}",
    )


def ensure_alike(
    found: Tensor, wanted: Tensor, what: str, *, rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """Refuse tensors that differ by more than rounding, naming the first place."""
    ensure(
        found.shape == wanted.shape,
        f"{what}: shape {tuple(found.shape)} instead of {tuple(wanted.shape)}",
    )
    differs = ~torch.isclose(found.double(), wanted.double(), rtol=rtol, atol=atol)
    if bool(differs.any()):
        place = tuple(differs.nonzero()[0].tolist())
        ensure(
            False,
            f"{what}: {float(found[place]):.9g} at {list(place)} instead of "
            f"{float(wanted[place]):.9g}",
        )


def ensure_same_state(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    """Refuse any difference of two states, to the bit."""
    ensure(list(found) == list(wanted), f"{what}: the state holds {list(found)}")
    for name, part in found.items():
        same = torch.equal(part, wanted[name])
        ensure(same, f"{what}: `{name}` is {part.tolist()} instead of {wanted[name].tolist()}")
