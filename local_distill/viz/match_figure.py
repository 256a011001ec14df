"""The whole way from an image to its matches on one page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from local_distill.errors import DataError, ShapeError, require_extra
from local_distill.structures import CropGeometry, Matches, TokenGrid
from local_distill.viz._drawing import check_count, picture_array
from local_distill.viz.figures import new_figure, view_colors
from local_distill.viz.matches import (
    GAP,
    Pair,
    add_colorbar,
    cost_range,
    draw_matches,
    one_match,
)
from local_distill.viz.views import draw_tokens, draw_views

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["match_figure"]


def match_figure(
    image: Any,
    views: Sequence[Any],
    geometries: Sequence[CropGeometry],
    grids: Sequence[TokenGrid],
    named_matches: Mapping[str, Mapping[Pair, Matches]],
    *,
    pairs: Sequence[Pair] | None = None,
    cost_labels: Mapping[str, str] | None = None,
    max_lines: int = 64,
    sample: int = 0,
) -> Figure:
    """The whole way from an image to its matches on one page.

    On top the source with the outlines of its views, beside it the views with their tokens; below
    the matches of a few pairs of views, one row a pair and one column a matcher. A matcher's
    column has one colour scale.

    Args:
        image: the source: (3, h, w) uint8, or float in [0, 1], or a PIL image.
        views: one picture per view, not normalised (see `denormalize`).
        geometries: one per view.
        grids: one per view.
        named_matches: for each matcher's name what `match_views` returned.
        pairs: (student view, teacher view) to show. By default one pair of teacher views, and the
            pair of a view that the teacher does not see and a view that it sees with most matches.
        cost_labels: for each matcher's name what its cost measures.
        max_lines: at most so many lines in one panel.
        sample: which image of batched input to show.

    Returns:
        The figure; write it with ``figure.savefig("matches.png", dpi=150)``.

    Raises:
        ShapeError: as many views, geometries and grids were not given, or matches of other grids.
        GeometryError: a geometry that cannot be.
        DataError: pixel values outside [0, 1], or a pair that a matcher has no matches for.

    Example:
        >>> import torch
        >>> from local_distill import from_box
        >>> grid = TokenGrid.tiling(2, 2, (8, 8))
        >>> crops = [from_box((0, 0, 8, 8), (8, 8), (8, 8)) for _ in range(2)]
        >>> same = Matches.identity(torch.ones(1, 4))
        >>> figure = match_figure(
        ...     torch.zeros(3, 8, 8), [torch.zeros(3, 8, 8)] * 2, crops, [grid] * 2,
        ...     {"geometric": {(0, 1): same, (1, 0): same}},
        ... )
        >>> [ax.get_title() for ax in figure.axes if "→" in ax.get_title()]
        ['geometric: view 0 → view 1, 4 of 4 tokens matched']
    """
    if not views:
        raise ShapeError("`views` is empty; give at least one view")
    check_count("geometries", geometries, len(views))
    check_count("grids", grids, len(views))
    names = list(named_matches)
    shown = _default_pairs(named_matches, sample) if pairs is None else list(pairs)
    shown = shown if names else []
    _check_pairs(shown, len(views))
    colors = view_colors(len(views))
    pictures = [picture_array(f"views[{v}]", view, sample) for v, view in enumerate(views)]
    column = 6.4
    panels = [
        sum(pictures[view].shape[1] / pictures[view].shape[0] for view in pair) + GAP
        for pair in shown
    ]
    # each row as high as its panels' proportions ask for, within reason
    heights = [min(max((column - 0.9) / panel, 1.2), 4.5) + 0.45 for panel in panels]
    top = 4.4
    width = column * max(len(names), 1) if len(names) != 1 else 1.6 * column
    figure = new_figure(width, top + sum(heights))
    ratios = [top, sum(heights)] if shown else [top]
    bands = figure.subfigures(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
    _draw_top(bands[0], image, pictures, geometries, grids, colors, sample)
    if len(ratios) == 1:
        return figure
    axes = bands[1].subplots(len(shown), len(names), squeeze=False, height_ratios=heights)
    for panel, name in zip(axes.T, names, strict=True):
        _draw_matcher(
            bands[1], panel, name, named_matches[name], shown, pictures, grids, colors,
            (cost_labels or {}).get(name, "cost"), max_lines, sample,
        )  # fmt: skip
    return figure


def _draw_top(
    band: Any,
    image: Any,
    pictures: Sequence[np.ndarray],
    geometries: Sequence[CropGeometry],
    grids: Sequence[TokenGrid],
    colors: Sequence[Any],
    sample: int,
) -> None:
    left, right = band.subfigures(1, 2, width_ratios=(1, 1.3))
    ax = left.subplots()
    draw_views(ax, image, geometries, colors=colors, sample=sample)
    ax.set_title("source; the arrow is a view's top edge", fontsize=9)
    rows = max(1, round(math.sqrt(len(pictures) / 2.2)))
    tiles = right.subplots(rows, math.ceil(len(pictures) / rows), squeeze=False).ravel()
    for tile in tiles:
        tile.set_axis_off()
    for view, tile in zip(range(len(pictures)), tiles, strict=False):
        tile.set_axis_on()
        draw_tokens(tile, pictures[view], grids[view], color=colors[view])
        height, width = pictures[view].shape[:2]
        grid = grids[view]
        tile.set_title(f"{view}: {height}×{width} px\n{grid.rows}×{grid.cols} tokens", fontsize=7.5)


def _draw_matcher(
    band: Any,
    panel: Sequence[Axes],
    name: str,
    matches: Mapping[Pair, Matches],
    pairs: Sequence[Pair],
    pictures: Sequence[np.ndarray],
    grids: Sequence[TokenGrid],
    colors: Sequence[Any],
    cost_label: str,
    max_lines: int,
    sample: int,
) -> None:
    chosen = []
    for pair in pairs:
        if pair not in matches:
            raise DataError(f"`named_matches[{name!r}]` has no pair {pair}; it has {list(matches)}")
        v, q = pair
        label = f"named_matches[{name!r}][{pair}]"
        chosen.append(one_match(label, matches[pair], grids[v], grids[q], sample))
    costs = [one.cost[one.matched].double().numpy() for one in chosen]
    norm = require_extra("matplotlib.colors", "train").Normalize(*cost_range(costs))
    for ax, (v, q), one in zip(panel, pairs, chosen, strict=True):
        draw_matches(
            ax, pictures[v], pictures[q], grids[v], grids[q], one,
            max_lines=max_lines, norm=norm, colorbar=False,
            student_color=colors[v], teacher_color=colors[q],
        )  # fmt: skip
        count, total = int(one.matched.sum()), grids[v].num_tokens
        ax.set_title(f"{name}: view {v} → view {q}, {count} of {total} tokens matched", fontsize=9)
    if any(cost.size for cost in costs):
        add_colorbar(band, list(panel), norm, cost_label, costs)


def _check_pairs(pairs: Sequence[Pair], views: int) -> None:
    for pair in pairs:
        if not all(0 <= view < views for view in pair):
            raise ShapeError(f"`pairs` holds {pair}, but there are {views} views")


def _default_pairs(named: Mapping[str, Mapping[Pair, Matches]], sample: int) -> list[Pair]:
    """One pair of teacher views, and the local view that is best covered with its teacher view."""
    if not named:
        return []
    first = next(iter(named.values()))
    teachers = {q for _, q in first}
    both = [pair for pair in first if pair[0] in teachers]

    def count(pair: Pair) -> int:
        matched = first[pair].matched
        return int(matched[min(sample, matched.shape[0] - 1)].sum()) if matched.shape[0] else 0

    local = [pair for pair in first if pair[0] not in teachers]
    return both[:1] + ([max(local, key=count)] if local else [])
