"""Image folders that survive a bad file."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from local_distill.errors import DataError, require_extra

__all__ = ["ImageFiles", "decode_image"]

_log = logging.getLogger(__name__)
_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2")
)
# How many files after a bad one are tried before the folder is given up.
_MOST_BAD_IN_A_ROW = 100


class ImageFiles(Dataset[tuple[Any, int]]):
    """The images below a folder, labelled by class folder where there are some, or flat.

    A file that cannot be decoded is reported, once by each worker, and the next readable one (in
    sorted order) stands in for it, so a run is not lost to it; it is the same one every time.

    Args:
        root: the folder. If it has sub-folders with images, each is a class, in sorted order, as in
            torchvision's ``ImageFolder``; images directly in it are then left out. Otherwise all
            images in it have label 0.
        transform: applied to each RGB PIL image.
        report: a JSON-lines file to which each bad file's path and error are appended, by whichever
            worker met it; None: only the log.

    Attributes:
        classes: names of the class folders; empty for a flat folder.
        paths: the files, sorted.
        targets: their labels.

    Raises:
        DataError: no such folder, or no image in it; when indexing: a hundred bad files in a row.

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
    ) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise DataError(
                f"`root` must be a folder of images, {str(self.root)!r} is not a folder"
            )
        require_extra("PIL", "vision")  # here, or each file would be reported as unreadable
        self.transform = transform
        self.report = None if report is None else Path(report)
        folders = sorted(entry for entry in self.root.iterdir() if entry.is_dir())
        by_class = {folder.name: _images_below(folder) for folder in folders}
        by_class = {name: paths for name, paths in by_class.items() if paths}
        self.classes = list(by_class)
        if by_class:
            self.paths = [path for paths in by_class.values() for path in paths]
            self.targets = [i for i, paths in enumerate(by_class.values()) for _ in paths]
        else:
            self.paths = sorted(path for path in self.root.iterdir() if _is_image(path))
            self.targets = [0] * len(self.paths)
        if not self.paths:
            raise DataError(
                f"`root` must hold images ({' '.join(sorted(_SUFFIXES))}), found none in or below "
                f"{str(self.root)!r}"
            )
        self._reported: set[Path] = set()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        position = range(len(self))[index]  # negative indices, and IndexError as a list has it
        tries = min(len(self), _MOST_BAD_IN_A_ROW)
        for step in range(tries):
            number = (position + step) % len(self)
            path = self.paths[number]
            try:
                image = decode_image(path)
            except (
                Exception
            ) as error:  # decoders raise anything on bad bytes: all of it is reported
                self._report(path, error)
                continue
            label = self.targets[number]
            return (image if self.transform is None else self.transform(image)), label
        raise DataError(
            f"{tries} files in a row below {str(self.root)!r} cannot be read, the first is "
            f"{str(self.paths[position])!r}; is this a folder of images?"
        )

    def _report(self, path: Path, error: Exception) -> None:
        if path in self._reported:
            return
        self._reported.add(path)
        _log.warning("skipped %s: %s: %s", path, type(error).__name__, error)
        if self.report is not None:
            line = {"path": str(path), "error": f"{type(error).__name__}: {error}"}
            # One short write in append mode: lines of several workers do not mix.
            with self.report.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")


def _images_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if _is_image(path) and path.is_file())


def decode_image(path: str | os.PathLike[str]) -> Any:
    """An image file as an upright RGB PIL image.

    Raises:
        Exception: whatever the decoder says of bad bytes; an image too large to be honest.
    """
    from PIL import Image, ImageOps
    from torchvision.transforms.v2.functional import to_pil_image

    from local_distill.transforms.images import rgb_tensor

    with warnings.catch_warnings():
        # Pillow warns of a decompression bomb where it could still decode it: refuse both.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 and 32 bit: convert would clip, not scale
                return to_pil_image(rgb_tensor(upright))
            return upright.convert("RGB")
