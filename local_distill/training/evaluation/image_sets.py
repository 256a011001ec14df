"""What is evaluated on: images with labels, and with class masks where there are some."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from local_distill._check import check_at_least
from local_distill.errors import ConfigError, DataError, require_extra
from local_distill.training.data import ImageFiles, ImageSource, decode_image, open_images
from local_distill.training.scenes import SyntheticScenes

__all__ = ["EvaluationImages", "StoredImages", "draw_scenes"]


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationImages:
    """Images drawn already and held in memory: what repeated evaluations share.

    Attributes:
        images: (n, 3, h, w) uint8 RGB; normalised with ImageNet's numbers when they are used.
        labels: (n,) int64, or None where there are none.
        masks: (n, h, w) uint8 class ids of the pixels, 255 is ignored; None where there are none.
        classes: names of the labels.

    Example:
        >>> drawn = draw_scenes(SyntheticScenes(3, 32))
        >>> len(drawn), tuple(drawn.images.shape), tuple(drawn.masks.shape)
        (3, (3, 3, 32, 32), (3, 32, 32))
    """

    images: Tensor
    labels: Tensor | None
    masks: Tensor | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def has_masks(self) -> bool:
        """Whether there are masks."""
        return self.masks is not None


def draw_scenes(
    scenes: SyntheticScenes, size: int | None = None, *, description: str | None = None
) -> EvaluationImages:
    """Draw scenes with their masks, resized where ``size`` is not theirs.

    Args:
        scenes: the scenes.
        size: side in pixels; None: as they are.
        description: beside a progress bar; None: no bar.

    Returns:
        `EvaluationImages`; the masks' ids are 0 for background, else 1 + class.

    Raises:
        ConfigError: no scene.

    Example:
        >>> draw_scenes(SyntheticScenes(2, 32), 24).masks.shape
        torch.Size([2, 24, 24])
    """
    if len(scenes) == 0:
        raise ConfigError("`scenes` is empty: there is nothing to evaluate")
    images, masks = [], []
    for i in tqdm(
        range(len(scenes)),
        desc=description,
        leave=False,
        dynamic_ncols=True,
        disable=description is None,
    ):
        scene = scenes.scene(i)
        image, mask = scene.image, scene.class_mask.to(torch.uint8)
        if size is not None:
            image, mask = _resized(image, size), _resized(mask[None], size, labels=True)[0]
        images.append(image)
        masks.append(mask)
    return EvaluationImages(
        torch.stack(images),
        torch.tensor(scenes.targets),
        torch.stack(masks),
        tuple(scenes.classes),
    )


class StoredImages(Dataset[tuple[Tensor, int, Tensor]]):
    """Images of a folder, a list or shards to be evaluated on, read while they are used.

    Either what `open_images` takes, such as class folders, ``cat/1.jpg``: labels and no masks. Or a
    folder with ``images/`` and ``masks/``: for each ``images/cat/1.jpg`` a ``masks/cat/1.png`` of
    the same size whose pixels are class ids, 255 for ignored; class folders within ``images/`` give
    labels, a flat one gives none.

    Args:
        data: the folder, or another name of `open_images`.
        size: the shorter side is resized to it, then the middle square is cut out.
        count: at most so many images, evenly spread over the sorted ones, and so over the classes;
            None: all.

    Attributes:
        classes: names of the classes; empty where there are no labels.
        has_masks: whether there are masks.
        pictures: the chosen images as they are, (PIL image, label).

    Raises:
        DataError: nothing there, or an image without a mask; when indexing: a mask that cannot be
            read, is no map of class ids, or has not its image's size.

    Example:
        >>> import os, tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, mode in (("images", "RGB"), ("masks", "L")):
        ...         os.mkdir(f"{folder}/{name}")
        ...         Image.new(mode, (8, 6)).save(f"{folder}/{name}/one.png")
        ...     image, label, mask = StoredImages(folder, 4)[0]
        >>> image.shape, label, mask.shape
        (torch.Size([3, 4, 4]), 0, torch.Size([4, 4]))
    """

    def __init__(self, data: str, size: int, *, count: int | None = None) -> None:
        self.size = check_at_least("size", size, 1)
        self._images, self._masks = Path(data) / "images", Path(data) / "masks"
        self.has_masks = self._images.is_dir() and self._masks.is_dir()
        if self.has_masks:
            opened: ImageSource = ImageFiles(self._images)
        else:
            found = open_images(data)
            if not isinstance(found, ImageSource):
                raise DataError(f"{data!r} must name stored images, not the built-in scenes")
            opened = found
        total = len(opened)
        if count is not None and check_at_least("count", count, 1) < total:
            opened = opened.select([int(i * total / count) for i in range(count)])
        self.pictures = opened
        self.classes = tuple(opened.classes)
        self._names = opened.names if self.has_masks else []
        self._targets = opened.targets if self.has_masks else []
        missing = [name for name in self._names if not self._mask_path(name).is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self)} images have no mask; the first is {missing[0]!r}, "
                f"whose mask should be {str(self._mask_path(missing[0]))!r}"
            )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        if not self.has_masks:
            image, label = self.pictures[index]
            return _resized(_tensor(image), self.size), label, torch.empty(0, dtype=torch.uint8)
        # Not by way of `pictures`, which lets another image stand in for a bad one: the mask would
        # be the wrong one.
        name, mask_path = self._names[index], self._mask_path(self._names[index])
        try:
            image = decode_image(name)
        except Exception as error:  # decoders raise anything on bad bytes
            raise DataError(f"{name!r} cannot be read, mend or remove it: {error}") from error
        mask = _read_mask(mask_path)
        if mask.shape != (image.height, image.width):
            raise DataError(
                f"{str(mask_path)!r} is {mask.shape[0]} × {mask.shape[1]} pixels, but its image "
                f"{name!r} is {image.height} × {image.width}"
            )
        resized = _resized(_tensor(image), self.size)
        return resized, self._targets[index], _resized(mask[None], self.size, labels=True)[0]

    def _mask_path(self, name: str) -> Path:
        return (self._masks / Path(name).relative_to(self._images)).with_suffix(".png")


def _read_mask(path: Path) -> Tensor:
    image_module = require_extra("PIL.Image", "vision")
    try:
        with image_module.open(path) as image:
            mode, ids = image.mode, np.array(image)
    except Exception as error:  # decoders raise anything on bad bytes
        raise DataError(f"{str(path)!r} cannot be read, mend or remove it: {error}") from error
    if mode not in ("L", "P", "1"):
        raise DataError(
            f"{str(path)!r} is an image of mode {mode}; a mask has one channel of 8 bits that "
            "holds class ids (mode L or P), 255 for ignored"
        )
    return torch.from_numpy(ids.astype(np.uint8))


def _tensor(image: Any) -> Tensor:
    functional = require_extra("torchvision.transforms.v2.functional", "vision")
    pixels: Tensor = functional.pil_to_tensor(image)
    return pixels


def _resized(image: Tensor, size: int, *, labels: bool = False) -> Tensor:
    """As `eval_transform` resizes and crops; labels by the pixel whose centre is nearest."""
    functional = require_extra("torchvision.transforms.v2.functional", "vision")
    mode = require_extra("torchvision.transforms.v2", "vision").InterpolationMode
    # NEAREST takes the pixel to the upper left, half a pixel off: NEAREST_EXACT does not.
    chosen = mode.NEAREST_EXACT if labels else mode.BICUBIC
    result: Tensor = functional.resize(image, [size], chosen, antialias=not labels)
    cut: Tensor = functional.center_crop(result, [size, size])
    return cut
