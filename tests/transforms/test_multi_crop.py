"""MultiCrop: views against pixels, geometry against two other ways, the recipe, the errors."""

import copy
import math
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.views import PLAIN, photograph
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from local_distill import ConfigError, CropGeometry, ShapeError, from_box, to_source
from local_distill.transforms import GeometryTensor, MultiCrop
from local_distill.transforms.crop_boxes import CropBox, box_geometries, sample_box
from local_distill.transforms.multi_crop import IMAGENET_MEAN, IMAGENET_STD
from local_distill.transforms.view_pixels import shift_hue


def centers(height, width):
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack((x, y), -1)


def ramp(height, width):
    """x / width, y / height and a constant: float, and in [0, 1] as MultiCrop wants it."""
    x, y = (centers(height, width) / torch.tensor([width, height])).unbind(-1)
    return torch.stack((x, y, torch.ones_like(x)))


def inner(geometry):
    """(h, w): the view pixels that bicubic's reach keeps from the border of the crop.

    There the filter is clamped and a ramp bends: its values no longer show their position.
    """
    keep = torch.ones(geometry.view_size.tolist(), dtype=torch.bool)
    for axis, side in enumerate(geometry.view_size.tolist()):
        scale = float(geometry.matrix[1 - axis, 1 - axis].abs())
        reach = 2 * max(1.0, 1 / scale)
        center = torch.arange(side) + 0.5
        inside = (center > reach) & (center < side - reach)
        keep &= inside[:, None] if axis == 0 else inside
    return keep


sizes = st.one_of(st.integers(8, 40), st.tuples(st.integers(8, 40), st.integers(8, 40)))


@given(
    height=st.integers(20, 90),
    width=st.integers(20, 90),
    global_size=sizes,
    local_size=sizes,
    counts=st.tuples(st.integers(1, 3), st.integers(0, 3)),
    seed=st.integers(0, 2**31),
)
def test_ramps_lie_where_the_geometry_says(height, width, global_size, local_size, counts, seed):
    multi_crop = MultiCrop(
        global_size=global_size,
        local_size=local_size,
        global_count=counts[0],
        local_count=counts[1],
        vflip_p=0.5,
        **PLAIN,
    )
    torch.manual_seed(seed)
    views, geometries = multi_crop(ramp(height, width))
    assert len(views) == len(geometries) == sum(counts)
    for view, geometry in zip(views, geometries, strict=True):
        view_height, view_width = geometry.view_size.tolist()
        assert view.shape == (3, view_height, view_width)
        assert geometry.source_size.tolist() == [height, width]
        points = centers(view_height, view_width).reshape(-1, 2)
        predicted = to_source(geometry, points).reshape(view_height, view_width, 2)
        shown = view[:2].permute(1, 2, 0) * torch.tensor([width, height])
        error = (shown - predicted)[inner(geometry)]
        if len(error):
            assert float(error.abs().max()) <= 0.1
            assert float(error.mean(0).abs().max()) <= 1e-3  # ripple is symmetric: no bias


