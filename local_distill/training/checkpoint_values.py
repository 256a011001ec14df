"""What a checkpoint may hold: tensors and plain values, nothing that would need code to be read."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from local_distill.errors import DataError

__all__ = ["check_storable"]

_PLAIN = (bool, int, float, str, type(None))
_SEQUENCES = (list, tuple)
_MAPPINGS = (dict, OrderedDict)


def check_storable(state: dict[str, Any]) -> int:
    """Refuse what could not be read back without running code, before anything is written.

    Subclasses are refused as well: a file names their class, and reading would have to import it.

    Args:
        state: tensors, numbers, strings, booleans and None, in lists, tuples and dicts whose keys
            are strings or integers.

    Returns:
        The bytes of the tensors, each storage counted once: about what the file will take.

    Raises:
        DataError: naming the place of the first value that cannot be stored, and the fix.

    Example:
        >>> check_storable({"step": 3, "weights": {"a": torch.zeros(2, 3)}})
        24
        >>> check_storable({"optimizer": [{"lr": torch.float32}]})
        Traceback (most recent call last):
        ...
        local_distill.errors.DataError: `state['optimizer'][0]['lr']` is a torch.dtype, which a \
checkpoint cannot hold; wanted tensors, numbers, strings, booleans, None, lists, tuples and dicts: \
convert it first, for instance with str(value)
    """
    if not isinstance(state, dict):
        raise DataError(f"`state` must be a dict, got {type(state).__name__}")
    storages: dict[tuple[str, int], int] = {}
    _check(state, "state", storages, ())
    return sum(storages.values())


def _check(
    value: Any, place: str, storages: dict[tuple[str, int], int], inside: tuple[int, ...]
) -> None:
    kind = type(value)
    if kind in _PLAIN:
        return
    if isinstance(value, Tensor):
        _check_tensor(value, place)
        storage = value.untyped_storage()
        storages[str(value.device), storage.data_ptr()] = storage.nbytes()
        return
    if id(value) in inside:
        raise DataError(f"`{place}` contains itself, which a checkpoint cannot hold")
    inside = (*inside, id(value))
    if kind in _SEQUENCES:
        for number, part in enumerate(value):
            _check(part, f"{place}[{number}]", storages, inside)
    elif kind in _MAPPINGS:
        for key, part in value.items():
            if type(key) not in (str, int):
                raise DataError(
                    f"`{place}` has the key {key!r} of type {_name(type(key))}; keys of a "
                    "checkpoint are strings or integers: convert it first"
                )
            _check(part, f"{place}[{key!r}]", storages, inside)
        if kind is OrderedDict:  # a state dict carries its modules' versions as `_metadata`
            for name, part in vars(value).items():
                _check(part, f"{place}.{name}", storages, inside)
    else:
        raise DataError(
            f"`{place}` is a {_name(kind)}, which a checkpoint cannot hold; wanted tensors, "
            f"numbers, strings, booleans, None, lists, tuples and dicts: {_fix(value)}"
        )


def _check_tensor(value: Tensor, place: str) -> None:
    kind = type(value)
    if hasattr(value, "full_tensor"):
        raise DataError(
            f"`{place}` is a {_name(kind)}, of which this process holds a part; gather it first, "
            "with value.full_tensor(), or torch.distributed.checkpoint.state_dict."
            "get_model_state_dict(..., StateDictOptions(full_state_dict=True))"
        )
    if kind not in (Tensor, nn.Parameter):
        raise DataError(
            f"`{place}` is a {_name(kind)}, a subclass of Tensor that only its own code can read; "
            "pass value.as_subclass(torch.Tensor)"
        )
    if value.device.type == "meta":
        raise DataError(f"`{place}` is on the device `meta`: it has no values that could be saved")
    if value.layout != torch.strided:
        raise DataError(f"`{place}` is a tensor of {value.layout}; pass value.to_dense()")
    if vars(value):
        raise DataError(
            f"`{place}` is a tensor that carries attributes, {sorted(vars(value))}, which a "
            "checkpoint cannot hold; pass value.detach()"
        )


def _fix(value: Any) -> str:
    for kind in (bool, int, float, str, list, tuple, dict):  # bool first: it is an int as well
        if isinstance(value, kind):
            return f"pass {kind.__name__}(value)"
    if hasattr(value, "tolist"):
        return "pass value.tolist(), or torch.from_numpy(value)"
    if hasattr(value, "state_dict"):
        return "pass value.state_dict()"
    return "convert it first, for instance with str(value)"


def _name(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
