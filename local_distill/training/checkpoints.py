"""Checkpoints: written aside and renamed, so that a crash leaves the old one or the new one."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from local_distill.errors import ConfigError, DataError

__all__ = ["check_same_config", "load_checkpoint", "save_checkpoint"]

_FORMAT = "local-distill-1"


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> Path:
    """Write tensors and plain values; the file appears whole or not at all.

    Args:
        path: the file; its folder is made where it is missing.
        state: state dicts, numbers, strings, lists and dicts.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_checkpoint(f"{folder}/last.ckpt", {"step": 3})
        ...     load_checkpoint(path)["step"]
        3
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as stream:
            torch.save({"format": _FORMAT, **state}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; code in the file is never run.

    Raises:
        DataError: no such file, not a checkpoint of this package, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"`checkpoint` {str(path)!r} is not a file")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"`checkpoint` {str(path)!r} cannot be read: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise DataError(
            f"`checkpoint` {str(path)!r} was not written by this version of local-distill "
            f"(format {_FORMAT})"
        )
    return state


def check_same_config(saved: dict[str, Any], now: dict[str, Any], free: frozenset[str]) -> None:
    """Refuse to resume a run under other settings.

    Args:
        saved: the settings in the checkpoint, JSON-able.
        now: the settings of this call.
        free: top-level settings that may differ, such as where to write.

    Raises:
        ConfigError: naming every setting that differs, with both values.

    Example:
        >>> check_same_config({"lr": 1, "output": "a"}, {"lr": 1, "output": "b"},
        ...                   frozenset({"output"}))
    """
    before, after = _flat(saved), _flat(json.loads(json.dumps(now)))
    differing = [
        f"  {name}: {before.get(name, 'absent')!r} in the checkpoint, "
        f"{after.get(name, 'absent')!r} now"
        for name in sorted(before.keys() | after.keys())
        if name.partition(".")[0] not in free and before.get(name) != after.get(name)
    ]
    if differing:
        raise ConfigError(
            "`resume` continues a run with the settings it was started with, these differ:\n"
            + "\n".join(differing)
            + "\nPass the same ones, or start a new run in another `output`."
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, part in value.items():
        found.update(_flat(part, f"{prefix}.{name}" if prefix else str(name)))
    return found
