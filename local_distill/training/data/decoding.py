"""One image file, or its bytes, to an upright RGB image; or an error that says why not."""

from __future__ import annotations

import io
import os
import stat
import warnings
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from local_distill._check import check_at_least
from local_distill.errors import DataError, require_extra

__all__ = [
    "DEFAULT_LIMITS",
    "BadImageError",
    "ImageLimits",
    "decode_image",
    "error_kind",
    "open_regular",
]

# Not all that Pillow has: EPS would start Ghostscript, and others are no photographs.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")
_ORIENTATION = 0x0112
_TILE_WIDTH, _TILE_LENGTH = 322, 323
# What a decoder takes: WebP holds the image four times, JPEG 2000 in 32-bit integers, others up to
# 2½ times. So these formats may have fewer pixels, and the same memory.
_SHARES = {"WEBP": 0.6, "JPEG2000": 0.5}
# Rows of a deep image that are scaled at once, in pixels: scratch space stays in a few MiB.
_STRIP = 1 << 20


class BadImageError(DataError):
    """An image that is not taken in.

    Args:
        message: what came and what was wanted.
        kind: one of a few words that a report can be counted by, such as "too many pixels".
    """

    def __init__(self, message: str, kind: str = "broken") -> None:
        super().__init__(message)
        self.kind = kind


class ImageLimits(NamedTuple):
    """What is read at all; both are looked at before anything is decoded."""

    max_pixels: int = 25_000_000
    """Height times width; 0.6 of it for WebP and 0.5 for JPEG 2000, whose decoders take more
    memory. So 24-megapixel photographs pass, and an image takes about 240 MiB at most."""
    max_bytes: int = 256 * 1024 * 1024
    """Size of the file."""

    def checked(self) -> ImageLimits:
        """The same limits.

        Raises:
            ConfigError: one is below 1.
        """
        for name, value in zip(self._fields, self, strict=True):
            check_at_least(name, value, 1)
        return self


DEFAULT_LIMITS = ImageLimits()


