"""Image folders that survive a bad file."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from local_distill.errors import DataError, require_extra
from local_distill.training.data.decoding import DEFAULT_LIMITS, ImageLimits
from local_distill.training.data.named_files import NamedFiles

__all__ = ["IMAGE_SUFFIXES", "ImageFiles", "has_images"]

_log = logging.getLogger(__name__)
IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"),
        *(".jp2", ".avif"),
    )
)


class ImageFiles(NamedFiles):
    """The images below a folder, labelled by class folder where there are some.

    If all images lie in sub-folders, each sub-folder is a class, in sorted order, as in
    torchvision's ``ImageFolder``. If some lie directly in the folder, it is flat or nested, and all
    images in and below it have label 0. Names that start with a dot are left out. Anything else
    with an image's suffix is listed, also a broken link: it is reported when its turn comes.

    Args:
        root: the folder.
        transform: applied to each RGB PIL image.
        report: a JSON-lines file that bad images are added to; None: only the log.
        most_bad: share of bad images among those looked at that stops the run; see `BadImages`.
        limits: of pixels and bytes, checked before decoding.

    Attributes:
        classes: names of the class folders; empty for a flat or nested folder.
        targets: the labels.
        paths: the files, sorted.

    Raises:
        DataError: no such folder, one that cannot be listed, or no image in it.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("cat", "dog"):
        ...         os.mkdir(f"{folder}/{name}")
        ...         Image.new("RGB", (8, 6)).save(f"{folder}/{name}/one.png")
        ...     files = ImageFiles(folder)
        ...     files.classes, len(files), files[1][1]
        (['cat', 'dog'], 2, 1)
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        transform: Callable[[Any], Any] | None = None,
        report: str | os.PathLike[str] | None = None,
        most_bad: float = 0.1,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(
                f"`root` must be a folder of images, {str(self.root)!r} is not a folder"
            )
        require_extra("PIL", "vision")
        names = list(_images_below(os.fspath(self.root), "", ()))
        if not names:
            raise DataError(
                f"`root` must hold images ({' '.join(sorted(IMAGE_SUFFIXES))}), found none in or "
                f"below {str(self.root)!r}"
            )
        tops = [name.partition(os.sep)[0] for name in names if os.sep in name]
        classes = sorted(set(tops)) if len(tops) == len(names) else []
        if tops and not classes:
            _log.warning(
                "%s: %d of %d images lie directly in it, so its sub-folders are no classes",
                *(self.root, len(names) - len(tops), len(names)),
            )
        number = {name: i for i, name in enumerate(classes)}
        labels = [number[top] for top in tops] if classes else [0] * len(names)
        super().__init__(
            *(self.root, names, labels, classes),
            transform=transform,
            report=report,
            most_bad=most_bad,
            limits=limits,
        )


def has_images(folder: str | os.PathLike[str]) -> bool:
    """Whether there is an image in or below a folder.

    Args:
        folder: where to look.

    Returns:
        Whether `ImageFiles` would find one.

    Raises:
        DataError: a folder cannot be listed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     has_images(folder)
        False
    """
    return any(True for _ in _images_below(os.fspath(folder), "", ()))


def _images_below(root: str, below: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Names of images relative to the root, sorted folder by folder."""
    folder = os.path.join(root, below)
    try:
        status = os.stat(folder)
        with os.scandir(folder) as scan:
            entries = sorted(
                (os.fsencode(entry.name), entry.name, _is_folder(entry))
                for entry in scan
                if not entry.name.startswith(".")
            )
    except OSError as error:
        raise DataError(f"the folder {folder!r} cannot be listed: {error}") from error
    this = (status.st_dev, status.st_ino)
    if this in above:  # a link to a folder that it lies in
        return
    for _, name, is_folder in entries:
        if is_folder:
            yield from _images_below(root, os.path.join(below, name), (*above, this))
        elif os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
            yield os.path.join(below, name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False
