"""The geometry of many views, checked and stacked: what depends on one view is done once a view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from local_distill._check import Axes, values_visible
from local_distill._geometric_inputs import view_geometry
from local_distill.errors import GeometryError
from local_distill.geometry import check_geometry, grid_fits
from local_distill.structures import CropGeometry, TokenGrid, Tokens

Pair = tuple[int, int]
_Places = dict[int, Pair]  # of a view: which stack, and where in it


class ViewStack(NamedTuple):
    """Views of one grid: those from ``start`` to ``stop`` of all that are stacked."""

    grid: TokenGrid
    start: int
    stop: int


def stacked_part(stack: ViewStack, geometry: CropGeometry) -> CropGeometry:
    """The part of (n, b) geometries that is this stack's."""
    return CropGeometry(*(part[stack.start : stack.stop] for part in geometry))


class StackedPairs(NamedTuple):
    """Pairs of views whose student views have one grid and dtype, and their teacher views one."""

    students: int  # index of the student views' stack
    teachers: int
    dtype: torch.dtype  # of the student views' matrices, and so of weights and costs
    pairs: list[Pair]
    slots: list[Pair]  # of each pair, the places in the two stacks
    names: list[tuple[str, str]]  # of each pair, what messages call the two views


class StackedViews(NamedTuple):
    """All views that take part, in one batch."""

    geometry: CropGeometry  # (n, b), those of one grid side by side
    stacks: list[ViewStack]
    groups: list[StackedPairs]
    names: list[str]  # what messages call each of the views
    grids: list[TokenGrid]  # of each of the views


class _Views:
    """Views of one grid, while they are gathered."""

    def __init__(self, grid: TokenGrid) -> None:
        self.grid = grid
        self.geometries: list[CropGeometry] = []
        self.names: list[str] = []

    def place(self, name: str, geometry: CropGeometry) -> int:
        """Where the view is; one that is there already is not taken in again."""
        for slot, known in enumerate(self.geometries):
            if (
                known.matrix is geometry.matrix
                and known.view_size is geometry.view_size
                and known.source_size is geometry.source_size
            ):
                return slot
        self.geometries.append(geometry)
        self.names.append(name)
        return len(self.geometries) - 1


def stack_views(
    student: Sequence[Tokens],
    teacher: Sequence[Tokens],
    pairs: Sequence[Pair],
    *,
    numbered: bool = True,
) -> StackedViews:
    """Check the shapes of the views that take part, and stack them.

    A view that comes twice, as a student's and a teacher's view with the very same geometry
    tensors, is stacked once. Values are looked at by `refuse_bad_values`, for all views at once.

    Args:
        student: `Tokens` of each student view, with geometry (b) and grid.
        teacher: likewise.
        pairs: (v, q), at least one, each once.
        numbered: whether messages say ``student[3]`` or ``student``.

    Raises:
        ShapeError: no geometry or grid, or batches that differ.
        GeometryError: half precision.
    """
    gathered: list[_Views] = []
    axes = Axes()
    places: tuple[_Places, _Places] = ({}, {})
    for side, (word, views) in enumerate((("student", student), ("teacher", teacher))):
        for view in sorted({pair[side] for pair in pairs}):
            name = _name(word, view, numbered)
            geometry, grid = view_geometry(name, views[view], axes)
            number = _of_grid(gathered, grid)
            places[side][view] = (number, gathered[number].place(name, geometry))
    geometries = [geometry for same in gathered for geometry in same.geometries]
    stacked = CropGeometry(*(torch.stack(parts) for parts in zip(*geometries, strict=True)))
    stacks: list[ViewStack] = []
    for same in gathered:
        start = stacks[-1].stop if stacks else 0
        stacks.append(ViewStack(same.grid, start, start + len(same.geometries)))
    groups = _grouped(pairs, places, student, numbered)
    names = [name for same in gathered for name in same.names]
    grids = [same.grid for same in gathered for _ in same.names]
    return StackedViews(stacked, stacks, groups, names, grids)


def _of_grid(gathered: list[_Views], grid: TokenGrid) -> int:
    # One by one, not in a dict: under torch.compile numbers may be symbols, which have no hash.
    for number, views in enumerate(gathered):
        if views.grid == grid:
            return number
    gathered.append(_Views(grid))
    return len(gathered) - 1


def refuse_bad_values(views: StackedViews, sound: Tensor) -> None:
    """Where values can be seen, refuse what `check_geometry` would, and different source sizes.

    Args:
        views: of `stack_views`.
        sound: bool of (n, b) matrices, whether a matrix is finite and not singular.

    Raises:
        GeometryError: names the view.
    """
    matrix, view_size, source_size = views.geometry
    if not values_visible(matrix, view_size, source_size) or matrix.numel() == 0:
        return
    same = sound.all() & (source_size == source_size[0]).all()
    good = bool(same & (torch.minimum(view_size, source_size) > 0).all())
    smallest = view_size.amin(1).tolist()
    for grid, (height, width) in zip(views.grids, smallest, strict=True):
        good = good and grid_fits(grid, height, width)
    if not good:
        _refuse_by_name(views)


def _refuse_by_name(views: StackedViews) -> None:
    for stack in views.stacks:
        for slot in range(stack.start, stack.stop):
            one = CropGeometry(*(part[slot] for part in views.geometry))
            check_geometry(f"{views.names[slot]}.geometry", one, stack.grid)
    for group in views.groups:
        sizes = [
            stacked_part(stack, views.geometry).source_size
            for stack in (views.stacks[group.students], views.stacks[group.teachers])
        ]
        for (ours, theirs), (v, q) in zip(group.names, group.slots, strict=True):
            if not torch.equal(sizes[0][v], sizes[1][q]):
                raise GeometryError(
                    f"`{ours}.geometry` and `{theirs}.geometry` have different source sizes "
                    f"(height, width), {sizes[0][v].tolist()} and {sizes[1][q].tolist()}: the "
                    "views must show the same images, in the same order"
                )


def _grouped(
    pairs: Sequence[Pair],
    places: tuple[_Places, _Places],
    student: Sequence[Tokens],
    numbered: bool,
) -> list[StackedPairs]:
    groups: list[StackedPairs] = []
    for v, q in pairs:
        (ours, v_slot), (theirs, q_slot) = places[0][v], places[1][q]
        geometry = student[v].geometry
        assert geometry is not None  # checked before
        wanted = (ours, theirs, geometry.matrix.dtype)
        for group in groups:
            # not a slice: torch 2.6 cannot trace one of a NamedTuple
            if (group.students, group.teachers, group.dtype) == wanted:
                break
        else:
            group = StackedPairs(*wanted, [], [], [])
            groups.append(group)
        group.pairs.append((v, q))
        group.slots.append((v_slot, q_slot))
        group.names.append((_name("student", v, numbered), _name("teacher", q, numbered)))
    return groups


def _name(side: str, view: int, numbered: bool) -> str:
    return f"{side}[{view}]" if numbered else side