@pytest.mark.parametrize("kind", ["uint8", "pil"])
def test_8_bit_ramps_lie_where_the_geometry_says(kind):
    # one grey level a pixel; rounding to 8 bits adds half a level
    levels = centers(200, 180).permute(2, 0, 1) - 0.5
    image = torch.cat((levels, levels[:1])).to(torch.uint8)
    if kind == "pil":
        image = F.to_pil_image(image)
    torch.manual_seed(0)
    errors = []
    for _ in range(3):
        for view, geometry in zip(*MultiCrop(global_size=64, **PLAIN)(image), strict=True):
            shown = view[:2].permute(1, 2, 0) * 255 + 0.5
            points = centers(*geometry.view_size.tolist())
            predicted = to_source(geometry, points.reshape(-1, 2)).reshape(points.shape)
            error = (shown - predicted)[inner(geometry)]
            assert len(error) > 100
            assert float(error.abs().max()) <= 0.6
            errors.append(error.mean(0))
    # a view's own mean may be off where its scale makes many ties, which all round the same way
    assert float(torch.stack(errors).mean(0).abs().max()) <= 0.05


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    flips=st.tuples(st.booleans(), st.booleans()),
    data=st.data(),
)
def test_geometry_is_that_of_the_kernels_and_of_from_box(height, width, size, flips, data):
    rows = data.draw(st.integers(1, height))
    cols = data.draw(st.integers(1, width))
    top = data.draw(st.integers(0, height - rows))
    left = data.draw(st.integers(0, width - cols))
    (ours,) = box_geometries([CropBox(top, left, rows, cols, *flips)], [size], (height, width))
    tracked = F.resized_crop(
        GeometryTensor.identity(height, width), top, left, rows, cols, size=list(size)
    )
    tracked = F.horizontal_flip(tracked) if flips[0] else tracked
    tracked = F.vertical_flip(tracked) if flips[1] else tracked
    box = from_box(
        (left, top, left + cols, top + rows),
        size,
        (height, width),
        hflip=flips[0],
        vflip=flips[1],
    )
    for other in (tracked.crop_geometry(), box):
        torch.testing.assert_close(ours.matrix, other.matrix, rtol=1e-6, atol=0)
        assert torch.equal(ours.view_size, other.view_size)
        assert torch.equal(ours.source_size, other.source_size)
    # float32 against the same sums in float64
    corners = torch.tensor([[0.0, 0.0], [size[1], size[0]]], dtype=torch.float64)
    exact = F.horizontal_flip(tracked) if flips[0] else tracked
    exact = F.vertical_flip(exact) if flips[1] else exact  # flipped back: an upright box
    exact = to_source(exact.crop_geometry(torch.float64), corners)
    wanted = torch.tensor([[left, top], [left + cols, top + rows]], dtype=torch.float64)
    torch.testing.assert_close(exact, wanted, rtol=1e-12, atol=1e-9)
    error = to_source(ours, corners).double() - to_source(
        tracked.crop_geometry(torch.float64), corners
    )
    assert float(error.abs().max()) <= 2**-22 * max(height, width, 1)


def test_boxes_are_drawn_as_torchvision_draws_them():
    # moments of area, aspect and place over 4,000 boxes of each
    torch.manual_seed(0)
    size, scale, ratio = (60, 90), (0.1, 0.5), (3 / 4, 4 / 3)
    theirs = v2.RandomResizedCrop(8, scale=scale, ratio=ratio)
    image = torch.zeros(3, *size)
    rows = torch.rand(4000, 22, dtype=torch.float64).tolist()
    boxes = {
        "ours": [sample_box(iter(row), size, scale, ratio)[:4] for row in rows],
        "theirs": [
            tuple(theirs.make_params([image])[key] for key in ("top", "left", "height", "width"))
            for _ in range(4000)
        ],
    }
    ours, other = (torch.tensor(boxes[key], dtype=torch.float64) for key in ("ours", "theirs"))
    for a, b in ((ours, other), (ours.log1p(), other.log1p())):
        spread = b.std(0)
        assert bool(((a.mean(0) - b.mean(0)).abs() < 0.1 * spread).all())
        assert bool(((a.std(0) - spread).abs() < 0.1 * spread).all())
    assert bool((ours[:, 0] + ours[:, 2] <= 60).all())
    assert bool((ours[:, 1] + ours[:, 3] <= 90).all())
    assert float((ours[:, 0] + ours[:, 2]).max()) == 60
    assert float(ours[:, :2].min()) == 0


@given(
    height=st.integers(1, 30),
    width=st.integers(1, 30),
    scale=st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)),
    ratio=st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)),
    seed=st.integers(0, 2**31),
)
def test_boxes_lie_in_the_source_whatever_the_settings(height, width, scale, ratio, seed):
    draws = torch.rand(22, generator=torch.Generator().manual_seed(seed)).tolist()
    scale, ratio = tuple(sorted(scale)), tuple(sorted(ratio))
    box = sample_box(iter(draws), (height, width), scale, ratio)
    assert 0 <= box.top < box.top + box.height <= height
    assert 0 <= box.left < box.left + box.width <= width


