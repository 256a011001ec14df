"""The checkpoints of a run: the last few kept, verified when they are read."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch

from local_distill._check import check_at_least
from local_distill.errors import ConfigError, DataError
from local_distill.training.checkpoint_files import (
    CheckpointWriteError,
    FileDigest,
    HashedStream,
    digest_of,
    make_folder,
    put,
    write_aside,
)
from local_distill.training.checkpoint_manifest import (
    MANIFEST,
    Entry,
    file_name,
    manifest_bytes,
    read_manifest,
    step_of,
)
from local_distill.training.checkpoint_values import check_storable

__all__ = ["CheckpointStore", "SavedCheckpoint", "read_checkpoint", "write_checkpoint"]

_FORMAT = "local-distill-2"
_UNLISTED = f"without-{MANIFEST}"
_logger = logging.getLogger(__name__)


class SavedCheckpoint(NamedTuple):
    """A checkpoint that was read and found good.

    Attributes:
        step: optimiser steps done.
        path: its file.
        state: what was saved, tensors on the CPU.
    """

    step: int
    path: Path
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of a run, written so that a crash loses none that was acknowledged.

    A file is written aside, synced, renamed, and its folder synced; so is ``manifest.json``, which
    lists the acknowledged ones with size and sha256. Each file ends in its own sha256 as well, by
    which it is judged where the manifest does not list it (a crash between the two) or is damaged.

    One process writes, any number may read meanwhile.

    Args:
        folder: such as ``runs/x/checkpoints``; made at the first save.
        keep: so many are kept, the last ones saved. With 1 there is none to fall back to.

    Raises:
        ConfigError: ``keep`` below 1, or a file stands where the folder is to be.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = CheckpointStore(folder, keep=2)
        ...     for step in (10, 20, 30):
        ...         path = store.save(step, {"weights": torch.full((2,), step)})
        ...     path.name, store.steps(), store.load().state
        ('step-00000030.ckpt', [20, 30], {'weights': tensor([30, 30])})
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 3) -> None:
        self.folder = Path(folder)
        self.keep = check_at_least("keep", keep, 1)
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(
                f"`folder` {str(self.folder)!r} is a file; wanted a folder, or a name that is free"
            )

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write a checkpoint; it is acknowledged, and survives a crash, once this returns.

        Args:
            step: optimiser steps done. One that is there already is replaced.
            state: tensors and plain values, see `check_storable`.

        Returns:
            The file.

        Raises:
            DataError: a value that could not be read back without running code.
            ConfigError: ``state["step"]`` is another step.
            CheckpointWriteError: a full disk, a folder that cannot be written to; those saved
                before are as they were.
        """
        check_at_least("step", step, 0)
        if "step" in state and state["step"] != step:
            raise ConfigError(f"`step` is {step}, but `state['step']` is {state['step']!r}")
        wanted = check_storable(state)
        path = self.folder / file_name(step)
        try:
            make_folder(self.folder)
            self._remove_asides()
            self._write(path, step, state, self._acknowledged())
        except OSError as error:
            with contextlib.suppress(OSError):  # the same trouble again: the first one is told
                self._remove_asides()
            raise CheckpointWriteError(error, path, wanted, self._last_step()) from error
        return path

    def load(self) -> SavedCheckpoint | None:
        """Read the newest checkpoint that verifies; nothing is written.

        One that is damaged, cut or gone is named in a warning of the log, and the one saved before
        it is tried.

        Returns:
            `SavedCheckpoint`, or None where nothing was ever saved.

        Raises:
            DataError: there were some, and none is good; it names them all.
        """
        entries, trouble = self._listed()
        candidates = self._in_order(entries, self._files())[::-1]
        reasons = [] if trouble is None else [trouble]
        for number, (step, digest) in enumerate(candidates):
            path = self.folder / file_name(step)
            try:
                state = read_checkpoint(path, step, digest)
            except DataError as error:
                last = number == len(candidates) - 1
                _logger.warning("%s; %s", error, "none is left" if last else "trying another")
                reasons.append(str(error))
                continue
            if digest is None:
                _logger.warning(
                    "%s is not listed in %s; its own sha256 is right, so it is used",
                    path,
                    MANIFEST,
                )
            return SavedCheckpoint(step, path, state)
        if not reasons:
            return None
        raise DataError(
            f"`folder` {str(self.folder)!r} holds no checkpoint that is good:\n  "
            + "\n  ".join(reasons)
            + "\nRestore one from a copy, or start again in another folder."
        )

    def steps(self) -> list[int]:
        """The steps that were acknowledged and are kept, in the order of their saving.

        Where the manifest is damaged: those whose file is there, in ascending order.
        """
        entries, trouble = self._listed()
        there = self._files()
        return sorted(there) if trouble else [e.step for e in entries if e.step in there]

    def _write(self, path: Path, step: int, state: dict[str, Any], entries: list[Entry]) -> None:
        manifest = self.folder / MANIFEST
        aside = _aside(path)
        # All that takes space is written before anything is renamed.
        digest = write_checkpoint(aside, step, state)
        others = [entry for entry in entries if entry.step != step]
        kept = [*others, Entry(step, digest)][-self.keep :]
        self._write_manifest(_aside(manifest), kept)
        if len(others) < len(entries):
            # The file is about to change under an old sha256. Unlisted it is good before and after.
            unlisted = _aside(self.folder / _UNLISTED)
            self._write_manifest(unlisted, others)
            put(unlisted, manifest)
        put(aside, path)
        put(_aside(manifest), manifest)  # from here on it is acknowledged
        for entry in others:
            if entry not in kept:
                self._remove(self.folder / entry.name)

    def _write_manifest(self, path: Path, entries: list[Entry]) -> None:
        text = manifest_bytes(entries)
        write_aside(path, lambda stream: stream.write(text))

    def _listed(self) -> tuple[list[Entry], str | None]:
        """What the manifest lists, oldest first, and what is wrong with it."""
        try:
            return read_manifest(self.folder) or [], None
        except DataError as error:
            _logger.warning("%s; each file is judged by its own sha256", error)
            return [], str(error)

    def _files(self) -> dict[int, Path]:
        try:
            paths = list(self.folder.iterdir())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise DataError(f"`folder` {str(self.folder)!r} cannot be read: {error}") from error
        steps = {path: step_of(path.name) for path in paths}
        return {step: path for path, step in steps.items() if step is not None}

    def _in_order(
        self, entries: list[Entry], there: Iterable[int]
    ) -> list[tuple[int, FileDigest | None]]:
        """The listed ones as they were saved, and each other after the last of a lower step."""
        order: list[tuple[int, FileDigest | None]] = [(e.step, e.digest) for e in entries]
        for step in sorted(set(there) - {entry.step for entry in entries}):
            lower = [number for number, (other, _) in enumerate(order) if other < step]
            order.insert(lower[-1] + 1 if lower else 0, (step, None))
        return order

    def _last_step(self) -> int | None:
        try:
            return next(reversed(self.steps()), None)
        except DataError:  # it is part of another error's message, and must not hide that one
            return None

    def _acknowledged(self) -> list[Entry]:
        """What is listed and there, oldest first, with what a crash or a damaged manifest left."""
        entries, _ = self._listed()
        there = self._files()
        found = []
        for step, digest in self._in_order(entries, there):
            path = self.folder / file_name(step)
            if step not in there:
                _logger.warning("%s has vanished", path)
                continue
            if digest is None:
                if not _ends_in_its_sha256(path):
                    put(path, path.with_name(f"{path.name}.bad"))
                    _logger.warning("%s is damaged and not listed; renamed to .bad", path)
                    continue
                digest = digest_of(path)
            found.append(Entry(step, digest))
        return found

    def _remove_asides(self) -> None:
        if self.folder.is_dir():
            for path in list(self.folder.iterdir()):
                name = path.name[1 : -len(".tmp")]
                ours = step_of(name) is not None or name in (MANIFEST, _UNLISTED)
                if ours and path == _aside(self.folder / name):
                    path.unlink(missing_ok=True)

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # the new one is safe, that is what was asked for
            _logger.warning("%s is no longer needed, but cannot be removed: %s", path, error)


