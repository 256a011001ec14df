"""A tensor that goes through a torchvision v2 pipeline beside the image, recording its geometry.

What each transform does to it stands in `geometry_kernels`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torchvision import tv_tensors

from local_distill.errors import GeometryError
from local_distill.geometry import check_geometry, with_middle_in_front
from local_distill.structures import CropGeometry

__all__ = ["GeometryTensor", "PilGeometryTensor", "append_step", "view_size"]

_LENGTH = 13  # matrix, row-major (9), view (height, width), source (height, width)
_Geometry = TypeVar("_Geometry", bound="GeometryTensor")


class GeometryTensor(tv_tensors.TVTensor):  # type: ignore[misc]
    """View → source homography and both sizes, carried through v2 transforms in float64.

    Everything stands in the thirteen numbers themselves: attributes of a tensor do not survive
    ``clone``, ``to`` or a loader's collate. Leading axes hold a batch of geometries whose views
    have one size; a transform then acts on all of them alike.

    Convention: as in `CropGeometry`, whose three parts it becomes at the end of the pipeline. What
    padding or a rotation adds lies outside the source, also where it repeats or reflects pixels.

    Beside a PIL image that is rotated with ``expand``, take a `PilGeometryTensor`.

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
    def identity(cls: type[_Geometry], height: int, width: int) -> _Geometry:
        """The geometry of an image that nothing has been done to yet."""
        return _wrap(cls, (1, 0, 0, 0, 1, 0, 0, 0, 1), (height, width), (height, width))

    @classmethod
    def from_crop_geometry(cls: type[_Geometry], geometry: CropGeometry) -> _Geometry:
        """(…, 13) that goes on from ``geometry``, on its device, which has to have float64.

        Raises:
            ShapeError: not a `CropGeometry`.
            GeometryError: a geometry that cannot be.
        """
        check_geometry("geometry", geometry)
        parts = (geometry.matrix.flatten(-2), geometry.view_size, geometry.source_size)
        values = torch.cat([part.to(torch.float64) for part in parts], -1)
        return values.as_subclass(cls)

    def crop_geometry(self, dtype: torch.dtype = torch.float32) -> CropGeometry:
        """What matchers take: the matrix, rounded once to ``dtype``, and int32 sizes.

        The homography's overall sign is such that the middle of the view has a positive third
        coordinate, as `from_matrix` does it.

        Raises:
            GeometryError: the numbers were cast or reshaped on the way.
        """
        numbers = _unwrap(self)
        if numbers is None:
            return _batched_crop_geometry(_plain(self), dtype)
        matrix, view, source = numbers
        if matrix[6] * view[1] + matrix[7] * view[0] + 2 * matrix[8] < 0:
            matrix = [-value for value in matrix]
        sizes = torch.frombuffer(array("i", (*view, *source)), dtype=torch.int32)
        whole = torch.frombuffer(array("d", matrix), dtype=torch.float64).view(3, 3)
        return CropGeometry(whole.to(dtype), sizes[:2], sizes[2:])

    def as_subclass(self, cls: type[Tensor]) -> Tensor:
        """Stay a GeometryTensor when v2's ``ToPureTensor`` strips the sample's tensors.

        Stripped, it would be passed by in silence by every later flip and crop.
        """
        return self if cls is Tensor else super().as_subclass(cls)


class PilGeometryTensor(GeometryTensor):
    """A `GeometryTensor` beside a PIL image.

    PIL and torchvision's tensors round the size of an expanding rotation differently: where a
    corner falls on a whole number, it may be one pixel more. The numbers don't tell whose image
    goes along, so the type does; `track` looks at the image at every rotation.
    """


