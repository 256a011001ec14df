"""What it means when a loader's worker dies, and what its error is below torch's wrapping."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from local_distill.errors import DataError

__all__ = ["named_worker_failures"]

_DEAD = ("DataLoader worker (pid", "Pin memory thread exited unexpectedly")
# The last line of a traceback.
_RAISED = re.compile(r"^[\w.]*DataError: ", re.MULTILINE)
_CAUGHT = "Caught DataError in DataLoader worker process"


@contextlib.contextmanager
def named_worker_failures() -> Iterator[None]:
    """Turn the failure of a loader's worker into a `DataError` that says what to do.

    Put it around the whole training loop: torch notices a dead worker through a signal, and raises
    wherever the main process just then is.

    Raises:
        DataError: a worker was killed or crashed, with the likely causes; or one raised a
            `DataError`, here without the worker's traceback in its message.

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
        told = message.strip().rstrip(".")
        raise DataError(
            f"a worker that loads images died: {told}. Likely causes: too little memory (lower the "
            "number of workers, the batch or `max_pixels`), a full /dev/shm (in a container give "
            "it more, as with --shm-size), or a decoder that crashed on an image. "
            "What the last checkpoint holds is not touched: start again with the same settings to "
            "go on from there"
        ) from error
