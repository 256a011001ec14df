"""Checkpoints: what a run can go on from. See `CheckpointStore`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from local_distill.errors import ConfigError, DataError
from local_distill.training.checkpoint_files import CheckpointWriteError, FileDigest
from local_distill.training.checkpoint_manifest import read_manifest
from local_distill.training.checkpoint_store import (
    CheckpointStore,
    SavedCheckpoint,
    read_checkpoint,
)

__all__ = [
    "CheckpointStore",
    "CheckpointWriteError",
    "SavedCheckpoint",
    "check_same_config",
    "load_checkpoint",
]


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; code in the file is never run.

    Args:
        path: a file; or the folder of a run, or its folder of checkpoints, of which the newest good
            one is taken.

    Returns:
        The state that was saved.

    Raises:
        DataError: nothing there, not a checkpoint of this package, or a damaged one.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run:
        ...     path = CheckpointStore(f"{run}/checkpoints").save(7, {"lr": 0.1})
        ...     load_checkpoint(path), load_checkpoint(run)
        ({'lr': 0.1}, {'lr': 0.1})
    """
    path = Path(path)
    if not path.is_dir():
        return read_checkpoint(path, digest=_listed_digest(path))
    inner = path / "checkpoints"
    saved = CheckpointStore(inner if inner.is_dir() else path).load()
    if saved is None:
        raise DataError(
            f"`checkpoint` {str(path)!r} is a folder without checkpoints; wanted a run's folder, "
            "its folder of checkpoints, or a file"
        )
    return saved.state


def _listed_digest(path: Path) -> FileDigest | None:
    try:
        entries = read_manifest(path.parent) or []
    except DataError:  # then the sha256 that the file ends in decides
        return None
    return next((entry.digest for entry in entries if entry.name == path.name), None)


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
