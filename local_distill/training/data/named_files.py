"""Images that are files below one folder, each known by its name there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from local_distill.training.data.image_source import ImageSource
from local_distill.training.data.packed_names import PackedNames

__all__ = ["NamedFiles"]


class NamedFiles(ImageSource):
    """What a folder of images and a list of images share; see `ImageSource` for the rest.

    Args:
        folder: that the names are relative to.
        names: of the files.
        labels: `(n,)` integers.
        classes: their names; empty where there are none.
        **settings: of `ImageSource`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        names: Iterable[str],
        labels: ArrayLike,
        classes: Sequence[str],
        **settings: Any,
    ) -> None:
        self._folder, self._names = Path(folder), PackedNames(names)
        super().__init__(labels, classes, **settings)

    @property
    def paths(self) -> list[Path]:
        """The files, made anew with each call."""
        return [Path(name) for name in self.names]

    def _source(self, number: int) -> str:
        return self._name(number)

    def _name(self, number: int) -> str:
        return os.path.join(self._folder, self._names[number])
