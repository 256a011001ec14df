"""Pure maths on crop geometry: where a view's pixels and tokens lie in the source image.

Everything is worked out in float64 where the device has it, and rounded once at the end, so float32
geometry is good to 2⁻²² of the longer source side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from local_distill._check import check_two_numbers, values_visible
from local_distill._precision import widest
from local_distill.errors import GeometryError, ShapeError
from local_distill.structures import CropGeometry, TokenGrid

__all__ = [
    "cell_diagonals",
    "check_geometry",
    "compose",
    "from_box",
    "from_matrix",
    "grid_points",
    "invert",
    "source_valid",
    "to_source",
    "token_centers",
]

Size = tuple[int, int] | Sequence[int] | Tensor


def from_matrix(matrix: Tensor, view_size: Size, source_size: Size) -> CropGeometry:
    """The geometry of a view from its homography.

    Convention: ``matrix`` maps *view* pixels to *source* pixels, in continuous coordinates where
    the centre of the first pixel is 0.5. A library that gives the other direction, or counts from
    pixel centres, has to be turned first (`invert`).

    Args:
        matrix: (…, 3, 3) float32 or float64.
        view_size: (height, width) or an int tensor (…, 2).
        source_size: (height, width) or an int tensor (…, 2).

    Returns:
        The checked `CropGeometry`. An overall factor of the matrix is divided out so that the
        view's middle has a positive third coordinate.

    Raises:
        ShapeError: a shape does not fit.
        GeometryError: half precision, a NaN, a singular matrix, a size below 1.

    Example:
        >>> import torch
        >>> flip = torch.tensor([[-1.0, 0, 32], [0, 1, 0], [0, 0, 1]])
        >>> geometry = from_matrix(flip, view_size=(20, 32), source_size=(20, 32))
        >>> to_source(geometry, torch.tensor([[0.5, 0.5]]))  # first pixel shows the last
        tensor([[31.5000,  0.5000]])
    """
    if not isinstance(matrix, Tensor) or matrix.shape[-2:] != (3, 3):
        got = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ShapeError(f"`matrix` must be a tensor of shape (…, 3, 3), got {got}")
    _check_dtype(matrix)
    batch = matrix.shape[:-2]
    geometry = CropGeometry(
        matrix,
        _size_tensor("view_size", view_size, batch, matrix.device),
        _size_tensor("source_size", source_size, batch, matrix.device),
    )
    check_geometry("matrix", geometry)
    return geometry._replace(matrix=with_middle_in_front(matrix, geometry.view_size))


def from_box(
    box: Sequence[float] | Tensor,
    view_size: Size,
    source_size: Size,
    *,
    hflip: bool | Tensor = False,
    vflip: bool | Tensor = False,
) -> CropGeometry:
    """The geometry of an axis-aligned crop that was resized to the view, and then maybe flipped.

    Convention: ``box`` is (x0, y0, x1, y1) in source pixels, so a crop of the first pixel alone is
    (0, 0, 1, 1). torchvision's ``RandomResizedCrop.get_params`` gives (top, left, height, width):
    that is the box (left, top, left + width, top + height).

    Args:
        box: (…, 4), four numbers or a tensor. It may reach out of the source (padding).
        view_size: (height, width) or an int tensor (…, 2).
        source_size: (height, width) or an int tensor (…, 2).
        hflip: whether the view was mirrored left to right; a bool or a bool tensor (…).
        vflip: whether the view was mirrored top to bottom; a bool or a bool tensor (…).

    Returns:
        `CropGeometry` with a float32 matrix, float64 for a float64 ``box`` tensor.

    Raises:
        ShapeError: a shape does not fit.
        GeometryError: a box without area or turned around, a NaN, a size below 1.

    Example:
        >>> geometry = from_box((10, 0, 30, 20), (40, 40), (20, 60), hflip=True)
        >>> token_centers(geometry, TokenGrid.tiling(1, 2, (40, 40)))
        tensor([[25., 10.],
                [15., 10.]])
    """
    corners = torch.as_tensor(box)
    if corners.dtype in (torch.float16, torch.bfloat16):
        raise GeometryError(f"`box` is {corners.dtype}, which moves tokens by pixels; use float32")
    if corners.dim() == 0 or corners.shape[-1] != 4:
        raise ShapeError(
            f"`box` must have shape (…, 4) as (x0, y0, x1, y1), got {tuple(corners.shape)}"
        )
    dtype = torch.float64 if isinstance(box, Tensor) and box.dtype == torch.float64 else None
    x0, y0, x1, y1 = widest(corners).unbind(-1)
    if values_visible(corners):
        good = (x1 > x0) & (y1 > y0)  # False for NaN as well
        if not bool(good.all()):
            first = corners.reshape(-1, 4)[int((~good).reshape(-1).nonzero()[0, 0])].tolist()
            raise GeometryError(
                f"`box` must be (x0, y0, x1, y1) with x1 > x0 and y1 > y0, got {first}; "
                "for (top, left, height, width) pass (left, top, left + width, top + height)"
            )
    batch = corners.shape[:-1]
    size = _size_tensor("view_size", view_size, batch, corners.device)
    height, width = widest(size).unbind(-1)
    scale_x, scale_y = (x1 - x0) / width, (y1 - y0) / height
    flip_x = torch.as_tensor(hflip, device=corners.device).expand(batch)
    flip_y = torch.as_tensor(vflip, device=corners.device).expand(batch)
    zero, one = torch.zeros_like(x0), torch.ones_like(x0)
    rows = (
        (torch.where(flip_x, -scale_x, scale_x), zero, torch.where(flip_x, x1, x0)),
        (zero, torch.where(flip_y, -scale_y, scale_y), torch.where(flip_y, y1, y0)),
        (zero, zero, one),
    )
    matrix = torch.stack([torch.stack(row, -1) for row in rows], -2)
    return from_matrix(matrix.to(dtype or torch.float32), size, source_size)


def compose(outer: CropGeometry, inner: CropGeometry) -> CropGeometry:
    """The geometry of a view of a view: first ``inner``'s view → its source, then ``outer``.

    Args:
        outer: maps the intermediate image to the source.
        inner: maps the view to the intermediate image; its source size is ``outer``'s view size.

    Returns:
        View of ``inner`` → source of ``outer``.

    Raises:
        GeometryError: the sizes of the intermediate image differ.

    Example:
        >>> crop = from_box((10, 10, 50, 30), (20, 40), (60, 80))
        >>> crop_of_crop = from_box((5, 5, 15, 15), (10, 10), (20, 40))
        >>> compose(crop, crop_of_crop).matrix[..., :2, 2]
        tensor([15., 15.])
    """
    middle, expected = inner.source_size, outer.view_size
    if values_visible(middle, expected) and not bool((middle == expected).all()):
        raise GeometryError(
            f"`inner.source_size` {_sizes(middle)} must equal `outer.view_size` {_sizes(expected)}:"
            " `inner` is a view of `outer`'s view; are the arguments swapped?"
        )
    matrix = widest(outer.matrix) @ widest(inner.matrix)
    dtype = torch.promote_types(outer.matrix.dtype, inner.matrix.dtype)
    batch = matrix.shape[:-2]
    return CropGeometry(
        matrix.to(dtype),
        inner.view_size.expand(*batch, 2),
        outer.source_size.expand(*batch, 2),
    )


def invert(geometry: CropGeometry) -> CropGeometry:
    """The geometry seen from the other side: source pixel → view pixel, with the sizes swapped.

    Example:
        >>> import torch
        >>> crop = from_box((8, 4, 24, 12), (16, 32), (20, 30))
        >>> to_source(invert(crop), torch.tensor([[8.0, 4.0], [24.0, 12.0]]))
        tensor([[ 0.,  0.],
                [32., 16.]])
    """
    check_geometry("geometry", geometry)
    matrix = inverse_matrix(widest(geometry.matrix)).to(geometry.matrix.dtype)
    return CropGeometry(matrix, geometry.source_size, geometry.view_size)


def to_source(geometry: CropGeometry, points: Tensor) -> Tensor:
    """Map view points to source points.

    Args:
        geometry: batched (…).
        points: (…, n, 2) as (x, y) in view pixels.

    Returns:
        (…, n, 2) in source pixels, in the matrix's dtype; NaN beyond the horizon of a perspective.

    Example:
        >>> import torch
        >>> to_source(from_box((2, 0, 4, 2), (4, 4), (8, 8)), torch.tensor([[2.0, 2.0]]))
        tensor([[3., 1.]])
    """
    if points.shape[-1] != 2:
        raise ShapeError(f"`points` must have shape (…, n, 2) as (x, y), got {tuple(points.shape)}")
    return project(widest(geometry.matrix), widest(points)).to(geometry.matrix.dtype)


def token_centers(geometry: CropGeometry, grid: TokenGrid) -> Tensor:
    """Where the token centres lie in the source.

    Args:
        geometry: batched (…).
        grid: the view's tokens.

    Returns:
        (…, rows·cols, 2) as (x, y) in source pixels, row-major, in the matrix's dtype.

    Raises:
        GeometryError: singular, non-finite or half-precision geometry, or a grid that does not fit
            into the view.

    Example:
        >>> crop = from_box((0, 0, 20, 10), (32, 64), (10, 20))
        >>> token_centers(crop, TokenGrid.tiling(1, 2, (32, 64)))
        tensor([[ 5.,  5.],
                [15.,  5.]])
    """
    check_geometry("geometry", geometry, grid)
    return wide_centers(geometry, grid).to(geometry.matrix.dtype)


def cell_diagonals(geometry: CropGeometry, grid: TokenGrid) -> Tensor:
    """How large one token's cell is in the source: √(‖∂x‖² + ‖∂y‖²), the unit of matchers' costs.

    ∂x and ∂y are the source vectors of one token step along a row and along a column, from the
    homography's Jacobian at the token.

    Returns:
        (…, rows·cols) in source pixels, in the matrix's dtype.

    Example:
        >>> crop = from_box((0, 0, 6, 8), view_size=(16, 16), source_size=(8, 6))
        >>> cell_diagonals(crop, TokenGrid.tiling(2, 2, (16, 16)))
        tensor([5., 5., 5., 5.])
    """
    check_geometry("geometry", geometry, grid)
    return wide_diagonals(geometry, grid).to(geometry.matrix.dtype)


def source_valid(geometry: CropGeometry, grid: TokenGrid) -> Tensor:
    """(…, rows·cols) bool: the token's centre lies inside the source, not in padding.

    Example:
        >>> padded = from_box((-10, 0, 10, 10), (32, 64), (10, 20))
        >>> source_valid(padded, TokenGrid.tiling(1, 2, (32, 64)))
        tensor([False,  True])
    """
    check_geometry("geometry", geometry, grid)
    return inside(wide_centers(geometry, grid), geometry.source_size)


def check_geometry(name: str, geometry: CropGeometry, grid: TokenGrid | None = None) -> None:
    """Refuse a geometry that cannot be, naming the argument.

    Shapes and dtypes are always checked; values only where that needs no device sync and no graph
    break. Elsewhere a NaN leads to tokens that are never matched.

    Args:
        name: the argument's name, for the message.
        geometry: what to look at.
        grid: where given, its token centres have to lie inside the view.

    Raises:
        ShapeError: not a `CropGeometry`, or shapes that do not belong together.
        GeometryError: half precision, non-finite, singular, sizes below 1, tokens outside the view.
    """
    if grid is not None:
        check_grid("grid", grid)
    check_geometry_shapes(name, geometry, grid)
    matrix, view_size, source_size = geometry
    if not values_visible(matrix, view_size, source_size) or matrix.numel() == 0:
        return
    sound = sound_matrix(widest(matrix))
    smallest = torch.minimum(view_size, source_size)
    if not bool((sound & (smallest >= 1).all(-1)).all()):
        _refuse_values(name, geometry, sound)
    if grid is not None:
        _check_grid_fits(name, view_size, grid)


def _refuse_values(name: str, geometry: CropGeometry, sound: Tensor) -> None:
    matrix, view_size, source_size = geometry
    for label, size in (("view_size", view_size), ("source_size", source_size)):
        if int(size.min()) < 1:
            raise GeometryError(f"`{name}`: {label} must be at least 1 × 1, got {_sizes(size)}")
    if not bool(matrix.isfinite().all()):
        raise GeometryError(f"`{name}`: the matrix holds NaN or infinity; what made this view?")
    first = int((~sound).reshape(-1).nonzero()[0, 0])
    raise GeometryError(
        f"`{name}`: the matrix is singular, the view would have no area in the source: "
        f"{matrix.reshape(-1, 3, 3)[first].tolist()}"
    )


def check_geometry_shapes(name: str, geometry: CropGeometry, grid: TokenGrid | None) -> None:
    """The part of `check_geometry` that looks at no value."""
    if not isinstance(geometry, CropGeometry):
        raise ShapeError(
            f"`{name}` must be a CropGeometry, got {type(geometry).__name__}; "
            "build one with from_box, from_matrix or a tracking transform"
        )
    matrix, view_size, source_size = geometry
    _check_dtype(matrix)
    batch = tuple(matrix.shape[:-2])
    if (
        matrix.shape[-2:] != (3, 3)
        or tuple(view_size.shape) != (*batch, 2)
        or tuple(source_size.shape) != (*batch, 2)
    ):
        raise ShapeError(
            f"`{name}` must have matrix (…, 3, 3), view_size (…, 2) and source_size (…, 2) with "
            f"the same leading axes, got {tuple(matrix.shape)}, {tuple(view_size.shape)} and "
            f"{tuple(source_size.shape)}"
        )
    if grid is not None and (grid.rows < 0 or grid.cols < 0):
        raise ShapeError(f"`grid` must not have negative rows or columns, got {grid}")


def check_grid(name: str, grid: object) -> None:
    """Refuse what is no `TokenGrid` of numbers: a tuple (rows, cols), or one number for two."""
    if not isinstance(grid, TokenGrid):
        raise ShapeError(
            f"`{name}` must be a TokenGrid or None, got {type(grid).__name__}; where the cells "
            "tile the view: TokenGrid.tiling(rows, cols, view_size)"
        )
    check_two_numbers(f"{name}.stride", grid.stride, "(x, y) in view pixels")
    check_two_numbers(f"{name}.offset", grid.offset, "(x, y) in view pixels")


def _check_grid_fits(name: str, view_size: Tensor, grid: TokenGrid) -> None:
    height, width = view_size.reshape(-1, 2).amin(0).tolist()
    if not grid_fits(grid, height, width):
        last_x, last_y = _last_center(grid)
        raise GeometryError(
            f"`{name}`: the grid's last token is centred at (x, y) = ({last_x}, {last_y}), outside "
            f"the view of (height, width) = ({height}, {width}); is one given as (width, height)?"
        )


def grid_fits(grid: TokenGrid, height: int, width: int) -> bool:
    """Whether the token centres lie in a view of this size, or not much outside."""
    last_x, last_y = _last_center(grid)
    # A backbone whose padding rounds up (ResNet at 97 px) centres its last token past the edge by
    # less than a stride; a grid beyond that belongs to another view, or its sizes are swapped.
    return last_x < width + grid.stride[0] and last_y < height + grid.stride[1]


def _last_center(grid: TokenGrid) -> tuple[float, float]:
    last_x = grid.offset[0] + grid.stride[0] * (grid.cols - 1)
    last_y = grid.offset[1] + grid.stride[1] * (grid.rows - 1)
    return last_x, last_y


def _check_dtype(matrix: Tensor) -> None:
    if matrix.dtype not in (torch.float32, torch.float64):
        raise GeometryError(
            f"`matrix` must be float32 or float64, got {matrix.dtype}: half precision moves tokens "
            "by pixels; keep geometry out of the network and of half-precision casts"
        )


def _size_tensor(
    name: str, size: Size, batch: Sequence[int] | torch.Size, device: torch.device
) -> Tensor:
    values = torch.as_tensor(size, device=device)
    if values.dim() == 0 or values.shape[-1] != 2 or values.is_floating_point():
        raise ShapeError(
            f"`{name}` must be whole numbers (height, width) or an int tensor (…, 2), got {size!r}"
        )
    try:
        # contiguous: an expanded tensor cannot be pinned or shared by a loader's workers
        return values.to(torch.int32).expand(*batch, 2).contiguous()
    except RuntimeError:
        raise ShapeError(
            f"`{name}` has leading axes {tuple(values.shape[:-1])}, wanted {tuple(batch)}"
        ) from None


def _sizes(size: Tensor) -> list[list[int]]:
    unique: list[list[int]] = torch.unique(size.reshape(-1, 2), dim=0).tolist()
    return unique


# What follows works in the dtype it is given and checks nothing; matchers share it.


def grid_points(grid: TokenGrid, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(rows·cols, 2) token centres as (x, y) in view pixels, row-major."""
    xs = grid.offset[0] + grid.stride[0] * torch.arange(grid.cols, device=device, dtype=dtype)
    ys = grid.offset[1] + grid.stride[1] * torch.arange(grid.rows, device=device, dtype=dtype)
    x = xs.expand(grid.rows, -1)
    y = ys[:, None].expand(-1, grid.cols)
    return torch.stack((x, y), -1).reshape(-1, 2)


