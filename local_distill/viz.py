"""Pictures: views on their source, token grids, and lines between matched tokens.

Every function draws onto matplotlib axes of the caller's; none touches pyplot or its global state,
so all work without a display and in threads. matplotlib comes with the extra ``train``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from local_distill.errors import DataError, GeometryError, ShapeError, require_extra
from local_distill.geometry import check_geometry, grid_points, to_source
from local_distill.structures import CropGeometry, Matches, TokenGrid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import LineCollection
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

__all__ = [
    "denormalize",
    "draw_matches",
    "draw_tokens",
    "draw_views",
    "match_figure",
    "new_figure",
    "view_colors",
]

Pair = tuple[int, int]

# Bicubic resampling overshoots a little; a normalised image leaves [0, 1] by far more.
_OVERSHOOT = 0.25
# The room between the two views of `draw_matches`, in view heights.
_GAP = 0.12
_BACKGROUND = "0.13"  # dark: the bright end of the colormap would vanish on white
# The few worst matches would otherwise take the whole colour scale to themselves.
_COST_QUANTILE = 0.98


def new_figure(width: float, height: float) -> Figure:
    """A figure outside pyplot, in inches; write it with ``figure.savefig(path)``.

    Raises:
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> new_figure(4, 3).axes
        []
    """
    figures = require_extra("matplotlib.figure", "train")
    figure: Figure = figures.Figure(figsize=(width, height), layout="constrained")
    return figure


def view_colors(count: int) -> list[tuple[float, float, float]]:
    """One colour a view, as (red, green, blue) in [0, 1]; they repeat after ten.

    Example:
        >>> len(view_colors(12)), view_colors(12)[0] == view_colors(12)[10]
        (12, True)
    """
    table = require_extra("matplotlib", "train").colormaps["tab10"].colors
    return [table[view % len(table)] for view in range(count)]


def denormalize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo a normalisation by channel: image · std + mean, clamped to [0, 1].

    Args:
        image: (…, c, h, w) normalised values.
        mean: c numbers, as they were given to the normalisation.
        std: c numbers.

    Returns:
        (…, c, h, w) in [0, 1], float32.

    Raises:
        ShapeError: the number of channels differs.

    Example:
        >>> image = torch.tensor([0.0, 2.0]).reshape(2, 1, 1)
        >>> denormalize(image, mean=(0.5, 0.5), std=(0.25, 0.2)).flatten()
        tensor([0.5000, 0.9000])
    """
    if image.dim() < 3 or not image.shape[-3] == len(mean) == len(std):
        raise ShapeError(
            f"`image` must have shape (…, c, h, w) with as many channels as `mean` ({len(mean)}) "
            f"and `std` ({len(std)}), got {tuple(image.shape)}"
        )
    scale = torch.tensor(std, dtype=torch.float32, device=image.device)[:, None, None]
    shift = torch.tensor(mean, dtype=torch.float32, device=image.device)[:, None, None]
    return (image.float() * scale + shift).clamp(0, 1)