@pytest.mark.parametrize(("size", "box"), [((90, 3), (43, 0, 4, 3)), ((3, 90), (0, 43, 3, 4))])
def test_a_source_too_narrow_gets_the_largest_central_crop(size, box):
    draws = [0.9] * 22
    assert sample_box(iter(draws), size, (0.9, 1.0), (3 / 4, 4 / 3))[:4] == box
    theirs = v2.RandomResizedCrop(8, scale=(0.9, 1.0)).make_params([torch.zeros(3, *size)])
    assert tuple(theirs[key] for key in ("top", "left", "height", "width")) == box


def test_dinos_defaults():
    multi_crop = MultiCrop()
    assert multi_crop.num_global == 2
    assert multi_crop.num_views == 10
    assert multi_crop.view_sizes == [(224, 224)] * 2 + [(96, 96)] * 8
    views, geometries = multi_crop(photograph())
    assert [tuple(view.shape) for view in views] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 8
    assert all(view.dtype == torch.float32 and view.is_contiguous() for view in views)
    assert all(type(view) is torch.Tensor for view in views)
    tensors = [part for geometry in geometries for part in geometry]
    assert sum(part.nbytes for part in tensors) <= 560
    # what is kept alive in memory, too: views of one storage count once
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in tensors}
    assert sum(storage.nbytes() for storage in storages.values()) <= 560
    assert "2 × (224, 224)" in repr(multi_crop)


def test_a_seed_keeps_its_boxes_from_release_to_release():
    # As drawn by the first version; a change here changes every run that is resumed across it.
    torch.manual_seed(0)
    _, geometries = MultiCrop(global_size=10, local_size=10, vflip_p=0.25)(
        torch.zeros(3, 375, 500, dtype=torch.uint8)
    )
    found = [
        (*g.matrix.diagonal()[:2].mul(10).round().int().tolist(), *g.matrix[:2, 2].int().tolist())
        for g in geometries
    ]
    assert found == [  # width and height, negative where mirrored, and the view's first corner
        (-402, 315, 480, 39),
        (285, 371, 73, 3),
        (-152, 160, 215, 80),
        (-185, 164, 466, 12),
        (196, 160, 107, 166),
        (192, 240, 255, 86),
        (-154, -136, 318, 278),
        (-133, 123, 173, 104),
        (211, -240, 195, 295),
        (-153, -166, 415, 316),
    ]


def test_areas_lie_in_their_scales():
    torch.manual_seed(0)
    multi_crop = MultiCrop(global_size=8, local_size=4, local_count=2, **PLAIN)
    areas = []
    for _ in range(200):
        _, geometries = multi_crop(photograph(100, 130))
        areas.append(
            [
                float(torch.linalg.det(g.matrix.double()).abs() * g.view_size.prod()) / 13000
                for g in geometries
            ]
        )
    areas = torch.tensor(areas)
    assert float(areas[:, :2].min()) > 0.39
    assert 0.9 < float(areas[:, :2].max()) <= 1.0
    assert float(areas[:, 2:].min()) < 0.08
    assert float(areas[:, 2:].min()) > 0.045
    assert float(areas[:, 2:].max()) < 0.41


def test_flips_come_at_their_odds():
    torch.manual_seed(0)
    for hflip_p, vflip_p in ((0.0, 1.0), (1.0, 0.0), (0.5, 0.25)):
        multi_crop = MultiCrop(
            global_size=4, local_count=0, global_count=4, hflip_p=hflip_p, vflip_p=vflip_p, **PLAIN
        )
        matrices = torch.stack([g.matrix for _ in range(250) for g in multi_crop(photograph())[1]])
        for axis, odds in ((0, hflip_p), (1, vflip_p)):
            share = float((matrices[:, axis, axis] < 0).double().mean())
            assert abs(share - odds) <= (0.0 if odds in (0, 1) else 0.06)


def changed(views, plain):
    """Which views differ from those of the same seed without the step."""
    return [not torch.allclose(a, b, atol=1e-4) for a, b in zip(views, plain, strict=True)]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({"blur_p": (1.0, 0.0, 0.0), "blur_sigma": (1.0, 1.5)}, [True, False, False, False]),
        ({"blur_p": (0.0, 1.0, 0.0), "blur_sigma": (1.0, 1.5)}, [False, True, False, False]),
        ({"blur_p": (0.0, 0.0, 1.0), "blur_sigma": (1.0, 1.5)}, [False, False, True, True]),
        ({"solarize_p": 1.0}, [False, True, False, False]),
        ({"grayscale_p": 1.0}, [True] * 4),
        ({"color_jitter": (0.4, 0.4, 0.2, 0.1), "color_jitter_p": 1.0}, [True] * 4),
        ({"color_jitter": (0.4, 0.4, 0.2, 0.1), "color_jitter_p": 0.0}, [False] * 4),
        ({"color_jitter": (0.0, 0.0, 0.0, 0.0), "color_jitter_p": 1.0}, [False] * 4),
        ({"normalize": (IMAGENET_MEAN, IMAGENET_STD)}, [True] * 4),
    ],
)
def test_each_step_changes_its_views_alone(setting, expected):
    common = {"global_size": 16, "local_size": 12, "local_count": 2}
    outputs = []
    for settings in (PLAIN, {**PLAIN, **setting}):
        torch.manual_seed(5)
        outputs.append(MultiCrop(**common, **settings)(photograph()))
    assert changed(outputs[1][0], outputs[0][0]) == expected
    for one, other in zip(outputs[0][1], outputs[1][1], strict=True):
        assert torch.equal(one.matrix, other.matrix)  # colours do not touch the boxes


def test_steps_do_what_torchvisions_do():
    common = {"global_size": 16, "local_count": 0}
    outputs = {}
    for name, setting in {
        "plain": {},
        "solarize": {"solarize_p": 1.0},
        "grayscale": {"grayscale_p": 1.0},
        "blur": {"blur_p": (1.0, 1.0, 1.0), "blur_sigma": (1.2, 1.2)},
        "normalize": {"normalize": (IMAGENET_MEAN, IMAGENET_STD)},
    }.items():
        torch.manual_seed(5)
        outputs[name] = MultiCrop(**common, **{**PLAIN, **setting})(photograph())[0][1]
    plain = outputs["plain"]
    eight_bit = (plain * 255).round().to(torch.uint8)
    for name, wanted in {
        "solarize": F.to_dtype(F.solarize(eight_bit, 128), torch.float32, scale=True),
        "grayscale": F.rgb_to_grayscale(plain, 3),
        "blur": F.gaussian_blur(plain, [9, 9], [1.2, 1.2]),
        "normalize": F.normalize(plain, IMAGENET_MEAN, IMAGENET_STD),
    }.items():
        torch.testing.assert_close(outputs[name], wanted, rtol=0, atol=1e-5)


@given(amount=st.floats(-0.5, 0.5), seed=st.integers(0, 2**31))
def test_the_hue_shift_is_torchvisions(amount, seed):
    view = torch.rand(3, 7, 9, generator=torch.Generator().manual_seed(seed))
    view[:, 0] = view[:1, 0]  # grey
    view[:2, 1] = view[:1, 1]  # two channels tie
    view[:, 2], view[:, 3] = 0, 1
    torch.testing.assert_close(
        shift_hue(view, amount), F.adjust_hue(view, amount), rtol=0, atol=5e-6
    )


def test_jitter_covers_torchvisions_range():
    # on a flat grey, brightness alone shows: a uniform factor in [0.6, 1.4]
    torch.manual_seed(0)
    settings = {**PLAIN, "color_jitter": (0.4, 0, 0, 0), "color_jitter_p": 0.8}
    multi_crop = MultiCrop(global_size=2, global_count=8, local_count=0, **settings)
    levels = torch.stack(
        [v.mean() for _ in range(250) for v in multi_crop(torch.full((3, 8, 8), 0.5))[0]]
    )
    moved = levels[(levels - 0.5).abs() > 1e-6]
    assert abs(len(moved) / len(levels) - 0.8) < 0.04
    assert float(moved.min()) >= 0.3 - 1e-6
    assert float(moved.max()) <= 0.7 + 1e-6
    assert abs(float(moved.mean()) - 0.5) < 0.01
    assert abs(float(moved.std()) - 0.4 / math.sqrt(12)) < 0.01


def test_the_same_seed_makes_the_same_views():
    multi_crop = MultiCrop(global_size=16, local_size=8, local_count=2)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(multi_crop(photograph()))
    for index, same in ((1, True), (2, False)):
        assert torch.equal(outputs[0][0][0], outputs[index][0][0]) == same
        assert torch.equal(outputs[0][1][0].matrix, outputs[index][1][0].matrix) == same


