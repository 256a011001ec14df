"""FiveCrop and TenCrop: several views of an image, each with its geometry, through what follows."""

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from local_distill import ConfigError, CropGeometry, from_box
from local_distill.transforms import GeometryTensor, track

KINDS = ["tensor", "image", "pil"]


def photograph(kind, height=40, width=51):
    torch.manual_seed(1)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    if kind == "pil":
        return F.to_pil_image(image)
    return tv_tensors.Image(image) if kind == "image" else image


def ramp(height, width, kind):
    """x and y of every pixel and nothing, as three channels."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack((x, y, torch.zeros_like(x))).to(torch.uint8)
    if kind == "pil":
        return F.to_pil_image(image)
    return tv_tensors.Image(image) if kind == "image" else image


def pixels(view):
    if isinstance(view, PIL.Image.Image):
        return torch.from_numpy(np.array(view)).permute(2, 0, 1)
    return view.as_subclass(torch.Tensor)


def assert_shows_what_is_said(view, geometry):
    """Whole pixels alone: the channels are the source position less half a pixel."""
    shown = pixels(view)[:2].double() + 0.5
    height, width = geometry.view_size.tolist()
    assert tuple(shown.shape[1:]) == (height, width)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    points = torch.stack((x, y, torch.ones_like(x)), -1).double()
    predicted = points @ geometry.matrix.double().T
    assert torch.equal(shown, predicted[..., :2].permute(2, 0, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (7, 4), 11, (40, 51), (13, 50)])
@pytest.mark.parametrize("vertical_flip", [None, False, True])
def test_the_views_are_torchvision_s_and_lie_where_it_is_said(kind, size, vertical_flip):
    crop = v2.FiveCrop(size) if vertical_flip is None else v2.TenCrop(size, vertical_flip)
    image = ramp(40, 51, kind)
    views, geometries = track(crop)(image)
    expected = crop(image)
    assert isinstance(views, tuple)
    assert isinstance(geometries, tuple)
    assert len(views) == len(geometries) == (5 if vertical_flip is None else 10)
    for view, geometry, alone in zip(views, geometries, expected, strict=True):
        assert type(view) is type(alone)
        assert torch.equal(pixels(view), pixels(alone))
        assert_shows_what_is_said(view, geometry)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("crop", [v2.FiveCrop((9, 12)), v2.TenCrop((9, 12))])
def test_what_follows_moves_every_view_and_every_geometry(kind, crop):
    pipeline = v2.Compose(
        [
            crop,
            v2.RandomHorizontalFlip(1.0),
            v2.Pad([1, 2, 0, 0]),
            v2.RandomCrop((8, 9), padding=0),
            v2.RandomVerticalFlip(1.0),
            v2.ToImage(),
            v2.RandomRotation((90, 90), expand=True),
        ]
    )
    torch.manual_seed(3)
    views, geometries = track(pipeline)(ramp(40, 51, kind))
    assert all(isinstance(view, tv_tensors.Image) for view in views)
    for view, geometry in zip(views, geometries, strict=True):
        shown = pixels(view)[:2].double() + 0.5
        height, width = geometry.view_size.tolist()
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        points = torch.stack((x, y, torch.ones_like(x)), -1).double()
        predicted = (points @ geometry.matrix.double().T)[..., :2].permute(2, 0, 1)
        filled = (shown == 0.5).all(0)  # what Pad added
        assert int((~filled).sum()) >= 6 * 8
        assert torch.equal(shown[:, ~filled], predicted[:, ~filled])


@pytest.mark.parametrize("kind", KINDS)
def test_all_views_are_drawn_alike(kind):
    # as v2 does it for PIL images and tv_tensors; of pure tensors it would change the first alone
    pipeline = v2.Compose(
        [
            v2.FiveCrop((16, 20)),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomResizedCrop((8, 8)),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.GaussianNoise(),
            v2.RandomErasing(0.5),
            v2.Normalize((0.5,) * 3, (0.2,) * 3),
        ]
    )
    image = photograph(kind)
    for seed in range(5):
        torch.manual_seed(seed)
        views, geometries = track(pipeline)(image)
        torch.manual_seed(seed)
        # an Image stands in where v2 alone would lose four of five
        alone = pipeline(tv_tensors.Image(image) if kind == "tensor" else image)
        assert all(torch.equal(one, other) for one, other in zip(views, alone, strict=True))
        assert all(type(view) is tv_tensors.Image for view in views)
        linear = [geometry.matrix[:2, :2] for geometry in geometries]
        assert all(torch.equal(linear[0], other) for other in linear)
        starts = {tuple(geometry.matrix[:2, 2].tolist()) for geometry in geometries}
        assert len(starts) == 5


def test_pure_tensors_stay_pure_and_all_are_changed():
    pipeline = v2.Compose([v2.FiveCrop(8), v2.Resize((4, 6)), v2.RandomInvert(1.0)])
    image = photograph("tensor")
    views, geometries = track(pipeline)(image)
    expected = [255 - F.resize(view, [4, 6]) for view in F.five_crop(image, [8, 8])]
    for view, wanted, geometry in zip(views, expected, geometries, strict=True):
        assert type(view) is torch.Tensor
        assert torch.equal(view, wanted)
        assert geometry.view_size.tolist() == [4, 6]


@pytest.mark.filterwarnings("ignore:The transform `ToTensor:UserWarning")
@pytest.mark.parametrize("convert", ["ToTensor", "PILToTensor", "ToPureTensor"])
def test_views_that_turn_into_pure_tensors_are_all_changed_afterwards(convert):
    pipeline = v2.Compose([v2.FiveCrop(8), getattr(v2, convert)(), v2.RandomHorizontalFlip(1.0)])
    kind = "image" if convert == "ToPureTensor" else "pil"
    views, geometries = track(pipeline)(ramp(20, 30, kind))
    for view, geometry in zip(views, geometries, strict=True):
        assert type(view) is torch.Tensor
        assert geometry.matrix[0, 0] == -1
        whole = view if view.dtype == torch.uint8 else (view * 255).round()
        assert_shows_what_is_said(whole, geometry)


def test_crops_of_crops_are_nested_as_torchvision_nests_them():
    pipeline = v2.Compose([v2.TenCrop(20), v2.FiveCrop((4, 5)), v2.RandomVerticalFlip(1.0)])
    views, geometries = track(pipeline)(ramp(30, 41, "tensor"))
    assert [len(part) for part in views] == [len(part) for part in geometries] == [5] * 10
    for group, places in zip(views, geometries, strict=True):
        for view, geometry in zip(group, places, strict=True):
            assert_shows_what_is_said(view, geometry)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_several_views_by_chance(p):
    view, geometry = track(v2.RandomApply([v2.FiveCrop(4)], p=p))(photograph("tensor"))
    assert isinstance(view, tuple) == (p == 1)
    assert isinstance(geometry, CropGeometry) == (p == 0)


def darken(image):
    assert isinstance(image, torch.Tensor)
    return image // 2


def test_a_vouched_transform_is_shown_one_view_after_the_other():
    image = photograph("tensor")
    views, _ = track(v2.Compose([v2.FiveCrop(8), darken]), trust=[darken])(image)
    for view, crop in zip(views, F.five_crop(image, [8, 8]), strict=True):
        assert torch.equal(view, crop // 2)


def test_a_crop_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"\(41, 8\).*\(40, 51\)"):
        track(v2.FiveCrop((41, 8)))(photograph("tensor"))


def test_subclasses_are_refused():
    class Mine(v2.FiveCrop):
        pass

    with pytest.raises(ConfigError, match=r"Mine: .*subclass of FiveCrop"):
        track(Mine(4))


def test_the_kernels_return_tuples_of_geometry_tensors():
    for name, count in (("five_crop", 5), ("ten_crop", 10)):
        made = getattr(F, name)(GeometryTensor.identity(20, 30), [6, 8])
        assert isinstance(made, tuple)
        assert len(made) == count
        assert all(type(one) is GeometryTensor for one in made)
    flipped = F.ten_crop(GeometryTensor.identity(20, 30), [6, 8], vertical_flip=True)[5]
    expected = from_box((0, 14, 8, 20), (6, 8), (20, 30), vflip=True)
    assert torch.equal(flipped.crop_geometry().matrix, expected.matrix)