def draw_views(
    ax: Axes,
    image: Any,
    geometries: Sequence[CropGeometry],
    *,
    labels: Sequence[str] | None = None,
    colors: Sequence[Any] | None = None,
    sample: int = 0,
) -> None:
    """Draw the source image with the outline of every view on it.

    A view's corners are mapped by its homography. A numbered dot marks the view's own top left
    corner, and an arrow runs from there along its top edge, so flips and turns show.

    Convention: axes coordinates are source pixels, x right, y down, pixel i spanning [i, i + 1].

    Args:
        ax: where to draw.
        image: the source: (3, h, w) uint8, or float in [0, 1], or a PIL image.
        geometries: one per view, (3, 3) or batched.
        labels: one short text per view; the view's number by default.
        colors: one matplotlib colour per view; `view_colors` by default.
        sample: which image of batched input to show.

    Raises:
        ShapeError: a shape does not fit.
        GeometryError: a geometry that cannot be, or a corner beyond the horizon.
        DataError: pixel values outside [0, 1], as those of a normalised image.

    Example:
        >>> from local_distill import from_box
        >>> ax = new_figure(3, 3).add_subplot()
        >>> crop = from_box((4, 2, 12, 6), (16, 32), (10, 20), hflip=True)
        >>> draw_views(ax, torch.zeros(3, 10, 20), [crop])
        >>> ax.patches[0].get_xy()[:2].tolist()  # mirrored: the view's left is the box's right
        [[12.0, 2.0], [4.0, 2.0]]
    """
    patches = require_extra("matplotlib.patches", "train")
    labels = labels or [str(view) for view in range(len(geometries))]
    colors = colors or view_colors(len(geometries))
    _check_count("labels", labels, len(geometries))
    _check_count("colors", colors, len(geometries))
    picture = _picture("image", image, sample)
    height, width = picture.shape[:2]
    _show(ax, picture, (0, width, height, 0))
    badges: list[np.ndarray] = []
    reach = math.hypot(width, height)
    left, right, top, bottom = 0.0, float(width), 0.0, float(height)
    for view, (label, color) in enumerate(zip(labels, colors, strict=True)):
        name = f"geometries[{view}]"
        corners = _outline(name, _one_geometry(name, geometries[view], sample))
        ax.add_patch(patches.Polygon(corners, closed=True, fill=False, ec="black", lw=2.6))
        ax.add_patch(patches.Polygon(corners, closed=True, fill=False, ec=color, lw=1.6))
        # drawn with annotate, whose head keeps its size in points whatever the image's resolution
        ax.annotate(
            "",
            xy=tuple(corners[1]),
            xytext=tuple(corners[0]),
            arrowprops={
                "arrowstyle": "-|>,head_width=0.3,head_length=0.6",
                "color": color,
                "lw": 3.2,
                "shrinkA": 0,
                "shrinkB": 0,
            },
            annotation_clip=False,
        )
        place = _free_place(corners, badges, 0.045 * reach)
        badges.append(place)
        ax.annotate(
            label,
            xy=tuple(place),
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold",
            color="white",
            bbox={"boxstyle": "circle,pad=0.25", "fc": color, "ec": "black", "lw": 0.8},
            annotation_clip=False,
            zorder=5,
        )
        left, right = min(left, corners[:, 0].min()), max(right, corners[:, 0].max())
        top, bottom = min(top, corners[:, 1].min()), max(bottom, corners[:, 1].max())
    # Views may reach out of the source (padding, rotation): that has to show.
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)


