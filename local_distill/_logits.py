"""What is done alike to logits that are a tensor and to `PrototypeLogits`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from local_distill._check import Axes, check_floating
from local_distill._precision import at_least_float32
from local_distill.errors import ShapeError
from local_distill.structures import PrototypeLogits

Logits = Tensor | PrototypeLogits


def stand_in(name: str, value: object) -> object:
    """A tensor with the logits' shape and device for shape checks, without values or memory.

    Args:
        name: the argument's name, for messages.
        value: what the caller passed: `PrototypeLogits`, whose parts are checked, or anything else,
            which comes back as it is.
    """
    if not isinstance(value, PrototypeLogits):
        return value
    axes = Axes()
    weight = check_floating(f"{name}.weight", axes.bind(f"{name}.weight", value.weight, "c d"))
    dims = value.features.dim() if isinstance(value.features, Tensor) else 1
    leading = "".join(f"n{axis} " for axis in range(dims - 1))
    features = axes.bind(f"{name}.features", value.features, leading + "d")
    check_floating(f"{name}.features", features)
    if value.bias is not None:
        check_floating(f"{name}.bias", axes.bind(f"{name}.bias", value.bias, "c"))
    if axes["d"] == 0:
        raise ShapeError(
            f"`{name}` has features of dimension 0: shape {tuple(features.shape)}; give it those "
            "that the prototype layer takes"
        )
    return features.detach()[..., :1].expand(*features.shape[:-1], weight.shape[0])


def multiplied_out(value: Logits) -> Tensor:
    """The table of logits, whichever way they come."""
    return value.logits() if isinstance(value, PrototypeLogits) else value


def with_token_axis(value: Logits) -> Logits:
    """(b, …) → (b, 1, …): a whole view as a view of one token."""
    if isinstance(value, PrototypeLogits):
        return PrototypeLogits(value.features[:, None], value.weight, value.bias)
    return value[:, None]


def detached(views: Sequence[Logits]) -> list[Logits]:
    """The same without gradient; what shared a tensor of prototypes still does."""
    known: list[tuple[Tensor, Tensor]] = []
    result: list[Logits] = []
    for view in views:
        if not isinstance(view, PrototypeLogits):
            result.append(view.detach())
            continue
        found = [ours for theirs, ours in known if theirs is view.weight]
        weight = found[0] if found else view.weight.detach()
        known.append((view.weight, weight))
        bias = None if view.bias is None else view.bias.detach()
        result.append(PrototypeLogits(view.features.detach(), weight, bias))
    return result


def no_rows(value: Logits) -> Tensor:
    """(0, c) in the dtype, at least float32, that the logits are computed in, on their device."""
    if not isinstance(value, PrototypeLogits):
        return at_least_float32(value.new_empty(0, value.shape[-1]))
    dtype = torch.promote_types(value.features.dtype, value.weight.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return value.features.new_empty(0, value.weight.shape[0], dtype=dtype)
