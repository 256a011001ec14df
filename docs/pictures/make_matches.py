"""Draws docs/pictures/matches.png: python docs/pictures/make_matches.py [FILE]."""

import sys
from pathlib import Path

import torch
from torch.nn.functional import adaptive_avg_pool2d

from local_distill import (
    MultiCrop,
    NearestMatcher,
    SimilarityMatcher,
    TokenGrid,
    Tokens,
    match_views,
)
from local_distill.training.scenes import SyntheticScenes
from local_distill.viz import denormalize, match_figure

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def tokens_of(view, geometry):
    """Tokens whose features are the patch's own pixels, coarsely: no network is needed."""
    rows, cols = view.shape[1] // 16, view.shape[2] // 16
    pixels = adaptive_avg_pool2d(view, (4 * rows, 4 * cols))
    patches = pixels.reshape(3, rows, 4, cols, 4).permute(1, 3, 0, 2, 4).reshape(rows * cols, -1)
    batched = type(geometry)(*(part[None] for part in geometry))
    return Tokens(patches[None], batched, TokenGrid.tiling(rows, cols, tuple(view.shape[1:])))


def main(path):
    torch.manual_seed(5)
    image = SyntheticScenes(8, 320).scene(3).image
    crop = MultiCrop(global_size=160, local_size=80, local_count=6, normalize=(MEAN, STD))
    views, geometries = crop(image)
    tokens = [tokens_of(view, place) for view, place in zip(views, geometries, strict=True)]
    figure = match_figure(
        image,
        [denormalize(view, MEAN, STD) for view in views],
        geometries,
        [one.grid for one in tokens],
        {
            "geometric": match_views(NearestMatcher(), tokens, tokens[:2]),
            "similarity": match_views(SimilarityMatcher(), tokens, tokens[:2]),
        },
        cost_labels={"geometric": "distance, larger cell diagonals", "similarity": "1 − cosine"},
        max_lines=40,
    )
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("matches.png"))
