"""Draws docs/pictures/conventions.png: python docs/pictures/make_conventions.py [FILE]."""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from local_distill import TokenGrid, cell_diagonals, from_box, to_source, token_centers

BLUE, ORANGE, GREY = "#1f6fb4", "#d95f02", "0.55"


def pixels(ax, left, top, width, height, face="white"):
    for y in range(height):
        for x in range(width):
            shade = face if (x + y) % 2 else "0.93"
            ax.add_patch(Rectangle((left + x, top + y), 1, 1, fc=shade, ec="0.7", lw=0.6))


def finish(ax, title, xlim, ylim):
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_xlim(*xlim)
    ax.set_ylim(ylim[1], ylim[0])
    ax.set_aspect("equal")
    ax.set_axis_off()


def arrow(ax, start, end, color, **look):
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.6, "shrinkA": 0, "shrinkB": 0, **look}
    ax.annotate("", xy=end, xytext=start, arrowprops=style)


def draw_pixels(ax):
    """Pixels are squares; whole numbers are their borders."""
    pixels(ax, 0, 0, 5, 3)
    for x in range(6):
        ax.text(x, -0.2, str(x), ha="center", va="bottom", fontsize=8)
    for y in range(4):
        ax.text(-0.2, y, str(y), ha="right", va="center", fontsize=8)
    arrow(ax, (0, -0.95), (5.4, -0.95), "black", lw=1)
    ax.text(5.5, -0.95, "x", va="center")
    arrow(ax, (-0.85, 0), (-0.85, 3.4), "black", lw=1)
    ax.text(-0.85, 3.6, "y", ha="center", va="top")
    ax.add_patch(Rectangle((3, 1), 1, 1, fc="#cfe3f5", ec=BLUE, lw=1.6))
    ax.plot(3.5, 1.5, "o", color=BLUE, ms=5)
    ax.annotate(
        "pixel 3 of row 1 spans\n[3, 4] × [1, 2]; its centre\nis (3.5, 1.5)",
        xy=(3.5, 1.5), xytext=(1.0, 3.35), fontsize=8, color=BLUE, va="top",
        arrowprops={"arrowstyle": "-", "color": BLUE, "lw": 0.8},
    )  # fmt: skip
    finish(ax, "1  Coordinates are continuous pixels", (-1.4, 6.2), (-1.5, 5.2))


def draw_crop(ax):
    """A crop of the source, shown mirrored in a view of another size."""
    source, view, box = (7, 10), (4, 4), (5.0, 2.0, 9.0, 6.0)
    geometry = from_box(box, view, source, hflip=True)
    pixels(ax, 0, 0, source[1], source[0])
    corners = torch.tensor([[0.0, 0], [4, 0], [4, 4], [0, 4]])
    placed = to_source(geometry, corners).numpy()
    ax.add_patch(Polygon(placed, fc="#fde3cf", ec=ORANGE, lw=1.8, alpha=0.8))
    arrow(ax, tuple(placed[0]), tuple(placed[1]), ORANGE, lw=2.6)
    ax.plot(*placed[0], "o", color=ORANGE, ms=7)
    start = np.array((13.0, 2.0))
    pixels(ax, *start, 4, 4, face="#fde3cf")
    ax.add_patch(Rectangle(tuple(start), 4, 4, fill=False, ec=ORANGE, lw=1.8))
    arrow(ax, tuple(start), (start[0] + 4, start[1]), ORANGE, lw=2.6)
    ax.plot(*start, "o", color=ORANGE, ms=7)
    point = torch.tensor([[0.5, 1.5]])
    there = to_source(geometry, point)[0].numpy()
    ax.plot(*there, "s", color=BLUE, ms=5)
    ax.plot(*(start + point[0].numpy()), "s", color=BLUE, ms=5)
    arrow(ax, tuple(start + point[0].numpy()), tuple(there), BLUE, lw=1.2,
          connectionstyle="arc3,rad=-0.25")  # fmt: skip
    ax.text(start[0] + 2, 6.3, "view, 4 × 4 px", ha="center", va="top", fontsize=8, color=ORANGE)
    ax.text(5, 7.3, "source, 7 × 10 px", ha="center", va="top", fontsize=8)
    ax.text(8.75, 8.45, "matrix · (0.5, 1.5, 1) = (8.5, 3.5, 1)",
            ha="center", va="top", fontsize=8, color=BLUE)  # fmt: skip
    ax.text(
        13, 1.6, "dot: the view's corner (0, 0)", fontsize=8, color=ORANGE, va="bottom", ha="left"
    )
    finish(ax, "2  `matrix` maps view pixels to source pixels (here with a flip)",
           (-0.5, 20), (-0.5, 9.5))  # fmt: skip


