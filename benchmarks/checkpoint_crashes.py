"""Whether a checkpoint that was acknowledged survives kill -9 and a full disk.

A child saves in a loop and acknowledges each step on a pipe. It is killed by SIGKILL at a random
moment (``--kills``), or by itself before each single operation of a save on files
(``--operations``), or runs out of space (``--full-disks``, each way: a small tmpfs where mounting
is allowed, a limit on the size of files, a count of bytes after which every write fails). Then the
newest step that was acknowledged, or a later one, must load, and all that is listed must hold what
its step says.

For Linux. What the kernel holds in memory is as good as on disk here: a power cut is not tried.
Progress goes to stderr, one line of JSON with the counts to stdout; the exit status is 1 where
anything was lost.

    python benchmarks/checkpoint_crashes.py --kills 1000 --operations 1 --full-disks 50
"""

from __future__ import annotations

import argparse
import errno
import functools
import itertools
import json
import logging
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from local_distill.training.checkpoint_manifest import step_of
from local_distill.training.checkpoints import (
    CheckpointStore,
    CheckpointWriteError,
    load_checkpoint,
)

KEEP = 3
CHAIN = 25  # so many crashes in a row in one folder, each resumed from
Acknowledge = Callable[..., None]


def state_of(step: int, again: int = 0) -> dict[str, Any]:
    """A state of 4 kB to 400 kB, which step and ``again`` tell all of."""
    draw = torch.Generator().manual_seed(step)
    count = int(torch.randint(1_000, 100_000, (), generator=draw))
    return {
        "step": step,
        "again": again,
        "network": {f"w{n}": torch.randn(count // 2, generator=draw) for n in range(2)},
        "config": {"name": f"step {step}", "sizes": [step, None, 0.5]},
    }


def is_right(state: dict[str, Any], step: int) -> bool:
    """Whether it is what was saved of that step."""
    return _same(state, state_of(step, state["again"]))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)


def in_child(body: Callable[[Acknowledge], None], kill_after: float | None = None) -> list[Any]:
    """Run in a forked child, kill it after so many seconds; what it said before it went."""
    ear, mouth = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(ear)
            body(lambda *said: os.write(mouth, json.dumps(said).encode() + b"\n") and None)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(mouth)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    with open(ear, "rb") as stream:
        said = [json.loads(line) for line in stream]
    _, status = os.waitpid(child, 0)
    ended = os.waitstatus_to_exitcode(status)
    if ended not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the child failed by itself, exit status {ended}; see above")
    return said


def save_on(folder: Path, acknowledge: Acknowledge, *, steps: int = 10**9, first: int = 1) -> None:
    """Go on from what is there, as a run does that is resumed; every fifth step is saved twice."""
    store = CheckpointStore(folder, keep=KEEP)
    saved = store.load()
    first = first if saved is None else saved.step + 1
    for step in range(first, first + steps):
        for again in range(2 if step % 5 == 0 else 1):
            store.save(step, state_of(step, again))
            acknowledge(step)


def verify(folder: Path, acknowledged: Iterable[int]) -> list[str]:
    """What was lost of a folder in which these steps were acknowledged."""
    told = set(acknowledged)
    newest = max(told, default=0)
    store = CheckpointStore(folder, keep=KEEP)
    listed = store.steps()
    lost = []
    try:
        for step in listed:
            state = load_checkpoint(folder / f"step-{step:08d}.ckpt")
            if not is_right(state, step):
                lost.append(f"step {step} has another content")
        saved = store.load()
    except ValueError as error:
        return [*lost, str(error)]
    if (0 if saved is None else saved.step) < newest:
        lost.append(f"{newest} was acknowledged, {saved and saved.step} loads")
    if saved is not None and not is_right(saved.state, saved.step):
        lost.append(f"step {saved.step} loads with another content")
    if len(listed) < min(KEEP, len(told)) - 1:  # one that is saved again is unlisted meanwhile
        lost.append(f"only {listed} of {sorted(told)} are kept")
    return lost


def traces(folder: Path) -> str:
    """What the kill interrupted, by what lies about."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    steps = {step for name in names if (step := step_of(name)) is not None}
    listed = CheckpointStore(folder, keep=KEEP).steps()
    if any(name.startswith(".step-") for name in names) and ".manifest.json.tmp" not in names:
        return "writing the file"
    if any(name.startswith(".step-") for name in names):
        return "writing the manifest"
    if steps - set(listed):
        return "file renamed, not yet listed" if max(steps) not in listed else "removing old ones"
    return "between, or renaming"


def kills(count: int, seed: int, work: Path) -> dict[str, Any]:
    """SIGKILL at random moments."""
    draw, found = random.Random(seed), Counter[str]()
    failures: list[str] = []
    told: list[int] = []
    total = 0
    for number in tqdm(range(count), "kills", mininterval=5):
        folder = work / f"chain{number // CHAIN}"
        if number % CHAIN == 0:
            shutil.rmtree(work / f"chain{number // CHAIN - 1}", ignore_errors=True)
            told = []
        # from before the first save to some ten saves on
        said = in_child(functools.partial(save_on, folder), draw.uniform(0.0, 0.15))
        told += [step for (step,) in said]
        total += len(said)
        found[traces(folder)] += 1
        failures += [f"kill {number}: {what}" for what in verify(folder, told)]
    return {"kills": count, "acknowledged": total, "while": dict(found), "failures": failures}


FILE_CALLS = ("open", "write", "fsync", "close", "replace", "unlink", "mkdir")


def operations(work: Path, stride: int) -> dict[str, Any]:
    """SIGKILL before each operation of a save on files; every stride-th write is cut in two."""
    failures, killed = [], Counter[str]()
    # the first save of all; one that pushes an old one out; one of a step that is there
    for scenario, before, step in (("first", 0, 1), ("later", KEEP, KEEP + 1), ("again", 3, 3)):
        start = work / f"{scenario}-start"
        start.mkdir()
        if before:
            save_on(start, lambda step: None, steps=before)
        told = range(1, before + 1)
        for number in itertools.count():
            folder = work / f"{scenario}{number}"
            shutil.copytree(start, folder) if before else None
            (what,) = in_child(functools.partial(save_and_die, folder, step, number, stride))[-1]
            failures += [f"{scenario}, {what} {number}: {x}" for x in verify(folder, told)]
            save_on(folder, lambda step: None, steps=1)  # it can be gone on from
            failures += [f"{scenario}, after {what} {number}: {x}" for x in verify(folder, told)]
            left = [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]
            failures += [f"{scenario}, {what} {number}: {name} was left" for name in left]
            shutil.rmtree(folder)
            if what == "saved":
                break
            killed[what] += 1
    return {"operations": killed.total(), "of which": dict(killed), "failures": failures}


def save_and_die(folder: Path, step: int, last: int, stride: int, acknowledge: Acknowledge) -> None:
    """Save one step, and die at the operation of that number."""
    store = CheckpointStore(folder, keep=KEEP)
    with dying(last, stride, acknowledge):
        store.save(step, state_of(step, 1))
    acknowledge("saved")


@contextmanager
def dying(last: int, stride: int, tell: Callable[[str], None]) -> Iterator[None]:
    """SIGKILL to oneself in place of the call of that number."""
    made = writes = 0
    real = {name: getattr(os, name) for name in FILE_CALLS}
    write = os.write

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal made, writes
            writes += name == "write"
            if name == "write" and writes % stride:
                return real[name](*args, **kwargs)
            if made == last:
                os.write = write  # type: ignore[assignment]
                tell(name)
                if name == "write":
                    write(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            made += 1
            return real[name](*args, **kwargs)

        return call

    for name in FILE_CALLS:
        setattr(os, name, counted(name))
    try:
        yield
    finally:
        for name, call in real.items():
            setattr(os, name, call)


def full_disks(count: int, seed: int, work: Path, how: str) -> dict[str, Any]:
    """The space runs out while a file or its manifest is being written."""
    draw, total = random.Random(seed), 0
    failures: list[str] = []
    untold: list[str] = []
    for number in tqdm(range(count), how, mininterval=5):
        disk = work / how / f"{number}"
        disk.mkdir(parents=True)
        space = draw.randrange(1_000, 1_500_000)
        with tmpfs(disk, space * 2 // 3) if how == "tmpfs" else no_disk() as more_space:
            folder = disk / "checkpoints"
            said = in_child(functools.partial(save_until_full, folder, how, space, 100 * number))
            steps = [entry[0] for entry in said if isinstance(entry[0], int)]
            total += len(steps)
            if said[-1][0] != "full" or said[-1][2] != max(steps, default=None):
                untold.append(f"{how} {number}: {said[-1]}, acknowledged {steps}")
            failures += [f"{how} {number}: {what}" for what in verify(folder, steps)]
            left = [path.name for path in disk.rglob("*.tmp")]
            failures += [f"{how} {number}: {name} was left" for name in left]
            more_space()
            save_on(folder, steps.append, steps=1)
            failures += [f"{how} {number}, with space: {what}" for what in verify(folder, steps)]
        shutil.rmtree(disk)
    counts = {"full_disks": count, "how": how, "acknowledged": total}
    return {**counts, "failures": failures + untold}


def save_until_full(
    folder: Path, how: str, space: int, first: int, acknowledge: Acknowledge
) -> None:
    """Save until it is said that there is no space."""
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (space // 4, resource.RLIM_INFINITY))
    if how == "counted":
        count_bytes(space)
    try:
        save_on(folder, acknowledge, steps=90, first=first + 1)
    except CheckpointWriteError as error:
        acknowledge("full", error.errno, error.last_good, str(error))


def count_bytes(space: int) -> None:
    """From now on so many bytes can be written to files by this process, and no more."""
    write, left = os.write, space

    def counted(descriptor: int, data: Any) -> int:
        nonlocal left
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return write(descriptor, data)  # the pipe
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, data[:left])
        left -= written
        return written

    os.write = counted  # type: ignore[assignment]


@contextmanager
def tmpfs(folder: Path, space: int) -> Iterator[Callable[[], None]]:
    """A disk of that size; yields what makes it larger."""
    pages = max(space // 4096, 4)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={pages * 4096}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        larger = ["mount", "-o", "remount,size=16m", str(folder)]
        yield lambda: subprocess.run(larger, check=True) and None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def no_disk() -> Iterator[Callable[[], None]]:
    """The limit is the child's, so the next child has space."""
    yield lambda: None


def closed_folder(work: Path) -> dict[str, Any]:
    """What is said of a folder that may be read, not written."""
    folder = work / "closed"
    save_on(folder, lambda step: None, steps=2)
    work.chmod(0o755)
    folder.chmod(0o555)
    said = in_child(functools.partial(save_as_nobody, folder))
    folder.chmod(0o755)
    return {"closed_folder": said, "failures": verify(folder, [1, 2])}


def save_as_nobody(folder: Path, acknowledge: Acknowledge) -> None:
    """Save without root's rights, which no folder is closed to."""
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        CheckpointStore(folder, keep=KEEP).save(3, state_of(3))
    except CheckpointWriteError as error:
        acknowledge(error.errno, error.last_good, str(error))


def main() -> int:
    """Run the trials that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--operations", type=int, default=0, help="N: of the writes each N-th")
    parser.add_argument("--full-disks", type=int, default=0, help="trials each way")
    parser.add_argument("--ways", nargs="+", default=["tmpfs", "limit", "counted"])
    parser.add_argument("--closed-folder", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="on the disk to try; default: the temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logs: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logs.append  # type: ignore[method-assign]
    logging.getLogger("local_distill").addHandler(handler)
    results, start = [], time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        if options.kills:
            results.append(kills(options.kills, options.seed, work))
        if options.operations:
            results.append(operations(work, options.operations))
        ways = options.ways if options.full_disks else []
        results += [full_disks(options.full_disks, options.seed, work, how) for how in ways]
        if options.closed_folder:
            results.append(closed_folder(work))
    failures = [what for result in results for what in result["failures"]]
    warned = Counter(str(record.msg) for record in logs)
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"results": results, "warnings": warned, "seconds": seconds}))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
