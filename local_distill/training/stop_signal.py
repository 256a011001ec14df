"""Ctrl-C and SIGTERM, taken at the end of a step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopSignal", "stop_signal"]


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
