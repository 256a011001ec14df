"""A process that has died ends the others, which say which one it was and why."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from lightning_fabric import Fabric

from local_distill.errors import LocalDistillError

__all__ = ["watch_processes"]

# Seconds: between two looks, without a sign of life, and for a process to end by itself.
_BEAT, _SILENCE, _GRACE = 1.0, 25.0, 3.0
_runs = itertools.count()


@contextmanager
def watch_processes(fabric: Fabric) -> Iterator[None]:
    """Within it no process waits for one that is dead: all end, and name it.

    Each process tells the group's store once a second that it lives, in a thread. The first one
    looks for those that went silent, the others at the first one and at the process that started
    them. What a process failed by is told to the others. A live process whose computation hangs
    still lives: for it there is ``process_timeout``.

    Args:
        fabric: launched.

    Raises:
        LocalDistillError: a collective failed as another process ended; it says which, where it
            is known.
    """
    if fabric.world_size == 1:
        yield
        return
    watch = _Watch(fabric)
    watch.start()
    try:
        yield
    except Exception as error:
        if not _of_a_collective(error):
            watch.tell(f"rank {watch.rank} failed: {type(error).__name__}: {error}")
            raise
        raise LocalDistillError(
            f"rank {watch.rank}: {watch.cause()}; the last checkpoint is good, go on with "
            "--resume true"
        ) from error
    finally:
        watch.stop()


class _Watch:
    def __init__(self, fabric: Fabric) -> None:
        self.rank, self.ranks = fabric.global_rank, fabric.world_size
        launcher = fabric.strategy.launcher
        # Those that Fabric started, in the order of their local ranks; torchrun watches its own.
        self.children: list[subprocess.Popen[bytes]] = getattr(launcher, "procs", [])
        self.parent, self.first = os.getppid(), fabric.global_rank - fabric.local_rank
        timeout = getattr(fabric.strategy, "_timeout", None)
        self.silence = min(_SILENCE, timeout.total_seconds() if timeout else _SILENCE)
        default = dist.distributed_c10d._get_default_store()
        self.store = dist.distributed_c10d.PrefixStore(f"local_distill/{next(_runs)}", default)
        self.ended = threading.Event()
        self.told: str | None = None
        self.heard: dict[int, tuple[bytes, float]] = {}
        self.answered = time.monotonic()

    def start(self) -> None:
        self.threads = [
            threading.Thread(target=work, daemon=True, name="watch-processes")
            for work in (self._beat, self._look)
        ]
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.ended.set()
        for thread in self.threads:  # the store must not go while one is talking to it
            thread.join(timeout=_GRACE)

    def tell(self, cause: str) -> None:
        """Let the others know; the store may be gone with the first process."""
        try:
            self.store.set("cause", cause)
        except RuntimeError as error:
            print(f"rank {self.rank}: the others cannot be told: {error}", file=sys.stderr)

    def found(self) -> str | None:
        """The first cause that was heard of or seen: what ends after it ends because of it."""
        if self.told is None:
            self.told = self._local_cause()
            if self.told is not None and self.rank == 0:
                self.tell(self.told)
        return self.told

    def cause(self) -> str:
        """Why a collective failed; the one that died may need a moment to be seen dead."""
        until = time.monotonic() + _GRACE
        while time.monotonic() < until:
            found = self.found()
            if found is not None:
                return found
            time.sleep(0.1)
        return "a collective failed, so another process has ended or cannot be reached"

    def _beat(self) -> None:
        """Talks to the store, which may not answer: what it hears is judged by `_look`."""
        for number in itertools.count():
            try:
                self.store.set(str(self.rank), f"{_name()} {number}")
                others = range(1, self.ranks) if self.rank == 0 else [0]
                seen = [other for other in others if self.store.check([str(other)])]
                for other, said in zip(seen, map(self.store.get, map(str, seen)), strict=True):
                    if self.heard.get(other, (b"", 0.0))[0] != said:
                        self.heard[other] = said, time.monotonic()
                self.answered = time.monotonic()
                if self.told is None and self.store.check(["cause"]):
                    self.told = self.store.get("cause").decode()
            except RuntimeError:  # no answer is what `_look` looks for
                pass
            if self.ended.wait(_BEAT):
                break

    def _look(self) -> None:
        since: float | None = None
        while not self.ended.wait(_BEAT / 2):
            found = self.found()
            # Who is told can mostly end by itself, which leaves a traceback and open files whole.
            since = None if found is None else since or time.monotonic()
            if since is not None and time.monotonic() - since < _GRACE:
                continue
            silent = self._silent() if found is None else None
            if (found or silent) and not self.ended.is_set():
                self._end(found or silent or "", abandoned=found is None)

    def _local_cause(self) -> str | None:
        for number, child in enumerate(self.children):
            status = child.poll()
            if status:
                # Fabric numbers ranks node by node; those of other nodes are not our children.
                return f"rank {self.rank + number + 1} (process {child.pid}) {_ended_by(status)}"
        if os.getppid() != self.parent:
            # Fabric starts the others of a machine from its first, torchrun all from its agent.
            who = "torchrun" if dist.is_torchelastic_launched() else f"rank {self.first}"
            return f"{who} (process {self.parent}), which started rank {self.rank}, is gone"
        return None

    def _silent(self) -> str | None:
        now = time.monotonic()
        if now - self.answered > self.silence:
            return f"the store that rank 0 keeps has not answered for {self.silence:.0f} s"
        for other, (said, when) in list(self.heard.items()):
            if now - when > self.silence:
                who = said.decode().rpartition(" ")[0]
                return f"rank {other} ({who}) gave no sign of life for {self.silence:.0f} s"
        return None

    def _end(self, cause: str, *, abandoned: bool) -> None:
        text = f"rank {self.rank}: {cause}; ending, go on with --resume true"
        print(f"error: {text}", file=sys.stderr, flush=True)
        if self.rank == 0:
            self.tell(cause)
            time.sleep(2 * _BEAT)  # for the others to hear of it
        for child in self.children:
            child.kill()
        by_fabric = self.rank > self.first and not dist.is_torchelastic_launched()
        if abandoned and by_fabric and os.getppid() == self.parent:
            os.kill(self.parent, signal.SIGKILL)  # stopped or stuck, nobody else would end it
        os._exit(1)  # the main thread may be stuck in a collective for good


def _name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _ended_by(status: int) -> str:
    if status > 0:
        return f"ended with status {status}"
    return f"was ended by signal {-status} ({signal.Signals(-status).name})"


def _of_a_collective(error: BaseException) -> bool:
    texts: Any = ("gloo", "Connection closed", "Connection reset", "NCCL")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )
