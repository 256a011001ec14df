"""Recipes: several kinds of views, what they inherit, pipelines of their own, YAML, the errors."""

import copy
import pickle

import jsonargparse
import pytest
import torch
from helpers.views import PLAIN, photograph, same
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from local_distill import ConfigError, GeometryError, MultiCrop, to_source, track
from local_distill.transforms.view_recipes import ViewRecipe

DINO = [
    ViewRecipe(224, (0.4, 1.0), 2, is_global=True),
    ViewRecipe(96, (0.05, 0.4), 8),
]
GLOBAL = ViewRecipe(16, (0.4, 1.0), is_global=True)


def views_of(multi_crop, seed=0, image=None):
    torch.manual_seed(seed)
    return multi_crop(photograph() if image is None else image)


@pytest.mark.parametrize(
    "settings",
    [{}, {"vflip_p": 0.5, "ratio": (1, 2), "blur_p": (0.1, 0.9, 0.2), "solarize_p": 0.9}],
)
def test_dinos_recipe_written_out_is_the_default(settings):
    simple, written = MultiCrop(**settings), MultiCrop(recipes=DINO, **settings)
    assert written.view_sizes == simple.view_sizes
    assert (written.num_global, written.num_views) == (2, 10)
    for seed in range(5):
        assert same(views_of(simple, seed), views_of(written, seed))


def test_several_local_sizes():
    multi_crop = MultiCrop(
        recipes=[
            GLOBAL,
            ViewRecipe((12, 10), (0.5, 1.0), is_global=True),
            ViewRecipe(9, (0.1, 0.3), 3),
            ViewRecipe((6, 5), (0.05, 0.05), 2, ratio=(1, 1)),
        ],
        **PLAIN,
    )
    sizes = [(16, 16), (12, 10), *[(9, 9)] * 3, *[(6, 5)] * 2]
    assert multi_crop.view_sizes == sizes
    assert (multi_crop.num_global, multi_crop.num_views) == (2, 7)
    for seed in range(20):
        views, geometries = views_of(multi_crop, seed)
        assert [tuple(view.shape) for view in views] == [(3, *size) for size in sizes]
        assert [tuple(g.view_size.tolist()) for g in geometries] == sizes
        for box in multi_crop.draw_boxes((200, 200)).boxes[5:]:
            assert (box.height, box.width) == (45, 45)  # √(0.05 · 200²) = 44.7
    assert "3 × (9, 9) local of (0.1, 0.3)" in repr(multi_crop)


def changed(settings, **recipe):
    """Which of two global and two local views a recipe's setting changes."""
    kinds = [
        [
            ViewRecipe(16, (0.4, 1.0), 2, is_global=True, **extra),
            ViewRecipe(12, (0.1, 0.4), 2, **extra),
        ]
        for extra in ({}, recipe)
    ]
    one, other = (views_of(MultiCrop(recipes=r, **settings))[0] for r in kinds)
    return [not torch.allclose(a, b, atol=1e-4) for a, b in zip(one, other, strict=True)]


def test_a_recipe_overrides_what_it_names():
    sharp = {**PLAIN, "blur_sigma": (1.0, 1.5)}
    assert changed(sharp, blur_p=1.0) == [True] * 4
    assert changed(sharp, blur_p=0.0) == [False] * 4
    assert changed(PLAIN, solarize_p=1.0) == [True] * 4
    assert changed({**PLAIN, "hflip_p": 0.0}, hflip_p=1.0) == [True] * 4
    assert changed({**PLAIN, "hflip_p": 1.0}, hflip_p=0.0) == [True] * 4
    assert changed(PLAIN, vflip_p=1.0) == [True] * 4


def test_a_pipeline_takes_the_place_of_the_colours():
    seen = []

    def watch(view):
        seen.append(view)
        return 1 - view

    own = track(v2.Lambda(watch), trust=[v2.Lambda])
    recipes = [GLOBAL, ViewRecipe(12, (0.1, 0.4), 2, pipeline=own)]
    plain = [GLOBAL, ViewRecipe(12, (0.1, 0.4), 2)]
    views, geometries = views_of(MultiCrop(recipes=recipes))
    raw_views, raw = views_of(MultiCrop(recipes=plain, **PLAIN))
    assert same(geometries, raw)
    for view, shown, wanted in zip(views[1:], seen, raw_views[1:], strict=True):
        assert torch.equal(shown, wanted)  # cut and flipped, in [0, 1], nothing else
        assert torch.equal(view, 1 - wanted)


