"""Shape checks that bind axis names across arguments; they trace under ``torch.compile``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from local_distill.errors import ConfigError, ShapeError


class Axes:
    """Remembers the size of each named axis, and which argument set it.

    Example:
        >>> axes = Axes()
        >>> _ = axes.bind("student_logits", torch.zeros(2, 5, 8), "b s c")
        >>> axes["c"]
        8
        >>> axes.bind("teacher_logits", torch.zeros(2, 4, 7), "b t c")
        Traceback (most recent call last):
        ...
        local_distill.errors.ShapeError: axis `c` is 8 in `student_logits` but 7 in \
`teacher_logits` (shape (2, 4, 7), wanted `b t c`)
    """

    def __init__(self) -> None:
        self._bound: dict[str, tuple[int, str]] = {}

    def __getitem__(self, axis: str) -> int:
        return self._bound[axis][0]

    def bind(self, name: str, value: object, axes: str) -> Tensor:
        """Check that ``value`` is a tensor with these axes and return it.

        Args:
            name: the argument's name, for the message.
            value: what the caller passed.
            axes: axis names or sizes, separated by blanks: ``"b s 3"``.
        """
        if not isinstance(value, Tensor):
            raise ShapeError(
                f"`{name}` must be a tensor with axes `{axes}`, got {type(value).__name__}"
            )
        wanted = axes.split()
        shape = tuple(value.shape)
        if len(shape) != len(wanted):
            raise ShapeError(
                f"`{name}` must have {len(wanted)} axes `{axes}`, got {len(shape)}: shape {shape}"
            )
        for axis, size in zip(wanted, shape, strict=True):
            if axis.isdigit():
                if size != int(axis):
                    raise ShapeError(f"`{name}` must have shape `{axes}`, got {shape}")
            elif axis in self._bound:
                known, first = self._bound[axis]
                if known != size:
                    raise ShapeError(
                        f"axis `{axis}` is {known} in `{first}` but {size} in `{name}` "
                        f"(shape {shape}, wanted `{axes}`)"
                    )
            else:
                self._bound[axis] = (size, name)
        return value


def check_floating(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if it holds floating-point numbers."""
    if not value.is_floating_point():
        raise ShapeError(
            f"`{name}` must hold floating-point numbers, got {value.dtype}; convert with .float()"
        )
    return value


def check_sequence(name: str, value: object, of: str) -> None:
    """Refuse a bare tensor where one entry per view is wanted: looping would split its batch.

    Nor a bare `Tokens`, `ViewOutput` or the like: a NamedTuple is a sequence of its parts.
    """
    alone = isinstance(value, tuple) and hasattr(value, "_fields")
    if alone or isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise ShapeError(
            f"`{name}` must be a list with {of} per view, got {type(value).__name__}; "
            f"wrap a single view as [{name}]"
        )


def check_two_numbers(name: str, value: object, of: str) -> None:
    """Refuse what is no pair of numbers, such as one number for both; a tensor (2,) passes."""
    if isinstance(value, Tensor):
        good = tuple(value.shape) == (2,)
    else:
        good = isinstance(value, (tuple, list)) and len(value) == 2
    if not good:
        fix = f"; for the same both ways ({value}, {value})"
        number = isinstance(value, (int, float))
        raise ShapeError(f"`{name}` must be a pair {of}, got {value!r}{fix if number else ''}")


def check_view_pairs(pairs: Iterable[tuple[int, int]], students: int, teachers: int) -> None:
    """Refuse (student view, teacher view) pairs of views that are not there."""
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ShapeError(
                "`pairs` must hold pairs (student view, teacher view), got the entry "
                f"{pair!r}; wrap a single pair as [(v, q)]"
            )
        v, q = pair
        if not (0 <= v < students and 0 <= q < teachers):
            raise ShapeError(
                f"`pairs` names ({v}, {q}) but there are {students} student and {teachers} "
                "teacher views"
            )


def check_positive(name: str, value: float) -> float:
    """Return a finite number above zero."""
    # a comparison, which a graph can hold where the number changes from step to step; False for NaN
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ConfigError(f"`{name}` must be a finite number above 0, got {value!r}")
    return float(value)


def check_weight(name: str, value: float) -> float:
    """Return a finite number that is not negative."""
    # a comparison, for the graph's sake, as above
    if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
        raise ConfigError(f"`{name}` must be a finite number of at least 0, got {value!r}")
    return float(value)


def check_at_least(name: str, value: int, least: int) -> int:
    """Return a whole number that is not below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"`{name}` must be a whole number of at least {least}, got {value!r}")
    return value


def check_fraction(name: str, value: float, *, upper_open: bool = False) -> float:
    """Return a number in [0, 1], or in [0, 1) where ``upper_open``."""
    inside = isinstance(value, (int, float)) and 0 <= value <= 1 and not (upper_open and value == 1)
    if not inside:
        bounds = "[0, 1)" if upper_open else "[0, 1]"
        raise ConfigError(f"`{name}` must lie in {bounds}, got {value!r}")
    return float(value)


def values_visible(*tensors: Tensor) -> bool:
    """Whether tensor *values* can be looked at for free: no device sync, no graph being traced."""
    return not torch.compiler.is_compiling() and all(
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        for tensor in tensors
    )
