"""One string that names a data source."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from local_distill.errors import DataError
from local_distill.training.data.decoding import DEFAULT_LIMITS, ImageLimits
from local_distill.training.data.hugging_face import HuggingFaceImages
from local_distill.training.data.image_files import ImageFiles, has_images
from local_distill.training.data.image_lists import LIST_SUFFIXES, ImageList
from local_distill.training.data.shards import ShardImages
from local_distill.training.options import SceneOptions
from local_distill.training.scenes import SyntheticScenes

__all__ = ["open_images"]

_WANTED = (
    '"scenes", a folder of images or of .tar shards, a list (.txt, .tsv, .csv, .jsonl), shards '
    'such as "train-{000000..000123}.tar", or "hf:NAME" or "hf:NAME:SPLIT"'
)


def open_images(
    data: str | os.PathLike[str],
    *,
    scenes: SceneOptions = SceneOptions(),
    report: str | os.PathLike[str] | None = None,
    most_bad: float = 0.1,
    max_pixels: int = DEFAULT_LIMITS.max_pixels,
    max_bytes: int = DEFAULT_LIMITS.max_bytes,
) -> Dataset[tuple[Any, int]]:
    """The data set that a string names.

    ========================================= ==============================================
    `data`                                    what comes
    ========================================= ==============================================
    ``scenes``                                `SyntheticScenes`, which has no bad images
    a folder                                  `ImageFiles`; `ShardImages` if all is in ``*.tar``
    ``list.txt``, ``.tsv``, ``.csv``, ``.jsonl``  `ImageList`
    ``a.tar``, ``a-*.tar``, ``a-{0..9}.tar``  `ShardImages`
    ``hf:NAME``, ``hf:NAME:SPLIT``            `HuggingFaceImages`; NAME may be a folder
    ========================================= ==============================================

    Args:
        data: what to open.
        scenes: which built-in scenes.
        report: a JSON-lines file that bad images are added to; None: only the log.
        most_bad: share of bad images among those looked at that stops the run; see `BadImages`.
        max_pixels: height times width of the largest image, checked before decoding.
        max_bytes: size of the largest file.

    Returns:
        A data set with a length, giving (RGB PIL image, label), with `classes` and `targets`.

    Raises:
        DataError: `data` names nothing that can be opened.
        ConfigError: another argument out of range.
        MissingExtraError: the library for this source is not installed.

    Example:
        >>> open_images("scenes", scenes=SceneOptions(count=3)).targets
        [8, 5, 9]
    """
    name = os.fspath(data)
    if name == "scenes":
        return SyntheticScenes(scenes.count, scenes.size, seed=scenes.seed)
    limits = ImageLimits(max_pixels, max_bytes).checked()
    if name.startswith("hf:"):
        where, split = _name_and_split(name.removeprefix("hf:"))
        return HuggingFaceImages(where, split, report=report, most_bad=most_bad, limits=limits)
    kind: type[ImageFiles] | type[ImageList] | type[ShardImages]
    if os.path.isdir(name):
        # A folder that was unpacked often has the .tar still in it.
        shards = any(Path(name).glob("*.tar")) and not has_images(name)
        kind = ShardImages if shards else ImageFiles
    elif ".tar" in os.path.basename(name):
        kind = ShardImages
    elif not os.path.exists(name):
        raise DataError(f"`data`: there is no {name!r}; give {_WANTED}")
    elif Path(name).suffix.lower() in LIST_SUFFIXES:
        kind = ImageList
    else:
        raise DataError(f"`data` {name!r} is a file of no known kind; give {_WANTED}")
    return kind(name, report=report, most_bad=most_bad, limits=limits)


def _name_and_split(text: str) -> tuple[str, str | None]:
    # a path may have a colon in it, and so may a split: "train[:10%]"
    ends = [i for i, letter in enumerate(text) if letter == ":"]
    for end in (len(text), *reversed(ends)):  # else it is the first colon, or the end
        if os.path.exists(text[:end]):
            break
    return text[:end], text[end + 1 :] or None
