"""Images in tar files, as WebDataset writes them, at random access."""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from local_distill.errors import DataError, require_extra
from local_distill.training.data.bad_images import BadImage
from local_distill.training.data.decoding import (
    DEFAULT_LIMITS,
    BadImageError,
    ImageLimits,
    open_regular,
)
from local_distill.training.data.image_files import IMAGE_SUFFIXES
from local_distill.training.data.image_source import ImageSource
from local_distill.training.data.packed_names import PackedNames

__all__ = ["ShardImages", "shard_paths"]

_BLOCK = 512


class ShardImages(ImageSource):
    """The images of tar shards in the WebDataset layout.

    A sample is the members of one key, that is of one name up to the first dot of its last part.
    Its image is the member with an image's suffix, its label the number in the member ``.cls``.
    The shards' headers are read once, at the start; an image is then one seek and one read. A
    resumed run so goes on exactly where it was, which a stream of samples cannot.

    Convention: shards in sorted order, or as the braces give them; samples as they stand in them.

    A damaged or cut shard is reported; what stands before the damage, and after it as far as
    headers can be found, is used.

    Args:
        shards: one tar file; a folder of ``*.tar``; a pattern with ``*``; or one with braces such
            as ``train-{000000..000123}.tar`` (extra ``data``). Plain tar, not compressed.
        transform: applied to each RGB PIL image.
        report: a JSON-lines file that bad images are added to; None: only the log.
        most_bad: share of bad images among those looked at that stops the run; see `BadImages`.
        limits: of pixels and bytes, checked before decoding.

    Attributes:
        classes: the class numbers as text; empty if a sample has no ``.cls``.
        targets: the labels.

    Raises:
        MissingExtraError: braces, and ``braceexpand`` is not installed.
        DataError: a shard is not there, or there is no image in any.

    Example:
        >>> import io, tempfile
        >>> from PIL import Image
        >>> image = io.BytesIO()
        >>> Image.new("RGB", (8, 6)).save(image, "PNG")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with tarfile.open(f"{folder}/a.tar", "w") as shard:
        ...         for name, content in (("0.png", image.getvalue()), ("0.cls", b"1")):
        ...             member = tarfile.TarInfo(name)
        ...             member.size = len(content)
        ...             shard.addfile(member, io.BytesIO(content))
        ...     images = ShardImages(folder)
        ...     len(images), images.targets, images[0][0].size
        (1, [1], (8, 6))
    """

    def __init__(
        self,
        shards: str | os.PathLike[str],
        *,
        transform: Callable[[Any], Any] | None = None,
        report: str | os.PathLike[str] | None = None,
        most_bad: float = 0.1,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        require_extra("PIL", "vision")
        self.shards = shard_paths(os.fspath(shards))
        samples: list[_Sample] = []
        damages: list[BadImage] = []
        for number, path in enumerate(self.shards):
            try:
                samples += _samples(number, path, damages)
            except (OSError, tarfile.TarError, BadImageError) as error:
                damages.append(_damage(path, f"{type(error).__name__}: {error}"))
        if not samples:
            why = f": {damages[0].name}: {damages[0].error}" if damages else ""
            raise DataError(f"no images in {len(self.shards)} shards of {shards!r}{why}")
        labels = [sample.label for sample in samples]
        labelled = min(labels) >= 0
        self._keys = PackedNames(sample.key for sample in samples)
        self._places = np.array([sample[:3] for sample in samples], np.int64)
        super().__init__(
            labels if labelled else np.zeros(len(samples), np.int32),
            [str(i) for i in range(max(labels) + 1)] if labelled else [],
            transform=transform,
            report=report,
            most_bad=most_bad,
            limits=limits,
        )
        self.bad_images.note(damages)

    def _source(self, number: int) -> bytes:
        shard, start, size = (int(value) for value in self._places[number])
        if size > self.limits.max_bytes:
            raise BadImageError(
                f"{size:,} bytes are more than the limit of {self.limits.max_bytes:,}",
                "too many bytes",
            )
        # Opened anew: 20 µs, and no handle that processes or a change of the file could spoil.
        with open_regular(self.shards[shard]) as stream:
            stream.seek(start)
            content = stream.read(size)
        if len(content) < size:
            raise BadImageError(f"the shard ends {size - len(content)} bytes too early")
        return content

    def _name(self, number: int) -> str:
        return f"{self.shards[int(self._places[number, 0])]}/{self._keys[number]}"


def shard_paths(shards: str) -> list[str]:
    """The tar files that a file, folder or pattern means.

    Args:
        shards: as in `ShardImages`.

    Returns:
        Paths, at least one.

    Raises:
        MissingExtraError: braces, and ``braceexpand`` is not installed.
        DataError: one is not there or is compressed.

    Example:
        >>> shard_paths("no-such-{00..01}.tar")
        Traceback (most recent call last):
        ...
        local_distill.errors.DataError: 2 of 2 shards of 'no-such-{00..01}.tar' are not there, \
the first is 'no-such-00.tar'
    """
    if os.path.isdir(shards):
        paths = sorted(str(path) for path in Path(shards).glob("*.tar"))
    else:
        expanded = [shards]
        if "{" in shards and not os.path.exists(shards):
            expanded = list(require_extra("braceexpand", "data").braceexpand(shards))
        paths = []
        for path in expanded:
            is_pattern = glob.has_magic(path) and not os.path.exists(path)
            paths += sorted(glob.glob(path)) if is_pattern else [path]
    if not paths:
        raise DataError(f"no shard (*.tar) matches {shards!r}")
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} shards of {shards!r} are not there, the first is "
            f"{missing[0]!r}"
        )
    compressed = [path for path in paths if not path.endswith(".tar")]
    if compressed:
        raise DataError(
            f"shards must be plain .tar files, got {compressed[0]!r}: a compressed one has no "
            "random access, and images are compressed already; unpack it with gunzip or zstd -d"
        )
    return paths


