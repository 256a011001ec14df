"""What a run's folder holds; any part of it may be missing, cut off or damaged."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, TypeGuard

from local_distill.errors import DataError, require_extra

__all__ = ["Picture", "RunRecord", "is_number", "read_run"]

_PICTURE = re.compile(r"step-(\d+)-([\w-]+)\.(?:png|jpg|webp)")


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that was drawn while the run went on.

    Args:
        step: of the weights it shows.
        path: the file.
    """

    step: int
    path: Path


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run's folder, read.

    Args:
        folder: the run.
        metrics: one dict a logged step, by rising step; of a step logged twice the later line.
        config: the settings, or None.
        pictures: for each kind ("matches", "tokens") the pictures by rising step.
        evaluations: for each name of ``eval/NAME.json`` what is in it.
        bad_images: the lines of ``bad_images.jsonl``; None: there is no such file.
        checkpoints: for each file its step (None: not said) and its size in bytes, by rising step.
        problems: what was there and could not be read, one sentence each.
        evaluation_plots: for each evaluation's name its pictures, ``eval/NAME-*.png``.
    """

    folder: Path
    metrics: list[dict[str, Any]]
    config: dict[str, Any] | None
    pictures: dict[str, list[Picture]]
    evaluations: dict[str, Any]
    bad_images: list[dict[str, Any]] | None
    checkpoints: dict[str, tuple[int | None, int]]
    problems: list[str]
    evaluation_plots: dict[str, list[Path]] = dataclasses.field(default_factory=dict)


def read_run(run: str | Path) -> RunRecord:
    r"""Read what a run's folder holds.

    Half a line at the end of a file, which a killed run leaves, is passed over.

    Args:
        run: the folder that was ``--output`` of ``local-distill train``.

    Raises:
        DataError: no such folder, or one without a line of metrics.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"st')
        ...     read_run(folder).metrics
        [{'step': 1, 'loss': 2.0}]
    """
    folder = Path(run)
    if not folder.is_dir():
        raise DataError(
            f"`run` {str(run)!r} is not a folder; pass the --output of `local-distill train`"
        )
    problems: list[str] = []
    metrics = _metrics(folder / "metrics.jsonl", problems)
    if not metrics:
        raise DataError(
            f"`run` {str(run)!r} holds no metrics: metrics.jsonl is missing or has no whole line "
            "yet; pass the --output of `local-distill train`, after its first line of the log"
        )
    bad = folder / "bad_images.jsonl"
    evaluations = _evaluations(folder / "eval", problems)
    return RunRecord(
        folder,
        metrics,
        _config(folder / "config.yaml", problems),
        _pictures(folder / "pictures"),
        evaluations,
        _json_lines(bad, problems) if bad.is_file() else None,
        _checkpoints(folder, problems),
        problems,
        _plots(folder / "eval", list(evaluations)),
    )


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a JSON value is a number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    by_step = {}
    for line in _json_lines(path, problems):
        step = line.get("step")
        if is_number(step) and math.isfinite(step):
            by_step[int(step)] = {**line, "step": int(step)}
    return [by_step[step] for step in sorted(by_step)]


def _json_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; damaged lines are counted, but for the last one."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found, damaged = [], 0
    for number, line in enumerate(lines):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            damaged += bool(line.strip()) and number < len(lines) - 1
            continue
        if isinstance(value, dict):
            found.append(value)
        else:
            damaged += 1
    if damaged:
        problems.append(f"{path.name}: {damaged} of {len(lines)} lines cannot be read")
    return found


def _config(path: Path, problems: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    yaml = require_extra("yaml", "train")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError as error:
        problems.append(f"{path.name} cannot be read: {' '.join(str(error).split())}")
        return None
    return value if isinstance(value, dict) else None


def _pictures(folder: Path) -> dict[str, list[Picture]]:
    kinds: dict[str, list[Picture]] = {}
    for path in sorted(folder.glob("step-*")):
        named = _PICTURE.fullmatch(path.name)
        if named is not None:
            kinds.setdefault(named[2], []).append(Picture(int(named[1]), path))
    return {kind: sorted(found, key=lambda one: one.step) for kind, found in kinds.items()}


def _evaluations(folder: Path, problems: list[str]) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem):
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8", errors="replace"))
        except (ValueError, RecursionError) as error:
            problems.append(f"eval/{path.name} cannot be read: {error}")
    return found


def _plots(folder: Path, names: list[str]) -> dict[str, list[Path]]:
    """Each picture by the longest name that it begins with; curves by layer are drawn anew."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.png")):
        owners = [name for name in names if path.stem.startswith(f"{name}-")]
        if owners and not path.stem.endswith("-layers"):
            found.setdefault(max(owners, key=len), []).append(path)
    return found


def _checkpoints(folder: Path, problems: list[str]) -> dict[str, tuple[int | None, int]]:
    """By what lies there, not by the manifest: files that are gone are not listed."""
    found: dict[str, tuple[int | None, int]] = {}
    for path in [*sorted((folder / "checkpoints").glob("*.ckpt")), *sorted(folder.glob("*.ckpt"))]:
        digits = re.search(r"step-(\d+)", path.name)
        size = path.stat().st_size
        if size == 0:
            problems.append(f"{path.name} is empty")
        found[path.relative_to(folder).as_posix()] = (int(digits[1]) if digits else None, size)
    return found
