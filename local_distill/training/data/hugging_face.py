"""Images of a Hugging Face data set."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from local_distill.errors import DataError, require_extra
from local_distill.training.data.decoding import DEFAULT_LIMITS, ImageLimits
from local_distill.training.data.image_source import ImageSource

__all__ = ["HuggingFaceImages"]


class HuggingFaceImages(ImageSource):
    """One split of a Hugging Face data set, through the library ``datasets`` (extra ``data``).

    The images are the column of feature type Image (the one named ``image`` or ``img``, else the
    first), the labels that of type ClassLabel (the one named ``label``, else the first). Images are
    decoded here, not by the library, so that limits and bad images are treated as everywhere.

    Args:
        name: a folder that ``save_to_disk`` wrote, or any name that ``datasets.load_dataset``
            takes; what is not on this machine is downloaded by it.
        split: such as "train" or "test[:10%]"; None: "train", or the only one there is.
        transform: applied to each RGB PIL image.
        report: a JSON-lines file that bad images are added to; None: only the log.
        most_bad: share of bad images among those looked at that stops the run; see `BadImages`.
        limits: of pixels and bytes, checked before decoding.

    Attributes:
        classes: class names; empty without a ClassLabel column.
        targets: the labels; −1 where the data set has none for an image.

    Raises:
        MissingExtraError: ``datasets`` is not installed.
        DataError: no such data set, split or column.
    """

    def __init__(
        self,
        name: str,
        split: str | None = None,
        *,
        transform: Callable[[Any], Any] | None = None,
        report: str | os.PathLike[str] | None = None,
        most_bad: float = 0.1,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        require_extra("PIL", "vision")
        datasets = require_extra("datasets", "data")
        try:
            rows = _load(datasets, name, split)
        except DataError:
            raise
        except Exception as error:  # its many kinds: files, network, Arrow, scripts
            raise DataError(
                f"the data set {name!r}, split {split!r}, cannot be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error
        images = _columns(rows, datasets.Image, ("image", "img"))
        if not images:
            raise DataError(
                f"the data set {name!r} has no column of images, only "
                f"{', '.join(f'{key}: {kind}' for key, kind in rows.features.items())}"
            )
        if len(rows) == 0:
            raise DataError(f"the data set {name!r}, split {split!r}, is empty")
        labels = _columns(rows, datasets.ClassLabel, ("label", "labels"))
        classes: list[str] = []
        numbers = np.zeros(len(rows), np.int32)
        if labels:
            classes = list(rows.features[labels[0]].names)
            found = rows.with_format(None).select_columns([labels[0]])[:][labels[0]]
            numbers = np.array([-1 if label is None else label for label in found], np.int32)
        self._dataset_name = name
        self._rows = (
            rows.with_format(None)
            .select_columns([images[0]])
            .cast_column(images[0], datasets.Image(decode=False))
        )
        self._column = images[0]
        super().__init__(
            *(numbers, classes),
            transform=transform,
            report=report,
            most_bad=most_bad,
            limits=limits,
        )

    def _source(self, number: int) -> Any:
        image = self._rows[number][self._column]
        if image is None:
            raise DataError("the row has no image")
        return image["path"] if image["bytes"] is None else image["bytes"]

    def _name(self, number: int) -> str:
        return f"{self._dataset_name}[{number}]"


def _load(datasets: Any, name: str, split: str | None) -> Any:
    on_disk = [os.path.join(name, file) for file in ("dataset_dict.json", "dataset_info.json")]
    if any(os.path.isfile(file) for file in on_disk):
        loaded = datasets.load_from_disk(name)
        if not isinstance(loaded, dict):
            if split is None or split == str(loaded.split):
                return loaded
            raise DataError(f"{name!r} holds one split, {loaded.split}, not {split!r}")
    elif split is None:
        loaded = datasets.load_dataset(name)
    else:
        return datasets.load_dataset(name, split=split)
    if split is None:
        split = "train" if "train" in loaded else next(iter(loaded))
        if split != "train" and len(loaded) > 1:
            raise DataError(
                f"{name!r} has the splits {', '.join(loaded)}: say which, as `hf:{name}:SPLIT`"
            )
    if split not in loaded:
        raise DataError(f"{name!r} has no split {split!r}, only {', '.join(loaded)}")
    return loaded[split]


def _columns(rows: Any, kind: type, liked: tuple[str, ...]) -> list[str]:
    """Columns of a feature type, the usual names first."""
    found = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
    return sorted(found, key=lambda name: name not in liked)
