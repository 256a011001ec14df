"""The file of results: a JSON object a line, written by several processes, cut off by none."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.study.pieces import Piece
from benchmarks.study.settings import Preset

__all__ = ["append_record", "read_records"]


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line, whole or not at all as far as readers can tell; safe from several processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record) + "\n"
    with path.open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # let go when the file is closed, or the process dies
        end = stream.seek(0, os.SEEK_END)
        if end and _last_byte(stream, end) != b"\n":
            line = "\n" + line  # half a line of a killed process: it stays alone, and is not read
        stream.write(line.encode())
        stream.flush()
        os.fsync(stream.fileno())


def read_records(path: Path, preset: Preset) -> dict[Piece, dict[str, Any]]:
    """The pieces that are there, made with this preset's settings; of two of a piece the later."""
    found = {}
    names = {study.name: preset.fingerprint(study) for study in preset.studies}
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut off: that piece is run again
        if names.get(record["study"]) == record["settings"]:
            found[Piece.of(record)] = record
    return found


def _last_byte(stream: Any, end: int) -> bytes:
    stream.seek(end - 1)
    byte: bytes = stream.read(1)
    return byte
