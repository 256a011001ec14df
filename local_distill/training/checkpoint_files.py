"""Files that appear whole or not at all: written aside, synced, renamed; and their sha256."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from local_distill.errors import LocalDistillError

__all__ = [
    "CheckpointWriteError",
    "FileDigest",
    "HashedStream",
    "digest_of",
    "make_folder",
    "put",
    "write_aside",
]

_BLOCK = 1 << 20


class CheckpointWriteError(LocalDistillError, OSError):
    """A checkpoint could not be written; those before it are as they were.

    Attributes:
        path: the file that was to be written.
        wanted: about so many bytes were to be written.
        free: bytes that are free on that disk, what was begun removed; None where unknown.
        last_good: the newest acknowledged step; None where there is none.

    Example:
        >>> str(CheckpointWriteError(
        ...     OSError(28, "No space left on device"), Path("run/step-00000300.ckpt"), 5000, 200))
        "'run/step-00000300.ckpt' could not be written (No space left on device): about 5,000 \
bytes wanted, an unknown number free; free some space there, or write elsewhere. The last good \
checkpoint is that of step 200."
    """

    def __init__(
        self, cause: OSError, path: Path, wanted: int, last_good: int | None = None
    ) -> None:
        self.path, self.wanted, self.last_good = path, wanted, last_good
        self.free = _free_bytes(path.parent)
        free = "an unknown number" if self.free is None else f"{self.free:,}"
        good = (
            "" if last_good is None else f" The last good checkpoint is that of step {last_good}."
        )
        super().__init__(
            f"{str(path)!r} could not be written ({cause.strerror or cause}): about {wanted:,} "
            f"bytes wanted, {free} free; {_fix(cause)}.{good}"
        )
        self.errno = cause.errno


class FileDigest(NamedTuple):
    """What a file's bytes are recognised by.

    Attributes:
        size: in bytes.
        sha256: 64 hexadecimal digits.
    """

    size: int
    sha256: str


class HashedStream:
    """A file that is hashed as it is written, and whose ``write`` never raises.

    Args:
        descriptor: of a file open for writing.

    Attributes:
        trouble: what went wrong; from there on nothing is written.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._sha256 = hashlib.sha256()
        self._size = 0
        self.trouble: BaseException | None = None

    def write(self, data: Any) -> int:
        """Write all bytes, or note the trouble; the count of bytes in either case."""
        # torch writes from C++, and when an exception passes through it, a full disk's as well as
        # Ctrl-C's, it comes out as a RuntimeError about an `unexpected pos`. So it waits.
        try:
            if self.trouble is None:
                rest = memoryview(data).cast("B")
                self._sha256.update(rest)
                self._size += len(rest)
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
        except BaseException as error:
            self.trouble = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing is held back."""

    def digest(self) -> FileDigest:
        """Size and sha256 of what was written so far."""
        return FileDigest(self._size, self._sha256.hexdigest())


def write_aside(aside: Path, write: Callable[[HashedStream], Any]) -> FileDigest:
    """Write a file and wait until the disk has it; nothing is left of it where that fails.

    Args:
        aside: where; what is there is replaced.
        write: is given the stream to write to.

    Returns:
        Size and sha256 of what was written.

    Raises:
        OSError: the disk is full, the folder cannot be written to, and so on.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_aside(Path(folder, "a"), lambda stream: stream.write(b"abc")).size
        3
    """
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        try:
            stream = HashedStream(descriptor)
            write(stream)
            if stream.trouble is not None:
                raise stream.trouble
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return stream.digest()


def put(aside: Path, path: Path) -> None:
    """Give the file its name, in place of what has it now, and wait until the disk has that too."""
    os.replace(aside, path)
    _sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, and wait until the disk has them."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def digest_of(path: Path, size: int | None = None) -> FileDigest:
    """Size and sha256 of a file, or of its first ``size`` bytes, read in blocks.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a").write_bytes(b"abc")
        ...     digest_of(Path(folder, "a"))
        FileDigest(size=3, sha256='ba7816bf8f01cfea...')
    """
    left = path.stat().st_size if size is None else size
    read, sha256 = 0, hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        while block := stream.read(min(_BLOCK, left - read)):
            sha256.update(block)
            read += len(block)
    return FileDigest(read, sha256.hexdigest())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there, and renames are journalled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks know no such call
            raise
    finally:
        os.close(descriptor)


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:  # it is part of another error's message, and must not hide that one
        return None


def _fix(cause: OSError) -> str:
    if isinstance(cause, (NotADirectoryError, FileExistsError)):
        return "a file stands where a folder is wanted: remove it, or write elsewhere"
    if isinstance(cause, PermissionError) or cause.errno == errno.EROFS:
        return "make the folder writable, or write elsewhere"
    if cause.errno == errno.EFBIG:
        return "files may not grow so large there: raise the limit (ulimit -f), or write elsewhere"
    return "free some space there, or write elsewhere"
