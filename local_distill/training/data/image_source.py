"""What all sources of image files share: labels, subsets, and what to do with a bad image."""

from __future__ import annotations

import copy
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from local_distill.errors import ConfigError, DataError
from local_distill.training.data.bad_images import BadImage, BadImages
from local_distill.training.data.decoding import DEFAULT_LIMITS, ImageLimits, decode_image

__all__ = ["ImageSource", "stride"]

# How many bad images after each other are tried before the data is given up.
_MOST_BAD_IN_A_ROW = 100


class ImageSource(Dataset[tuple[Any, int]], ABC):
    """Images with labels, any of which may turn out to be bad.

    A bad image i is replaced by the first readable one of i + s, i + 2s, … (modulo the number of
    images), where s is `stride` of that number. So the stand-in is a function of the data alone,
    whichever worker meets it and whatever was met before; and when a whole folder is bad, its
    stand-ins come from all over the data.

    A subclass calls ``super().__init__`` and has `_source(number)` and `_name(number)`.

    Args:
        labels: `(n,)` integers.
        classes: their names; empty where there are none.
        transform: applied to each RGB PIL image.
        report: a JSON-lines file that bad images are added to; None: only the log.
        most_bad: share of bad images among those looked at that stops the run; see `BadImages`.
        limits: of pixels and bytes, checked before decoding.

    Returns:
        Indexing gives (image, label), both of the stand-in where the image is bad.

    Raises:
        ConfigError: a setting out of range.
        DataError: when indexing: too many bad images, or a hundred after each other.
        IndexError: when indexing: out of range; negative ones count from the end.
    """

    def __init__(
        self,
        labels: ArrayLike,
        classes: Sequence[str] = (),
        *,
        transform: Callable[[Any], Any] | None = None,
        report: str | os.PathLike[str] | None = None,
        most_bad: float = 0.1,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        # Arrays, not lists of objects: with every look at an object its count of references is
        # written, and so each worker ends up with its own copy of the memory it was forked with.
        self._labels: NDArray[np.int32] = np.asarray(labels, dtype=np.int32)
        self.classes = list(classes)
        self.transform = transform
        self.limits = ImageLimits(*limits).checked()
        self.bad_images = BadImages(len(self._labels), report=report, most_bad=most_bad)
        self._chosen: NDArray[np.int64] | None = None

    @abstractmethod
    def _source(self, number: int) -> Any:
        """A path or the bytes of an image; may raise anything if it is bad."""

    @abstractmethod
    def _name(self, number: int) -> str:
        """The image's path, or another name for reports."""

    @property
    def targets(self) -> list[int]:
        """The labels, made anew with each call."""
        chosen = self._labels if self._chosen is None else self._labels[self._chosen]
        return [int(label) for label in chosen]

    @property
    def names(self) -> list[str]:
        """Paths or keys of all images, made anew with each call."""
        return [self._name(self._number(position)) for position in range(len(self))]

    def select(self, indices: Sequence[int]) -> Self:
        """Some of the images; bad ones are replaced by others of these, and counted in common.

        Args:
            indices: of the images wanted, in order.

        Returns:
            A data set of the same kind.

        Raises:
            ConfigError: an index out of range.
        """
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise ConfigError(
                f"`indices` must be from 0 to {len(self) - 1}, got {wanted.min()} … {wanted.max()}"
            )
        chosen = copy.copy(self)
        chosen._chosen = wanted if self._chosen is None else self._chosen[wanted]
        return chosen

    def __len__(self) -> int:
        return len(self._labels) if self._chosen is None else len(self._chosen)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        length = len(self)
        position = range(length)[index]  # negative indices, and IndexError as a list has it
        step = stride(length)
        bad: list[BadImage] = []
        for tried in range(min(length, _MOST_BAD_IN_A_ROW)):
            number = self._number((position + tried * step) % length)
            try:
                image = decode_image(self._source(number), self.limits)
            except Exception as error:  # decoders raise anything on bad bytes: all is reported
                bad.append(BadImage.because(number, self._name(number), error))
                continue
            self.bad_images.good(number)
            self.bad_images.bad(bad, self._name(number))
            label = int(self._labels[number])
            return (image if self.transform is None else self.transform(image)), label
        self.bad_images.bad(bad, None)
        raise DataError(
            f"{len(bad)} images in a row cannot be read, the first is {bad[0].name!r} "
            f"({bad[0].error}); are these images, and is the disk that they are on there?"
        )

    def _number(self, position: int) -> int:
        return position if self._chosen is None else int(self._chosen[position])


def stride(length: int) -> int:
    """The step from a bad image to the next that is tried: about 0.618 of all, coprime to it.

    Coprime, so that all images are visited; the golden ratio, so that the next few are far apart.

    Args:
        length: number of images, at least 1.

    Returns:
        At least 1.

    Example:
        >>> stride(10), sorted((3 + i * stride(10)) % 10 for i in range(10)) == list(range(10))
        (7, True)
    """
    step = max(1, round(length * (math.sqrt(5) - 1) / 2))
    while math.gcd(step, length) != 1:
        step += 1
    return step