class _Sample(NamedTuple):
    shard: int
    start: int
    size: int
    key: str
    label: int


def _samples(number: int, path: str, damages: list[BadImage]) -> Iterator[_Sample]:
    """The samples of one shard that have an image; −1 is the label of those without."""
    image: tuple[str, int, int, str] | None = None
    label = -1
    with open_regular(path) as stream:
        for member in _members(path, stream, damages):
            key, suffix = _split(member.name)
            if image is not None and key != image[0]:
                yield _Sample(number, *image[1:], label)
                image, label = None, -1
            if suffix in IMAGE_SUFFIXES:
                image = (key, member.offset_data, member.size, member.name)
            elif suffix == ".cls":
                # The label may stand before its image: then it is the first of its sample.
                stream.seek(member.offset_data)
                label = _number(stream.read(min(member.size, 32)))
        if image is not None:
            yield _Sample(number, *image[1:], label)


def _members(path: str, stream: BinaryIO, damages: list[BadImage]) -> Iterator[tarfile.TarInfo]:
    """The regular members of a tar file, and what is damaged in it."""
    size = os.fstat(stream.fileno()).st_size
    end = 0
    # ignore_zeros also steps over damaged headers, block by block, to the next that is whole.
    with tarfile.open(fileobj=stream, mode="r:", ignore_zeros=True) as shard:
        while True:
            try:
                member = shard.next()
            except (tarfile.TarError, OSError) as error:
                damages.append(_damage(path, f"after byte {end:,}: {error}"))
                return
            if member is None:
                break
            shard.members = []  # type: ignore[attr-defined]  # else it keeps all of them
            if member.offset != end and _not_zero(stream, end, member.offset):
                damages.append(_damage(path, f"no member in bytes {end:,} … {member.offset:,}"))
            end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
            if member.isreg():
                yield member
    if size < end + 2 * _BLOCK or _not_zero(stream, end, size):
        damages.append(_damage(path, f"cut or damaged after byte {min(end, size):,} of {size:,}"))


def _damage(path: str, error: str) -> BadImage:
    return BadImage(-1, path, "damaged shard", error)


def _not_zero(stream: BinaryIO, start: int, end: int) -> bool:
    stream.seek(start)
    while start < end:
        block = stream.read(min(end - start, 1 << 20))
        if not block:
            return False
        if block.count(0) != len(block):
            return True
        start += len(block)
    return False


def _split(name: str) -> tuple[str, str]:
    """Key and lower-case suffix, from the first dot of the last part on."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def _number(content: bytes) -> int:
    text = content.strip()
    return int(text) if text.isdigit() else -1
