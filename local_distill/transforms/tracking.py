"""Any v2 pipeline, handing on where the view lies beside the view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import PIL.Image
from torch import Tensor, nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from local_distill.errors import ConfigError, GeometryError
from local_distill.structures import CropGeometry
from local_distill.transforms.geometry_tensor import GeometryTensor, check_interpolation
from local_distill.transforms.images import image_size

__all__ = ["Tracked", "track"]


def _classes(*names: str) -> frozenset[type]:
    # by name: some exist only in newer torchvision
    return frozenset(getattr(v2, name) for name in names if hasattr(v2, name))


_TRACKED = _classes(
    *("CenterCrop", "Pad", "RandomCrop", "RandomHorizontalFlip", "RandomResize"),
    *("RandomResizedCrop", "RandomShortestSize", "RandomVerticalFlip", "RandomZoomOut"),
    *("Resize", "ScaleJitter"),
)
_PHOTOMETRIC = _classes(
    *("ClampBoundingBoxes", "ColorJitter", "ConvertImageDtype", "GaussianBlur", "GaussianNoise"),
    *("Grayscale", "Identity", "JPEG", "Normalize", "PILToTensor", "RGB", "RandomAdjustSharpness"),
    *("RandomAutocontrast", "RandomChannelPermutation", "RandomEqualize", "RandomErasing"),
    *("RandomGrayscale", "RandomInvert", "RandomPhotometricDistort", "RandomPosterize"),
    *("RandomSolarize", "ToDtype", "ToImage", "ToPILImage", "ToPureTensor", "ToTensor"),
)

_COLOUR = "use ColorJitter, RandomSolarize, RandomPosterize and the like, which only change colours"
_LATER = "use crops, resizes, flips and pads, which are tracked"
# torchvision's own transforms that are known to move pixels: nobody can vouch for these.
_MOVING = {
    "AugMix": f"it shears, rotates and mixes the image behind the geometry's back; {_COLOUR}",
    "AutoAugment": f"it shears and rotates the image behind the geometry's back; {_COLOUR}",
    "RandAugment": f"it shears and rotates the image behind the geometry's back; {_COLOUR}",
    "TrivialAugmentWide": f"it shears and rotates the image behind the geometry's back; {_COLOUR}",
    "CutMix": "it pastes pixels of another image; apply it to the batch, after the views are made",
    "MixUp": "it blends in another image; apply it to the batch, after the views are made",
    "ElasticTransform": f"its displacement is no homography; {_LATER}",
    "FiveCrop": f"it returns several views; {_LATER}, once per view",
    "TenCrop": f"it returns several views; {_LATER}, once per view",
    "RandomAffine": f"it is not tracked; {_LATER}",
    "RandomIoUCrop": "it needs bounding boxes; use RandomResizedCrop",
    "RandomPerspective": f"it is not tracked; {_LATER}",
    "RandomRotation": f"it is not tracked; {_LATER}",
}
_VOUCH = "if it moves no pixels, vouch for it with `trust=[{name}]`"


class _ImageOnly(nn.Module):
    """A transform that the caller vouched for: shown the image, and nothing else."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, sample: tuple[GeometryTensor, Any]) -> tuple[GeometryTensor, Any]:
        geometry, image = sample
        return geometry, self.transform(image)


class Tracked:
    """What `track` returns: image → (view, `CropGeometry`).

    Attributes:
        pipeline: the pipeline that runs, for printing.
    """

    def __init__(
        self, pipeline: Callable[..., Any], trust: Iterable[type | Callable[..., Any]] = ()
    ) -> None:
        trusted = list(trust)
        for entry in trusted:
            kind = entry if isinstance(entry, type) else type(entry)
            if kind in _TRACKED or kind in _classes(*_MOVING):
                raise ConfigError(
                    f"`trust` names {kind.__name__}, which moves pixels; trust is for transforms "
                    "that only change colours"
                )
        self.pipeline: Callable[[tuple[Tensor, Any]], tuple[Tensor, Any]] = _admit(
            pipeline, trusted
        )

    def __call__(self, image: PIL.Image.Image | Tensor) -> tuple[Any, CropGeometry]:
        """Transform one image.

        Args:
            image: a PIL image or a (channels, height, width) tensor.

        Returns:
            What the pipeline makes of it, and where that lies in ``image``: float32 matrix, int32
            sizes.

        Raises:
            ShapeError: not one image.
            GeometryError: the pipeline changed the image's size in a way that was not tracked.
        """
        height, width = image_size(image)
        # The geometry goes first: what it refuses is then said in its words, not torch's.
        geometry, view = self.pipeline((GeometryTensor.identity(height, width), image))
        if not isinstance(geometry, GeometryTensor):
            raise GeometryError(
                f"the pipeline turned the geometry into a {type(geometry).__name__}; "
                "a transform in it treats every tensor as an image"
            )
        seen, expected = list(image_size(view)), F.get_size(geometry)
        if seen != expected:
            raise GeometryError(
                f"the view is (height, width) = {tuple(seen)} but the tracked geometry says "
                f"{tuple(expected)}: a transform that was vouched for in `trust` moves pixels"
            )
        return view, geometry.crop_geometry()

    def __repr__(self) -> str:
        return f"Tracked({self.pipeline!r})"