def draw_grid(ax, grid, side, title, notes):
    """A view's tokens: cells, centres, stride and offset."""
    ax.add_patch(Rectangle((0, 0), side, side, fc="0.95", ec="0.3", lw=1.5))
    for row in range(grid.rows):
        for col in range(grid.cols):
            x = grid.offset[0] + grid.stride[0] * col
            y = grid.offset[1] + grid.stride[1] * row
            corner = (x - grid.stride[0] / 2, y - grid.stride[1] / 2)
            ax.add_patch(
                Rectangle(corner, *grid.stride, fill=False, ec=BLUE, lw=0.7, ls=(0, (4, 2)))
            )
            ax.plot(x, y, "o", color=BLUE, ms=4)
    x, y = grid.offset
    arrow(ax, (x, y), (x + grid.stride[0], y), ORANGE)
    ax.text(x + grid.stride[0] / 2, y - 3, f"stride {grid.stride[0]:g}", ha="center", va="bottom",
            fontsize=8, color=ORANGE)  # fmt: skip
    ax.annotate(
        f"offset ({x:g}, {y:g})", xy=(x, y), xytext=(-4, -26), fontsize=8, color=ORANGE,
        arrowprops={"arrowstyle": "-", "color": ORANGE, "lw": 0.8},
    )  # fmt: skip
    ax.text(side / 2, side + 22, notes, ha="center", va="top", fontsize=8)
    finish(ax, title, (-22, side + 22), (-34, side + 48))


def draw_diagonals(ax):
    """The larger of two cell diagonals is the unit of a match's distance."""
    source = (60, 110)
    ax.add_patch(Rectangle((0, 0), source[1], source[0], fc="0.97", ec="0.6"))
    student = from_box((8, 12, 38, 42), (48, 48), source)
    teacher = from_box((18, 4, 102, 56), (64, 64), source)
    grids = TokenGrid.tiling(3, 3, (48, 48)), TokenGrid.tiling(3, 4, (64, 64))
    for geometry, grid, color in zip((student, teacher), grids, (ORANGE, BLUE), strict=True):
        for x, y in token_centers(geometry, grid).tolist():
            scale = geometry.matrix[0, 0].item(), geometry.matrix[1, 1].item()
            cell = [grid.stride[axis] * scale[axis] for axis in (0, 1)]
            ax.add_patch(
                Rectangle((x - cell[0] / 2, y - cell[1] / 2), *cell, fill=False, ec=color, lw=0.8)
            )
            ax.plot(x, y, ".", color=color, ms=4)
    near, far = token_centers(student, grids[0])[5], token_centers(teacher, grids[1])[0]
    i, j = 5, 4
    near, far = token_centers(student, grids[0])[i], token_centers(teacher, grids[1])[j]
    for geometry, grid, token, color in (
        (student, grids[0], i, ORANGE),
        (teacher, grids[1], j, BLUE),
    ):
        center = token_centers(geometry, grid)[token]
        half = torch.tensor(grid.stride) / 2 * geometry.matrix.diagonal()[:2]
        start, end = (center - half).tolist(), (center + half).tolist()
        arrow(ax, start, end, color, arrowstyle="<|-|>", lw=1.3)
        value = cell_diagonals(geometry, grid)[token].item()
        ax.text(*(end[0] + 1, end[1] + 1), f"{value:.1f} px", fontsize=8, color=color, va="top",
                bbox={"fc": "white", "ec": "none", "pad": 0.6, "alpha": 0.8})  # fmt: skip
    ax.plot(*zip(near.tolist(), far.tolist(), strict=True), color="black", lw=1.8)
    distance = (near - far).norm().item()
    larger = max(
        cell_diagonals(student, grids[0])[i].item(), cell_diagonals(teacher, grids[1])[j].item()
    )
    ax.text(55, 64, f"cost = {distance:.1f} px / {larger:.1f} px = {distance / larger:.2f} "
            "larger cell diagonals", ha="center", va="top", fontsize=8)  # fmt: skip
    ax.text(8, 10.5, "student", color=ORANGE, fontsize=8, va="bottom")
    ax.text(101, 3, "teacher", color=BLUE, fontsize=8, va="bottom", ha="right")
    finish(ax, "5  Matchers measure in the larger cell diagonal", (-4, 114), (-6, 74))


def main(path):
    figure = Figure(figsize=(12, 8.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    first, second = top.subplots(1, 2, width_ratios=(1, 1.9))
    draw_pixels(first)
    draw_crop(second)
    vit, resnet, cells = bottom.subplots(1, 3, width_ratios=(1, 1, 1.7))
    draw_grid(vit, TokenGrid.tiling(6, 6, (96, 96)), 96, "3  A ViT's cells tile the view",
              "patch 16 at 96 px: centres at\n16·c + 8")  # fmt: skip
    draw_grid(
        resnet,
        TokenGrid(3, 3, (32.0, 32.0), (0.5, 0.5)),
        96,
        "4  A ResNet's do not",
        "stride 32 at 96 px: centres at 32·c + 0.5,\nso a flip moves them by a whole token",
    )
    draw_diagonals(cells)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("conventions.png"))
