"""albumentations: geometry from a replay, that is from the parameters that moved the pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from local_distill.errors import ConfigError, GeometryError
from local_distill.structures import CropGeometry
from local_distill.transforms.adapters._albumentations_steps import STEPS
from local_distill.transforms.adapters._steps import check_size, view_geometry

__all__ = ["from_albumentations"]

Size = tuple[int, int]


def from_albumentations(
    replay: Mapping[str, Any],
    source_size: Size,
    view_size: Size,
    *,
    trust: Iterable[str] = (),
) -> CropGeometry:
    """Where a view of ``albumentations.ReplayCompose`` lies in the image.

    The geometry is worked out from each applied transform's own parameters, in order. Neither
    keypoints nor boxes are asked: albumentations moves those by other rules than the pixels.

    Convention: OpenCV's warps count from pixel centres, its resizes from the image's edge; each
    step is turned into continuous pixels before it is composed.

    Args:
        replay: ``result["replay"]`` of a ``ReplayCompose``, from albumentations 2.0. What was
            written to JSON and read back works as well, as long as its numbers came through.
        source_size: (height, width) of the image that went in.
        view_size: (height, width) of the view that came out.
        trust: names of transforms that move no pixels although this package does not know them,
            as the replay spells them: ``"Lambda"``, ``"my_module.MyTransform"``. ``"SomeOf"`` and
            ``"RandomOrder"`` say that these have ``replace=False``, which a replay leaves out.

    Returns:
        `CropGeometry` of one view: float32 matrix (3, 3).

    Raises:
        ConfigError: a transform, applied or not, that moves pixels in a way that its replay does
            not say; a container whose replay doesn't tell what was applied in which order.
        GeometryError: the sizes are not those of the replay.

    Example:
        >>> import os
        >>> os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else importing it asks the network
        >>> import albumentations as A, numpy as np
        >>> pipeline = A.ReplayCompose([A.CenterCrop(10, 20), A.Resize(5, 5), A.Transpose(p=1)])
        >>> result = pipeline(image=np.zeros((30, 40, 3), np.uint8))
        >>> from_albumentations(result["replay"], (30, 40), result["image"].shape[:2]).matrix
        tensor([[ 0.,  4., 10.],
                [ 2.,  0., 10.],
                [ 0.,  0.,  1.]])

    Source:
        ``ReplayCompose`` in ``albumentations/core/composition.py`` of albumentations 2.0.8.

    Deviations: nothing is fitted to transformed keypoints, as other adapters do.
    """
    if not isinstance(replay, Mapping) or "transforms" not in replay:
        raise ConfigError(
            f"`replay` must be result['replay'] of an albumentations.ReplayCompose, got "
            f"{type(replay).__name__} without `transforms`; a plain Compose keeps no replay"
        )
    size = source = check_size("source_size", source_size)
    view = check_size("view_size", view_size)
    matrix = torch.eye(3, dtype=torch.float64)
    seen: set[int] = set()
    _check(replay, frozenset(trust))
    for name, settings in _applied(replay):
        params = settings["params"]
        if id(params) in seen:
            raise ConfigError(
                f"{name} is one object that stands twice in the pipeline, and the replay keeps "
                "its last parameters only; make two of it"
            )
        seen.add(id(params))
        given = tuple(int(side) for side in params["shape"][:2])
        if given != size:
            raise GeometryError(
                f"{name} was given an image of {given} (height, width), and `source_size` leads "
                f"to {size} there; is `source_size` another image's, or (width, height)?"
            )
        step, size = STEPS[name](settings, params, size)
        matrix = step @ matrix
    if size != view:
        raise GeometryError(f"`view_size` is {view} but the replay makes a view of {size}")
    return view_geometry(matrix, view, source)


def _check(node: Mapping[str, Any], trusted: frozenset[str]) -> bool:
    """Whether a part of the pipeline may move pixels; refuse what can't be read, drawn or not.

    So a pipeline fails at its first image, not at the first that draws the part.
    """
    name = node["__class_fullname__"]
    if "transforms" not in node:
        if name not in STEPS and name not in _PHOTOMETRIC and name not in trusted:
            raise ConfigError(f"cannot read {name}: {_REFUSED.get(name, _UNKNOWN)}")
        if name in _RESIZES and node.get("interpolation") == _NEAREST:
            raise ConfigError(
                f"cannot read {name} with cv2.INTER_NEAREST, which takes a pixel above and to the "
                "left of the right one; use cv2.INTER_NEAREST_EXACT"
            )
        return name in STEPS
    if name not in _CONTAINERS:
        raise ConfigError(f"cannot read {name}: {_REFUSED.get(name, _UNKNOWN)}")
    moving = [child for child in node["transforms"] if _check(child, trusted)]
    if name == "RandomOrder" and len(moving) > 1:
        names = " and ".join(child["__class_fullname__"] for child in moving)
        raise ConfigError(
            f"cannot read RandomOrder with {names}: the replay doesn't say which came first; leave "
            "only one in it that moves pixels"
        )
    if name in ("RandomOrder", "SomeOf") and moving and name not in trusted:
        raise ConfigError(
            f"cannot read {name} with transforms that move pixels: the replay doesn't say whether "
            f"it may apply one twice; if yours has replace=False, say so with trust=['{name}']"
        )
    return bool(moving)


def _applied(node: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name, settings) of each applied transform that moves pixels, in order."""
    if "transforms" in node:
        for child in node["transforms"]:
            yield from _applied(child)
    elif node["__class_fullname__"] in STEPS and node.get("params") is not None:
        yield node["__class_fullname__"], node


_NEAREST = 0  # cv2.INTER_NEAREST
_RESIZES = {
    *(
        "CropAndPad",
        "LongestMaxSize",
        "RandomResizedCrop",
        "RandomScale",
        "RandomSizedBBoxSafeCrop",
    ),
    *("RandomSizedCrop", "Resize", "SmallestMaxSize"),
}

_CONTAINERS = {
    *("Compose", "OneOf", "OneOrOther", "RandomOrder", "ReplayCompose", "Sequential", "SomeOf"),
}
_PHOTOMETRIC = {
    *("AdditiveNoise", "AdvancedBlur", "AutoContrast", "Blur", "CLAHE", "ChannelDropout"),
    *("ChannelShuffle", "ChromaticAberration", "CoarseDropout", "ColorJitter"),
    *("ConstrainedCoarseDropout", "Defocus", "Downscale", "Emboss", "Equalize", "Erasing", "FDA"),
    *("FancyPCA", "FromFloat", "GaussNoise", "GaussianBlur", "GlassBlur", "GridDropout", "HEStain"),
    *("HistogramMatching", "HueSaturationValue", "ISONoise", "Illumination", "ImageCompression"),
    *("InvertImg", "MaskDropout", "MedianBlur", "MotionBlur", "MultiplicativeNoise", "NoOp"),
    *("Normalize", "PixelDistributionAdaptation", "PixelDropout", "PlanckianJitter"),
    *("PlasmaBrightnessContrast", "PlasmaShadow", "Posterize", "RGBShift"),
    *("RandomBrightnessContrast", "RandomFog", "RandomGamma", "RandomGravel", "RandomRain"),
    *("RandomShadow", "RandomSnow", "RandomSunFlare", "RandomToneCurve", "RingingOvershoot"),
    *("SaltAndPepper", "Sharpen", "ShotNoise", "Solarize", "Spatter", "Superpixels"),
    *("ToFloat", "ToGray", "ToRGB", "ToSepia", "ToTensorV2", "UnsharpMask", "XYMasking"),
    "ZoomBlur",
}

_UNKNOWN = "it is not known whether it moves pixels; if it moves none, name it in `trust`"
_BENT = "its distortion is no homography; use crops, resizes, flips, turns, Affine or Perspective"
_PASTED = "it shows pixels of another place or image; apply it after the views are made"
_REFUSED = {
    **dict.fromkeys(
        (
            *("ElasticTransform", "GridDistortion", "GridElasticDeform", "OpticalDistortion"),
            *("PiecewiseAffine", "ThinPlateSpline"),
        ),
        _BENT,
    ),
    **dict.fromkeys(("Mosaic", "OverlayElements", "RandomGridShuffle", "TextImage"), _PASTED),
    "SelectiveChannelTransform": "it may move some channels and not the others",
    "Morphological": "it grows or shrinks what is seen, to one side for even kernels",
}
