"""Triton where it is installed. Files that hold kernels can be imported without it too.

Only they import this one, and they are imported where a kernel is launched: loading Triton takes
time that a user of the CPU need not spend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    from triton import language as tl
except ImportError:
    # No kernel is launched then: `triton_switch.triton_serves` is false.
    triton = tl = None

__all__ = ["jit", "tl"]


def jit(function: Callable[..., Any]) -> Any:
    """A kernel; without Triton the function as it is."""
    return function if triton is None else triton.jit(function)
