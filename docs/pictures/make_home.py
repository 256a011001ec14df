"""Draws docs/pictures/home.png: python docs/pictures/make_home.py [FILE]."""

import sys
from pathlib import Path

import torch
from matplotlib.patches import ConnectionPatch
from torch.nn.functional import adaptive_avg_pool2d
from torchvision.transforms import v2

from local_distill import (
    MultiView,
    NearestMatcher,
    SimilarityMatcher,
    TokenGrid,
    Tokens,
    match_views,
)
from local_distill.matching.diagnostics import correspondence_error
from local_distill.training.scenes import SyntheticScenes
from local_distill.viz import draw_views, new_figure, view_colors

SIDE, CELLS = 160, 5
TRUE, FALSE = "#16a34a", "#dc2626"
SEED = 55  # views that are turned, mirrored and overlap well
LINES = 12  # in one panel; all tokens have their dot

PIPELINE = v2.Compose(
    [
        v2.RandomResizedCrop(SIDE, scale=(0.3, 0.6), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomRotation(20, interpolation=v2.InterpolationMode.BILINEAR),
    ]
)


def tokens_of(view, geometry):
    """Tokens whose features are the patch's own pixels, coarsely: no network is needed."""
    pixels = adaptive_avg_pool2d(view, 4 * CELLS).reshape(3, CELLS, 4, CELLS, 4)
    features = pixels.permute(1, 3, 0, 2, 4).reshape(1, CELLS**2, -1)
    batched = type(geometry)(*(part[None] for part in geometry))
    return Tokens(features, batched, TokenGrid.tiling(CELLS, CELLS, (SIDE, SIDE)))


def draw_pair(ax, title, views, tokens, matches):
    """Two views in one panel; a line is green where it joins the same place of the source."""
    student, teacher = tokens
    true = correspondence_error(matches, student, teacher)[0] < 1
    matched = matches.matched[0]
    gap = SIDE // 4
    for number, (view, color) in enumerate(zip(views, view_colors(2), strict=True)):
        left = number * (SIDE + gap)
        ax.imshow(view.clamp(0, 1).permute(1, 2, 0), extent=(left, left + SIDE, SIDE, 0))
        frame = [(left, 0), (left + SIDE, 0), (left + SIDE, SIDE), (left, SIDE), (left, 0)]
        ax.plot(*zip(*frame, strict=True), color=color, linewidth=2.4, clip_on=False)
    ax.set(xlim=(0, 2 * SIDE + gap), ylim=(SIDE, 0))
    ax.set_axis_off()
    step = SIDE / CELLS
    at = [((i % CELLS + 0.5) * step, (i // CELLS + 0.5) * step) for i in range(CELLS**2)]
    shown = matched.nonzero().flatten().tolist()
    shown = shown[:: max(1, round(len(shown) / LINES))]
    for i in shown:
        x, y = at[int(matches.teacher_index[0, i, 0])]
        ends = at[i], (x + SIDE + gap, y)
        for color, width in (("white", 2.2), (TRUE if true[i] else FALSE, 1.3)):
            ax.add_artist(ConnectionPatch(*ends, "data", color=color, linewidth=width))
    for i, place in enumerate(at):
        color = (TRUE if true[i] else FALSE) if matched[i] else "none"
        edge = {"markeredgewidth": 0.7}
        ax.plot(*place, "o", markersize=4.5, markerfacecolor=color, markeredgecolor="white", **edge)
    wrong = int((matched & ~true).sum())
    said = f"{int(matched.sum())} of {len(at)}, {wrong or 'none'} wrong"
    ax.set_title(f"{title}: {said}", fontsize=11.5, loc="left")


def main(path):
    torch.manual_seed(SEED)
    image = SyntheticScenes(8, 320).scene(3).image
    views, geometries = MultiView([(PIPELINE, 2)])(image.float() / 255)
    tokens = [tokens_of(view, place) for view, place in zip(views, geometries, strict=True)]
    figure = new_figure(7, 3)
    left, right = figure.subfigures(1, 2, width_ratios=(0.43, 0.57))
    ax = left.subplots()
    draw_views(ax, image, geometries)
    ax.set_title("an image, two views", fontsize=11.5, loc="left")
    panels = right.subplots(2)
    matchers = {
        "by geometry": NearestMatcher(method="search"),
        "by similarity": SimilarityMatcher(),
    }
    for ax, (title, matcher) in zip(panels, matchers.items(), strict=True):
        found = match_views(matcher, tokens, tokens)[0, 1]
        draw_pair(ax, title, views, tokens, found)
    figure.savefig(path, dpi=200)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("home.png"))
