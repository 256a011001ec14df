"""What the trials share: our lines put into a copy of their code, the run, and what came of it."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "Change",
    "Count",
    "Fall",
    "apply_changes",
    "commit_of",
    "copy_of",
    "fall",
    "lines_of_code",
    "run_named",
    "run_on_cpu",
    "started",
    "write_scene_folders",
]

REPOSITORY = Path(__file__).parents[2]


class Change(NamedTuple):
    """Lines of ours at a line of theirs.

    Attributes:
        file: path in their repository.
        anchor: a short piece of the line of theirs; it must occur in one line of the file.
        place: ``"before"`` or ``"after"`` that line, or ``"instead"`` of it.
        lines: ours; they get the indentation of their line, and may begin with more of it.
    """

    file: str
    anchor: str
    place: str
    lines: tuple[str, ...]


class Count(NamedTuple):
    """Lines of code added to theirs, and lines of theirs that went."""

    added: int
    removed: int


class Fall(NamedTuple):
    """Means over the first and the last fifth of a series."""

    steps: int
    first: float
    last: float

    @property
    def falling(self) -> bool:
        """Both means are finite, and the last is the lower."""
        return math.isfinite(self.first) and math.isfinite(self.last) and self.last < self.first


def apply_changes(root: Path, changes: Sequence[Change]) -> Count:
    """Put our lines into the files below ``root``; blank lines and comments do not count.

    Raises:
        ValueError: an anchor that no line has, or more than one.
    """
    added = removed = 0
    for change in changes:
        if change.place not in ("before", "after", "instead"):
            raise ValueError(f"`place` is {change.place!r}; give 'before', 'after' or 'instead'")
        path = root / change.file
        theirs = path.read_text("utf-8").splitlines()
        found = [number for number, line in enumerate(theirs) if change.anchor in line]
        if len(found) != 1:
            raise ValueError(
                f"{change.file}: {change.anchor!r} is in {len(found)} lines; it must be in one"
            )
        at = found[0]
        indent = theirs[at][: len(theirs[at]) - len(theirs[at].lstrip())]
        ours = [indent + line if line else "" for line in change.lines]
        added += lines_of_code(ours)
        removed += change.place == "instead"
        start, end = {"before": (at, at), "after": (at + 1, at + 1), "instead": (at, at + 1)}[
            change.place
        ]
        theirs[start:end] = ours
        path.write_text("\n".join(theirs) + "\n", "utf-8")
    return Count(added, removed)


def lines_of_code(lines: Sequence[str]) -> int:
    """How many are neither blank nor a comment."""
    return sum(bool(line.strip()) and line.lstrip()[0] != "#" for line in lines)


def copy_of(clone: Path, to: Path) -> Path:
    """A fresh copy of a clone's files, without its history."""
    if to.exists():
        shutil.rmtree(to)
    shutil.copytree(clone, to, ignore=shutil.ignore_patterns(".git"))
    return to


def commit_of(clone: Path) -> str:
    """The commit that a clone stands at."""
    command = ["git", "-C", str(clone), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write_scene_folders(to: Path, count: int, size: int) -> Path:
    """The built-in scenes as torchvision's ``ImageFolder`` reads them: one folder a class."""
    from local_distill.training.scenes import SyntheticScenes

    scenes = SyntheticScenes(count, size)
    for index in range(count):
        image, label = scenes[index]
        folder = to / f"{label:02}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index:05}.png")
    return to


class Started(NamedTuple):
    """A trial that was begun.

    Attributes:
        processes: how many, one number for each run.
        with_ours: whether our lines are in the copy.
        work: folder for all that it writes.
        code: the copy of their code.
        data: folder of scenes.
    """

    processes: list[int]
    with_ours: bool
    work: Path
    code: Path
    data: Path


