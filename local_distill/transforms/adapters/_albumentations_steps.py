"""albumentations' transforms, one function each: where the pixels go, from the drawn parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from local_distill.transforms.adapters._steps import resized, scale_and_shift, to_continuous

Size = tuple[int, int]
Params = Mapping[str, Any]
Step = tuple[Tensor, Size]  # input → output in continuous pixels, and the output's size

# Each takes the transform's settings, its drawn parameters and its input's size.


def _cropped(params: Params, size: Size) -> Step:
    x0, y0, x1, y1 = (int(value) for value in params["crop_coords"])
    pad = params.get("pad_params") or {"pad_left": 0, "pad_top": 0}
    return scale_and_shift(1, 1, pad["pad_left"] - x0, pad["pad_top"] - y0), (y1 - y0, x1 - x0)


def _crop(settings: Params, params: Params, size: Size) -> Step:
    return _cropped(params, size)


def _resized_crop(settings: Params, params: Params, size: Size) -> Step:
    crop, cropped = _cropped(params, size)
    # RandomSizedBBoxSafeCrop has height and width, the others a size
    wanted = settings.get("size") or (settings["height"], settings["width"])
    view = int(wanted[0]), int(wanted[1])
    return resized(cropped, view) @ crop, view


def _crop_and_pad(settings: Params, params: Params, size: Size) -> Step:
    x0, y0, x1, y1 = params["crop_params"] or (0, 0, size[1], size[0])
    top, bottom, left, right = params["pad_params"] or (0, 0, 0, 0)
    middle = int(y1 - y0 + top + bottom), int(x1 - x0 + left + right)
    shift = scale_and_shift(1, 1, left - x0, top - y0)
    return (resized(middle, size) @ shift, size) if settings["keep_size"] else (shift, middle)


def _pad(settings: Params, params: Params, size: Size) -> Step:
    top, bottom, left, right = (params[f"pad_{at}"] for at in ("top", "bottom", "left", "right"))
    return scale_and_shift(1, 1, left, top), (size[0] + top + bottom, size[1] + left + right)


def _resize(settings: Params, params: Params, size: Size) -> Step:
    view = int(settings["height"]), int(settings["width"])
    return resized(size, view), view


def _scale(settings: Params, params: Params, size: Size) -> Step:
    view = int(size[0] * params["scale"]), int(size[1] * params["scale"])
    return resized(size, view), view


def _max_size(settings: Params, params: Params, size: Size) -> Step:
    view = max(1, round(size[0] * params["scale"])), max(1, round(size[1] * params["scale"]))
    return resized(size, view), view


def _element(name: str, size: Size) -> Step:
    height, width = size
    flip_x, flip_y = scale_and_shift(-1, 1, width, 0), scale_and_shift(1, -1, 0, height)
    swap = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    turn = scale_and_shift(1, -1, 0, width) @ swap  # a quarter turn against the clock
    swapped = width, height
    steps: dict[str, Step] = {
        "e": (torch.eye(3, dtype=torch.float64), size),
        "h": (flip_x, size),
        "v": (flip_y, size),
        "t": (swap, swapped),
        "r90": (turn, swapped),
        "r180": (flip_x @ flip_y, size),
        "r270": (scale_and_shift(-1, 1, height, 0) @ swap, swapped),
        "hvt": (swap @ flip_x @ flip_y, swapped),
    }
    return steps[name]


def _always(element: str) -> Callable[[Params, Params, Size], Step]:
    return lambda settings, params, size: _element(element, size)


def _group(settings: Params, params: Params, size: Size) -> Step:
    return _element(str(params["group_element"]), size)


def _quarter_turns(settings: Params, params: Params, size: Size) -> Step:
    return _element(("e", "r90", "r180", "r270")[int(params["factor"]) % 4], size)


def _warped(matrix: Any) -> Tensor:
    wide = torch.as_tensor(matrix, dtype=torch.float64)
    if wide.shape == (2, 3):
        wide = torch.cat([wide, torch.tensor([[0.0, 0, 1]], dtype=torch.float64)])
    if torch.allclose(wide, torch.eye(3, dtype=torch.float64)):
        return torch.eye(3, dtype=torch.float64)  # albumentations leaves such images alone
    return to_continuous(wide)


def _affine(settings: Params, params: Params, size: Size) -> Step:
    warped = _warped(params["matrix"])
    if torch.equal(warped, torch.eye(3, dtype=torch.float64)):
        return warped, size
    height, width = (round(float(side)) for side in params["output_shape"][:2])
    return warped, (height, width)


def _rotate(settings: Params, params: Params, size: Size) -> Step:
    turned = _warped(params["matrix"])
    if not settings["crop_border"]:
        return turned, size
    x0, x1, y0, y1 = (int(params[key]) for key in ("x_min", "x_max", "y_min", "y_max"))
    return scale_and_shift(1, 1, -x0, -y0) @ turned, (y1 - y0, x1 - x0)


def _perspective(settings: Params, params: Params, size: Size) -> Step:
    matrix = torch.as_tensor(params["matrix"], dtype=torch.float64)
    middle = int(params["max_height"]), int(params["max_width"])
    if settings["keep_size"]:
        # scaled as OpenCV is told to, about the first pixel's centre and not about its corner
        return to_continuous(resized(middle, size) @ matrix), size
    return to_continuous(matrix), middle


STEPS: dict[str, Callable[[Params, Params, Size], Step]] = {
    **dict.fromkeys(
        (
            *("AtLeastOneBBoxRandomCrop", "BBoxSafeRandomCrop", "CenterCrop", "Crop"),
            *("CropNonEmptyMaskIfExists", "RandomCrop", "RandomCropFromBorders"),
            "RandomCropNearBBox",
        ),
        _crop,
    ),
    **dict.fromkeys(
        ("RandomResizedCrop", "RandomSizedBBoxSafeCrop", "RandomSizedCrop"), _resized_crop
    ),
    "CropAndPad": _crop_and_pad,
    "Pad": _pad,
    "PadIfNeeded": _pad,
    "Resize": _resize,
    "RandomScale": _scale,
    "LongestMaxSize": _max_size,
    "SmallestMaxSize": _max_size,
    "HorizontalFlip": _always("h"),
    "VerticalFlip": _always("v"),
    "Transpose": _always("t"),
    "D4": _group,
    "SquareSymmetry": _group,
    "RandomRotate90": _quarter_turns,
    "Rotate": _rotate,
    "Affine": _affine,
    "SafeRotate": _affine,
    "ShiftScaleRotate": _affine,
    "Perspective": _perspective,
}
