"""What `track` does with each public transform class of torchvision v2: the one place that says it.

`transform_table` gives it as Markdown.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from torch import nn
from torchvision.transforms import v2

__all__ = [
    "COLOUR",
    "TRANSFORM_CLASSES",
    "ClassEntry",
    "TransformKind",
    "class_entry",
    "public_classes",
    "transform_table",
]


class TransformKind(enum.Enum):
    """What happens to a transform in a pipeline that is tracked."""

    TRACKED = "tracked"
    """It moves pixels, and the geometry with them."""
    PHOTOMETRIC = "photometric"
    """It leaves every pixel of an image where it is; the geometry is kept away from it."""
    CONTAINER = "container"
    """It is walked, and rebuilt from its parts."""
    REFUSED = "refused"
    """A ``ConfigError`` names it and the way out, before anything runs."""


class ClassEntry(NamedTuple):
    """One row of the table.

    Attributes:
        kind: what `track` does with it.
        reason: why; for a refused one, what is wrong with it and the way out.
        can_be_trusted: a refused one of which a caller may know that it moves no pixels.
    """

    kind: TransformKind
    reason: str
    can_be_trusted: bool = False


_TRACKED, _PHOTOMETRIC = TransformKind.TRACKED, TransformKind.PHOTOMETRIC
_CONTAINER, _REFUSED = TransformKind.CONTAINER, TransformKind.REFUSED

_RESIZE = "any size and filter but NEAREST, which shifts tensor images"
_TURN = "nearest too: half a pixel off at most"
COLOUR = "use ColorJitter, RandomSolarize, RandomPosterize and the like, which only change colours"
_MAGIC = f"it shears and rotates the image behind the geometry's back; {COLOUR}"
_AFTER = "apply it to the batch, after the views are made"
_VOUCH = "if yours moves no pixels, vouch for it with `trust=[it]`"
_BOXES = "changes bounding boxes or key points alone; an image passes by"

# By name: some exist only in newer torchvision, some may go one day.
TRANSFORM_CLASSES: dict[str, ClassEntry] = {
    "AugMix": ClassEntry(_REFUSED, f"it shears, rotates and mixes copies of the image; {COLOUR}"),
    "AutoAugment": ClassEntry(_REFUSED, _MAGIC),
    "CenterCrop": ClassEntry(_TRACKED, "whole pixels, also where it pads"),
    "ClampBoundingBoxes": ClassEntry(_PHOTOMETRIC, _BOXES),
    "ClampKeyPoints": ClassEntry(_PHOTOMETRIC, _BOXES),
    "ColorJitter": ClassEntry(_PHOTOMETRIC, "changes colours"),
    "Compose": ClassEntry(_CONTAINER, "its parts in order"),
    "ConvertBoundingBoxFormat": ClassEntry(_PHOTOMETRIC, _BOXES),
    "ConvertImageDtype": ClassEntry(_PHOTOMETRIC, "changes the dtype"),
    "CutMix": ClassEntry(_REFUSED, f"it pastes pixels of another image; {_AFTER}"),
    "ElasticTransform": ClassEntry(
        _REFUSED,
        "its displacement is no homography; use RandomAffine or RandomPerspective, which are "
        "tracked",
    ),
    "FiveCrop": ClassEntry(_TRACKED, "whole pixels; five views and five geometries"),
    "GaussianBlur": ClassEntry(_PHOTOMETRIC, "smooths about each pixel"),
    "GaussianNoise": ClassEntry(_PHOTOMETRIC, "adds to each pixel"),
    "Grayscale": ClassEntry(_PHOTOMETRIC, "changes colours"),
    "Identity": ClassEntry(_PHOTOMETRIC, "does nothing"),
    "JPEG": ClassEntry(_PHOTOMETRIC, "compresses, within blocks of 8 or 16 px"),
    "Lambda": ClassEntry(_REFUSED, f"what it does can't be seen; {_VOUCH}", can_be_trusted=True),
    "LinearTransformation": ClassEntry(
        _REFUSED,
        f"it mixes all pixels of the image with each other; use Normalize, or {_VOUCH}",
        can_be_trusted=True,
    ),
    "MixUp": ClassEntry(_REFUSED, f"it blends in another image; {_AFTER}"),
    "Normalize": ClassEntry(_PHOTOMETRIC, "changes values"),
    "PILToTensor": ClassEntry(_PHOTOMETRIC, "changes the type"),
    "Pad": ClassEntry(_TRACKED, "whole pixels; what is added lies outside, in every mode"),
    "RGB": ClassEntry(_PHOTOMETRIC, "changes colours"),
    "RandAugment": ClassEntry(_REFUSED, _MAGIC),
    "RandomAdjustSharpness": ClassEntry(_PHOTOMETRIC, "sharpens about each pixel"),
    "RandomAffine": ClassEntry(_TRACKED, f"any angle, shift, scale, shear and centre; {_TURN}"),
    "RandomApply": ClassEntry(_CONTAINER, "all its parts, or none"),
    "RandomAutocontrast": ClassEntry(_PHOTOMETRIC, "changes colours"),
    "RandomChannelPermutation": ClassEntry(_PHOTOMETRIC, "changes colours"),
    "RandomChoice": ClassEntry(_CONTAINER, "one of its parts"),
    "RandomCrop": ClassEntry(_TRACKED, "whole pixels, also where it pads"),
    "RandomEqualize": ClassEntry(_PHOTOMETRIC, "changes colours"),
    "RandomErasing": ClassEntry(_PHOTOMETRIC, "overwrites pixels, moves none"),
    "RandomGrayscale": ClassEntry(_PHOTOMETRIC, "changes colours"),
    "RandomHorizontalFlip": ClassEntry(_TRACKED, "whole pixels"),
    "RandomInvert": ClassEntry(_PHOTOMETRIC, "changes colours"),
    "RandomIoUCrop": ClassEntry(_REFUSED, "it needs bounding boxes; use RandomResizedCrop"),
    "RandomOrder": ClassEntry(_CONTAINER, "its parts in any order"),
    "RandomPerspective": ClassEntry(_TRACKED, f"a homography; {_TURN}"),
    "RandomPhotometricDistort": ClassEntry(_PHOTOMETRIC, "changes colours"),
    "RandomPosterize": ClassEntry(_PHOTOMETRIC, "changes colours"),
    "RandomResize": ClassEntry(_TRACKED, _RESIZE),
    "RandomResizedCrop": ClassEntry(_TRACKED, _RESIZE),
    "RandomRotation": ClassEntry(
        _TRACKED, f"any angle and centre, with or without expand; {_TURN}"
    ),
    "RandomShortestSize": ClassEntry(_TRACKED, _RESIZE),
    "RandomSolarize": ClassEntry(_PHOTOMETRIC, "changes colours"),
    "RandomVerticalFlip": ClassEntry(_TRACKED, "whole pixels"),
    "RandomZoomOut": ClassEntry(_TRACKED, "whole pixels; what is added lies outside"),
    "Resize": ClassEntry(_TRACKED, _RESIZE),
    "SanitizeBoundingBoxes": ClassEntry(
        _REFUSED, "it needs bounding boxes; take it out, only an image is carried here"
    ),
    "SanitizeKeyPoints": ClassEntry(
        _REFUSED, "it needs key points; take it out, only an image is carried here"
    ),
    "ScaleJitter": ClassEntry(_TRACKED, _RESIZE),
    "SetClampingMode": ClassEntry(_PHOTOMETRIC, _BOXES),
    "TenCrop": ClassEntry(_TRACKED, "whole pixels; ten views and ten geometries"),
    "ToDtype": ClassEntry(_PHOTOMETRIC, "changes the dtype"),
    "ToImage": ClassEntry(_PHOTOMETRIC, "changes the type"),
    "ToPILImage": ClassEntry(_PHOTOMETRIC, "changes the type"),
    "ToPureTensor": ClassEntry(_PHOTOMETRIC, "changes the type"),
    "ToTensor": ClassEntry(_PHOTOMETRIC, "changes the type and the dtype"),
    "Transform": ClassEntry(
        _REFUSED,
        f"it is the base class, which does nothing itself; use Identity, or {_VOUCH}",
        True,
    ),
    "TrivialAugmentWide": ClassEntry(_REFUSED, _MAGIC),
    "UniformTemporalSubsample": ClassEntry(
        _REFUSED,
        "it drops images of a batch as if they were frames; take frames before tracking begins",
    ),
}


def class_entry(kind: type) -> ClassEntry | None:
    """The row of a class, None for what is no transform class of torchvision v2 or not placed.

    A subclass has none, whatever its base: it may override anything.

    Example:
        >>> class_entry(v2.Resize).kind
        <TransformKind.TRACKED: 'tracked'>
        >>> class_entry(type("Mine", (v2.Resize,), {})) is None
        True
    """
    name = kind.__name__
    return TRANSFORM_CLASSES.get(name) if getattr(v2, name, None) is kind else None


def public_classes() -> dict[str, type]:
    """Every transform class that the installed ``torchvision.transforms.v2`` exports, by name."""
    return {
        name: value
        for name, value in sorted(vars(v2).items())
        if not name.startswith("_") and isinstance(value, type) and issubclass(value, nn.Module)
    }


def transform_table() -> str:
    """The table as Markdown, with the classes that the installed torchvision lacks.

    Example:
        >>> print(transform_table().splitlines()[2])
        | `AugMix` | refused | it shears, rotates and mixes copies of the image; use ...
    """
    rows = ["| torchvision v2 | in `track` | why, and the way out |", "|---|---|---|"]
    for name, entry in sorted(TRANSFORM_CLASSES.items(), key=lambda item: item[0].lower()):
        rows.append(f"| `{name}` | {entry.kind.value} | {entry.reason} |")
    return "\n".join(rows)
