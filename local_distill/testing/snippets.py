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

    Example:
        >>> to_code(torch.tensor([0.1, float("inf")]))
        'torch.tensor([0.1, inf])'
        >>> to_code({(0, 1): [None, True]})
        '{(0, 1): [None, True]}'
    """
    if isinstance(value, Tensor):
        return _tensor(value)
    if _is_named(value):
        if not any(isinstance(part, (Tensor, list, dict)) or _is_named(part) for part in value):
            return repr(value)
        pad = " " * (indent + 4)
        fields = zip(value._fields, value, strict=True)
        parts = [f"{pad}{name}={to_code(part, indent + 4)},\n" for name, part in fields]
        return f"{type(value).__name__}(\n{''.join(parts)}{' ' * indent})"
    if isinstance(value, (list, tuple)):
        inner = ", ".join(to_code(part, indent) for part in value)
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, dict):
        items = (f"{to_code(key)}: {to_code(part, indent)}" for key, part in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, float):
        return _number(value)
    return repr(value)


def _is_named(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def _tensor(value: Tensor) -> str:
    if value.numel() > _LIMIT:
        return f"...  # a tensor of shape {tuple(value.shape)}, too long to print"
    default = value.dtype in (torch.float32, torch.int64, torch.bool)
    dtype = "" if default else f", dtype={value.dtype}"
    if value.numel() == 0:
        kind = f", dtype={value.dtype}" if value.dtype != torch.float32 else ""
        return f"torch.zeros({tuple(value.shape)}{kind})"
    plain = value.detach().cpu()
    if plain.dtype in (torch.float16, torch.bfloat16):
        plain = plain.float()
    return f"torch.tensor({_nested(plain.numpy())}{dtype})"


def _nested(array: Any) -> str:
    if array.ndim:
        return "[" + ", ".join(_nested(part) for part in array) + "]"
    value = array.item()
    # numpy knows the shortest decimals that give a float32 back; Python would print all of them
    return _number(value, str(array)) if isinstance(value, float) else repr(value)


def _number(value: float, text: str | None = None) -> str:
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return text if text is not None else repr(value)