def test_pil_and_tensors_make_the_same_views():
    image = photograph()
    outputs = []
    for same in (image, F.to_pil_image(image), tv_tensors.Image(image), image.float() / 255):
        torch.manual_seed(2)
        outputs.append(MultiCrop(global_size=16, local_size=8, local_count=2)(same)[0])
    for views in outputs[1:3]:
        for one, other in zip(outputs[0], views, strict=True):
            assert torch.equal(one, other)
    for one, other in zip(outputs[0], outputs[3], strict=True):
        # 8-bit resampling rounds, and jitter, the mean's contrast and normalising stretch that
        assert float((one - other).abs().mean()) < 0.02


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16"],
)
def test_pil_images_of_any_mode(mode):
    if mode in ("I;16", "I"):
        deep = np.full((20, 30), 65535 // 2, dtype=np.uint16 if mode == "I;16" else np.int32)
        image = PIL.Image.fromarray(deep)
        assert image.mode == mode
    elif mode == "LAB":
        image = PIL.Image.new("LAB", (30, 20), (128, 0, 0))
    else:
        image = PIL.Image.new("RGB", (30, 20), (127, 127, 127)).convert(mode)
    views, geometries = MultiCrop(global_size=8, local_count=0, **PLAIN)(image)
    assert geometries[0].source_size.tolist() == [20, 30]
    assert views[0].shape == (3, 8, 8)
    if mode not in ("1", "LAB"):
        # a palette is dithered
        assert float((views[0] - 0.5).abs().max()) < (0.05 if mode.startswith("P") else 0.01)


def test_a_palette_with_transparency_does_not_warn():
    image = PIL.Image.new("P", (30, 20))
    image.info["transparency"] = b"\x00\xff"
    views, _ = MultiCrop(global_size=8, local_count=0, **PLAIN)(image)
    assert float(views[0].max()) == 0


def test_grey_tensors_become_rgb():
    views, _ = MultiCrop(global_size=8, local_count=0, **PLAIN)(photograph()[:1])
    assert torch.equal(views[0][0], views[0][2])


def test_odd_inputs_make_finite_views():
    torch.manual_seed(0)
    multi_crop = MultiCrop(global_size=(5, 9), local_size=1, local_count=3)
    for image in (
        torch.zeros(3, 1, 1, dtype=torch.uint8),
        photograph(1, 400),
        photograph(400, 1),
        photograph(30, 40).transpose(1, 2),  # not contiguous
        photograph(31, 1).expand(3, 31, 17),
        photograph(4000, 3),
        torch.rand(3, 20, 20, dtype=torch.float16),
        torch.rand(3, 20, 20, dtype=torch.float64, requires_grad=True),
    ):
        views, geometries = multi_crop(image)
        for view, geometry in zip(views, geometries, strict=True):
            assert bool(view.isfinite().all())
            assert not view.requires_grad
            assert float(torch.linalg.det(geometry.matrix)) != 0


def test_the_image_is_left_as_it_was():
    for image in (photograph(), photograph().float() / 255):
        before = image.clone()
        MultiCrop(global_size=8, local_size=4)(image)
        assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"global_size": 0}, "global_size"),
        ({"global_size": (8, 0)}, "global_size"),
        ({"local_size": (8, 8, 8)}, "local_size"),
        ({"local_size": 8.0}, "local_size"),
        ({"global_count": 0}, "global_count"),
        ({"local_count": -1}, "local_count"),
        ({"local_count": 2.0}, "local_count"),
        ({"global_scale": (1.0, 0.4)}, r"global_scale.*\(1.0, 0.4\)"),
        ({"local_scale": (0.0, 0.4)}, "local_scale"),
        ({"local_scale": (0.1, 1.5)}, "local_scale.*≤ 1"),
        ({"local_scale": (0.1, math.nan)}, "local_scale"),
        ({"local_scale": 0.3}, "local_scale"),
        ({"ratio": (2.0, 0.5)}, "ratio"),
        ({"hflip_p": 1.5}, "hflip_p"),
        ({"vflip_p": -0.5}, "vflip_p"),
        ({"color_jitter": (0.4, 0.4, 0.4)}, "color_jitter.*4"),
        ({"color_jitter": (0.4, 0.4, 0.4, 0.6)}, "color_jitter.*hue"),
        ({"color_jitter": (-0.4, 0.4, 0.4, 0.1)}, "color_jitter"),
        ({"color_jitter_p": 2}, "color_jitter_p"),
        ({"grayscale_p": 2}, "grayscale_p"),
        ({"blur_p": 0.5}, "blur_p.*first global"),
        ({"blur_p": None}, "blur_p.*first global"),
        ({"global_size": None}, "global_size"),
        ({"normalize": True}, "normalize"),
        ({"blur_p": (0.5, 0.5, 2.0)}, "blur_p"),
        ({"blur_sigma": (0.0, 2.0)}, "blur_sigma"),
        ({"solarize_p": 2}, "solarize_p"),
        ({"normalize": (0.5,)}, "normalize"),
        ({"normalize": ((0.5,) * 3, (0.5, 0.5, 0.0))}, "normalize.*std"),
        ({"normalize": ((0.5,) * 4, (0.5,) * 4)}, "normalize.*3"),
    ],
)
def test_settings_that_cannot_be(setting, message):
    with pytest.raises(ConfigError, match=message):
        MultiCrop(**setting)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), dtype=np.uint8), "ndarray.*to_image"),
        ("photo.jpg", "str"),
        (torch.zeros(2, 3, 8, 8), "batch"),
        (torch.zeros(4, 8, 8), r"\(4, 8, 8\).*alpha"),
        (torch.zeros(8, 8, 3), "channels, height, width"),
        (torch.zeros(3, 8, 0), r"\(3, 8, 0\)"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "int64.*to_dtype"),
        (torch.full((3, 8, 8), 200.0), r"\[200, 200\], wanted \[0, 1\]"),
        (torch.full((3, 8, 8), math.nan), "NaN"),
        (-torch.ones(3, 8, 8), "normalise"),
        (tv_tensors.Mask(torch.zeros(3, 8, 8)), "Mask"),
        (PIL.Image.fromarray(np.zeros((8, 8), dtype=np.float32)), "mode F"),
    ],
)
def test_refuses_what_is_no_image(image, message):
    with pytest.raises(ShapeError, match=message):
        MultiCrop()(image)


