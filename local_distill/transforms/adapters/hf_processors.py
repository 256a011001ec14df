"""Hugging Face image processors: where what they resize and crop lies in the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from local_distill.errors import ConfigError, GeometryError
from local_distill.structures import CropGeometry
from local_distill.transforms.adapters._steps import (
    check_size,
    resized,
    scale_and_shift,
    view_geometry,
)

__all__ = ["from_hf_processor"]

Size = tuple[int, int]


def from_hf_processor(processor: Any, source_size: Size, view_size: Size) -> CropGeometry:
    """Where the ``pixel_values`` that an image processor makes of an image lie in it.

    Worked out from the processor's settings: ``do_resize`` with ``size``, ``do_center_crop`` with
    ``crop_size``, ``do_pad`` with ``pad_size``. Both back ends are known, torchvision and PIL; they
    place an image that is smaller than its crop one pixel apart.

    Args:
        processor: an image processor of transformers 5: ``ViTImageProcessor``,
            ``BitImageProcessor`` (DINOv2), ``DINOv3ViTImageProcessor``, ``CLIPImageProcessor``,
            ``SiglipImageProcessor``, ``DeiTImageProcessor``, ``ConvNextImageProcessor``,
            ``BeitImageProcessor``, ``LevitImageProcessor`` and all others that leave resizing,
            cropping and padding to their back end; ``…Pil`` too.
        source_size: (height, width) of the image as it was handed over.
        view_size: (height, width) of its ``pixel_values``.

    Returns:
        `CropGeometry` of one view: float32 matrix (3, 3).

    Raises:
        ConfigError: a processor that tiles, turns or resizes in a way of its own, or none.
        GeometryError: the processor makes no view of this size out of such an image, perhaps as
            other settings were handed to its call: set them on the processor.

    Example:
        >>> from transformers import BitImageProcessor
        >>> processor = BitImageProcessor(size={"shortest_edge": 256}, crop_size=224)
        >>> from_hf_processor(processor, (512, 768), (224, 224)).matrix
        tensor([[  2.,   0., 160.],
                [  0.,   2.,  32.],
                [  0.,   0.,   1.]])

    Source:
        ``transformers/image_processing_backends.py`` of transformers 5.23.
    """
    size = source = check_size("source_size", source_size)
    view = check_size("view_size", view_size)
    backend = _check_processor(processor)
    matrix = torch.eye(3, dtype=torch.float64)
    if getattr(processor, "do_resize", None):
        resize = _RESIZES.get(_plain_name(processor), _resize)
        step, size = resize(processor, size, backend)
        matrix = step @ matrix
    if getattr(processor, "do_center_crop", None):
        wanted = _height_and_width(processor, "crop_size")
        matrix = _center_crop(size, wanted, backend) @ matrix
        size = wanted
    if getattr(processor, "do_pad", None):
        size = _padded(processor, size, view)  # on the right and at the bottom: nothing moves
    if size != view:
        raise GeometryError(
            f"`view_size` is {view}, but {type(processor).__name__} makes views of {size} (height, "
            f"width) out of images of {source}; were other settings handed to its call?"
        )
    return view_geometry(matrix, view, source)


# What a processor may not have made its own, for its settings to say it all.
_MOVING_METHODS = ("_preprocess", "resize", "center_crop", "pad", "preprocess", "process_image")
_HOMES = {
    "transformers.image_processing_backends",
    "transformers.image_processing_utils",
}
# Read and compared with their pixels, though they have some of these methods of their own.
_KNOWN = {"BeitImageProcessor", "ConvNextImageProcessor", "DINOv3ViTImageProcessor"} | {
    "LevitImageProcessor"
}
_WAY_OUT = (
    "resize and crop by torchvision v2 instead, through local_distill.transforms.track, or hand "
    "the box that it shows to local_distill.from_box"
)


def _plain_name(processor: Any) -> str:
    return type(processor).__name__.removesuffix("Pil").removesuffix("Fast")


def _check_processor(processor: Any) -> str:
    kind = type(processor)
    backend = getattr(processor, "backend", None)
    if backend not in ("torchvision", "pil"):
        raise ConfigError(
            f"cannot read {kind.__name__}: it is no image processor of transformers 5 with the "
            f"torchvision or the PIL back end; {_WAY_OUT}"
        )
    for method in _MOVING_METHODS:
        home = next((base for base in kind.__mro__ if method in vars(base)), None)
        if home is None or home.__module__ in _HOMES:
            continue
        if _plain_name(processor) in _KNOWN and kind.__module__.startswith("transformers."):
            continue
        raise ConfigError(
            f"cannot read {kind.__name__}: it has a `{method}` of its own, which may tile, turn or "
            f"pad; {_WAY_OUT}"
        )
    return str(backend)


def _setting(processor: Any, name: str) -> Mapping[str, int]:
    value = getattr(processor, name, None)
    try:
        return {key: int(number) for key, number in dict(value or {}).items() if number is not None}
    except (TypeError, ValueError):
        raise ConfigError(
            f"`processor.{name}` must be a dictionary such as {{'height': 224, 'width': 224}}, got "
            f"{value!r}"
        ) from None


def _height_and_width(processor: Any, name: str) -> Size:
    setting = _setting(processor, name)
    if "height" not in setting or "width" not in setting:
        raise ConfigError(
            f"`processor.{name}` must say height and width, got {setting or None}, in "
            f"{type(processor).__name__}"
        )
    return setting["height"], setting["width"]


def _shortest_edge(size: Size, edge: int) -> Size:
    height, width = size
    longer = int(edge * max(size) / min(size))
    return (longer, edge) if width <= height else (edge, longer)


def _between_edges(size: Size, shortest: int, longest: int) -> Size:
    low, high = float(min(size)), float(max(size))
    exact: float = shortest
    if high / low * shortest > longest:
        exact = longest * low / high
        shortest = round(exact)
    height, width = size
    if min(size) == shortest:
        return size
    if width < height:
        return int(exact * height / width), shortest
    return shortest, int(exact * width / height)


def _resized_size(processor: Any, size: Size) -> Size:
    setting = _setting(processor, "size")
    if "shortest_edge" in setting and "longest_edge" in setting:
        return _between_edges(size, setting["shortest_edge"], setting["longest_edge"])
    if "shortest_edge" in setting:
        return _shortest_edge(size, setting["shortest_edge"])
    if "max_height" in setting and "max_width" in setting:
        scale = min(setting["max_height"] / size[0], setting["max_width"] / size[1])
        return int(size[0] * scale), int(size[1] * scale)
    return _height_and_width(processor, "size")


def _resize(processor: Any, size: Size, backend: str) -> tuple[Tensor, Size]:
    view = _resized_size(processor, size)
    return resized(size, view), view


def _resize_and_crop(processor: Any, size: Size, backend: str) -> tuple[Tensor, Size]:
    """ConvNeXT's: below 384 px its ``resize`` crops as well."""
    edge = _setting(processor, "size").get("shortest_edge", 0)
    if edge >= 384 or not edge:
        view = (edge, edge) if edge else _height_and_width(processor, "size")
        return resized(size, view), view
    middle = _shortest_edge(size, int(edge / processor.crop_pct))
    crop = _center_crop(middle, (edge, edge), backend)
    return crop @ resized(size, middle), (edge, edge)


