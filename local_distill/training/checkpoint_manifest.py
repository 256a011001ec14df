"""The manifest: which checkpoints were acknowledged, in that order, with size and sha256."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from local_distill.errors import DataError
from local_distill.training.checkpoint_files import FileDigest

__all__ = ["MANIFEST", "Entry", "file_name", "manifest_bytes", "read_manifest", "step_of"]

MANIFEST = "manifest.json"
_FORMAT = "local-distill-manifest-1"
_NAME = re.compile(r"step-([0-9]{8,18})\.ckpt")


class Entry(NamedTuple):
    """One acknowledged checkpoint.

    Attributes:
        step: optimiser steps done.
        digest: size and sha256 of the file.
    """

    step: int
    digest: FileDigest

    @property
    def name(self) -> str:
        """The file's name."""
        return file_name(self.step)


def file_name(step: int) -> str:
    """The name of a step's file.

    Example:
        >>> file_name(200), step_of(file_name(200)), step_of("notes.txt")
        ('step-00000200.ckpt', 200, None)
    """
    return f"step-{step:08d}.ckpt"


def step_of(name: str) -> int | None:
    """The step that a file's name says, None where it is not a checkpoint's."""
    found = _NAME.fullmatch(name)
    step = None if found is None else int(found[1])
    return step if step is not None and file_name(step) == name else None


def manifest_bytes(entries: Sequence[Entry]) -> bytes:
    """The manifest as JSON, with a sha256 of its own list: a changed digit must not pass for one
    that was written.

    Args:
        entries: oldest first.

    Example:
        >>> print(manifest_bytes([Entry(200, FileDigest(7, "ab"))]).decode())
        {
          "format": "local-distill-manifest-1",
          "checkpoints": [
            {
              "file": "step-00000200.ckpt",
              "size": 7,
              "sha256": "ab"
            }
          ],
          "sha256": "..."
        }
    """
    listed = [
        {"file": entry.name, "size": entry.digest.size, "sha256": entry.digest.sha256}
        for entry in entries
    ]
    whole = {"format": _FORMAT, "checkpoints": listed, "sha256": _digest(listed)}
    return json.dumps(whole, indent=2).encode()


def read_manifest(folder: Path) -> list[Entry] | None:
    """What `manifest_bytes` wrote, oldest first; None where there is no manifest.

    Raises:
        DataError: it is damaged, or cannot be read.
    """
    path = folder / MANIFEST
    try:
        whole: Any = json.loads(path.read_bytes())
        if whole["format"] != _FORMAT:
            raise DataError(f"{str(path)!r} is of format {whole['format']!r}, wanted {_FORMAT!r}")
        if whole["sha256"] != _digest(whole["checkpoints"]):
            raise DataError(f"{str(path)!r} is damaged: its list has another sha256 than it says")
        return [_entry(listed) for listed in whole["checkpoints"]]
    except FileNotFoundError:
        return None
    except DataError:
        raise
    # RecursionError: brackets within brackets; the others: not JSON, or not of this form
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error!r}") from error


def _entry(listed: dict[str, Any]) -> Entry:
    step = step_of(listed["file"])
    if step is None:  # a name such as ../../elsewhere is never followed
        raise ValueError(f"{listed['file']!r} is not the name of a checkpoint")
    return Entry(step, FileDigest(int(listed["size"]), str(listed["sha256"])))


def _digest(listed: Any) -> str:
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