def draw_tokens(
    ax: Axes, view: Any, grid: TokenGrid, *, color: Any = "white", sample: int = 0
) -> None:
    """Draw a view with its tokens: the borders of their cells, and a dot at each centre.

    Convention: axes coordinates are view pixels; a cell reaches half a stride around its centre, so
    cells stand out of the view (and are cut) or leave a rest where the grid does not tile it.

    Args:
        ax: where to draw.
        view: (3, h, w) uint8, or float in [0, 1], or a PIL image.
        grid: the view's tokens.
        color: matplotlib colour of borders, dots and frame.
        sample: which image of batched input to show.

    Example:
        >>> ax = new_figure(3, 3).add_subplot()
        >>> draw_tokens(ax, torch.zeros(3, 32, 48), TokenGrid.tiling(2, 3, (32, 48)))
        >>> [len(collection.get_offsets()) for collection in ax.collections][-1]
        6
    """
    picture = _picture("view", view, sample)
    height, width = picture.shape[:2]
    _show(ax, picture, (0, width, height, 0))
    x = grid.offset[0] + grid.stride[0] * (np.arange(grid.cols + 1) - 0.5)
    y = grid.offset[1] + grid.stride[1] * (np.arange(grid.rows + 1) - 0.5)
    borders = [[(at, y[0]), (at, y[-1])] for at in x] + [[(x[0], at), (x[-1], at)] for at in y]
    # a thin line over a wider dark one is seen on any texture
    thin = min(1.0, 8 / max(grid.rows, grid.cols, 1))
    for shade, linewidth in (("black", 1.2 * thin), (color, 0.6 * thin)):
        _add_lines(ax, borders, colors=shade, linewidths=linewidth, alpha=0.8)
    centers = _centers(grid)
    _add_dots(ax, centers, 0.2 * min(grid.stride), facecolors=[color], edgecolors="none")
    for spine in ax.spines.values():
        spine.set(visible=True, edgecolor=color, linewidth=2.5)


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
    chosen = _one_match("matches", matches, student_grid, teacher_grid, sample)
    pictures = [
        _picture("student_view", student_view, sample),
        _picture("teacher_view", teacher_view, sample),
    ]
    starts, widths, x = [], [], 0.0
    for picture, frame in zip(pictures, (student_color, teacher_color), strict=True):
        starts.append(x)
        widths.append(picture.shape[1] / picture.shape[0])
        _show(ax, picture, (x, x + widths[-1], 1, 0))
        _add_frame(ax, x, widths[-1], frame)
        x += widths[-1] + _GAP
    ax.set_xlim(-0.02, x - _GAP + 0.02)
    ax.set_ylim(1.02, -0.02)
    ax.set_facecolor(_BACKGROUND)

    student_at, teacher_at = (
        _centers(grid) / picture.shape[0] + (start, 0)
        for grid, picture, start in zip((student_grid, teacher_grid), pictures, starts, strict=True)
    )
    matched, cost = chosen.matched[0].numpy(), chosen.cost[0].double().numpy()
    norm = norm or colors.Normalize(*_cost_range([cost[matched]]))
    pairs = _choose_lines(chosen, student_grid, max_lines, max_candidates)
    segments = [[student_at[i], teacher_at[j]] for i, j, _ in pairs]
    opacity = [part for *_, part in pairs] or None
    _add_lines(ax, segments, linewidths=1.9, colors="black", alpha=opacity)
    by_cost = {"cmap": _cost_colors(), "norm": norm}
    lines = _add_lines(
        ax, segments, linewidths=1.1, alpha=opacity, array=[cost[i] for i, *_ in pairs], **by_cost
    )
    answering = np.zeros(teacher_grid.num_tokens, dtype=bool)
    answering[[j for _, j in _all_pairs(chosen)]] = True
    for at, filled, values, picture, grid in (
        (student_at, matched, cost, pictures[0], student_grid),
        (teacher_at, answering, None, pictures[1], teacher_grid),
    ):
        diameter = min(0.3 * min(grid.stride) / picture.shape[0], 0.035)
        _add_dots(ax, at[~filled], diameter, facecolors="none", edgecolors="white", linewidths=0.6)
        look = {"facecolors": "white"} if values is None else {"array": values[filled], **by_cost}
        _add_dots(ax, at[filled], diameter, edgecolors="black", linewidths=0.4, **look)
    if not matched.any():
        ax.text(
            (x - _GAP) / 2, 0.5, "no matches", color="white", ha="center", va="center",
            bbox={"fc": _BACKGROUND, "ec": "white"},
        )  # fmt: skip
    elif colorbar:
        _add_colorbar(ax.figure, ax, norm, cost_label, [cost[matched]])
    return lines


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
    _check_count("geometries", geometries, len(views))
    _check_count("grids", grids, len(views))
    names = list(named_matches)
    shown = _default_pairs(named_matches, sample) if pairs is None else list(pairs)
    shown = shown if names else []
    _check_pairs(shown, len(views))
    colors = view_colors(len(views))
    pictures = [_picture(f"views[{v}]", view, sample) for v, view in enumerate(views)]
    column = 6.4
    panels = [
        sum(pictures[view].shape[1] / pictures[view].shape[0] for view in pair) + _GAP
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
        chosen.append(_one_match(label, matches[pair], grids[v], grids[q], sample))
    costs = [one.cost[one.matched].double().numpy() for one in chosen]
    norm = require_extra("matplotlib.colors", "train").Normalize(*_cost_range(costs))
    for ax, (v, q), one in zip(panel, pairs, chosen, strict=True):
        draw_matches(
            ax, pictures[v], pictures[q], grids[v], grids[q], one,
            max_lines=max_lines, norm=norm, colorbar=False,
            student_color=colors[v], teacher_color=colors[q],
        )  # fmt: skip
        count, total = int(one.matched.sum()), grids[v].num_tokens
        ax.set_title(f"{name}: view {v} → view {q}, {count} of {total} tokens matched", fontsize=9)
    if any(cost.size for cost in costs):
        _add_colorbar(band, list(panel), norm, cost_label, costs)


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


def _cost_range(costs: Sequence[np.ndarray]) -> tuple[float, float]:
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


def _add_colorbar(
    figure: Any, axes: Any, norm: Normalize, label: str, costs: Sequence[np.ndarray]
) -> None:
    # of its own, not of the lines: those carry opacities
    mappable = require_extra("matplotlib.cm", "train").ScalarMappable(norm, _cost_colors())
    beyond = any((cost > norm.vmax).any() for cost in costs)
    figure.colorbar(
        mappable, ax=axes, label=label, shrink=0.8, pad=0.01, extend="max" if beyond else "neither"
    )


def _outline(name: str, geometry: CropGeometry) -> np.ndarray:
    height, width = geometry.view_size.tolist()
    corners = torch.tensor([[0, 0], [width, 0], [width, height], [0, height]], dtype=torch.float64)
    source: np.ndarray = to_source(geometry, corners).double().numpy()
    if not np.isfinite(source).all():
        raise GeometryError(
            f"`{name}`: a corner of the view lies beyond the horizon of its perspective and has no "
            "place in the source"
        )
    return source


def _free_place(corners: np.ndarray, taken: Sequence[np.ndarray], distance: float) -> np.ndarray:
    """Where to label a view: its first corner, or as far towards its middle as others allow."""
    first: np.ndarray = corners[0]
    middle = corners.mean(0)
    for part in np.linspace(0, 1, 12):
        place: np.ndarray = first + part * (middle - first)
        if all(np.hypot(*(place - other)) >= distance for other in taken):
            return place
    return first


def _one_geometry(name: str, geometry: CropGeometry, sample: int) -> CropGeometry:
    check_geometry(name, geometry)
    if geometry.matrix.dim() == 3:
        _check_sample(name, sample, geometry.matrix.shape[0])
        geometry = CropGeometry(*(part[sample] for part in geometry))
    if geometry.matrix.dim() != 2:
        raise ShapeError(
            f"`{name}` must have a matrix (3, 3) or (b, 3, 3), got {tuple(geometry.matrix.shape)}"
        )
    return geometry.to("cpu")


def _one_match(
    name: str, matches: Matches, student: TokenGrid, teacher: TokenGrid, sample: int
) -> Matches:
    """The matches of one image with batch axis 1, on the CPU, checked against both grids."""
    b, s, _ = matches.weight.shape
    if b != 1:
        _check_sample(name, sample, b)
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


def _check_sample(name: str, sample: int, batch: int) -> None:
    if not 0 <= sample < batch:
        raise ShapeError(f"`sample` is {sample}, but `{name}` holds {batch} images")


def _check_count(name: str, values: Sequence[Any], wanted: int) -> None:
    if len(values) != wanted:
        raise ShapeError(
            f"`{name}` has {len(values)} entries for {wanted} views; give one per view"
        )


def _picture(name: str, image: Any, sample: int) -> np.ndarray:
    """(h, w, 3) float32 in [0, 1], from any of the forms in which callers hold an image."""
    if isinstance(image, np.ndarray):
        return image  # one of our own, already converted
    if hasattr(image, "convert"):  # a PIL image; PIL itself is optional
        return np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    if not isinstance(image, Tensor):
        raise ShapeError(f"`{name}` must be a tensor or a PIL image, got {type(image).__name__}")
    if image.dim() == 4:
        _check_sample(name, sample, image.shape[0])
        image = image[sample]
    if image.dim() != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise ShapeError(f"`{name}` must have shape (3, h, w), got {tuple(image.shape)}")
    values = image.detach().cpu().expand(3, -1, -1).permute(1, 2, 0)
    if not values.is_floating_point():
        if values.dtype != torch.uint8:
            raise ShapeError(f"`{name}` must be uint8, or float in [0, 1], got {values.dtype}")
        return _as_array(values.float().div(255))
    values = values.float()
    low, high = float(values.min()), float(values.max())
    if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):
        raise DataError(
            f"`{name}` must hold values in [0, 1], got {low:.3g} to {high:.3g}; "
            "if it was normalised, pass denormalize(image, mean, std)"
        )
    return _as_array(values.clamp(0, 1))


