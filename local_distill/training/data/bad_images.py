"""Which images were bad: one report for all workers, and a stop when there are too many."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

from local_distill._check import check_fraction
from local_distill.errors import DataError
from local_distill.training.data.decoding import error_kind

__all__ = ["BadImage", "BadImages"]

_log = logging.getLogger(__name__)
_GOOD, _BAD = 1, 2
# The share says nothing before so many images have been looked at (or half of them, if they are
# fewer), and so few bad ones never stop a run.
_LEAST_LOOKED_AT = 1000
_LEAST_BAD = 10
# Warnings of one process; the report has them all.
_MOST_WARNINGS = 20


class BadImage(NamedTuple):
    """One image that could not be read."""

    number: int
    """Where it stands in the data."""
    name: str
    """Its path or key."""
    kind: str
    """Why, in a few words that can be counted by."""
    error: str
    """Why."""

    @classmethod
    def because(cls, number: int, name: str, error: Exception) -> BadImage:
        """Of what was raised; as text, for an exception holds on to the memory of its frames.

        Args:
            number: where it stands in the data.
            name: its path or key.
            error: what reading it raised.

        Returns:
            The account of one bad image.

        Example:
            >>> BadImage.because(1, "b.jpg", OSError("cut short"))
            BadImage(number=1, name='b.jpg', kind='broken', error='OSError: cut short')
        """
        return cls(number, name, error_kind(error), f"{type(error).__name__}: {error}")


class BadImages:
    """Keeps the account of good and bad images, over all worker processes of one training process.

    One byte an image in shared memory says whether it is good, bad or not yet looked at. Setting it
    twice changes nothing, so workers need no lock, and each image counts once.

    The report has one line for each bad image: a line is added under a file lock, after a look at
    what others have added. So several workers, several training processes and a resumed run can
    share one file.

    Args:
        length: number of images.
        report: a JSON-lines file that bad images are added to; None: only the log.
        most_bad: share of the images looked at that may be bad. Judged from 1,000 images on, or
            from half of all where they are fewer; fewer than 10 bad ones never stop a run. 0: the
            first one does.

    Raises:
        ConfigError: `most_bad` is no share.

    Example:
        >>> account = BadImages(3, most_bad=0)
        >>> account.good(0)
        >>> account.bad([BadImage.because(1, "b.jpg", OSError("cut"))], "c.jpg")
        Traceback (most recent call last):
        ...
        local_distill.errors.DataError: 1 of 2 images looked at are bad (50.0%), more than \
`most_bad`, 0: the last is 'b.jpg' (OSError: cut); mend or drop them, or raise `most_bad`
    """

    def __init__(
        self, length: int, *, report: str | os.PathLike[str] | None = None, most_bad: float = 0.1
    ) -> None:
        check_fraction("most_bad", most_bad)
        self.report = None if report is None else Path(report)
        self.most_bad = most_bad
        self._state = torch.zeros(length, dtype=torch.uint8)
        self._state.share_memory_()  # type: ignore[no-untyped-call]
        self._reported: set[str] = set()
        self._read_to = 0
        self._warnings = 0

    @property
    def counts(self) -> tuple[int, int]:
        """(images looked at, bad ones among them), by all workers.

        Example:
            >>> account = BadImages(3)
            >>> account.good(2)
            >>> account.counts
            (1, 0)
        """
        return int(self._state.count_nonzero()), int((self._state == _BAD).sum())

    def good(self, number: int) -> None:
        """Note that an image could be read.

        Args:
            number: where it stands in the data.
        """
        self._state[number] = _GOOD

    def bad(self, images: list[BadImage], replaced_by: str | None) -> None:
        """Note images that could not be read: in the log, the report and the count.

        Args:
            images: one image and those that should have replaced it.
            replaced_by: name of the image that stands in for all of them.

        Raises:
            DataError: more than the set share is bad.
        """
        new = [image for image in images if self._state[image.number] != _BAD]
        if new:
            for image in new:
                self._state[image.number] = _BAD
            self.note(new, replaced_by)
            self._judge(new[-1])

    def note(self, images: list[BadImage], replaced_by: str | None = None) -> None:
        """Add to the log and to the report what is not in it yet; counts nothing.

        Args:
            images: with a number of −1 for what is no image, such as a damaged shard.
            replaced_by: name of the image that stands in for them.
        """
        for image in images:
            self._warn(image)
        if self.report is None:
            return
        try:
            with _locked(self.report) as stream:
                self._catch_up(stream)
                for image in images:
                    if image.name not in self._reported:
                        stream.write(_line(image, replaced_by))
                        self._reported.add(image.name)
                stream.flush()
                self._read_to = stream.tell()
        except OSError as error:  # a full disk is no reason to lose the run to a report
            if self._warnings <= _MOST_WARNINGS:
                _log.error("`report` %s cannot be written: %s", self.report, error)

    def _catch_up(self, stream: BinaryIO) -> None:
        """Learn which names are in the report, and leave the stream at the start of a line."""
        stream.seek(self._read_to)
        line = b"\n"
        for line in stream:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # of a process killed there
                self._reported.add(json.loads(line)["path"])
        if not line.endswith(b"\n"):
            stream.write(b"\n")

    def _warn(self, image: BadImage) -> None:
        self._warnings += 1
        if self._warnings <= _MOST_WARNINGS:
            # A name need not be text, and a log file need not take what is none.
            name = os.fsencode(image.name).decode("utf-8", "backslashreplace")
            _log.warning("bad image: %s: %s", name, image.error)
        if self._warnings == _MOST_WARNINGS:
            _log.warning("further bad images of this process go to `report` (%s) only", self.report)

    def _judge(self, last: BadImage) -> None:
        looked_at, bad = self.counts
        if self.most_bad > 0 and (
            bad < _LEAST_BAD or looked_at < min(_LEAST_LOOKED_AT, len(self._state) / 2)
        ):
            return
        if bad <= self.most_bad * looked_at:
            return
        where = "" if self.report is None else f"; all are in {str(self.report)!r}"
        raise DataError(
            f"{bad} of {looked_at} images looked at are bad ({bad / looked_at:.1%}), more than "
            f"`most_bad`, {self.most_bad:g}: the last is {last.name!r} ({last.error}){where}; "
            "mend or drop them, or raise `most_bad`"
        )


def _line(image: BadImage, replaced_by: str | None) -> bytes:
    line = {
        "path": image.name,
        "index": None if image.number < 0 else image.number,
        "kind": image.kind,
        "error": image.error,
        "replaced_by": replaced_by,
    }
    return json.dumps(line).encode("ascii") + b"\n"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file, for this process alone, to read and to append to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as stream:
        try:
            import fcntl
        except ImportError:  # not on Windows: two workers may both report one image
            yield stream
        else:
            with contextlib.suppress(OSError):  # some network disks have no locks
                fcntl.flock(stream, fcntl.LOCK_EX)  # closing the stream gives it back
            yield stream
