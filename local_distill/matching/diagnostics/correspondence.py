"""How far matches lie from the geometrically true place."""

from __future__ import annotations

import torch
from torch import Tensor

from local_distill._check import Axes, check_positive
from local_distill._geometric_inputs import geometric_inputs
from local_distill.errors import ShapeError
from local_distill.geometry import inside, wide_centers, wide_diagonals
from local_distill.kernels import block_length
from local_distill.matching._match_checks import check_matches, check_targets
from local_distill.matching.diagnostics._means import matched_tokens, mean_of, share
from local_distill.matching.nearest import nearest_matches
from local_distill.structures import Matches, Tokens

__all__ = [
    "correspondence_accuracy",
    "correspondence_error",
    "mean_correspondence_error",
    "reachable_tokens",
]


def correspondence_error(matches: Matches, student: Tokens, teacher: Tokens) -> Tensor:
    r"""How far from each student token's place in the source its matches lie.

    .. math:: e_i = \sum_k w_{ik} d(i, j_{ik}) \big/ \sum_k w_{ik}, \quad
        d(i, j) = |p_i - p_j| / \max(D_i, D_j)

    with p the centres in source pixels and D the cells' diagonals there (`cell_diagonals`).

    Convention: in *larger cell diagonals*, as the cost of `NearestMatcher`, whose matches have
    their cost as error. +inf for a token that has no match, or whose own centre lies outside the
    source: it has no true place. A teacher token in the padding stands where the geometry puts it,
    so that being matched to it is an error like any other; beyond the horizon of a perspective
    nothing stands, and the error is +inf.

    Args:
        matches: student → teacher, (b, s, k), any k.
        student: `Tokens` with geometry (b) and grid of s tokens; features are not looked at.
        teacher: `Tokens` with geometry (b) and grid.

    Returns:
        (b, s), ≥ 0, in the geometry's dtype.

    Raises:
        ShapeError: no geometry or grid, or sizes that do not belong together.
        GeometryError: as `nearest_matches`.

    Example:
        >>> from local_distill import TokenGrid, from_box
        >>> crop = from_box(torch.tensor([[0.0, 0, 6, 8]]), view_size=(16, 16), source_size=(8, 6))
        >>> view = Tokens(None, crop, TokenGrid.tiling(2, 2, view_size=(16, 16)))
        >>> index = torch.tensor([[[0], [0], [0], [0]]])  # cells of 3 × 4 source pixels
        >>> matches = Matches(index, torch.ones(1, 4, 1), torch.zeros(1, 4))
        >>> correspondence_error(matches, view, view)
        tensor([[0.0000, 0.6000, 0.8000, 1.0000]])
    """
    return wide_error(matches, student, teacher).to(geometry_type(student, teacher))


def mean_correspondence_error(
    matches: Matches, student: Tokens, teacher: Tokens, *, threshold: float | None = 0.5
) -> Tensor:
    r"""Mean of `correspondence_error` over the tokens that have one, and a true partner.

    .. math:: \text{mean}\; e_i \text{ over } e_i < \infty, \; i \text{ reachable}

    Convention: only tokens that a geometric matcher could match count (`reachable_tokens`). The
    others' error is the price of crops that do not overlap, which changes from step to step and
    would drown the matcher's. So a perfect matcher stays below ``threshold`` whatever the crops.

    Args:
        matches: student → teacher, (b, s, k), any k.
        student: `Tokens` with geometry (b) and grid of s tokens.
        teacher: `Tokens` with geometry (b) and grid.
        threshold: how near a teacher token has to be, in larger cell diagonals; None: all tokens
            with a finite error count.

    Returns:
        0-d; 0 where no token counts, so look at `MatchDiagnostics.correspondence_tokens` or
        `coverage` beside it.

    Raises:
        ShapeError, GeometryError: as `correspondence_error`.
        ConfigError: a threshold that is not above 0.

    Example:
        >>> from local_distill import TokenGrid, from_box
        >>> crop = from_box(torch.tensor([[0.0, 0, 6, 8]]), view_size=(16, 16), source_size=(8, 6))
        >>> view = Tokens(None, crop, TokenGrid.tiling(2, 2, view_size=(16, 16)))
        >>> matches = Matches(torch.zeros(1, 4, 1).long(), torch.ones(1, 4, 1), torch.zeros(1, 4))
        >>> mean_correspondence_error(matches, view, view)
        tensor(0.6000)
    """
    error = wide_error(matches, student, teacher)
    counts = error.isfinite()
    if threshold is not None:
        counts = counts & reachable_tokens(student, teacher, threshold)
    return mean_of(error, counts).to(geometry_type(student, teacher))