def project(matrix: Tensor, points: Tensor) -> Tensor:
    """Apply homographies (…, 3, 3) to points (…, n, 2)."""
    x, y = points.unbind(-1)
    m = matrix[..., None]  # (…, 3, 3, 1): broadcasts over the points
    third = m[..., 2, 0, :] * x + m[..., 2, 1, :] * y + m[..., 2, 2, :]
    third = torch.where(third > 0, third, torch.nan)
    first = (m[..., 0, 0, :] * x + m[..., 0, 1, :] * y + m[..., 0, 2, :]) / third
    second = (m[..., 1, 0, :] * x + m[..., 1, 1, :] * y + m[..., 1, 2, :]) / third
    return torch.stack((first, second), -1)


def with_middle_in_front(matrix: Tensor, view_size: Tensor) -> Tensor:
    """(…, 3, 3), each of the sign that gives its view's middle a positive third coordinate."""
    height, width = view_size.to(matrix.dtype).unbind(-1)
    third = (matrix[..., 2, 0] * width + matrix[..., 2, 1] * height) / 2 + matrix[..., 2, 2]
    sign = torch.where(third < 0, -1.0, 1.0).to(matrix.dtype)
    return matrix * sign[..., None, None]


def inverse_matrix(matrix: Tensor) -> Tensor:
    """Inverse of 3 × 3 matrices by cofactors: elementwise, so it batches and never syncs."""
    cofactors = cofactor_matrix(matrix)
    return cofactors.mT / determinant(matrix, cofactors)[..., None, None]


