"""Token footprints: which part of the source each token's cell covers, and what two views share.

Everything is worked out in float64 where the device has it, and rounded once at the end.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from local_distill._check import values_visible
from local_distill._geometric_inputs import geometric_inputs
from local_distill._precision import widest
from local_distill.errors import ConfigError, GeometryError
from local_distill.geometry import check_geometry, grid_points, project
from local_distill.structures import CropGeometry, TokenGrid, Tokens

__all__ = ["footprint_areas", "overlap_area", "token_footprints"]

# Bytes that one block of the clipping's (tokens × teacher tokens) tables may take.
_CLIP_BYTES = 64 * 2**20
# What one pair of tokens takes while it is clipped: rings of 8 corners, their depths and indices.
_BYTES_PER_PAIR = 640
# A crop's rows and columns count as straight while they drift by less than this part of a cell.
_STRAIGHT = 1e-5
# Corners of a cell in view order, in units of half a stride.
_CORNERS = ((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))


def token_footprints(geometry: CropGeometry, grid: TokenGrid) -> Tensor:
    """The quadrilateral in the source that each token's cell covers.

    Corner k of token i is H(c_i + d_k ⊙ stride / 2), with H the view's homography, c_i the token's
    centre in the view and d_k = (−1, −1), (1, −1), (1, 1), (−1, 1).

    Convention: a token's cell is its centre ± half a stride, so that neighbours' cells touch. The
    corners are top-left, top-right, bottom-right, bottom-left *of the view's cell*: in the source
    they run the other way round where the view was mirrored. They are not clipped to the source.

    Args:
        geometry: batched (…).
        grid: the view's tokens.

    Returns:
        (…, rows·cols, 4, 2) as (x, y) in source pixels, in the matrix's dtype. NaN at the corners
        that lie beyond the horizon of a perspective.

    Raises:
        ShapeError: shapes that do not belong together.
        GeometryError: singular, non-finite or half-precision geometry, or a grid that does not fit
            into the view.

    Example:
        >>> from local_distill import TokenGrid, from_box
        >>> crop = from_box((0, 0, 20, 10), (32, 64), (10, 20), hflip=True)
        >>> token_footprints(crop, TokenGrid.tiling(1, 2, (32, 64)))[0]
        tensor([[20.,  0.],
                [10.,  0.],
                [10., 10.],
                [20., 10.]])
    """
    check_geometry("geometry", geometry, grid)
    return wide_footprints(geometry, grid).to(geometry.matrix.dtype)


def footprint_areas(geometry: CropGeometry, grid: TokenGrid) -> Tensor:
    """The area that each token's cell covers in the source, |Σ_k q_k × q_{k+1}| / 2.

    Convention: not clipped to the source.

    Args:
        geometry: batched (…).
        grid: the view's tokens.

    Returns:
        (…, rows·cols) in source px², in the matrix's dtype. +inf for a cell that reaches the
        horizon of a perspective, so that the share of it that anything overlaps is 0.

    Raises:
        ShapeError: shapes that do not belong together.
        GeometryError: as `token_footprints`.

    Example:
        >>> from local_distill import TokenGrid, from_box
        >>> crop = from_box((0, 0, 20, 10), (32, 64), (10, 20))
        >>> footprint_areas(crop, TokenGrid.tiling(1, 2, (32, 64)))
        tensor([100., 100.])
    """
    check_geometry("geometry", geometry, grid)
    areas = signed_area(wide_footprints(geometry, grid)).abs()
    return torch.where(areas.isnan(), torch.inf, areas).to(geometry.matrix.dtype)


def overlap_area(
    student: Tokens, teacher: Tokens, *, method: Literal["clip", "boxes"] = "clip"
) -> Tensor:
    """The area in the source that a student token's and a teacher token's footprints share.

    .. math:: A_{ij} = |Q_i ∩ Q_j|

    with Q the footprints (`token_footprints`), in source px².

    Convention: the footprints are not clipped to the source, so padding that both views show
    counts. No gradient flows through the areas.

    Args:
        student: `Tokens` with geometry (b) and grid of s tokens; features are not looked at.
        teacher: `Tokens` with geometry (b) and grid of t tokens.
        method: ``"clip"`` cuts one convex quadrilateral with the other's four sides and takes any
            geometry. ``"boxes"`` multiplies what columns share by what rows share: much quicker,
            for crops and flips alone.

    Returns:
        (b, s, t), never negative, in the wider of the two matrices' dtypes. Exactly 0 for
        footprints that are apart, and for those that reach the horizon of a perspective.

    Raises:
        ShapeError: no geometry or grid, or batches that differ.
        GeometryError: a singular, non-finite or half-precision geometry, or different sources; one
            that ``"boxes"`` cannot serve, where that can be seen without a device sync. Where it
            can't, that image's areas are 0.
        ConfigError: an unknown method.

    Example:
        >>> from local_distill import TokenGrid, from_box
        >>> grid = TokenGrid.tiling(1, 2, view_size=(16, 32))
        >>> one = from_box(torch.tensor([[0.0, 0, 32, 16]]), (16, 32), (16, 64))
        >>> two = from_box(torch.tensor([[8.0, 0, 40, 16]]), (16, 32), (16, 64))
        >>> overlap_area(Tokens(None, one, grid), Tokens(None, two, grid))
        tensor([[[128.,   0.],
                 [128., 128.]]])

    Source: cutting a polygon side by side is Sutherland and Hodgman's "Reentrant polygon clipping"
    (1974).
    """
    if method not in ("clip", "boxes"):
        raise ConfigError(f'`method` must be "clip" or "boxes", got {method!r}')
    s_geometry, s_grid, t_geometry, t_grid = geometric_inputs(student, teacher, user="overlap_area")
    with torch.no_grad():
        if method == "clip":
            areas = clipped_areas(
                wide_footprints(s_geometry, s_grid), wide_footprints(t_geometry, t_grid)
            )
        else:
            areas = _by_boxes(s_geometry, s_grid, t_geometry, t_grid)
        return areas.to(torch.promote_types(s_geometry.matrix.dtype, t_geometry.matrix.dtype))


# What follows works in the widest dtype and checks no shapes; the overlap matcher shares it.


def wide_footprints(geometry: CropGeometry, grid: TokenGrid) -> Tensor:
    """`token_footprints`, unchecked and not rounded to the geometry's dtype."""
    matrix = widest(geometry.matrix)
    centers = grid_points(grid, matrix.device, matrix.dtype)
    reach = torch.tensor(_CORNERS, device=matrix.device, dtype=matrix.dtype)
    reach = reach * torch.tensor(grid.stride, device=matrix.device, dtype=matrix.dtype) / 2
    corners = centers[:, None] + reach  # (n, 4, 2)
    points = project(matrix, corners.flatten(0, 1))
    return points.reshape(*points.shape[:-2], grid.num_tokens, 4, 2)


