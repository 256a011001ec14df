"""Which transforms `upgrade` lets into a v1 pipeline, and as what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from local_distill.errors import ConfigError, GeometryError
from local_distill.transforms.geometry_kernels import check_interpolation
from local_distill.transforms.refusals import vouch, ways_out
from local_distill.transforms.tracking import track
from local_distill.transforms.transform_classes import COLOUR
from local_distill.transforms.upgrading.photometric_probe import check_moves_nothing
from local_distill.transforms.upgrading.steps import GEOMETRIC, ImageOnly, Moving, quarter_turn
from local_distill.transforms.upgrading.views import inner_pipeline, view_pipelines

__all__ = ["admit", "check_trust", "only_v2"]

_V1_CONTAINERS = (v1.Compose, v1.RandomApply, v1.RandomChoice, v1.RandomOrder, nn.Sequential)
_V2_CONTAINERS = (v2.Compose, v2.RandomApply, v2.RandomChoice, v2.RandomOrder)
_PHOTOMETRIC = (
    *(v1.ColorJitter, v1.ConvertImageDtype, v1.GaussianBlur, v1.Grayscale, v1.Normalize),
    *(v1.PILToTensor, v1.RandomAdjustSharpness, v1.RandomAutocontrast, v1.RandomEqualize),
    *(v1.RandomErasing, v1.RandomGrayscale, v1.RandomInvert, v1.RandomPosterize),
    *(v1.RandomSolarize, v1.ToPILImage, v1.ToTensor, nn.Identity),
)
# What the codebases call their own blurs, colour changes and conversions. The name is a hint, not a
# proof: each is tried on an image before it is let in.
_TRIED = frozenset(
    (
        *("Equalization", "GaussianBlur", "MaybeToTensor", "PILRandomGaussianBlur"),
        *("RandomSolarization", "Solarization", "Solarize", "ToTensor"),
    )
)

_CALLED = ("__call__", "forward")
_SEVERAL = "it returns several views; use CenterCrop or RandomCrop, or v2's with `track`"
# torchvision's own transforms that nobody can vouch for.
_REFUSED = {
    v1.AugMix: f"it shears, rotates and mixes the image without saying how; {COLOUR}",
    v1.AutoAugment: f"it shears and rotates the image without saying how; {COLOUR}",
    v1.ElasticTransform: "its displacement is no homography; use RandomAffine or RandomPerspective",
    v1.FiveCrop: _SEVERAL,
    v1.LinearTransformation: (
        "it mixes all pixels of the image with each other; use Normalize, or vouch for it with "
        "`trust=[LinearTransformation]`"
    ),
    v1.RandAugment: f"it shears and rotates the image without saying how; {COLOUR}",
    v1.TenCrop: _SEVERAL,
    v1.TrivialAugmentWide: f"it shears and rotates the image without saying how; {COLOUR}",
    v2.FiveCrop: _SEVERAL,
    v2.TenCrop: _SEVERAL,
}


def only_v2(transform: Any) -> bool:
    """Whether `track` takes the pipeline, or refuses it in better words."""
    if type(transform) in (*_V2_CONTAINERS, nn.Sequential):
        parts = list(transform.transforms if hasattr(transform, "transforms") else transform)
        return bool(parts) and all(only_v2(part) for part in parts)
    return isinstance(transform, v2.Transform)


def check_trust(trust: Iterable[Any]) -> list[Any]:
    """The entries of ``trust``.

    Raises:
        ConfigError: one is known to move pixels.
    """
    trusted = list(trust)
    for entry in trusted:
        kind = entry if isinstance(entry, type) else type(entry)
        moving = issubclass(kind, (*GEOMETRIC, *_REFUSED)) and kind is not v1.LinearTransformation
        if moving or kind in _V1_CONTAINERS:
            raise ConfigError(
                f"`trust` names {kind.__name__}, which moves pixels or can; trust is for "
                "transforms that only change colours"
            )
    track(v2.Identity(), trust=trusted)  # which refuses the v2 ones that move pixels
    return trusted


def admit(transform: Any, trusted: Sequence[Any]) -> Any:
    """Rebuild a pipeline from steps that take and return ``(geometry, image)``.

    Raises:
        ConfigError: a transform that moves the pixels and not the geometry, or may.
    """
    kind = type(transform)
    if any(entry is transform or entry is kind for entry in trusted):
        return ImageOnly(transform)
    base = _runs_as(transform)
    if base in _V1_CONTAINERS or kind in _V2_CONTAINERS:
        return _container(transform, kind if base is None else base, trusted)
    if base in GEOMETRIC:
        if base in (v1.Resize, v1.RandomResizedCrop):
            try:
                check_interpolation(kind.__name__, transform.interpolation)
            except GeometryError as error:
                raise ConfigError(f"cannot upgrade {kind.__name__}: {error}") from None
        return Moving(transform, GEOMETRIC[base])
    if base in _PHOTOMETRIC:
        return ImageOnly(transform)
    if isinstance(transform, v2.Transform) and kind not in _REFUSED:
        return track(transform).pipeline  # takes and returns (geometry, image), as the steps here
    inner = inner_pipeline(transform)
    if inner is not None:
        return admit(inner, trusted)
    if (kind.__module__, kind.__name__) == ("lightly.transforms.rotation", "RandomRotate"):
        return Moving(transform, quarter_turn)
    if kind.__name__ in _TRIED:
        try:
            check_moves_nothing(transform)
        except GeometryError as error:
            raise ConfigError(
                f"cannot upgrade {kind.__name__}: its name is that of a transform that leaves "
                f"pixels in place, but tried on an image {error}"
            ) from error
        return ImageOnly(transform)
    raise ConfigError(_refusal(transform))


def _runs_as(transform: Any) -> type | None:
    """The v1 class whose code runs when ``transform`` is called, if one does."""
    kind, base = type(transform), _v1_base(transform)
    if base is None or _altered(transform):
        return None
    ours, own = ([getattr(k, name, None) for name in _CALLED] for k in (base, kind))
    return base if ours == own else None


def _v1_base(transform: Any) -> type | None:
    known = (*_V1_CONTAINERS, *GEOMETRIC, *_PHOTOMETRIC)
    return next((base for base in type(transform).__mro__ if base in known), None)


def _altered(transform: Any) -> bool:
    """Whether this very object runs other code than its class says."""
    own = getattr(transform, "__dict__", {})
    hooks = (own.get("_forward_hooks"), own.get("_forward_pre_hooks"))
    return "forward" in own or any(hooks)


def _container(transform: Any, base: type, trusted: Sequence[Any]) -> Any:
    if base is nn.Sequential:
        return v1.Compose([admit(part, trusted) for part in transform])
    # torchvision's own container draws its own numbers; only what stands in it is ours.
    parts = [admit(part, trusted) for part in transform.transforms]
    return base(parts, p=transform.p) if hasattr(transform, "p") else base(parts)


def _refusal(transform: Any) -> str:
    kind = type(transform)
    if isinstance(transform, type):
        name = transform.__name__
        return f"cannot upgrade the class {name}; pass an instance, {name}(…)"
    if isinstance(transform, (list, tuple)):
        return (
            f"cannot upgrade a {kind.__name__} of transforms: wrap it in transforms.Compose([...])"
        )
    # A function is named by itself, an object by its class.
    name = (
        kind.__name__
        if isinstance(transform, nn.Module)
        else getattr(transform, "__name__", kind.__name__)
    )
    for base, reason in _REFUSED.items():
        if isinstance(transform, base):
            return f"cannot upgrade {name}: {reason}"
    if not callable(transform):
        return f"cannot upgrade {name}: it is no transform, as it can't be called"
    if isinstance(transform, v1.Lambda):
        return (
            "cannot upgrade Lambda: what it does can't be seen; if it moves no pixels, vouch for "
            "it with `trust=[…]`, naming the Lambda object"
        )
    if view_pipelines(transform) is not None:
        return (
            f"cannot upgrade {name} inside a pipeline: it makes several views; pass it to upgrade "
            "by itself"
        )
    base = _v1_base(transform)
    if base is not None:
        what = (
            "its `forward` was replaced, or it has hooks"
            if _altered(transform)
            else f"it is a subclass of {base.__name__} with code of its own"
        )
        way_out = f"use {base.__name__} itself" if base in GEOMETRIC else vouch(name)
        return f"cannot upgrade {name}: {what}, which may move pixels in any way; {way_out}"
    return f"cannot upgrade {name}: {ways_out(name, 'upgrade(pipeline)')}"