class Photographs(Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 4

    def __getitem__(self, index):
        views, geometries = self.transform(F.to_pil_image(photograph(30 + index, 41)))
        return views, geometries, index


@pytest.mark.parametrize("workers", [0, 2])
def test_through_a_loader(workers):
    torch.manual_seed(0)
    multi_crop = MultiCrop(global_size=(16, 24), local_size=8, local_count=3)
    loader = DataLoader(Photographs(multi_crop), batch_size=2, num_workers=workers)
    for step, (views, geometries, index) in enumerate(loader):
        assert isinstance(views, list)
        assert isinstance(geometries, list)
        assert index.tolist() == [2 * step, 2 * step + 1]
        assert [tuple(v.shape) for v in views] == [(2, 3, 16, 24)] * 2 + [(2, 3, 8, 8)] * 3
        for view, geometry in zip(views, geometries, strict=True):
            assert type(geometry) is CropGeometry
            assert all(type(part) is torch.Tensor for part in geometry)
            assert geometry.matrix.shape == (2, 3, 3)
            assert geometry.matrix.dtype == torch.float32
            assert geometry.view_size.tolist() == [list(view.shape[2:])] * 2
            assert geometry.source_size.tolist() == [[30 + i, 41] for i in index.tolist()]
            assert geometry.source_size.dtype == torch.int32


def test_through_a_loader_without_collate():
    loader = DataLoader(
        Photographs(MultiCrop(global_size=8, local_count=0)), batch_size=None, num_workers=2
    )
    for _, geometries, index in loader:
        assert geometries[0].source_size.tolist() == [30 + index, 41]
        assert geometries[0].matrix.shape == (3, 3)


def test_workers_draw_different_views():
    torch.manual_seed(0)
    multi_crop = MultiCrop(global_size=8, local_count=0)
    loader = DataLoader(Photographs(multi_crop), batch_size=1, num_workers=2)
    matrices = [geometries[0].matrix for _, geometries, _ in loader]
    assert all(not torch.equal(a, b) for i, a in enumerate(matrices) for b in matrices[:i])


def test_collate_then_pin_keeps_the_structures():
    # pin_memory itself needs an accelerator; its walk over the sample does not
    from torch.utils.data._utils.pin_memory import pin_memory

    batch = default_collate(
        [MultiCrop(global_size=8, local_count=1, local_size=4)(photograph())] * 2
    )
    if torch.cuda.is_available():
        batch = pin_memory(batch)
        assert batch[1][0].matrix.is_pinned()
    assert type(batch[1][0]) is CropGeometry
    assert batch[1][0].matrix.is_contiguous()
    assert batch[1][0].source_size.is_contiguous()


def test_pickle_and_deepcopy():
    multi_crop = MultiCrop(global_size=8, local_size=4, local_count=1)
    wanted = None
    for copied in (multi_crop, pickle.loads(pickle.dumps(multi_crop)), copy.deepcopy(multi_crop)):
        torch.manual_seed(0)
        views, geometries = copied(photograph())
        wanted = wanted or (views, geometries)
        assert all(torch.equal(a, b) for a, b in zip(views, wanted[0], strict=True))
        assert torch.equal(geometries[1].matrix, wanted[1][1].matrix)


def test_every_place_is_drawn():
    # 4 × 5 pixels, always a 2 × 2 box: 3 rows and 4 columns to begin at, each as often
    half = [0.5, 0.5]
    draws = torch.linspace(0, 0.9999, 120).tolist()
    scale, ratio = (0.2, 0.2), (1.0, 1.0)
    boxes = [sample_box(iter([*half, d, d]), (4, 5), scale, ratio) for d in draws]
    assert [sum(box.top == top for box in boxes) for top in range(4)] == [40, 40, 40, 0]
    assert [sum(box.left == left for box in boxes) for left in range(5)] == [30, 30, 30, 30, 0]


@pytest.mark.parametrize("level", [0, 100, 200, 255])
def test_16_bit_images_keep_their_levels(level):
    deep = np.full((20, 30), 257 * level, dtype=np.uint16)
    deep[0, 0] = 65535
    deep[1, 1] = 0
    (view,), _ = MultiCrop(
        global_size=(20, 30),
        local_count=0,
        global_count=1,
        global_scale=(1, 1),
        ratio=(1.5, 1.5),
        hflip_p=0.0,
        **PLAIN,
    )(PIL.Image.fromarray(deep))
    assert float(view[0, 10, 10]) == pytest.approx(level / 255, abs=1e-6)
    assert float(view[0, 0, 0]) == 1
    assert float(view[0, 1, 1]) == 0
