"""What counts as one image, and how it becomes an RGB tensor."""

from __future__ import annotations

import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from local_distill.errors import ShapeError

__all__ = ["image_size", "rgb_tensor"]

# Resampling overshoots [0, 1] by an eighth at most; what lies further out was never in that range.
_OVERSHOOT = 0.25


def image_size(image: object) -> tuple[int, int]:
    """(height, width) of one image, or an error that says why it is none.

    Raises:
        ShapeError: not a PIL image or a (channels, height, width) tensor.

    Example:
        >>> image_size(torch.zeros(3, 20, 30))
        (20, 30)
    """
    if isinstance(image, PIL.Image.Image):
        return image.height, image.width
    if isinstance(image, Tensor) and (
        isinstance(image, tv_tensors.Image) or not isinstance(image, tv_tensors.TVTensor)
    ):
        shape = tuple(image.shape)
        if len(shape) != 3 or 0 in shape:
            raise ShapeError(
                f"`image` must be one image of shape (channels, height, width), got {shape}; "
                "a batch is transformed image by image, in the loader"
            )
        return shape[1], shape[2]
    raise ShapeError(
        f"`image` must be a PIL image or a (channels, height, width) tensor, got "
        f"{type(image).__name__}; an array (height, width, channels) becomes one with "
        "torchvision.transforms.v2.functional.to_image"
    )


def rgb_tensor(image: object) -> Tensor:
    """One image as a plain (3, height, width) tensor.

    Args:
        image: a PIL image of any mode but F, or a tensor with 1 or 3 channels: uint8, or floating
            point in [0, 1].

    Returns:
        uint8, or float32 in [0, 1] for a floating-point image.

    Raises:
        ShapeError: not an image, or one whose range of values can't be told.

    Example:
        >>> rgb_tensor(PIL.Image.new("L", (30, 20), 255)).shape
        torch.Size([3, 20, 30])
    """
    image_size(image)
    if isinstance(image, PIL.Image.Image):
        return _rgb_from_pil(image)
    assert isinstance(image, Tensor)
    tensor = image.detach().as_subclass(Tensor)
    if tensor.shape[0] not in (1, 3):
        raise ShapeError(
            f"`image` must have 1 or 3 channels, got shape {tuple(tensor.shape)}; for an image "
            "with alpha pass image[:3], and axes must be in the order (channels, height, width)"
        )
    if tensor.is_floating_point():
        low, high = (float(bound) for bound in tensor.aminmax())
        if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):
            raise ShapeError(
                f"`image` is {tensor.dtype} with values in [{low:.4g}, {high:.4g}], wanted [0, 1]: "
                "divide by 255, do not normalise before, and drop images with NaN"
            )
        tensor = tensor.to(torch.float32).clamp(0, 1)
    elif tensor.dtype != torch.uint8:
        raise ShapeError(
            f"`image` is {tensor.dtype}, wanted uint8 or floating point; convert with "
            "torchvision.transforms.v2.functional.to_dtype(image, torch.float32, scale=True)"
        )
    return tensor.expand(3, -1, -1)


def _rgb_from_pil(image: PIL.Image.Image) -> Tensor:
    if image.mode == "F":
        raise ShapeError(
            "`image` has PIL mode F, whose range is not defined; pass a float tensor in [0, 1]"
        )
    if image.mode.startswith("I"):
        # PIL would clip 16-bit values to 255: nearly all white.
        deep: Tensor = F.pil_to_tensor(image).to(torch.float32)
        if float(deep.max()) > 255:
            deep = deep / 257  # 65,535 → 255
        return deep.round().clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, PIL warns
    return F.pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))  # type: ignore[no-any-return]