def view_size(geometry: Tensor) -> list[int]:
    """(height, width) of the view, or of all views of a batch.

    Raises:
        GeometryError: the views of a batch differ in size, or there are none.
    """
    numbers = _unwrap(geometry)
    if numbers is not None:
        return numbers[1]
    sizes = _plain(geometry)[..., 9:11].reshape(-1, 2)
    if sizes.shape[0] == 0 or not bool((sizes == sizes[0]).all()):
        raise GeometryError(
            f"a batch of geometries beside one batch of images needs one view size, got (height, "
            f"width) = {torch.unique(sizes, dim=0).tolist()}; transform image by image instead"
        )
    return [int(side) for side in sizes[0].tolist()]


def append_step(geometry: _Geometry, step: Sequence[float], view: Sequence[int]) -> _Geometry:
    """Append one transform.

    Args:
        geometry: (…, 13).
        step: row-major 3 × 3, maps the transform's output pixels to its input pixels.
        view: (height, width) of its output.

    Returns:
        (…, 13) of the same class.

    Raises:
        GeometryError: an output without pixels, or a geometry that was cast or reshaped.
    """
    numbers = _unwrap(geometry)
    if numbers is None:
        return _append_to_batch(geometry, step, view)
    m, _, source = numbers
    # Plain numbers: at this size torch's dispatch would cost more than the arithmetic.
    product = [
        m[row] * step[col] + m[row + 1] * step[col + 3] + m[row + 2] * step[col + 6]
        for row in (0, 3, 6)
        for col in (0, 1, 2)
    ]
    return _wrap(type(geometry), product, view, source)


def _append_to_batch(geometry: _Geometry, step: Sequence[float], view: Sequence[int]) -> _Geometry:
    if min(view) < 1:
        raise _no_pixels(view)
    plain = _plain(geometry)
    batch = plain.shape[:-1]
    matrix = plain[..., :9].reshape(*batch, 3, 3) @ plain.new_tensor(step).view(3, 3)
    values = torch.cat(
        (matrix.flatten(-2), plain.new_tensor(view).expand(*batch, 2), plain[..., 11:]), -1
    )
    return values.as_subclass(type(geometry))


def _batched_crop_geometry(plain: Tensor, dtype: torch.dtype) -> CropGeometry:
    whole = plain[..., 9:].to(torch.int32)
    matrix = with_middle_in_front(plain[..., :9].reshape(*plain.shape[:-1], 3, 3), whole[..., :2])
    return CropGeometry(matrix.to(dtype), whole[..., :2].contiguous(), whole[..., 2:].contiguous())


def _wrap(
    cls: type[_Geometry], matrix: Sequence[float], view: Sequence[int], source: Sequence[int]
) -> _Geometry:
    if min(view) < 1:
        raise _no_pixels(view)
    # A typed array, which a tensor takes over as it is: a list it would read number by number.
    numbers = array("d", (*matrix, *view, *source))
    return torch.frombuffer(numbers, dtype=torch.float64).as_subclass(cls)


def _no_pixels(view: Sequence[int]) -> GeometryError:
    return GeometryError(
        f"the view would be (height, width) = {tuple(view)}: a transform leaves no pixels"
    )


def _unwrap(geometry: Tensor) -> tuple[list[float], list[int], list[int]] | None:
    """Matrix, view and source size of one geometry as plain numbers; None for a batch."""
    # Reading a shape, a dtype and a list through the subclass's dispatch would be the dearest part
    # of a step.
    with torch._C.DisableTorchFunctionSubclass():
        if geometry.shape == (_LENGTH,) and geometry.dtype == torch.float64:
            values: list[float] = geometry.tolist()
            return values[:9], [int(s) for s in values[9:11]], [int(s) for s in values[11:]]
    _plain(geometry)  # refuses all but a batch
    return None


def _plain(geometry: Tensor) -> Tensor:
    """The (…, 13) numbers as a pure tensor."""
    if geometry.shape[-1:] != (_LENGTH,) or geometry.dtype != torch.float64:
        raise GeometryError(
            f"a GeometryTensor holds {_LENGTH} float64 numbers, or a batch (…, {_LENGTH}) of them, "
            f"got shape {tuple(geometry.shape)} and {geometry.dtype}: keep it out of casts"
        )
    return Tensor.as_subclass(geometry, Tensor)