def write_checkpoint(path: Path, step: int, state: dict[str, Any]) -> FileDigest:
    """Write one checkpoint's file as `write_aside` does: a zip of torch's, then its sha256."""

    def write(stream: HashedStream) -> None:
        whole = {"format": _FORMAT, "step": step, "state": state}
        torch.save(whole, cast("IO[bytes]", stream))  # it needs no more of a file than this
        stream.write(_trailer(stream.digest().sha256))

    return write_aside(path, write)


def read_checkpoint(
    path: Path, step: int | None = None, digest: FileDigest | None = None
) -> dict[str, Any]:
    """Read one checkpoint's file onto the CPU, once its bytes are known to be right.

    Code in the file is never run.

    Args:
        path: the file.
        step: the step it must be of; None: any.
        digest: the size and sha256 it must have; None: the one it ends in must be right.

    Returns:
        The state that was saved.

    Raises:
        DataError: no such file, damaged, or not a checkpoint of this package.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     digest = write_checkpoint(Path(folder, "a"), 3, {"lr": 0.1})
        ...     read_checkpoint(Path(folder, "a"), 3, digest)
        {'lr': 0.1}
    """
    if not os.path.isfile(path):  # unlike Path's, it does not raise where a folder is closed to us
        raise DataError(f"`checkpoint` {str(path)!r} is not a file, or has vanished")
    try:
        _check_bytes(path, digest)
    except OSError as error:
        raise DataError(f"`checkpoint` {str(path)!r} cannot be read: {error}") from error
    try:
        whole: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what bytes from anywhere can raise is not to be listed
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"`checkpoint` {str(path)!r} cannot be read: {reason}") from error
    if not isinstance(whole, dict) or whole.get("format") != _FORMAT:
        raise DataError(
            f"`checkpoint` {str(path)!r} was not written by this version of local-distill "
            f"(format {_FORMAT})"
        )
    if step is not None and whole["step"] != step:
        raise DataError(f"`checkpoint` {str(path)!r} is of step {whole['step']}, its name is not")
    state: dict[str, Any] = whole["state"]
    return state


