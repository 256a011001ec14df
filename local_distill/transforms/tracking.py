"""Any v2 pipeline, handing on where the view lies beside the view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from local_distill.errors import ConfigError, GeometryError, ShapeError
from local_distill.geometry import check_geometry
from local_distill.structures import CropGeometry
from local_distill.transforms.finished_views import finish_view, image_shape
from local_distill.transforms.geometry_kernels import check_interpolation
from local_distill.transforms.geometry_tensor import GeometryTensor
from local_distill.transforms.pipeline_steps import Sample, TrackedStep, UntrackedStep, VouchedStep
from local_distill.transforms.refusals import vouch, ways_out
from local_distill.transforms.transform_classes import TransformKind, class_entry

__all__ = ["Tracked", "track"]

_RESIZING = ("RandomResize", "RandomResizedCrop", "RandomShortestSize", "Resize", "ScaleJitter")


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
            known = class_entry(kind)
            if known is not None and not known.can_be_trusted and _moves(known.kind):
                raise ConfigError(
                    f"`trust` names {kind.__name__}, which moves pixels; trust is for transforms "
                    "that only change colours"
                )
        self.pipeline: Callable[[Sample], Sample] = _admit(pipeline, trusted)

    def __call__(
        self, image: PIL.Image.Image | Tensor, geometry: CropGeometry | None = None
    ) -> tuple[Any, Any]:
        """Transform one image, or one batch of images with one draw for all, as v2 does.

        Args:
            image: a PIL image or a (…, channels, height, width) tensor.
            geometry: where ``image`` itself lies in its source, if it is a view already: with the
                same leading axes (…) as the image. What is returned then leads back to that
                source, as ``compose(geometry, step)`` does. On a GPU its sizes are not compared
                with the image's, which would wait for the device.

        Returns:
            What the pipeline makes of it, and where that lies in ``image``: float32 matrix (or
            ``geometry``'s dtype), int32 sizes, with the image's leading axes and on its device.
            Behind ``FiveCrop`` or ``TenCrop``: a tuple of views and a tuple of geometries.

        Raises:
            ShapeError: not an image, or ``geometry`` has other leading axes.
            GeometryError: ``geometry`` is of a view of another size, or the pipeline changed the
                image's size in a way that was not tracked.
        """
        batch, (height, width) = image_shape(image)
        if geometry is not None:
            _check_start(geometry, batch, (height, width))
        start = GeometryTensor.identity(height, width)
        step, view = self.pipeline((start, image))
        return view, _finish(step, view, batch, geometry)

    def __repr__(self) -> str:
        return f"Tracked({self.pipeline!r})"


def track(
    pipeline: Callable[..., Any], *, trust: Iterable[type | Callable[..., Any]] = ()
) -> Tracked:
    """Make a torchvision v2 pipeline return where its view lies in the image, beside the view.

    The pixels are the same as without, under the same seed. Crops, resizes, flips, pads, rotations,
    affine and perspective transforms are tracked, however nested in ``Compose``, ``RandomApply``,
    ``RandomChoice`` and ``RandomOrder``. `transform_classes` lists every class and what becomes of
    it. The pipeline is walked once, here; a transform that is not known is refused, subclasses of
    known ones too.

    Convention: outside the source is outside; reflected or repeated padding shows pixels that are
    not where they seem, and their positions lie beyond the image. Padding *after* a crop is not
    told from the image, as its positions lie in the source, where the crop cut it off: pad first.
    The same holds for the corners that a rotation or a perspective fills: they are told from the
    image only where they lie outside the *source*, so rotate first and crop afterwards. Beyond the
    horizon of a strong perspective, positions are NaN.

    Args:
        pipeline: one v2 transform, or a v2 container of them.
        trust: transforms, or classes of transforms, that move no pixels although this package does
            not know them: your own, ``Lambda``, v1 ones. They are shown the image alone; behind
            ``FiveCrop``, one view after the other.

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
        >>> views, geometries = track(v2.FiveCrop(8))(torch.zeros(3, 30, 40))
        >>> [geometry.matrix[:2, 2].tolist() for geometry in geometries]
        [[0.0, 0.0], [32.0, 0.0], [0.0, 22.0], [32.0, 22.0], [16.0, 11.0]]
        >>> track(v2.RandAugment())
        Traceback (most recent call last):
        ...
        local_distill.errors.ConfigError: cannot track RandAugment: it shears and rotates the image
        behind the geometry's back; use ColorJitter, ...

    Deviations: behind ``FiveCrop`` and ``TenCrop``, torchvision transforms only the first of
        several pure tensors; here all views are transformed, of whatever type they are.
    """
    return Tracked(pipeline, trust)


def _check_start(geometry: CropGeometry, batch: tuple[int, ...], size: tuple[int, int]) -> None:
    check_geometry("geometry", geometry)
    axes = tuple(geometry.matrix.shape[:-2])
    if axes != batch:
        raise ShapeError(
            f"`geometry` has leading axes {axes} but `image` has {batch}: one geometry per image; "
            "stack or expand it to the images' batch"
        )
    sizes = geometry.view_size
    if sizes.device.type == "cpu" and not bool((sizes == sizes.new_tensor(size)).all()):
        raise GeometryError(
            f"`geometry` is of views of (height, width) = "
            f"{torch.unique(sizes.reshape(-1, 2), dim=0).tolist()} but `image` is {size}: it has "
            "to say where this very image lies in its source"
        )


def _finish(
    step: Any, view: Any, batch: tuple[int, ...], geometry: CropGeometry | None
) -> CropGeometry | tuple[Any, ...]:
    """`finish_view` of one view or of a tuple of them."""
    if isinstance(view, (tuple, list)) and isinstance(step, tuple):
        return tuple(
            _finish(part, shown, batch, geometry) for part, shown in zip(step, view, strict=True)
        )
    return finish_view(step, view, batch, geometry)


def _admit(transform: Any, trusted: Sequence[Any]) -> Any:
    """Rebuild a pipeline from parts that are known not to lose the geometry."""
    kind = type(transform)
    if any(entry is transform or entry is kind for entry in trusted):
        return VouchedStep(transform)
    if kind is nn.Sequential:
        return v2.Compose([_admit(part, trusted) for part in transform])
    entry = class_entry(kind)
    if entry is None or entry.kind is TransformKind.REFUSED:
        raise ConfigError(_refusal(transform))
    _check_unaltered(transform)
    if entry.kind is TransformKind.CONTAINER:
        parts = [_admit(part, trusted) for part in transform.transforms]
        return kind(parts, p=transform.p) if hasattr(transform, "p") else kind(parts)
    if entry.kind is TransformKind.PHOTOMETRIC:
        return UntrackedStep(transform)
    if kind.__name__ in _RESIZING:
        try:
            check_interpolation(kind.__name__, transform.interpolation)
        except GeometryError as error:
            raise ConfigError(f"cannot track {kind.__name__}: {error}") from None
    return TrackedStep(transform)


def _moves(kind: TransformKind) -> bool:
    return kind in (TransformKind.TRACKED, TransformKind.REFUSED)


def _check_unaltered(transform: nn.Module) -> None:
    """Refuse an object whose methods were replaced, or that runs hooks: it may do anything."""
    name = type(transform).__name__
    replaced = [
        key
        for key, value in vars(transform).items()
        if callable(getattr(type(transform), key, None)) and callable(value)
    ]
    if replaced or transform._forward_hooks or transform._forward_pre_hooks:
        what = f"its `{replaced[0]}` was replaced" if replaced else "it has forward hooks"
        raise ConfigError(
            f"cannot track {name}: {what}, and what that does to the pixels can't be seen; "
            f"{vouch('it')}"
        )


def _refusal(transform: Any) -> str:
    kind = type(transform)
    if isinstance(transform, type):
        return (
            f"cannot track the class {transform.__name__}; pass an instance, "
            f"{transform.__name__}(…)"
        )
    if isinstance(transform, (list, tuple)):
        return f"cannot track a {kind.__name__} of transforms: wrap it in v2.Compose([...])"
    # A function is named by itself, an object by its class.
    name = (
        kind.__name__
        if isinstance(transform, nn.Module)
        else getattr(transform, "__name__", kind.__name__)
    )
    entry = class_entry(kind)
    if entry is not None:
        return f"cannot track {name}: {entry.reason}"
    module = kind.__module__
    if module.startswith("torchvision.transforms.") and ".v2." not in f"{module}.":
        return (
            f"cannot track {name}: it is a torchvision v1 transform, which sees the image alone; "
            f"use torchvision.transforms.v2.{name}, or hand the whole v1 pipeline to "
            "local_distill.upgrade(pipeline), which keeps its pixels"
        )
    base = next((base for base in kind.__mro__[1:] if class_entry(base) is not None), None)
    if base is not None and base is not v2.Transform:
        return (
            f"cannot track {name}: it is a subclass of {base.__name__}, which may override "
            f"anything; use {base.__name__} itself, or {vouch(name)}"
        )
    return f"cannot track {name}: {ways_out(name, 'pipeline')}"