def correspondence_accuracy(
    matches: Matches, student: Tokens, teacher: Tokens, threshold: float = 0.5
) -> Tensor:
    r"""Share of the matched tokens that are matched to the right place.

    .. math:: |\{i \in R: e_i < \text{threshold}\}| / |R|, \quad
        R = \{i \text{ matched and reachable}\}

    Convention: as the percentage of correct key points, with the cell as the measure. Tokens whose
    place the teacher view does not show take no part (`reachable_tokens`, under the same
    threshold), nor do unmatched ones: matchers that choose gain here what they lose in `coverage`.

    Args:
        matches: student → teacher, (b, s, k), any k.
        student: `Tokens` with geometry (b) and grid of s tokens.
        teacher: `Tokens` with geometry (b) and grid.
        threshold: in larger cell diagonals.

    Returns:
        0-d, in [0, 1]; 0 where no token counts.

    Raises:
        ShapeError, GeometryError: as `correspondence_error`.
        ConfigError: a threshold that is not above 0.

    Example:
        >>> from local_distill import TokenGrid, from_box
        >>> crop = from_box(torch.tensor([[0.0, 0, 6, 8]]), view_size=(16, 16), source_size=(8, 6))
        >>> view = Tokens(None, crop, TokenGrid.tiling(2, 2, view_size=(16, 16)))
        >>> matches = Matches(torch.zeros(1, 4, 1).long(), torch.ones(1, 4, 1), torch.zeros(1, 4))
        >>> correspondence_accuracy(matches, view, view)
        tensor(0.2500)
        >>> correspondence_accuracy(matches, view, view, threshold=0.7)
        tensor(0.5000)
    """
    error = wide_error(matches, student, teacher)
    counts = matched_tokens(matches) & reachable_tokens(student, teacher, threshold)
    return share(error < threshold, counts, geometry_type(student, teacher))


def reachable_tokens(student: Tokens, teacher: Tokens, threshold: float = 0.5) -> Tensor:
    """Student tokens whose place the teacher view shows: some teacher token is near enough.

    Nearest in source pixels, then below ``threshold`` larger cell diagonals: exactly what
    ``nearest_matches(..., max_distance=threshold, method="search")`` matches. The search looks at
    all pairs, in blocks, and takes any geometry.

    Args:
        student: `Tokens` with geometry (b) and grid of s tokens.
        teacher: `Tokens` with geometry (b) and grid.
        threshold: in larger cell diagonals.

    Returns:
        (b, s) bool.

    Raises:
        ShapeError, GeometryError: as `nearest_matches`.
        ConfigError: a threshold that is not above 0.

    Example:
        >>> from local_distill import TokenGrid, from_box
        >>> grid = TokenGrid.tiling(1, 4, view_size=(8, 32))
        >>> one = from_box(torch.tensor([[0.0, 0, 32, 8]]), (8, 32), source_size=(8, 48))
        >>> two = from_box(torch.tensor([[16.0, 0, 48, 8]]), (8, 32), source_size=(8, 48))
        >>> reachable_tokens(Tokens(None, one, grid), Tokens(None, two, grid))
        tensor([[False, False,  True,  True]])
    """
    check_positive("threshold", threshold)
    return matched_tokens(
        nearest_matches(student, teacher, max_distance=threshold, method="search")
    )


def wide_error(matches: Matches, student: Tokens, teacher: Tokens) -> Tensor:
    """`correspondence_error` in the widest type, a few student tokens at a time."""
    s_geometry, s_grid, t_geometry, t_grid = geometric_inputs(
        student, teacher, user="a correspondence error"
    )
    axes = Axes()
    matches = check_matches("matches", matches, axes)
    axes.bind("student.geometry.matrix", s_geometry.matrix, "b 3 3")
    b, s, k = matches.weight.shape
    if s_grid.num_tokens != s:
        raise ShapeError(
            f"`matches` are of {s} student tokens but `student.grid` has {s_grid.rows} × "
            f"{s_grid.cols} = {s_grid.num_tokens}: are these the matches of another pair of views?"
        )
    check_targets("matches", matches.teacher_index, t_grid.num_tokens, "`teacher.grid`")
    centers = wide_centers(s_geometry, s_grid).detach()
    source = torch.cat((centers, wide_diagonals(s_geometry, s_grid).detach()[..., None]), -1)
    target = torch.cat(
        (wide_centers(t_geometry, t_grid), wide_diagonals(t_geometry, t_grid)[..., None]), -1
    ).detach()
    # Per candidate: x, y and diagonal, two differences, the distance, the weight and a rest.
    block = block_length(8 * target.element_size() * b * k, target.device)
    if s == 0 or b == 0:
        return source[..., 0]  # empty, (b, s)
    errors = [
        _mean_distance(
            matches.teacher_index[:, start : start + block],
            matches.weight[:, start : start + block],
            source[:, start : start + block],
            target,
        )
        for start in range(0, s, block)
    ]
    placed = inside(centers, s_geometry.source_size)
    return torch.where(placed, torch.cat(errors, 1), torch.inf)


def _mean_distance(index: Tensor, weight: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """(b, n) weighted mean distance in cells from source (b, n, 3) to target[index] (b, n, k)."""
    b, n, _ = index.shape
    # One coordinate at a time, so that the index (often expanded) is never copied.
    x, y, diagonal = (
        part[:, None].expand(b, n, part.shape[1]).gather(2, index) for part in target.unbind(-1)
    )
    own_x, own_y, own_diagonal = source[..., None, :].unbind(-1)
    pixels = ((own_x - x).square() + (own_y - y).square()).sqrt()
    distance = pixels / torch.maximum(own_diagonal, diagonal)
    distance = torch.where(distance.isnan(), torch.inf, distance)
    taken = weight > 0
    weight = torch.where(taken, weight, 0.0).to(distance.dtype)
    total = torch.where(taken, weight * distance, 0.0).sum(-1)
    mass = weight.sum(-1)
    return torch.where(mass > 0, total / mass, torch.inf)


def geometry_type(student: Tokens, teacher: Tokens) -> torch.dtype:
    """The dtype of what is told of two views that have a geometry."""
    assert student.geometry is not None
    assert teacher.geometry is not None
    return torch.promote_types(student.geometry.matrix.dtype, teacher.geometry.matrix.dtype)
