"""A tensor that goes through a torchvision v2 pipeline beside the image, recording its geometry.

Its kernels are registered with torchvision when this module is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from local_distill.errors import GeometryError
from local_distill.structures import CropGeometry

__all__ = ["GeometryTensor"]

_LENGTH = 13  # matrix, row-major (9), view (height, width), source (height, width)


class GeometryTensor(tv_tensors.TVTensor):  # type: ignore[misc]
    """View → source homography and both sizes, carried through v2 transforms in float64.

    Everything stands in the thirteen numbers themselves: attributes of a tensor do not survive
    ``clone``, ``to`` or a loader's collate.

    Convention: as in `CropGeometry`, whose three parts it becomes at the end of the pipeline. What
    padding adds lies outside the source, also where it repeats or reflects pixels.

    Example:
        >>> import torch
        >>> from torchvision.transforms.v2 import functional as F
        >>> image, geometry = torch.zeros(3, 20, 30), GeometryTensor.identity(20, 30)
        >>> geometry = F.horizontal_flip(F.crop(geometry, top=5, left=10, height=10, width=20))
        >>> geometry.crop_geometry().matrix
        tensor([[-1.,  0., 30.],
                [ 0.,  1.,  5.],
                [ 0.,  0.,  1.]])
    """

    @classmethod
    def identity(cls, height: int, width: int) -> GeometryTensor:
        """The geometry of an image that nothing has been done to yet."""
        return _wrap((1, 0, 0, 0, 1, 0, 0, 0, 1), (height, width), (height, width))

    def crop_geometry(self, dtype: torch.dtype = torch.float32) -> CropGeometry:
        """What matchers take: the matrix, rounded once to ``dtype``, and int32 sizes.

        Raises:
            GeometryError: the thirteen numbers were cast or reshaped on the way.
        """
        matrix, view_size, source_size = _unwrap(self)
        return CropGeometry(
            torch.tensor(matrix, dtype=dtype).view(3, 3),
            torch.tensor(view_size, dtype=torch.int32),
            torch.tensor(source_size, dtype=torch.int32),
        )

    def as_subclass(self, cls: type[Tensor]) -> Tensor:
        """Stay a GeometryTensor when v2's ``ToPureTensor`` strips the sample's tensors.

        Stripped, it would be passed by in silence by every later flip and crop.
        """
        return self if cls is Tensor else super().as_subclass(cls)


def _wrap(matrix: Sequence[float], view: Sequence[int], source: Sequence[int]) -> GeometryTensor:
    if min(view) < 1:
        raise GeometryError(
            f"the view would be (height, width) = {tuple(view)}: a transform leaves no pixels"
        )
    values = torch.tensor([*matrix, *view, *source], dtype=torch.float64)
    return values.as_subclass(GeometryTensor)


def _unwrap(geometry: Tensor) -> tuple[list[float], list[int], list[int]]:
    if geometry.shape != (_LENGTH,) or geometry.dtype != torch.float64:
        raise GeometryError(
            f"a GeometryTensor holds {_LENGTH} float64 numbers, got shape {tuple(geometry.shape)} "
            f"and {geometry.dtype}: keep it out of casts and collate; a batch has one per image"
        )
    values = geometry.tolist()
    return values[:9], [int(side) for side in values[9:11]], [int(side) for side in values[11:]]


def _extend(geometry: Tensor, step: Sequence[float], view: Sequence[int]) -> GeometryTensor:
    """Append one transform: ``step``, row-major 3 × 3, maps its output pixels to its input."""
    m, _, source = _unwrap(geometry)
    # Plain numbers: at this size torch's dispatch would cost more than the arithmetic.
    product = [
        m[row] * step[col] + m[row + 1] * step[col + 3] + m[row + 2] * step[col + 6]
        for row in (0, 3, 6)
        for col in (0, 1, 2)
    ]
    return _wrap(product, view, source)


def _translate(geometry: Tensor, left: int, top: int, view: Sequence[int]) -> GeometryTensor:
    return _extend(geometry, (1, 0, left, 0, 1, top, 0, 0, 1), view)


def _get_size(geometry: GeometryTensor) -> list[int]:
    return _unwrap(geometry)[1]


def _horizontal_flip(geometry: GeometryTensor) -> GeometryTensor:
    view = _get_size(geometry)
    return _extend(geometry, (-1, 0, view[1], 0, 1, 0, 0, 0, 1), view)


def _vertical_flip(geometry: GeometryTensor) -> GeometryTensor:
    view = _get_size(geometry)
    return _extend(geometry, (1, 0, 0, 0, -1, view[0], 0, 0, 1), view)


def _crop(geometry: GeometryTensor, top: int, left: int, height: int, width: int) -> GeometryTensor:
    return _translate(geometry, left, top, (height, width))


def _pad(geometry: GeometryTensor, padding: int | Sequence[int], **_: Any) -> GeometryTensor:
    sides = [padding] if isinstance(padding, int) else list(padding)
    # v2 takes one number, (left/right, top/bottom) or (left, top, right, bottom).
    left, top, right, bottom = sides * (4 // len(sides))
    height, width = _get_size(geometry)
    return _translate(geometry, -left, -top, (height + top + bottom, width + left + right))


def _center_crop(geometry: GeometryTensor, output_size: int | Sequence[int]) -> GeometryTensor:
    sides = [output_size] if isinstance(output_size, int) else list(output_size)
    wanted = sides * (2 // len(sides))
    top, left = (
        _center_offset(have, want) for have, want in zip(_get_size(geometry), wanted, strict=True)
    )
    return _translate(geometry, left, top, wanted)


def _center_offset(have: int, want: int) -> int:
    # Where the image is too small it is padded first, the smaller half before it; otherwise the
    # middle is rounded half to even.
    return -((want - have) // 2) if want > have else round((have - want) / 2)


def _resize(
    geometry: GeometryTensor,
    size: int | Sequence[int] | None,
    interpolation: Any = InterpolationMode.BILINEAR,
    max_size: int | None = None,
    **_: Any,
) -> GeometryTensor:
    check_interpolation("resize", interpolation)
    height, width = _get_size(geometry)
    if isinstance(size, Sequence) and len(size) == 2 and max_size is None:
        new_height, new_width = size
    else:
        # torchvision's own rule for one side, asked of an image without channels
        probe = F.resize(torch.empty(0, height, width), size, max_size=max_size)
        new_height, new_width = probe.shape[-2:]
    if min(new_height, new_width) < 1:
        raise GeometryError(
            f"resize would turn {height} × {width} pixels into {new_height} × {new_width}"
        )
    step = (width / new_width, 0, 0, 0, height / new_height, 0, 0, 0, 1)
    return _extend(geometry, step, (new_height, new_width))


def _resized_crop(
    geometry: GeometryTensor,
    top: int,
    left: int,
    height: int,
    width: int,
    size: int | Sequence[int],
    interpolation: Any = InterpolationMode.BILINEAR,
    **_: Any,
) -> GeometryTensor:
    return _resize(_crop(geometry, top, left, height, width), size, interpolation)


def check_interpolation(name: str, interpolation: Any) -> None:
    """Refuse the one interpolation whose pixels are not where the sizes say."""
    # torch's "nearest" takes the source pixel at i·scale instead of (i + ½)·scale: a bias of half a
    # step, and on tensors only, which can't be seen from here. 0 is PIL's code for it.
    if interpolation in (InterpolationMode.NEAREST, "nearest", 0):
        raise GeometryError(
            f"`{name}` with interpolation NEAREST shifts tensor images by up to half a source "
            "step; use InterpolationMode.NEAREST_EXACT (the same pixels on PIL images)"
        )


def _refusing(name: str) -> Callable[..., GeometryTensor]:
    def kernel(geometry: GeometryTensor, *_: Any, **__: Any) -> GeometryTensor:
        raise GeometryError(
            f"`{name}` moves pixels in a way that is not tracked, so the geometry would be wrong; "
            "take it out of the pipeline or apply it before tracking begins"
        )

    return kernel


_KERNELS: dict[str, Callable[..., Any]] = {
    "get_size": _get_size,
    "horizontal_flip": _horizontal_flip,
    "vertical_flip": _vertical_flip,
    "crop": _crop,
    "pad": _pad,
    "center_crop": _center_crop,
    "resize": _resize,
    "resized_crop": _resized_crop,
}
# Without a kernel of its own, a transform passes an unknown tensor by in silence.
for _name in ("affine", "rotate", "perspective", "elastic", "five_crop", "ten_crop"):
    _KERNELS[_name] = _refusing(_name)
for _name, _kernel in _KERNELS.items():
    F.register_kernel(getattr(F, _name), GeometryTensor)(_kernel)
