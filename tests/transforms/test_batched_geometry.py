"""Batches: many images through one draw, and geometries that go on where others ended."""

import copy
import pickle

import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from local_distill import (
    CropGeometry,
    GeometryError,
    ShapeError,
    compose,
    from_box,
    from_matrix,
    to_source,
)
from local_distill.transforms import GeometryTensor, track

BILINEAR = InterpolationMode.BILINEAR
STEPS = {
    "crop": v2.RandomCrop((12, 9)),
    "resized crop": v2.RandomResizedCrop((7, 11)),
    "flip": v2.RandomHorizontalFlip(1.0),
    "vertical flip": v2.RandomVerticalFlip(1.0),
    "pad": v2.Pad([1, 0, 4, 2]),
    "center crop": v2.CenterCrop((30, 9)),
    "affine": v2.RandomAffine(30, (0.1, 0.1), (0.8, 1.2), 10, interpolation=BILINEAR),
    "rotation": v2.RandomRotation(180, BILINEAR, expand=True),
    "perspective": v2.RandomPerspective(0.4, 1.0),
    "resize": v2.Resize(13),
    "pipeline": v2.Compose(
        [v2.RandomRotation(10), v2.RandomResizedCrop(8), v2.RandomHorizontalFlip(), v2.ToImage()]
    ),
}


def images(*batch, height=20, width=26):
    # its own generator: the tests seed the transforms' one before they ask for images
    return torch.rand(*batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def different(b, view=(20, 26), dtype=torch.float32):
    """b different views of sources of different sizes."""
    boxes = torch.rand(b, 4, dtype=dtype, generator=torch.Generator().manual_seed(2)) * 10
    boxes[:, 2:] += 20
    sources = torch.stack((torch.arange(b) + 40, torch.arange(b) + 50), -1)
    return from_box(boxes, view, sources, hflip=torch.arange(b) % 2 == 0)


def assert_same(one, other, *, exact=True):
    for part, wanted in zip(one, other, strict=True):
        assert type(part) is torch.Tensor
        assert part.dtype == wanted.dtype
        assert part.shape == wanted.shape
        if exact:
            assert torch.equal(part, wanted)
        else:
            torch.testing.assert_close(part, wanted, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("batch", [(3,), (1,), (2, 3), (0,)])
def test_a_batch_of_images_is_drawn_once(step, batch):
    tracked, batched = track(STEPS[step]), images(*batch)
    torch.manual_seed(3)
    one, expected = tracked(images())
    torch.manual_seed(3)
    views, geometry = tracked(batched)
    assert tuple(views.shape) == (*batch, *one.shape)
    wanted = CropGeometry(*(part.expand(*batch, *part.shape) for part in expected))
    assert_same(geometry, wanted)
    assert all(part.is_contiguous() for part in geometry)
    if 0 not in batch:
        # each image by itself, under the same draw
        torch.manual_seed(3)
        last, _ = tracked(batched.flatten(0, -4)[-1])
        torch.testing.assert_close(views.flatten(0, -4)[-1], last)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_go_on_from_a_batch_is_to_compose(step, dtype):
    tracked, start = track(STEPS[step]), different(3, dtype=dtype)
    torch.manual_seed(4)
    expected_views, inner = tracked(images(3))
    torch.manual_seed(4)
    views, geometry = tracked(images(3), start)
    assert torch.equal(views, expected_views)
    wanted = compose(start, CropGeometry(*inner))
    assert_same(geometry, wanted, exact=False)
    assert geometry.matrix.dtype == dtype
    assert all(part.is_contiguous() for part in geometry)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["pil", "tensor"])
def test_to_go_on_from_one_image_is_to_compose(step, kind):
    start = CropGeometry(*(part[1] for part in different(2)))
    image = F.to_pil_image(images()) if kind == "pil" else images()
    tracked = track(STEPS[step])
    torch.manual_seed(5)
    _, inner = tracked(image)
    torch.manual_seed(5)
    _, geometry = tracked(image, geometry=start)
    assert_same(geometry, compose(start, inner), exact=False)


@pytest.mark.parametrize("step", [name for name in STEPS if name != "pipeline"])
def test_a_batch_of_geometry_tensors_goes_through_a_pipeline_of_ones_own(step):
    start = different(4, dtype=torch.float64)
    carried = GeometryTensor.from_crop_geometry(start)
    assert carried.shape == (4, 13)
    torch.manual_seed(6)
    _, expected = track(STEPS[step])(images(4), start)
    torch.manual_seed(6)
    _, geometry = STEPS[step]((tv_tensors.Image(images(4)), carried))
    assert isinstance(geometry, GeometryTensor)
    assert geometry.shape == (4, 13)
    handed_on = geometry.crop_geometry(torch.float64)
    torch.testing.assert_close(handed_on.matrix, expected.matrix, rtol=1e-12, atol=1e-9)
    assert torch.equal(handed_on.view_size, expected.view_size)
    assert torch.equal(handed_on.source_size, expected.source_size)
    assert handed_on.view_size.dtype == handed_on.source_size.dtype == torch.int32


@given(
    boxes=st.lists(
        st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(21, 40)] * 2), min_size=2, max_size=4
    ),
    top=st.integers(-3, 5),
    left=st.integers(-3, 5),
    angle=st.floats(-180, 180),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
