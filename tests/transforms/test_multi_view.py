"""MultiView: views in order, each with the pixels and the geometry of its own pipeline."""

import itertools
import pickle

import pytest
import torch
import torchvision.transforms as v1
from helpers.views import (
    assert_a_seeded_loader_repeats,
    assert_views_do_not_depend_on_the_workers,
    photograph,
    same,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from local_distill import ConfigError, CropGeometry, GeometryError, ShapeError, from_box, track
from local_distill.transforms.multi_view import MultiView

LARGE = v2.Compose(
    [v2.ToImage(), v2.RandomResizedCrop((16, 20), scale=(0.4, 1.0)), v2.RandomHorizontalFlip()]
)
SMALL = v2.Compose([v2.ToImage(), v2.RandomCrop(8), v2.RandomVerticalFlip(), v2.RandomInvert()])


class LeftHalf:
    """An adapter of the caller's: the left half, and where it lies."""

    def __call__(self, image):
        half = image[:, :, : image.shape[2] // 2]
        height, width = half.shape[1:]
        return half, from_box((0, 0, width, height), (height, width), tuple(image.shape[1:]))


@given(counts=st.tuples(st.integers(1, 3), st.integers(1, 3)), seed=st.integers(0, 2**31))
def test_views_are_those_of_their_pipelines_one_after_the_other(counts, seed):
    image = photograph()
    multi_view = MultiView([(LARGE, counts[0]), (SMALL, counts[1]), LARGE])
    torch.manual_seed(seed)
    views, geometries = multi_view(image)
    torch.manual_seed(seed)
    pipelines = [LARGE] * counts[0] + [SMALL] * counts[1] + [LARGE]
    pixels = [pipeline(image) for pipeline in pipelines]
    torch.manual_seed(seed)
    wanted = [track(pipeline)(image) for pipeline in pipelines]
    assert same(views, pixels)
    assert same(geometries, [geometry for _, geometry in wanted])
    assert all(type(geometry) is CropGeometry for geometry in geometries)
    assert multi_view.num_views == len(views) == sum(counts) + 1
    assert multi_view.num_global == counts[0]


def test_the_geometry_says_where_the_pixels_are():
    image = torch.arange(40 * 50, dtype=torch.int32).view(1, 40, 50).to(torch.float32) / 2000
    flips = v2.Compose([v2.RandomCrop((7, 9)), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()])
    multi_view = MultiView([(flips, 5)])
    torch.manual_seed(0)
    for view, geometry in zip(*multi_view(image), strict=True):
        for row, col in itertools.product((0, 3, 6), (0, 4, 8)):
            x, y, _ = (geometry.matrix @ torch.tensor([col + 0.5, row + 0.5, 1.0])).tolist()
            assert float(view[0, row, col]) == float(image[0, int(y), int(x)])


def test_tracked_and_other_callables_go_as_they_are():
    class Own(v2.Transform):
        """Known to nobody."""

        def transform(self, inpt, params):
            return inpt

    own = track(Own(), trust=[Own])
    image = photograph()
    views, geometries = MultiView([own, LeftHalf(), nn.Sequential(v2.CenterCrop(6))])(image)
    assert torch.equal(views[0], image)
    assert torch.equal(views[1], image[:, :, :25])
    assert geometries[1].view_size.tolist() == [40, 25]
    assert torch.equal(views[2], F.center_crop(image, [6, 6]))
    with pytest.raises(ConfigError, match="Own"):
        MultiView([Own()])
    assert torch.equal(MultiView([Own()], trust=[Own])(image)[0][0], image)


def test_what_is_global():
    assert MultiView([LARGE, SMALL]).num_global == 1
    assert MultiView([LARGE, SMALL], num_global=2).num_global == 2
    assert "2 global of 5 views" in repr(MultiView([(LARGE, 2), (SMALL, 3)]))


@pytest.mark.parametrize(
    ("views", "settings", "message"),
    [
        ([], {}, "at least one"),
        (LARGE, {}, "`views` must be a list"),
        ([(LARGE, 0)], {}, r"views\[0\].*count"),
        ([LARGE, (SMALL, 2.0)], {}, r"views\[1\].*count"),
        ([None], {}, r"views\[0\].*None"),
        ([v2.RandAugment()], {}, "RandAugment"),
        ([v2.CenterCrop], {}, "class CenterCrop"),
        ([v1.RandomCrop(8)], {}, "v1"),
        ([LARGE], {"num_global": 0}, "num_global"),
        ([LARGE], {"num_global": 2}, "num_global.*2.*1 views"),
    ],
)
def test_settings_that_cannot_be(views, settings, message):
    with pytest.raises(ConfigError, match=message):
        MultiView(views, **settings)


def test_a_callable_has_to_say_where_its_view_lies():
    with pytest.raises(GeometryError, match=r"view 1 must return.*Tensor"):
        MultiView([LARGE, lambda image: image[:, :3]])(photograph())
    with pytest.raises(GeometryError, match="tuple"):
        MultiView([lambda image: (image, torch.eye(3))])(photograph())


def test_what_is_no_image():
    with pytest.raises(ShapeError, match="str"):
        MultiView([LARGE])("photo.jpg")


def test_seeds_and_pickle():
    multi_view = MultiView([(LARGE, 2), (SMALL, 3), LeftHalf()])
    found = []
    for copied, seed in ((multi_view, 0), (pickle.loads(pickle.dumps(multi_view)), 0),
                         (multi_view, 1)):  # fmt: skip
        torch.manual_seed(seed)
        found.append(copied(photograph()))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_seeded_loader_makes_the_same_views_again(workers):
    assert_a_seeded_loader_repeats(MultiView([(LARGE, 2), (SMALL, 2)]), workers)


def test_seeded_by_index_the_views_do_not_depend_on_the_workers():
    assert_views_do_not_depend_on_the_workers(MultiView([(LARGE, 2), (SMALL, 2)]))
