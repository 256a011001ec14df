"""The end of a tracked pipeline: what was tracked, as the geometry of the view that came out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors

from local_distill.errors import GeometryError
from local_distill.geometry import compose
from local_distill.structures import CropGeometry
from local_distill.transforms.geometry_tensor import view_size
from local_distill.transforms.images import image_size
from local_distill.transforms.refusals import check_one_view

__all__ = ["finish_view", "image_shape"]


def image_shape(image: object) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Leading axes and (height, width)."""
    if (
        isinstance(image, Tensor)
        and image.dim() > 3
        and 0 not in image.shape[-3:]
        and (isinstance(image, tv_tensors.Image) or not isinstance(image, tv_tensors.TVTensor))
    ):
        return tuple(image.shape[:-3]), (image.shape[-2], image.shape[-1])
    return (), image_size(image)


def finish_view(
    step: Any, view: Any, batch: tuple[int, ...] = (), geometry: CropGeometry | None = None
) -> CropGeometry:
    """The tracked numbers as `CropGeometry`, on the view's device; `track` and `upgrade` end so.

    Args:
        step: the `GeometryTensor` at the end of the pipeline.
        view: what the pipeline made.
        batch: leading axes of the image that went in.
        geometry: where that image lies in its source, if it is a view itself.

    Raises:
        GeometryError: the view has another size, or other leading axes; there are several views.
    """
    check_one_view(view, "pipeline")
    leading, seen = image_shape(view)
    expected = view_size(step)
    if list(seen) != expected or leading != batch:
        raise GeometryError(
            f"the view is (height, width) = {tuple(seen)} but the tracked geometry says "
            f"{tuple(expected)}: a transform that was vouched for in `trust` moves pixels"
            if leading == batch
            else f"the view has leading axes {leading} but the image had {batch}: a transform that "
            "was vouched for in `trust` changes the batch"
        )
    if geometry is None and not batch:
        made: CropGeometry = step.crop_geometry()
    elif geometry is None:
        made = CropGeometry(
            # whole copies: an expanded tensor can't be pinned or shared by a loader's workers
            *(part.expand(*batch, *part.shape).contiguous() for part in step.crop_geometry())
        )
    else:
        return _continue(geometry, step.crop_geometry(torch.float64))
    return made.to(view.device) if isinstance(view, Tensor) else made


def _continue(geometry: CropGeometry, step: CropGeometry) -> CropGeometry:
    device, dtype = geometry.matrix.device, geometry.matrix.dtype
    # Not all devices have float64; `compose` works in the widest there is.
    whole = compose(geometry, step if device.type == "cpu" else step.to(device))
    return CropGeometry(
        whole.matrix.to(dtype), whole.view_size.contiguous(), whole.source_size.contiguous()
    )
