"""The geometric match: the teacher token whose centre is nearest in the source."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from local_distill._check import (
    check_positive,
    check_sequence,
    check_view_pairs,
    values_visible,
)
from local_distill._precision import widest
from local_distill.errors import ConfigError, GeometryError
from local_distill.geometry import sound_matrix
from local_distill.kernels.aligned_lattice import aligned_pairs, aligned_views, are_aligned
from local_distill.kernels.lattice import (
    CellMaps,
    LatticeStudents,
    LatticeTeachers,
    cell_maps,
    lattice_students,
    lattice_teachers,
    nearest_on_lattice,
    placed_tokens,
)
from local_distill.kernels.nearest_search import nearest_by_search, search_views
from local_distill.kernels.triton_switch import triton_serves
from local_distill.matching._results import hard_matches, no_matches
from local_distill.matching._view_stacks import (
    StackedPairs,
    StackedViews,
    refuse_bad_values,
    stack_views,
    stacked_part,
)
from local_distill.structures import CropGeometry, Matches, Tokens

__all__ = ["NearestMatcher", "nearest_matches", "nearest_view_matches"]

Pair = tuple[int, int]
Method = Literal["lattice", "search"]
# What one launch of the kernel takes.
_MOST_PAIRS = 65535
# Of every block of p pairs (p, b, s, …) each.
Found = list[Matches]


def nearest_matches(
    student: Tokens,
    teacher: Tokens,
    *,
    max_distance: float | None = 0.5,
    method: Method = "lattice",
) -> Matches:
    """Match each student token to the teacher token whose centre is nearest in the source.

    .. math:: j(i) = argmin_j |p_i - p_j|, cost_i = |p_i - p_{j(i)}| / max(D_i, D_{j(i)})

    with p the centres in source pixels and D the cells' diagonals there (`cell_diagonals`).

    Convention: distances are in *larger cell diagonals*, so that 0.5 means: the centre lies within
    about half a cell of the coarser grid. Ties go to the lowest teacher index.

    Args:
        student: `Tokens` with geometry (b) and grid of s tokens; features are not looked at.
        teacher: `Tokens` with geometry (b) and grid of t tokens.
        max_distance: a token whose nearest lies at or beyond it has no match; None: no limit.
        method: ``"lattice"`` rounds in the teacher's token coordinates and needs no s × t table. It
            serves teacher views whose cell axes are orthogonal in the source: crops, flips, quarter
            turns, similarity transforms. ``"search"`` takes any geometry.

    Returns:
        `Matches` with k = 1 (k = 0 where t = 0). Tokens with centres outside the source are never
        matched and never capture a match.

    Raises:
        ShapeError: no geometry or grid, or batches that differ.
        GeometryError: a singular, non-finite or half-precision geometry; one that the lattice
            cannot serve, where that can be seen without a device sync. Where it can't, the tokens
            concerned stay unmatched: never a wrong match.

    Example:
        >>> import torch
        >>> from local_distill import TokenGrid, from_box
        >>> grid = TokenGrid.tiling(2, 3, view_size=(32, 48))
        >>> one = from_box(torch.tensor([[0.0, 0, 48, 32], [0, 0, 48, 32]]), (32, 48), (32, 64))
        >>> two = from_box(torch.tensor([[16.0, 0, 64, 32], [0, 0, 48, 32]]), (32, 48), (32, 64),
        ...                hflip=torch.tensor([False, True]))
        >>> matches = nearest_matches(Tokens(None, one, grid), Tokens(None, two, grid))
        >>> matches.teacher_index[1, :, 0]  # mirrored
        tensor([2, 1, 0, 5, 4, 3])
        >>> matches.matched[0]  # the first column is not in the second view
        tensor([False,  True,  True, False,  True,  True])

    Source: "Global-Local Self-Distillation" (WACV 2023), its distance-based matching with a hinge.
    """
    return _matches_of_pairs([student], [teacher], [(0, 0)], max_distance, method, numbered=False)[
        0, 0
    ]


def nearest_view_matches(
    student: Sequence[Tokens],
    teacher: Sequence[Tokens],
    pairs: Iterable[Pair],
    *,
    max_distance: float | None = 0.5,
    method: Method = "lattice",
) -> dict[Pair, Matches]:
    """`nearest_matches` of many pairs of views, worked out together.

    What depends on one view alone is done once a view, and all pairs with the same two grids go
    through in one batch: ten views of a DINO step cost little more than one pair.

    Args:
        student: `Tokens` of each student view.
        teacher: `Tokens` of each teacher view. A view whose geometry tensors are the very ones of
            a student view is worked out once for both.
        pairs: (v, q) pairs to match. Views that no pair names are not looked at.
        max_distance: as in `nearest_matches`.
        method: as in `nearest_matches`.

    Returns:
        ``{(v, q): Matches}``, in the order of ``pairs``: to the bit those of `nearest_matches`
        wherever the arithmetic is exact, and within one float32 rounding of them elsewhere.

    Raises:
        ShapeError: as `nearest_matches`, with ``student[v]`` or ``teacher[q]`` named; a pair of
            views that are not there.
        GeometryError: as `nearest_matches`, likewise.

    Example:
        >>> import torch
        >>> from local_distill import TokenGrid, from_box
        >>> boxes = torch.tensor([[0.0, 0, 32, 32], [8, 0, 40, 32]])
        >>> geometry = from_box(boxes, view_size=(32, 32), source_size=(40, 40))
        >>> fine = Tokens(None, geometry, TokenGrid.tiling(4, 4, view_size=(32, 32)))
        >>> coarse = Tokens(None, geometry, TokenGrid.tiling(2, 2, view_size=(32, 32)))
        >>> found = nearest_view_matches([fine, coarse], [fine], [(0, 0), (1, 0)])
        >>> found[1, 0].teacher_index[..., 0]  # between four tokens each: the first of them
        tensor([[ 0,  2,  8, 10],
                [ 0,  2,  8, 10]])
    """
    check_sequence("student", student, "Tokens")
    check_sequence("teacher", teacher, "Tokens")
    pairs = list(dict.fromkeys(pairs))
    check_view_pairs(pairs, len(student), len(teacher))
    return _matches_of_pairs(student, teacher, pairs, max_distance, method, numbered=True)


class NearestMatcher(nn.Module):
    """Module form of `nearest_matches`.

    Args:
        max_distance: limit in larger cell diagonals; a token at or beyond it has no match. None: no
            limit.
        method: ``"lattice"`` or ``"search"``, see `nearest_matches`.

    Raises:
        ConfigError: a limit that is not above 0, an unknown method.

    Example:
        >>> NearestMatcher(max_distance=None)
        NearestMatcher(max_distance=None, method='lattice')
    """

    def __init__(
        self,
        max_distance: float | None = 0.5,
        method: Method = "lattice",
    ) -> None:
        super().__init__()
        if max_distance is not None:
            check_positive("max_distance", max_distance)
        if method not in ("lattice", "search"):
            raise ConfigError(f'`method` must be "lattice" or "search", got {method!r}')
        self.max_distance = max_distance
        self.method: Method = method

    def forward(self, student: Tokens, teacher: Tokens) -> Matches:
        """See `nearest_matches`."""
        return nearest_matches(student, teacher, max_distance=self.max_distance, method=self.method)

    def match_views(
        self, student: Sequence[Tokens], teacher: Sequence[Tokens], pairs: Iterable[Pair]
    ) -> dict[Pair, Matches]:
        """See `nearest_view_matches`."""
        return nearest_view_matches(
            student, teacher, pairs, max_distance=self.max_distance, method=self.method
        )

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"max_distance={self.max_distance}, method={self.method!r}"


def _matches_of_pairs(
    student: Sequence[Tokens],
    teacher: Sequence[Tokens],
    pairs: Sequence[Pair],
    max_distance: float | None,
    method: Method,
    *,
    numbered: bool,
) -> dict[Pair, Matches]:
    if method not in ("lattice", "search"):
        raise ConfigError(f'`method` must be "lattice" or "search", got {method!r}')
    if not pairs:
        return {}
    views = stack_views(student, teacher, pairs, numbered=numbered)
    # Worked out in the widest type, and cut off from the graph.
    matrix, view_size, source_size = views.geometry
    geometry = CropGeometry(widest(matrix.detach()), view_size, source_size)
    full = [group for group in views.groups if min(_num_tokens(views, group)) > 0]
    # Infinity is no cost of a match.
    limit = torch.inf if max_distance is None else max_distance
    if method == "search":
        found = _by_search(views, geometry, full, limit)
    elif _kernel_serves(geometry, full):
        found = _by_kernel(views, geometry, full, limit)
    elif full and values_visible(*geometry) and are_aligned(geometry.matrix):
        found = _on_aligned_lattice(views, geometry, full, limit)
    else:
        found = _on_lattice(views, geometry, full, limit)
    results: dict[Pair, Matches] = {}
    for group in views.groups:
        s, t = _num_tokens(views, group)
        if s and t:
            each = [
                Matches(*parts)
                for block in found.pop(0)
                for parts in zip(*(part.unbind(0) for part in block), strict=True)
            ]
        else:
            like = geometry.matrix.new_empty(0, dtype=group.dtype)
            b = geometry.matrix.shape[1]
            each = [no_matches(b, s, min(1, t), like) for _ in group.pairs]
        results.update(zip(group.pairs, each, strict=True))
    return {pair: results[pair] for pair in pairs}


def _num_tokens(views: StackedViews, group: StackedPairs) -> tuple[int, int]:
    """How many tokens the student and the teacher views have."""
    s, t = (views.stacks[side].grid.num_tokens for side in (group.students, group.teachers))
    return s, t


def _on_lattice(
    views: StackedViews, geometry: CropGeometry, groups: Sequence[StackedPairs], limit: float
) -> list[Found]:
    """The matches of each group on the lattices of its teacher views."""
    maps = cell_maps(geometry.matrix, geometry.source_size, views.grids)
    refuse_bad_values(views, maps.sound)
    student_stacks = {group.students for group in groups}
    teacher_stacks = {group.teachers for group in groups}
    students: dict[int, LatticeStudents] = {}
    teachers: dict[int, LatticeTeachers] = {}
    for number, stack in enumerate(views.stacks):
        if number not in student_stacks | teacher_stacks:
            continue
        part = CellMaps(*(values[..., stack.start : stack.stop, :] for values in maps))
        tokens = placed_tokens(part, stack.grid)
        if number in student_stacks:
            students[number] = lattice_students(part, tokens)
        if number in teacher_stacks:
            teachers[number] = lattice_teachers(part, tokens)
    found = []
    for group in groups:
        lattices, grid = teachers[group.teachers], views.stacks[group.teachers].grid
        _refuse_unserved(lattices, group)
        blocks = nearest_on_lattice(students[group.students], lattices, group.slots, grid)
        found.append(
            [hard_matches(index, cost < limit, cost.to(group.dtype)) for index, cost in blocks]
        )
    return found


def _kernel_serves(geometry: CropGeometry, groups: Sequence[StackedPairs]) -> bool:
    """Whether one launch does all: on a GPU, and weights and costs of one dtype."""
    matrix = geometry.matrix
    return (
        len({group.dtype for group in groups}) == 1
        and matrix.numel() > 0
        and matrix.dtype == torch.float64
        and sum(len(group.pairs) for group in groups) <= _MOST_PAIRS
        and triton_serves(matrix, geometry.source_size)
    )


def _by_kernel(
    views: StackedViews, geometry: CropGeometry, groups: Sequence[StackedPairs], limit: float
) -> list[Found]:
    """As `_on_lattice`, in one launch for all groups."""
    # Only now: it loads Triton.
    from local_distill.kernels.triton_lattice import LatticePair, lattice_matches

    matrix, _, source_size = geometry
    if values_visible(*geometry):
        refuse_bad_values(views, sound_matrix(matrix))
    pairs = []
    for group in groups:
        ours, theirs = views.stacks[group.students], views.stacks[group.teachers]
        pairs += [
            LatticePair(ours.start + v, theirs.start + q, ours.grid, theirs.grid)
            for v, q in group.slots
        ]
    whole = lattice_matches(matrix, source_size, pairs, limit, groups[0].dtype)
    b = matrix.shape[1]
    shapes = [(len(group.pairs), b, _num_tokens(views, group)[0]) for group in groups]
    sizes = [math.prod(shape) for shape in shapes]
    parts = zip(shapes, *(torch.split_with_sizes(values, sizes) for values in whole), strict=True)
    return [
        [Matches(index.view(*shape, 1), weight.view(*shape, 1), cost.view(shape))]
        for shape, index, weight, cost in parts
    ]


def _on_aligned_lattice(
    views: StackedViews, geometry: CropGeometry, groups: Sequence[StackedPairs], limit: float
) -> list[Found]:
    """As `_on_lattice`, where all views are crops and flips: a row and a column at a time."""
    matrix, _, source_size = geometry
    refuse_bad_values(views, matrix.new_ones(matrix.shape[:2], dtype=torch.bool))
    bound = limit * limit or math.ulp(0.0)  # above 0, as the limit is
    starts = [stack.start for stack in views.stacks]
    slots = [
        (starts[group.students] + v, starts[group.teachers] + q)
        for group in groups
        for v, q in group.slots
    ]
    pairs = aligned_pairs(aligned_views(matrix, source_size, views.grids), slots)
    found = []
    start = 0
    for group in groups:
        stop = start + len(group.slots)
        grids = (views.stacks[side].grid for side in (group.students, group.teachers))
        found.append(
            [
                # the root of what is rounded already: half the time
                hard_matches(index, squared < bound, squared.to(group.dtype).sqrt_())
                for index, squared in pairs.blocks(start, stop, *grids)
            ]
        )
        start = stop
    return found


def _refuse_unserved(teachers: LatticeTeachers, group: StackedPairs) -> None:
    """Where values can be seen, name the first image that the lattice cannot serve."""
    good = teachers.orthogonal & teachers.rectangular
    if not values_visible(good) or bool(good.all()):
        return
    for (_, name), (_, slot) in zip(group.names, group.slots, strict=True):
        _refuse_unless(
            teachers.orthogonal[slot],
            name,
            "cell axes are not orthogonal in the source (shear, perspective)",
        )
        _refuse_unless(
            teachers.rectangular[slot],
            name,
            "turned view reaches out of the source, so that its inner tokens form no rectangle",
        )


def _refuse_unless(good: Tensor, name: str, what: str) -> None:
    if not bool(good.all()):
        first = int((~good).nonzero()[0, 0])
        raise GeometryError(
            f"`{name}.geometry` of image {first}: the {what}; the lattice method cannot serve it, "
            'use NearestMatcher(method="search")'
        )


def _by_search(
    views: StackedViews, geometry: CropGeometry, groups: Sequence[StackedPairs], limit: float
) -> list[Found]:
    """The matches of each group by looking at all teacher tokens."""
    refuse_bad_values(views, sound_matrix(geometry.matrix))
    sides = [search_views(stacked_part(stack, geometry), stack.grid) for stack in views.stacks]
    return [
        [
            hard_matches(index, cost < limit, cost.to(group.dtype))
            for index, cost in nearest_by_search(
                sides[group.students], sides[group.teachers], group.slots
            )
        ]
        for group in groups
    ]