def signed_area(quads: Tensor) -> Tensor:
    """(…) of (…, 4, 2), positive where the corners turn from x to y: half the diagonals' cross."""
    one = quads[..., 2, :] - quads[..., 0, :]
    two = quads[..., 3, :] - quads[..., 1, :]
    return (one[..., 0] * two[..., 1] - one[..., 1] * two[..., 0]) / 2


def clipped_areas(student: Tensor, teacher: Tensor) -> Tensor:
    """(b, s, t) of quads (b, s, 4, 2) and (b, t, 4, 2), in blocks of student tokens."""
    b, s = student.shape[:2]
    t = teacher.shape[1]
    if 0 in (b, s, t):
        return student.new_zeros(b, s, t)
    student, s_good = _only_finite(student)
    teacher, t_good = _only_finite(teacher)
    # Counted from the teacher's cell: far from the origin the products below would lose digits.
    middle = teacher.mean(2)
    teacher = teacher - middle[:, :, None]
    way = signed_area(teacher).sign()  # a mirrored view's corners run the other way round
    t_good = t_good & (way != 0)
    block = min(s, max(1, _CLIP_BYTES // (_BYTES_PER_PAIR * b * t)))
    areas = []
    for start in range(0, s, block):
        quads = student[:, start : start + block, None] - middle[:, None, :, None]  # (b, n, t, 4,2)
        x, y = (part.movedim(-1, 0).contiguous() for part in quads.unbind(-1))  # (4, b, n, t)
        good = s_good[:, start : start + block, None] & t_good[:, None]
        for side in range(4):
            from_x, from_y = teacher[:, None, :, side].unbind(-1)
            to_x, to_y = teacher[:, None, :, (side + 1) % 4].unbind(-1)
            depth = (to_x - from_x) * (y - from_y) - (to_y - from_y) * (x - from_x)
            x, y, left = _cut(x, y, depth * way[:, None])
            good = good & left
        areas.append(torch.where(good, _ring_area(x, y), 0.0))
    return torch.cat(areas, 1)


def _only_finite(quads: Tensor) -> tuple[Tensor, Tensor]:
    good = quads.isfinite().all(-1).all(-1)
    return torch.where(good[..., None, None], quads, 0.0), good


def _cut(x: Tensor, y: Tensor, depth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut convex rings of n corners (n, …) with a line each: the n + 1 corners where depth ≥ 0.

    Walking both ways from the deepest corner until one is outside finds the only part that counts.
    Rounding may put corners of a side along the line on either side of it in any order, and a test
    of each corner for itself could then leave a ring open.

    Returns:
        x and y of the corners left, the last ones repeated where there are fewer, and whether any
        corner was inside: where none was, the ring means nothing.
    """
    n = x.shape[0]
    deepest = depth.argmax(0)
    places = torch.arange(n, device=x.device).reshape(n, *[1] * deepest.dim())
    depth = depth.gather(0, (places + deepest) % n)  # now counted from the deepest corner
    outside = (depth < 0).to(torch.uint8)
    whole = outside.sum(0) == 0
    first = torch.where(whole, n, outside.argmax(0))  # the first corner outside, and the last
    last = n - 1 - outside.flip(0).argmax(0)

    def corner(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = (index % n)[None]
        place = (index + deepest) % n
        return x.gather(0, place)[0], y.gather(0, place)[0], depth.gather(0, index)[0]

    def crossing(inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
        (a_x, a_y, a), (b_x, b_y, b) = corner(inner), corner(outer)
        share = torch.where(whole, 0.0, a / (a - b))
        return a_x + share * (b_x - a_x), a_y + share * (b_y - a_y)

    leaving, entering = crossing(first - 1, first), crossing(last + 1, last)
    slots = torch.arange(n + 1, device=x.device).reshape(n + 1, *[1] * deepest.dim())
    kept = (torch.where(slots < first, slots, slots - 1).clamp(min=0) + deepest) % n
    is_leaving = slots == first
    is_entering = (slots > first) & (slots <= last + 1)
    x, y = (
        torch.where(is_leaving, out, torch.where(is_entering, back, part.gather(0, kept)))
        for part, out, back in zip((x, y), leaving, entering, strict=True)
    )
    return x, y, depth[0] >= 0


def _ring_area(x: Tensor, y: Tensor) -> Tensor:
    """(…) area of rings (n, …), by triangles from the first corner."""
    x, y = x[1:] - x[0], y[1:] - y[0]
    return (x[:-1] * y[1:] - x[1:] * y[:-1]).sum(0).abs() / 2


def _by_boxes(
    s_geometry: CropGeometry, s_grid: TokenGrid, t_geometry: CropGeometry, t_grid: TokenGrid
) -> Tensor:
    """(b, s, t) where rows and columns are straight in the source: x and y are shared apart."""
    served = upright_views(
        s_geometry, s_grid, t_geometry, t_grid, use='overlap_area(..., method="clip")'
    )
    along_x = shared_lengths(spans(s_geometry, s_grid, 0), spans(t_geometry, t_grid, 0))
    along_y = shared_lengths(spans(s_geometry, s_grid, 1), spans(t_geometry, t_grid, 1))
    areas = along_y[:, :, None, :, None] * along_x[:, None, :, None, :]
    areas = areas.flatten(3, 4).flatten(1, 2)
    return torch.where(served[:, None, None], areas, 0.0)


def upright_views(
    s_geometry: CropGeometry,
    s_grid: TokenGrid,
    t_geometry: CropGeometry,
    t_grid: TokenGrid,
    *,
    use: str,
) -> Tensor:
    """(b,) whether both views' cells are upright boxes in the source.

    Raises:
        GeometryError: where they are not and that can be seen; the message says what to ``use``.
    """
    served = []
    for name, geometry, grid in (
        ("student", s_geometry, s_grid),
        ("teacher", t_geometry, t_grid),
    ):
        good = _is_upright(widest(geometry.matrix), grid)
        if values_visible(geometry.matrix) and not bool(good.all()):
            raise GeometryError(
                f"`{name}.geometry` of image {int((~good).nonzero()[0, 0])}: the view is turned, "
                "sheared or in perspective, its cells are no upright boxes in the source; use "
                f"{use}"
            )
        served.append(good)
    return served[0] & served[1]


def _is_upright(matrix: Tensor, grid: TokenGrid) -> Tensor:
    """(b,) whether rows run along the source's x axis and columns along its y axis."""
    reach_x = grid.offset[0] + grid.stride[0] * grid.cols
    reach_y = grid.offset[1] + grid.stride[1] * grid.rows
    # How far a row drifts off y over the whole grid, in cells, and a column off x.
    drift_y = (matrix[:, 1, 0] * reach_x / (matrix[:, 1, 1] * grid.stride[1])).abs()
    drift_x = (matrix[:, 0, 1] * reach_y / (matrix[:, 0, 0] * grid.stride[0])).abs()
    bend = (matrix[:, 2, 0].abs() * reach_x + matrix[:, 2, 1].abs() * reach_y) / matrix[:, 2, 2]
    # A bend moves the far cells by that share of the grid.
    bend = bend.abs() * max(grid.cols, grid.rows, 1)
    upright: Tensor = (drift_x < _STRAIGHT) & (drift_y < _STRAIGHT) & (bend < _STRAIGHT)
    return upright


def spans(geometry: CropGeometry, grid: TokenGrid, axis: int) -> tuple[Tensor, Tensor]:
    """(b, n) low and high end in the source of each column (axis 0) or row (axis 1)."""
    matrix = widest(geometry.matrix)
    count = (grid.cols, grid.rows)[axis]
    edges = torch.arange(count + 1, device=matrix.device, dtype=matrix.dtype) - 0.5
    edges = grid.offset[axis] + grid.stride[axis] * edges
    scale = matrix[:, axis, axis] / matrix[:, 2, 2]
    ends = scale[:, None] * edges + (matrix[:, axis, 2] / matrix[:, 2, 2])[:, None]
    return torch.minimum(ends[:, :-1], ends[:, 1:]), torch.maximum(ends[:, :-1], ends[:, 1:])


def shared_lengths(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """(b, s, t) length that intervals share."""
    low = torch.maximum(student[0][:, :, None], teacher[0][:, None])
    high = torch.minimum(student[1][:, :, None], teacher[1][:, None])
    return (high - low).clamp_min(0.0)