def _centers(grid: TokenGrid) -> np.ndarray:
    return _as_array(grid_points(grid, torch.device("cpu"), torch.float64))


def _as_array(values: Tensor) -> np.ndarray:
    array: np.ndarray = values.numpy()
    return array


def _show(ax: Axes, picture: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    # `extent` in continuous pixels: imshow's own default puts the centre of pixel 0 at 0
    ax.imshow(picture, extent=extent, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])


def _add_frame(ax: Axes, x: float, width: float, color: Any) -> None:
    patches = require_extra("matplotlib.patches", "train")
    ax.add_patch(patches.Rectangle((x, 0), width, 1, fill=False, ec=color, lw=2.5))


def _add_lines(ax: Axes, segments: Sequence[Any], **look: Any) -> LineCollection:
    collections = require_extra("matplotlib.collections", "train")
    lines: LineCollection = collections.LineCollection(segments, **look)
    ax.add_collection(lines, autolim=False)
    return lines


def _add_dots(ax: Axes, centers: np.ndarray, diameter: float, **look: Any) -> None:
    # sized in data units, so that a 37 × 37 grid stays as legible as a 3 × 3 one
    collections = require_extra("matplotlib.collections", "train")
    size = np.full(len(centers), diameter)
    dots = collections.EllipseCollection(
        size, size, np.zeros(len(centers)), units="xy",
        offsets=centers, offset_transform=ax.transData, zorder=3, **look,
    )  # fmt: skip
    ax.add_collection(dots, autolim=False)
