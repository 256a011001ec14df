"""Ctrl-C and SIGTERM, taken at the end of a step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopSignal", "leave_stopping_to_the_parent", "stop_signal"]


class StopSignal:
    """Whether a signal has come."""

    asked = False


@contextmanager
def stop_signal() -> Iterator[StopSignal]:
    """Ctrl-C and SIGTERM end the run at the end of a step; a second one ends it at once.

    Example:
        >>> import os
        >>> with stop_signal() as stop:
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     stop.asked
        True
    """
    stop = StopSignal()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        for name, handler in before.items():
            signal.signal(name, handler)

    try:
        before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread (a notebook's worker): signals are not ours there
        before = {}
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def leave_stopping_to_the_parent() -> None:
    """In a loader's worker: only the process that started it ends it.

    Terminals, supervisors and schedulers send their signal to every process of a run. A worker that
    went at once would leave the step without its batch, which looks like a crash; the main process
    ends the step, saves, and then ends its workers. SIGKILL ends them as ever.

    On macOS and Windows nobody can tell who sent a signal: there SIGTERM ends a worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else it would inherit the main one's handler
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_the_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        continue
    os._exit(0)  # as torch's own handler does, which knows the parent's signal too