def test_a_pipeline_that_moves_pixels_takes_the_geometry_along():
    y, x = torch.meshgrid(torch.arange(60) + 0.5, torch.arange(80) + 0.5, indexing="ij")
    ramp = torch.stack((x / 80, y / 60, torch.ones_like(x)))
    flips = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.RandomVerticalFlip(0.5)])
    recipes = [ViewRecipe((20, 30), (0.4, 1.0), 3, is_global=True, pipeline=flips)]
    multi_crop = MultiCrop(recipes=recipes, hflip_p=0.3)
    for seed in range(10):
        for view, geometry in zip(*views_of(multi_crop, seed, ramp), strict=True):
            points = torch.tensor([[15.0, 10.0], [20.0, 14.0]])
            for (px, py), at in zip(points.tolist(), to_source(geometry, points), strict=True):
                around = view[:2, int(py) - 1 : int(py) + 1, int(px) - 1 : int(px) + 1]
                shown = around.mean((1, 2)) * torch.tensor([80.0, 60.0])
                assert float((shown - at).abs().max()) < 0.05


def test_a_pipeline_keeps_the_size():
    bad = ViewRecipe(12, (0.1, 0.4), pipeline=v2.CenterCrop(8))
    with pytest.raises(GeometryError, match=r"\(12, 12\) into \(8, 8\).*`size`"):
        MultiCrop(recipes=[GLOBAL, bad])(photograph())


def test_a_pipeline_must_be_one_that_can_be_tracked():
    with pytest.raises(ConfigError, match="RandAugment"):
        MultiCrop(recipes=[GLOBAL, ViewRecipe(12, (0.1, 0.4), pipeline=v2.RandAugment())])


def test_seeds_and_copies():
    jitter = v2.Compose([v2.ColorJitter(0.4, 0.4, 0.4, 0.1), v2.RandomSolarize(0.5)])
    multi_crop = MultiCrop(recipes=[GLOBAL, ViewRecipe(12, (0.1, 0.4), 3, pipeline=jitter)])
    wanted = views_of(multi_crop)
    assert not same(wanted, views_of(multi_crop, 1))
    for copied in (multi_crop, pickle.loads(pickle.dumps(multi_crop)), copy.deepcopy(multi_crop)):
        assert same(wanted, views_of(copied))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"size": 0}, "size"),
        ({"size": (8, 8, 8)}, "size"),
        ({"scale": (0.5, 0.1)}, "scale"),
        ({"scale": (0.5, 1.1)}, "scale.*≤ 1"),
        ({"count": 0}, "count"),
        ({"count": 1.0}, "count"),
        ({"ratio": (0, 1)}, "ratio"),
        ({"hflip_p": 2}, "hflip_p"),
        ({"vflip_p": -1}, "vflip_p"),
        ({"blur_p": 2}, "blur_p"),
        ({"solarize_p": 2}, "solarize_p"),
        ({"blur_p": 0.5, "pipeline": F.invert}, "pipeline.*blur_p"),
    ],
)
def test_recipes_that_cannot_be(setting, message):
    with pytest.raises(ConfigError, match=message):
        ViewRecipe(**{"size": 8, "scale": (0.1, 0.4), **setting})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipes": []}, "none with is_global"),
        ({"recipes": [ViewRecipe(8, (0.1, 0.4))]}, "none with is_global"),
        ({"recipes": [ViewRecipe(8, (0.1, 0.4)), GLOBAL]}, "global views first"),
        ({"recipes": [{"size": 8}]}, "ViewRecipe"),
        ({"recipes": 3}, "ViewRecipe"),
        ({"recipes": DINO, "local_size": 64}, "local_size.*64.*recipes"),
        ({"recipes": DINO, "global_scale": (0.3, 1.0)}, "global_scale.*recipes"),
        ({"recipes": DINO, "local_count": 0}, "local_count.*recipes"),
    ],
)
def test_lists_of_recipes_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message):
        MultiCrop(**settings)


def test_recipes_from_yaml():
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--views", type=MultiCrop)
    text = """
views:
  class_path: local_distill.MultiCrop
  init_args:
    recipes:
      - {size: 16, scale: [0.4, 1.0], count: 2, is_global: true}
      - {size: [12, 9], scale: [0.1, 0.4], count: 3, blur_p: 0.0}
      - size: 8
        scale: [0.05, 0.1]
        pipeline:
          class_path: torchvision.transforms.v2.RandomGrayscale
          init_args: {p: 1.0}
    min_overlap: 0.5
    overlap_with: all
    min_global_overlap: 0.3
"""
    settings = parser.parse_string(text)
    again = parser.parse_string(parser.dump(settings))  # what --print_config writes
    for read in (settings, again):
        multi_crop = parser.instantiate(read).views
        assert multi_crop.view_sizes == [*[(16, 16)] * 2, *[(12, 9)] * 3, (8, 8)]
        assert multi_crop.constraints[:3] == (0.5, "all", 0.3)
        grey = views_of(multi_crop)[0][5]
        assert torch.equal(grey[0], grey[2])
