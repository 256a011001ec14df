"""What it means when a loader's worker dies, and what its error is below torch's wrapping."""

from __future__ import annotations

import contextlib
import re
import time
import traceback
from collections.abc import Iterator

from torch._C import _error_if_any_worker_fails

from local_distill.errors import DataError
from local_distill.training.stop_signal import StopSignal

__all__ = ["named_worker_failures"]

_DEAD = ("DataLoader worker (pid", "Pin memory thread exited unexpectedly")
# The last line of a traceback.
_RAISED = re.compile(r"^[\w.]*DataError: ", re.MULTILINE)
_CAUGHT = "Caught DataError in DataLoader worker process"
# What the main process meets that was just taking a tensor over from the worker's socket.
_CUT_OFF = (ConnectionError, EOFError, FileNotFoundError)
_SECONDS_TO_DIE = 5.0
# A signal to a whole group reaches one process after the other.
_SECONDS_TO_HEAR = 1.0


@contextlib.contextmanager
def named_worker_failures(stop: StopSignal | None = None) -> Iterator[None]:
    """Turn the failure of a loader's worker into a `DataError` that says what to do.

    Put it around the whole training loop: torch notices a dead worker through a signal, and raises
    wherever the main process just then is.

    Args:
        stop: whether the run was told to stop, which is then why the worker died.

    Raises:
        DataError: a worker was killed or crashed, with the likely causes; or one raised a
            `DataError`, here without the worker's traceback in its message.
        KeyboardInterrupt: a worker died as the run was told to stop, before the end of the step.

    Example:
        >>> with named_worker_failures():
        ...     raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
        Traceback (most recent call last):
        ...
        local_distill.errors.DataError: a worker that loads images died: DataLoader worker (pid 7) \
is killed by signal: Killed. Likely causes: too little memory (lower the number of workers, the \
batch or `max_pixels`), a full /dev/shm (in a container give it more, as with --shm-size), or a \
decoder that crashed on an image. What the last checkpoint holds is not touched: start again with \
the same settings to go on from there
    """
    try:
        yield
    except DataError as error:
        message = str(error)
        if not message.startswith(_CAUGHT):
            raise
        raise DataError(_RAISED.split(message)[-1].strip()) from error
    except RuntimeError as error:
        message = str(error)
        if not any(part in message for part in _DEAD):
            raise
        # Another one that died is not to be told of later, in the midst of what comes next.
        with contextlib.suppress(RuntimeError):
            _error_if_any_worker_fails()
        raise _dead_worker(message, stop) from error
    except _CUT_OFF as error:
        # torch tells of the death itself a moment later, by a signal, wherever the process is then
        if not _between_processes(error) or (told := _wait_for_a_death()) is None:
            raise
        raise _dead_worker(told, stop) from error


def _dead_worker(told: str, stop: StopSignal | None) -> BaseException:
    if stop is not None and _told_to_stop(stop):
        return KeyboardInterrupt(
            "a worker that loads images was ended before the step was; go on from the last "
            "checkpoint with --resume true"
        )
    return DataError(
        f"a worker that loads images died: {told.strip().rstrip('.')}. Likely causes: too little "
        "memory (lower the number of workers, the batch or `max_pixels`), a full /dev/shm (in a "
        "container give it more, as with --shm-size), or a decoder that crashed on an image. "
        "What the last checkpoint holds is not touched: start again with the same settings to "
        "go on from there"
    )


def _told_to_stop(stop: StopSignal) -> bool:
    end = time.monotonic() + _SECONDS_TO_HEAR
    while not stop.asked and time.monotonic() < end:
        time.sleep(0.01)
    return stop.asked


def _between_processes(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "multiprocessing.queues" for frame, _ in frames)


def _wait_for_a_death() -> str | None:
    """What torch says of a worker that died, once it knows."""
    end = time.monotonic() + _SECONDS_TO_DIE
    try:
        while time.monotonic() < end:
            _error_if_any_worker_fails()
            time.sleep(0.01)
    except RuntimeError as error:  # of the call, or of the signal
        return str(error)
    return None