def track(
    pipeline: Callable[..., Any], *, trust: Iterable[type | Callable[..., Any]] = ()
) -> Tracked:
    """Make a torchvision v2 pipeline return where its view lies in the image, beside the view.

    The pixels are the same as without, under the same seed. Crops, resizes, flips and pads are
    tracked, however nested in ``Compose``, ``RandomApply``, ``RandomChoice`` and ``RandomOrder``.

    Convention: outside the source is outside; reflected or repeated padding shows pixels that are
    not where they seem, and their positions lie beyond the image. Padding *after* a crop is not
    told from the image, as its positions lie in the source, where the crop cut it off: pad first.

    Args:
        pipeline: one v2 transform, or a v2 container of them.
        trust: transforms, or classes of transforms, that move no pixels although this package does
            not know them: your own, ``Lambda``, v1 ones. They are shown the image alone.

    Returns:
        A callable from an image to ``(view, CropGeometry)``; it can be pickled for loader workers.

    Raises:
        ConfigError: a transform that would move the pixels and not the geometry, or might.

    Example:
        >>> import torch
        >>> from torchvision.transforms import v2
        >>> tracked = track(v2.Compose([v2.CenterCrop((10, 20)), v2.Resize((5, 5)), v2.ToImage()]))
        >>> view, geometry = tracked(torch.zeros(3, 30, 40))
        >>> geometry.matrix
        tensor([[ 4.,  0., 10.],
                [ 0.,  2., 10.],
                [ 0.,  0.,  1.]])
        >>> track(v2.RandAugment())
        Traceback (most recent call last):
        ...
        local_distill.errors.ConfigError: cannot track RandAugment: it shears and rotates the image
        behind the geometry's back; use ColorJitter, ...
    """
    return Tracked(pipeline, trust)


def _admit(transform: Any, trusted: Sequence[Any]) -> Any:
    """Rebuild a pipeline from parts that are known not to lose the geometry."""
    kind = type(transform)
    if any(entry is transform or entry is kind for entry in trusted):
        return _ImageOnly(transform)
    if kind in (v2.Compose, v2.RandomApply, v2.RandomChoice, v2.RandomOrder):
        parts = [_admit(part, trusted) for part in transform.transforms]
        if kind in (v2.RandomApply, v2.RandomChoice):
            return kind(parts, p=transform.p)
        return kind(parts)
    if kind is nn.Sequential:
        return v2.Compose([_admit(part, trusted) for part in transform])
    if kind in _TRACKED:
        try:
            check_interpolation(kind.__name__, getattr(transform, "interpolation", None))
        except GeometryError as error:
            raise ConfigError(f"cannot track {kind.__name__}: {error}") from None
        return transform
    if kind in _PHOTOMETRIC:
        return transform
    raise ConfigError(_refusal(transform))


def _refusal(transform: Any) -> str:
    kind = type(transform)
    if isinstance(transform, type):
        return (
            f"cannot track the class {transform.__name__}; pass an instance, "
            f"{transform.__name__}(…)"
        )
    # A function is named by itself, an object by its class.
    name = (
        kind.__name__
        if isinstance(transform, nn.Module)
        else getattr(transform, "__name__", kind.__name__)
    )
    if kind in _classes(*_MOVING):
        return f"cannot track {name}: {_MOVING[name]}"
    module = kind.__module__
    if module.startswith("torchvision.transforms.") and ".v2." not in f"{module}.":
        return (
            f"cannot track {name}: it is a torchvision v1 transform, which sees the image alone; "
            f"use torchvision.transforms.v2.{name}"
        )
    if kind is v2.Lambda:
        return f"cannot track Lambda: what it does can't be seen; {_VOUCH.format(name='it')}"
    return (
        f"cannot track {name}: it is not known whether it moves pixels; {_VOUCH.format(name=name)}"
    )