def test_batched_kernels_are_the_plain_ones_row_by_row(boxes, top, left, angle, size):
    start = from_box(torch.tensor(boxes, dtype=torch.float64), (17, 23), (40, 40))
    batch = GeometryTensor.from_crop_geometry(start)

    def act(geometry):
        geometry = F.crop(geometry, top, left, 9, 14)
        geometry = F.vertical_flip(F.horizontal_flip(geometry))
        geometry = F.rotate(geometry, angle, expand=True)
        geometry = F.perspective(geometry, None, None, coefficients=[1, 0.1, 2, 0, 1, 1, 0.01, 0])
        geometry = F.affine(geometry, 10.0, [1, 2], 1.2, [3.0, 4.0], center=[2, 1])
        geometry = F.resize(F.pad(geometry, [1, 2, 3, 4]), list(size))
        return F.center_crop(geometry, [11, 5])

    whole = act(batch).crop_geometry(torch.float64)
    for index in range(len(boxes)):
        row = act(GeometryTensor(batch[index])).crop_geometry(torch.float64)
        torch.testing.assert_close(whole.matrix[index], row.matrix, rtol=1e-12, atol=1e-9)
        assert torch.equal(whole.view_size[index], row.view_size)
        assert torch.equal(whole.source_size[index], row.source_size)


def test_five_crops_of_a_batch():
    start = different(3)
    views, geometries = track(v2.Compose([v2.FiveCrop((6, 8)), v2.RandomVerticalFlip(1.0)]))(
        images(3), start
    )
    corner = [[0, 0], [18, 0], [0, 14], [18, 14], [9, 7]]
    for view, geometry, (left, top) in zip(views, geometries, corner, strict=True):
        assert torch.equal(view, images(3)[..., top : top + 6, left : left + 8].flip(-2))
        step = from_box((left, top, left + 8, top + 6), (6, 8), (20, 26), vflip=True)
        assert_same(geometry, compose(start, step), exact=False)
    batch = GeometryTensor.from_crop_geometry(start)
    assert [crop.shape for crop in F.ten_crop(batch, [6, 8])] == [(3, 13)] * 10