def _check_bytes(path: Path, wanted: FileDigest | None) -> None:
    if wanted is None:
        if not _ends_in_its_sha256(path):
            raise DataError(
                f"`checkpoint` {str(path)!r} is damaged, or was not written by this version of "
                f"local-distill (format {_FORMAT}): it does not end in its own sha256"
            )
        return
    size = path.stat().st_size
    if size != wanted.size:
        raise DataError(
            f"`checkpoint` {str(path)!r} is damaged: it has {size:,} bytes, {MANIFEST} says "
            f"{wanted.size:,}"
        )
    got = digest_of(path)
    if got != wanted:
        raise DataError(
            f"`checkpoint` {str(path)!r} is damaged: its sha256 is {got.sha256}, {MANIFEST} says "
            f"{wanted.sha256}"
        )


def _ends_in_its_sha256(path: Path) -> bool:
    # The zip's CRC-32 sums do not do: its directory has none, and with one wrong byte in there
    # torch was seen to read a tensor from elsewhere in the file.
    zipped = path.stat().st_size - len(_trailer(""))
    if zipped <= 0:
        return False
    with path.open("rb") as stream:
        stream.seek(zipped)
        said = stream.read()
    return said == _trailer(digest_of(path, zipped).sha256)


def _trailer(sha256: str) -> bytes:
    return f"\nlocal-distill sha256 {sha256:64}\n".encode()


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