def started(
    description: str, ours: Sequence[Change], shims: Sequence[Change], images: int, size: int
) -> Started:
    """Read CLONE WORK from the command line, make the copy and the scenes, print the lines' count.

    Args:
        description: of the trial, in a line.
        ours: what is counted, and left out with ``--without``.
        shims: what else the copy needs here.
        images: number of scenes.
        size: their side, pixels.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("clone", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--without", action="store_true", help="run theirs without our lines")
    given = parser.parse_args()
    work = given.work.resolve()
    code = copy_of(given.clone, work / "code")
    count = apply_changes(code, () if given.without else ours)
    apply_changes(code, shims)
    data = work / "scenes"
    if not data.exists():
        write_scene_folders(data, images, size)
    print(json.dumps({"commit": commit_of(given.clone), **count._asdict()}), flush=True)
    return Started(given.processes, not given.without, work, code, data)


def run_named(
    library: str,
    address: str,
    description: str,
    runs: Sequence[str],
    try_run: Callable[[str, Path, Path], dict[str, Any]],
    run_script: Callable[[Path, Path], None],
) -> None:
    """The command line of a trial whose runs have names.

    Args:
        library: its name, for a person.
        address: its owner and repository.
        description: of the trial, in a line.
        runs: all of them; ``--runs`` chooses.
        try_run: (name, clone, folder for all runs) -> the figures that are printed.
        run_script: (script of theirs, folder), in a process that ``--script`` has started.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("clone", type=Path, nargs="?", help=f"of {address}")
    parser.add_argument("out", type=Path, nargs="?", help="a folder for the runs")
    parser.add_argument("--runs", nargs="+", choices=runs, default=list(runs))
    parser.add_argument("--script", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.script is not None:
        run_script(args.script, Path.cwd())
        return
    if args.out is None:
        parser.error(f"give the path to a clone of {address}, and a folder for the runs")
    print(library, "at", commit_of(args.clone))
    for name in args.runs:
        print(name, json.dumps(try_run(name, args.clone, args.out.resolve())), flush=True)


def run_on_cpu(
    script: Path,
    arguments: Sequence[str],
    *,
    record: Path,
    options: Sequence[str],
    processes: int = 1,
    runner: str = "cuda_on_cpu",
    paths: Sequence[Path] = (),
) -> dict[str, Any]:
    """Run their script under torchrun on the CPU, and read what `cuda_on_cpu` wrote down.

    Args:
        script: theirs.
        arguments: its own.
        record: folder for the log and the record of each process.
        options: what the runner takes before the script.
        processes: how many, joined by gloo.
        runner: the module beside this one that runs it.
        paths: folders for its imports; the script's own unless told.

    Returns:
        The records of the processes by rank, under ``"ranks"``, and ``"seconds"``.

    Raises:
        RuntimeError: it ended with an error; the message has the end of its log.
    """
    if record.exists():
        shutil.rmtree(record)
    record.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", "-m", f"benchmarks.integrations.{runner}"]
    command += [str(record), *options, str(script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    imports = [*(paths or [script.parent]), REPOSITORY, os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in imports if path)
    began = time.monotonic()
    with (record / "log.txt").open("w") as log:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode:
        end = (record / "log.txt").read_text("utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"{script.name} ended with {done.returncode}:\n{end}")
    ranks = [json.loads((record / f"rank{rank}.json").read_text()) for rank in range(processes)]
    return {"ranks": ranks, "seconds": round(time.monotonic() - began)}


def fall(values: Sequence[float], *, after: int = 0) -> Fall:
    """The means of the first and of the last fifth; NaN where a value is not finite.

    Args:
        values: of each step.
        after: so many steps at the start are left out of the means.

    Raises:
        ValueError: fewer than five values.
    """
    if not all(math.isfinite(value) for value in values):
        return Fall(len(values), math.nan, math.nan)
    values = values[after:]
    fifth = len(values) // 5
    if not fifth:
        raise ValueError(f"`values`: {len(values)} steps have no fifth; run at least 5")
    return Fall(len(values), sum(values[:fifth]) / fifth, sum(values[-fifth:]) / fifth)
