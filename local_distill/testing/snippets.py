"""Python source that builds a value again, for the message of a failed check."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["to_code"]

_LIMIT = 4096  # numbers; a snippet longer than that helps nobody


def to_code(value: Any, indent: int = 0) -> str:
    """Source that evaluates to ``value``: tensors, NamedTuples of them, containers, plain values.

    Convention: the names ``torch``, ``nan`` and ``inf`` and those of the NamedTuples have to be
    known where it is evaluated. Tensors come back with their values, shape and dtype, on the CPU
    and contiguous. One of more than 4096 numbers is replaced by a string that says so.

    Args:
        value: what to write.
        indent: blanks before the fields of a NamedTuple that takes several lines.

    Example:
        >>> to_code(torch.tensor([0.1, float("inf")]))
        'torch.tensor([0.1, inf])'
        >>> to_code({(0, 1): [None, True]})
        '{(0, 1): [None, True]}'
    """
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return _named(value, indent)
    if isinstance(value, (list, tuple)):
        inner = ", ".join(to_code(part, indent) for part in value)
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict):
        items = (f"{to_code(key)}: {to_code(part, indent)}" for key, part in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, float):
        return _number(value, repr(float(value)))
    if isinstance(value, torch.device):
        return f"torch.{value!r}"
    return repr(value)


def _named(value: Any, indent: int) -> str:
    """A field a line, but one line for those of plain values alone, such as a grid."""
    several = any(_holds_tensor(part) for part in value)
    parts = [
        f"{name}={to_code(part, indent + 4)}"
        for name, part in zip(value._fields, value, strict=True)
    ]
    if not several:
        return f"{type(value).__name__}({', '.join(parts)})"
    pad = " " * (indent + 4)
    lines = "".join(f"{pad}{part},\n" for part in parts)
    return f"{type(value).__name__}(\n{lines}{' ' * indent})"


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_tensor(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensor(part) for part in value)
    return isinstance(value, Tensor)


def _tensor(value: Tensor) -> str:
    shape = tuple(value.shape)
    if value.numel() > _LIMIT:
        return repr(f"a tensor of shape {shape} and {value.dtype}, too long to print")
    if value.numel() == 0:
        dtype = "" if value.dtype == torch.float32 else f", dtype={value.dtype}"
        return f"torch.zeros({shape}{dtype})"
    plain = value.detach().cpu()
    if plain.is_complex():
        # by parts: Python's own form of a complex number writes infinity as `infj`
        real, imaginary = torch.view_as_real(plain.resolve_conj()).unbind(-1)
        return f"torch.complex({_tensor(real)}, {_tensor(imaginary)})"
    if plain.is_floating_point() and plain.dtype != torch.float64:
        plain = plain.float()  # exact; numpy does not know all the short formats
    # these three are what torch.tensor makes of such numbers by itself
    plainly = value.dtype in (torch.float32, torch.int64, torch.bool)
    dtype = "" if plainly else f", dtype={value.dtype}"
    return f"torch.tensor({_nested(plain.numpy())}{dtype})"


def _nested(array: Any) -> str:
    if array.ndim:
        return "[" + ", ".join(_nested(part) for part in array) + "]"
    value = array.item()
    # numpy knows the shortest decimals that give a float32 back; Python would print all of them
    return _number(value, str(array)) if isinstance(value, float) else repr(value)


def _number(value: float, text: str) -> str:
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return text