def _resize_wider(processor: Any, size: Size, backend: str) -> tuple[Tensor, Size]:
    """LeViT's: the shortest edge times 256 / 224."""
    setting = _setting(processor, "size")
    if "shortest_edge" not in setting:
        return _resize(processor, size, backend)
    view = _shortest_edge(size, int((256 / 224) * setting["shortest_edge"]))
    return resized(size, view), view


_RESIZES: dict[str, Callable[[Any, Size, str], tuple[Tensor, Size]]] = {
    "ConvNextImageProcessor": _resize_and_crop,
    "LevitImageProcessor": _resize_wider,
}


def _center_crop(size: Size, wanted: Size, backend: str) -> Tensor:
    shift = []
    for length, crop in zip(size, wanted, strict=True):
        if crop <= length:
            shift.append(-((length - crop) // 2))
        else:  # padded: the odd pixel goes to the end with torchvision, to the start with PIL
            missing = crop - length
            shift.append(missing // 2 if backend == "torchvision" else -(-missing // 2))
    return scale_and_shift(1, 1, shift[1], shift[0])


def _padded(processor: Any, size: Size, view: Size) -> Size:
    if _setting(processor, "pad_size"):
        return _height_and_width(processor, "pad_size")
    # padded to the largest of its batch
    return max(size[0], view[0]), max(size[1], view[1])