def decode_image(
    source: str | os.PathLike[str] | bytes, limits: ImageLimits = DEFAULT_LIMITS
) -> Any:
    """An image as an upright RGB PIL image.

    The first frame of an animation. Alpha is dropped, as torchvision does it. 16 bits become 8 by
    the range of 16 bits; floating point by [0, 1].

    Convention: EXIF orientation is undone where it can be read, else the image is taken as it is.

    Args:
        source: a file's path, or a file's content.
        limits: of pixels and bytes, checked before decoding.

    Returns:
        A PIL image of mode RGB.

    Raises:
        BadImageError: not a regular file (a FIFO or a device is not even read), beyond the limits,
            changed while it was read, or values of no defined range.
        OSError: the file cannot be opened or is cut short.
        Exception: whatever a decoder says of bad bytes.

    Example:
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("LA", (5, 4)).save(file, "PNG")
        >>> decode_image(file.getvalue()).mode
        'RGB'
        >>> decode_image(file.getvalue(), ImageLimits(max_pixels=19))
        Traceback (most recent call last):
        ...
        local_distill.training.data.decoding.BadImageError: 5 × 4 pixels are more than the limit \
of 19 for PNG; raise `max_pixels` if such images belong to the data
    """
    require_extra("PIL", "vision")  # here, or each file would be reported as unreadable
    if isinstance(source, bytes):
        _check_bytes(len(source), limits)
        return _decode(io.BytesIO(source), limits)
    with open_regular(source) as stream:
        before = os.fstat(stream.fileno())
        _check_bytes(before.st_size, limits)
        image = _decode(stream, limits)
        after = os.fstat(stream.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise BadImageError("the file was written to while it was read", "changed while read")
    return image


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read, and nothing that is not a file.

    Args:
        path: of the file; links are followed.

    Returns:
        A binary stream.

    Raises:
        BadImageError: a folder, FIFO, socket or device.
        OSError: it cannot be opened.

    Example:
        >>> open_regular("/dev/zero")
        Traceback (most recent call last):
        ...
        local_distill.training.data.decoding.BadImageError: it is a character device, not a file
    """
    _check_regular(os.stat(path).st_mode)  # before it is opened: opening can act on a device
    # Not blocking, for a FIFO that took the file's place just now would be waited for.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    stream = os.fdopen(os.open(path, flags), "rb")
    try:
        _check_regular(os.fstat(stream.fileno()).st_mode)
    except BadImageError:
        stream.close()
        raise
    return stream


def error_kind(error: BaseException) -> str:
    """A few words that a report of bad images can be counted by.

    Args:
        error: what `decode_image` raised.

    Returns:
        "missing", "no permission", "not an image", "out of memory", the kind of a `BadImageError`,
        or "broken".

    Example:
        >>> error_kind(FileNotFoundError())
        'missing'
    """
    if isinstance(error, BadImageError):
        return error.kind
    kinds: tuple[tuple[type[BaseException], str], ...] = (
        (FileNotFoundError, "missing"),
        (PermissionError, "no permission"),
        (MemoryError, "out of memory"),
        (require_extra("PIL.Image", "vision").DecompressionBombError, "too many pixels"),
        (require_extra("PIL.Image", "vision").DecompressionBombWarning, "too many pixels"),
    )
    return next((kind for of, kind in kinds if isinstance(error, of)), "broken")


def _check_regular(mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    names = {
        stat.S_IFDIR: "folder",
        stat.S_IFIFO: "FIFO",
        stat.S_IFSOCK: "socket",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
    }
    raise BadImageError(f"it is a {names.get(stat.S_IFMT(mode), 'thing')}, not a file", "no file")


def _check_bytes(size: int, limits: ImageLimits) -> None:
    if size == 0:
        raise BadImageError("the file is empty", "empty")
    if size > limits.max_bytes:
        raise BadImageError(
            f"{size:,} bytes are more than the limit of {limits.max_bytes:,}; raise `max_bytes` if "
            "such files belong to the data",
            "too many bytes",
        )


def _decode(stream: BinaryIO, limits: ImageLimits) -> Any:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a million files' odd metadata would drown all else
        # Pillow warns of a decompression bomb where it could still decode it: refuse both.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with _open(stream) as image:
            _check_pixels(image, limits)
            if image.format != "PNG":
                return _loaded(image)
            image.verify()  # the checksums of all chunks, which loading leaves out; it ends there
        stream.seek(0)
        with _open(stream) as image:
            return _loaded(image)


def _open(stream: BinaryIO) -> Any:
    from PIL import Image, UnidentifiedImageError

    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        return Image.open(stream, formats=formats)
    except UnidentifiedImageError as error:
        raise BadImageError(f"none of {', '.join(formats)}", "not an image") from error


def _loaded(image: Any) -> Any:
    image.load()
    upright = _upright(_rgb(image), _orientation(image))
    upright.info = {}  # or who looks at its EXIF turns it once more
    return upright


def _check_pixels(image: Any, limits: ImageLimits) -> None:
    sizes = [image.size]
    if image.format == "TIFF":  # a tile is held as a whole, however small the image is
        tile = image.tag_v2.get(_TILE_WIDTH), image.tag_v2.get(_TILE_LENGTH)
        if all(isinstance(side, int) for side in tile):
            sizes.append(tile)
    most = int(limits.max_pixels * _SHARES.get(image.format, 1))
    for width, height in sizes:
        if width * height > most:
            raise BadImageError(
                f"{width} × {height} pixels are more than the limit of {most} for "
                f"{image.format}; raise `max_pixels` if such images belong to the data",
                "too many pixels",
            )


def _orientation(image: Any) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata raises anything, and the pixels are good
        return 1


def _upright(image: Any, orientation: int) -> Any:
    from PIL.Image import Transpose

    turn = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


def _rgb(image: Any) -> Any:
    if image.mode == "RGB":
        # A copy would cost as much again; and without this one the file stays referred to.
        return image._new(image.im)
    if image.mode != "F" and not image.mode.startswith("I"):
        return image.convert("RGB")
    from PIL import Image

    # Pillow would clip deep values to 255, nearly all white. Strip by strip: they take up to four
    # times the space.
    width, height = image.size
    rows = max(1, _STRIP // width)
    boxes = [(0, top, width, min(top + rows, height)) for top in range(0, height, rows)]
    low, high = np.inf, -np.inf
    for box in boxes:
        values = np.asarray(image.crop(box))
        if not np.isfinite(values).all():
            raise BadImageError("some values are not finite", "no range")
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    scale = _scale(image.mode, low, high)
    grey = Image.new("L", image.size)
    for box in boxes:
        values = np.asarray(image.crop(box)).astype(np.float32) * np.float32(scale)
        grey.paste(Image.fromarray(np.rint(values).astype(np.uint8)), box)
    return grey.convert("RGB")


def _scale(mode: str, low: float, high: float) -> float:
    """What brings values of a deep image to 0 … 255."""
    if mode.startswith("I;16"):
        return 1 / 257
    if mode == "I" and low >= 0 and high <= 65535:
        return 1.0 if high <= 255 else 1 / 257
    if mode == "F" and low >= 0 and high <= 1:
        return 255.0
    raise BadImageError(
        f"values are {low:g} … {high:g} in mode {mode}, whose range is not defined: wanted 0 … 1 "
        "for floating point, 0 … 65,535 for integers",
        "no range",
    )