def test_two_rounds_show_the_right_pixels():
    # a loader's crops of different places, collated, then one more round on the batch
    height, width = 50, 60
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    ramp = torch.stack((x, y)).double()
    torch.manual_seed(7)
    first = track(v2.Compose([v2.RandomCrop((30, 40)), v2.RandomHorizontalFlip()]))
    loader = DataLoader([ramp] * 6, batch_size=3, collate_fn=lambda rows: [first(r) for r in rows])
    for rows in loader:
        views = torch.stack([view for view, _ in rows])
        start = CropGeometry(*map(torch.stack, zip(*(place for _, place in rows), strict=True)))
        assert not torch.equal(start.matrix[0], start.matrix[1])
        again = track(v2.Compose([v2.RandomRotation(30, BILINEAR), v2.CenterCrop((9, 12))]))
        views, geometry = again(views, start)
        inner = torch.stack(
            torch.meshgrid(*(torch.arange(n) + 0.5 for n in (12, 9)), indexing="xy")
        )
        points = inner.flatten(1).T.expand(3, -1, -1)
        shown = views.flatten(2).transpose(1, 2)
        torch.testing.assert_close(shown, to_source(geometry, points).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("image", "geometry", "error", "message"),
    [
        (images(3), different(2), ShapeError, r"`geometry` has leading axes \(2,\).*\(3,\)"),
        (images(3), different(1), ShapeError, r"\(1,\).*\(3,\)"),
        (images(), different(1), ShapeError, r"\(1,\).*\(\)"),
        (images(2), from_box((0, 0, 9, 9), (20, 26), (9, 9)), ShapeError, r"\(\).*\(2,\)"),
        (PIL.Image.new("L", (26, 20)), different(2), ShapeError, r"\(2,\).*\(\)"),
        (images(2), different(2, (26, 20)), GeometryError, r"\[\[26, 20\]\].*\(20, 26\)"),
        (
            images(2),
            CropGeometry(
                different(2).matrix,
                torch.tensor([[20, 26], [20, 25]], dtype=torch.int32),
                different(2).source_size,
            ),
            GeometryError,
            r"\[20, 25\].*\(20, 26\)",
        ),
        (images(2), different(2).matrix, ShapeError, "CropGeometry"),
        (images(2), different(2)._replace(matrix=torch.zeros(2, 3, 3)), GeometryError, "singular"),
        (
            images(2),
            different(2)._replace(matrix=different(2).matrix.half()),
            GeometryError,
            "half precision",
        ),
    ],
)
def test_what_does_not_fit_together_is_named(image, geometry, error, message):
    with pytest.raises(error, match=message):
        track(v2.RandomHorizontalFlip())(image, geometry)


def test_views_of_different_sizes_cannot_share_a_batch():
    rows = [GeometryTensor.identity(20, 26), GeometryTensor.identity(20, 25)]
    batch = GeometryTensor(torch.stack(rows))
    with pytest.raises(GeometryError, match=r"one view size.*\[20.0, 25.0\]"):
        F.horizontal_flip(batch)
    with pytest.raises(GeometryError, match="one view size"):
        F.horizontal_flip(GeometryTensor(torch.zeros(0, 13, dtype=torch.float64)))
    same = GeometryTensor(torch.stack(rows[:1] * 2))
    with pytest.raises(GeometryError, match="no pixels"):
        F.crop(same, 0, 0, 3, 0)


def test_a_vouched_transform_that_changes_the_batch_is_caught():
    def halve(image):
        return image[: len(image) // 2]

    with pytest.raises(GeometryError, match=r"\(2,\).*\(4,\).*changes the batch"):
        track(v2.Compose([halve]), trust=[halve])(images(4))


def test_a_batch_survives_clone_pickling_and_devices():
    batch = GeometryTensor.from_crop_geometry(different(2))
    for copied in (batch.clone(), copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        again = copied.as_subclass(GeometryTensor)
        assert_same(again.crop_geometry(), batch.crop_geometry())


def test_there_and_back_is_the_same_geometry():
    start = from_matrix(
        torch.tensor([[[1.0, 0.1, 3], [0.2, 2, 1], [0.001, 0, 1]]] * 2), (8, 9), (30, 40)
    )
    assert_same(GeometryTensor.from_crop_geometry(start).crop_geometry(), start)
    one = CropGeometry(*(part[0] for part in start))
    assert_same(GeometryTensor.from_crop_geometry(one).crop_geometry(), one)