def cofactor_matrix(matrix: Tensor) -> Tensor:
    """(…, 3, 3) cofactors: row i is the cross product of the two rows that follow it in turn."""
    cofactors: Tensor = torch.linalg.cross(matrix.roll(-1, -2), matrix.roll(1, -2), dim=-1)
    return cofactors


def determinant(matrix: Tensor, cofactors: Tensor) -> Tensor:
    """(…) determinants, from the `cofactor_matrix`."""
    return (matrix[..., 0, :] * cofactors[..., 0, :]).sum(-1)


def sound_matrix(matrix: Tensor) -> Tensor:
    """(…) bool: finite and not singular."""
    # Relative to the product of the column lengths, so that a crop of 1 px out of 65,535 passes.
    lengths = matrix[..., :2, :2].square().sum(-2).prod(-1).sqrt()
    area = determinant(matrix, cofactor_matrix(matrix)).abs()
    # Not finite where any entry is not, as all entries are factors of it.
    singular = 1e-7 * lengths * matrix[..., 2, 2].abs().clamp_min(1e-30)
    return (area > singular) & (area < torch.inf)


def wide_centers(geometry: CropGeometry, grid: TokenGrid) -> Tensor:
    """`token_centers`, unchecked and not rounded to the geometry's dtype."""
    matrix = widest(geometry.matrix)
    return project(matrix, grid_points(grid, matrix.device, matrix.dtype))


def wide_diagonals(geometry: CropGeometry, grid: TokenGrid) -> Tensor:
    """`cell_diagonals`, unchecked and not rounded to the geometry's dtype."""
    matrix = widest(geometry.matrix)
    points = grid_points(grid, matrix.device, matrix.dtype)
    source = project(matrix, points)
    third = (matrix[..., 2:, :2] * points).sum(-1) + matrix[..., 2:, 2]
    # Quotient rule: ∂(u/w) = (∂u − (u/w)·∂w) / w, for both source axes and both view axes.
    slope = matrix[..., None, :2, :2] - source[..., None] * matrix[..., None, 2:, :2]
    step = torch.tensor(grid.stride, device=matrix.device, dtype=matrix.dtype)
    steps = slope / third[..., None, None] * step
    return steps.square().sum((-2, -1)).sqrt()


def inside(points: Tensor, source_size: Tensor) -> Tensor:
    """Whether source points (…, n, 2) lie in the closed source rectangle; False for NaN."""
    height, width = source_size.to(points.dtype)[..., None, :].unbind(-1)
    x, y = points.unbind(-1)
    return (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
