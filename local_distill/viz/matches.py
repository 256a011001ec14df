"""Lines between the tokens that were matched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from local_distill.errors import ShapeError, require_extra
from local_distill.structures import Matches, TokenGrid
from local_distill.viz._drawing import (
    add_dots,
    add_frame,
    add_lines,
    check_sample,
    picture_array,
    show,
    token_points,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Normalize

__all__ = ["Pair", "draw_matches"]

Pair = tuple[int, int]

# The room between the two views of `draw_matches`, in view heights.
GAP = 0.12
_BACKGROUND = "0.13"  # dark: the bright end of the colormap would vanish on white
# The few worst matches would otherwise take the whole colour scale to themselves.
_COST_QUANTILE = 0.98


def draw_matches(
    ax: Axes,
    student_view: Any,
    teacher_view: Any,
    student_grid: TokenGrid,
    teacher_grid: TokenGrid,
    matches: Matches,
    *,
    max_lines: int = 64,
    max_candidates: int = 4,
    norm: Normalize | None = None,
    colorbar: bool = True,
    cost_label: str = "cost",
    student_color: Any = "white",
    teacher_color: Any = "white",
    sample: int = 0,
) -> LineCollection:
    """Draw two views side by side, with lines between the tokens that were matched.

    Lines and student tokens are coloured by the match's cost, those above the 98th percentile
    alike; a line is as opaque as its candidate weighs against the token's heaviest. Unmatched
    student tokens, and teacher tokens that answer nobody, are hollow. Where not all lines fit into
    ``max_lines``, those of every second (third …) row and column of student tokens are drawn; the
    markers always show all tokens.

    Convention: axes coordinates are view pixels over the view's height: both views are 1 high, the
    student's left edge is at x = 0, the teacher's 0.12 to the right of the student's right edge.

    Args:
        ax: where to draw.
        student_view: (3, h, w) uint8, or float in [0, 1], or a PIL image.
        teacher_view: likewise.
        student_grid: the student's s tokens.
        teacher_grid: the teacher's t tokens.
        matches: (b, s, k) of this pair of views.
        max_lines: at most so many lines.
        max_candidates: at most so many lines a token, those of greatest weight.
        norm: from cost to colour; by default it spans the costs of the matched tokens.
        colorbar: whether to add one.
        cost_label: what it says, such as the matcher's unit.
        student_color: the frame around the student's view.
        teacher_color: the frame around the teacher's view.
        sample: which image of batched input to show.

    Returns:
        The lines, which know their costs and colours.

    Raises:
        ShapeError: the matches belong to other grids.
        DataError: pixel values outside [0, 1].

    Example:
        >>> import torch
        >>> from local_distill.viz import new_figure
        >>> grid = TokenGrid.tiling(1, 2, (8, 16))
        >>> matches = Matches(  # token 0 goes to token 1, token 1 has no match
        ...     teacher_index=torch.tensor([[[1], [0]]]),
        ...     weight=torch.tensor([[[1.0], [0.0]]]),
        ...     cost=torch.tensor([[0.3, torch.inf]]),
        ... )
        >>> view = torch.zeros(3, 8, 16)
        >>> lines = draw_matches(new_figure(4, 2).add_subplot(), view, view, grid, grid, matches)
        >>> [segment.tolist() for segment in lines.get_segments()]  # 2 wide, gap 0.12, token 1
        [[[0.5, 0.5], [3.62, 0.5]]]
    """
    colors = require_extra("matplotlib.colors", "train")
    chosen = one_match("matches", matches, student_grid, teacher_grid, sample)
    pictures = [
        picture_array("student_view", student_view, sample),
        picture_array("teacher_view", teacher_view, sample),
    ]
    starts, widths, x = [], [], 0.0
    for picture, frame in zip(pictures, (student_color, teacher_color), strict=True):
        starts.append(x)
        widths.append(picture.shape[1] / picture.shape[0])
        show(ax, picture, (x, x + widths[-1], 1, 0))
        add_frame(ax, x, widths[-1], frame)
        x += widths[-1] + GAP
    ax.set_xlim(-0.02, x - GAP + 0.02)
    ax.set_ylim(1.02, -0.02)
    ax.set_facecolor(_BACKGROUND)

    student_at, teacher_at = (
        token_points(grid) / picture.shape[0] + (start, 0)
        for grid, picture, start in zip((student_grid, teacher_grid), pictures, starts, strict=True)
    )
    matched, cost = chosen.matched[0].numpy(), chosen.cost[0].double().numpy()
    norm = norm or colors.Normalize(*cost_range([cost[matched]]))
    pairs = _choose_lines(chosen, student_grid, max_lines, max_candidates)
    segments = [[student_at[i], teacher_at[j]] for i, j, _ in pairs]
    opacity = [part for *_, part in pairs] or None
    add_lines(ax, segments, linewidths=1.9, colors="black", alpha=opacity)
    by_cost = {"cmap": _cost_colors(), "norm": norm}
    lines = add_lines(
        ax, segments, linewidths=1.1, alpha=opacity, array=[cost[i] for i, *_ in pairs], **by_cost
    )
    answering = np.zeros(teacher_grid.num_tokens, dtype=bool)
    answering[[j for _, j in _all_pairs(chosen)]] = True
    for at, filled, values, picture, grid in (
        (student_at, matched, cost, pictures[0], student_grid),
        (teacher_at, answering, None, pictures[1], teacher_grid),
    ):
        diameter = min(0.3 * min(grid.stride) / picture.shape[0], 0.035)
        add_dots(ax, at[~filled], diameter, facecolors="none", edgecolors="white", linewidths=0.6)
        look = {"facecolors": "white"} if values is None else {"array": values[filled], **by_cost}
        add_dots(ax, at[filled], diameter, edgecolors="black", linewidths=0.4, **look)
    if not matched.any():
        ax.text(
            (x - GAP) / 2, 0.5, "no matches", color="white", ha="center", va="center",
            bbox={"fc": _BACKGROUND, "ec": "white"},
        )  # fmt: skip
    elif colorbar:
        add_colorbar(ax.figure, ax, norm, cost_label, [cost[matched]])
    return lines


def one_match(
    name: str, matches: Matches, student: TokenGrid, teacher: TokenGrid, sample: int
) -> Matches:
    """The matches of one image with batch axis 1, on the CPU, checked against both grids."""
    b, s, _ = matches.weight.shape
    if b != 1:
        check_sample(name, sample, b)
        matches = Matches(*(part[sample : sample + 1] for part in matches))
    matches = Matches(*(part.detach().cpu() for part in matches))
    if s != student.num_tokens:
        raise ShapeError(
            f"`{name}` matches {s} student tokens, but the student's grid has "
            f"{student.rows} × {student.cols} = {student.num_tokens}"
        )
    used = matches.teacher_index[matches.weight > 0]
    if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < teacher.num_tokens:
        raise ShapeError(
            f"`{name}` refers to teacher tokens {int(used.min())} to {int(used.max())}, but the "
            f"teacher's grid has {teacher.rows} × {teacher.cols} = {teacher.num_tokens}"
        )
    return matches


def _all_pairs(matches: Matches) -> list[Pair]:
    token, candidate = matches.weight[0].nonzero(as_tuple=True)
    return list(
        zip(token.tolist(), matches.teacher_index[0, token, candidate].tolist(), strict=True)
    )


def _choose_lines(
    matches: Matches, grid: TokenGrid, max_lines: int, max_candidates: int
) -> list[tuple[int, int, float]]:
    """(student token, teacher token, weight over the token's greatest), at most ``max_lines``."""
    weight = matches.weight[0].double()
    lines = []
    for token in matches.matched[0].nonzero().flatten().tolist():
        order = weight[token].argsort(descending=True, stable=True)[:max_candidates]
        greatest = weight[token, order[0]].item()
        lines.append(
            [
                (
                    token,
                    int(matches.teacher_index[0, token, at]),
                    weight[token, at].item() / greatest,
                )
                for at in order.tolist()
                if weight[token, at] > 0
            ]
        )
    # Thin out by rows and columns alike, so that what stays is still an even grid.
    for step in range(1, max(grid.rows, grid.cols) + 1):
        kept = [
            line
            for token in lines
            for line in token
            if token[0][0] // grid.cols % step == (step - 1) // 2
            and token[0][0] % grid.cols % step == (step - 1) // 2
        ]
        if len(kept) <= max_lines and (kept or not lines):
            return kept
    return [line for token in lines for line in token][:max_lines]


def cost_range(costs: Sequence[np.ndarray]) -> tuple[float, float]:
    finite = np.concatenate([np.zeros(0), *(cost[np.isfinite(cost)] for cost in costs)])
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(np.quantile(finite, _COST_QUANTILE))
    # equal costs up to rounding would be spread over the whole colormap, as if they differed
    return (low, high) if high - low > 1e-6 * max(1.0, abs(high)) else (low - 0.5, low + 0.5)


def _cost_colors() -> Any:
    colors = require_extra("matplotlib.colors", "train")
    table = require_extra("matplotlib", "train").colormaps["viridis"]
    # without its darkest quarter, which cannot be told from shadows
    return colors.ListedColormap(table(np.linspace(0.25, 1, 256)), name="cost")


def add_colorbar(
    figure: Any, axes: Any, norm: Normalize, label: str, costs: Sequence[np.ndarray]
) -> None:
    # of its own, not of the lines: those carry opacities
    mappable = require_extra("matplotlib.cm", "train").ScalarMappable(norm, _cost_colors())
    beyond = any((cost > norm.vmax).any() for cost in costs)
    figure.colorbar(
        mappable, ax=axes, label=label, shrink=0.8, pad=0.01, extend="max" if beyond else "neither"
    )
