"""lightly's pixels against the geometry read from its grid and its location."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightly.transforms.random_crop_and_flip_with_grid import RandomResizedCropAndFlip
from lightly.transforms.vicregl_transform import VICRegLTransform
from torchvision import transforms as v1

from local_distill import CropGeometry, GeometryError, ShapeError, from_box
from local_distill.transforms.adapters import (
    from_lightly_grid,
    from_lightly_location,
    from_vicregl_grid,
)

pytestmark = [  # lightly calls torchvision v2 in the old way
    pytest.mark.filterwarnings(f"ignore:The function `{name}:UserWarning")
    for name in (r"get_image_size\(\.\.\.\)` is deprecated", r"to_tensor\(\.\.\.\)` is deprecated")
]
EXACT = 2e-3  # source px: float32 images
FILTER = 0.1  # source px: torchvision's antialiasing filter is not quite centred


def limit(geometry):
    """torchvision antialiases only where it makes smaller."""
    smaller = geometry.matrix.diagonal(dim1=-2, dim2=-1)[..., :2].abs() > 1
    return FILTER if bool(smaller.any()) else EXACT


sides = st.integers(24, 60)
seeds = st.integers(0, 2**31)
cells = st.integers(2, 9)


class Noting(RandomResizedCropAndFlip):
    """lightly's transform, which shows its location as well."""

    def location_to_NxN_grid(self, location):
        self.location = location
        return super().location_to_NxN_grid(location=location)


@given(height=sides, width=sides, seed=seeds, size=st.integers(20, 90), grid_size=cells)
def test_the_grid_agrees_with_the_pixels(height, width, seed, size, grid_size, ramps, agreement):
    transform = Noting(grid_size, size, crop_min_scale=0.2, crop_max_scale=1.0)
    torch.manual_seed(seed)
    view, grid = transform(ramps(height, width).float())
    geometry = from_lightly_grid(grid, (size, size), (height, width))
    assert agreement(view, geometry).error < limit(geometry)
    direct = from_lightly_location(transform.location, (size, size))
    torch.testing.assert_close(direct.matrix, geometry.matrix, rtol=0, atol=1e-5)
    assert direct.source_size.tolist() == [height, width]


def test_pixels_are_compared(ramps, agreement):
    torch.manual_seed(0)
    view, grid = RandomResizedCropAndFlip(7, 90, 0.3, 0.6)(ramps(53, 61).float())
    assert agreement(view, from_lightly_grid(grid, (90, 90), (53, 61))).pixels > 1000


@pytest.mark.parametrize("grid_size", [2, 3, 7, 14])
def test_lightlys_own_grid_is_a_whole_cell_off_at_the_last_token(grid_size):
    """The reason why the grid is not taken as it is."""
    transform = RandomResizedCropAndFlip(grid_size, 96, hf_prob=0.0, vf_prob=0.0)
    torch.manual_seed(0)
    _, grid = transform(torch.zeros(3, 203, 301))
    scale = from_lightly_grid(grid, (grid_size, grid_size), (203, 301)).matrix  # one px, one cell
    true = scale[0, 0] * (torch.arange(grid_size) + 0.5) + scale[0, 2]
    off = (grid[0, :, 0] - true) / scale[0, 0]
    torch.testing.assert_close(off, torch.linspace(0, 1, grid_size), rtol=0, atol=1e-4)


def test_all_views_of_vicregl_agree_with_their_pixels(ramps, agreement):
    plain = {"cj_prob": 0.0, "random_gray_scale": 0.0, "local_solarize_prob": 0.0}
    blur = {"global_gaussian_blur_prob": 0.0, "local_gaussian_blur_prob": 0.0}
    transform = VICRegLTransform(80, 48, normalize=None, hf_prob=0.5, vf_prob=0.5, **plain, **blur)
    compared = 0
    for seed in range(4):
        torch.manual_seed(seed)
        scale = torch.tensor([90.0, 90, 1]).reshape(3, 1, 1)  # colours are clamped to [0, 1]
        samples = [transform(ramps(61, 90).float() / scale) for _ in range(2)]
        stacked = [torch.stack(each) for each in zip(*samples, strict=True)]  # as a loader does
        views = len(stacked) // 2  # all views first, then their grids
        for batch, grids in zip(stacked[:views], stacked[views:], strict=True):
            geometry = from_lightly_grid(grids, batch.shape[-2:], (61, 90))
            for index, view in enumerate(batch):
                one = CropGeometry(*(field[index] for field in geometry))
                found = agreement(view * scale, one)
                assert found.error < limit(one) + 90 / 255  # lightly makes images 8-bit
                compared += found.pixels
    assert compared > 10_000


def test_a_source_of_65535_pixels_is_solved_to_the_pixel():
    transform = Noting(7, 224, crop_min_scale=0.01, crop_max_scale=0.9)
    torch.manual_seed(0)
    for _ in range(50):
        _, grid = transform(torch.zeros(1, 1, 1).expand(1, 65535, 40001)[:, :8, :8])
        location = transform.location
        location.left, location.width = 40001 - 3 * location.width, 3 * location.width
        location.top, location.height = 65535 - 5 * location.height, 5 * location.height
        location.image_height, location.image_width = 65535, 40001
        grid = RandomResizedCropAndFlip.location_to_NxN_grid(transform, location)
        geometry = from_lightly_grid(grid, (224, 224), (65535, 40001))
        expected = from_lightly_location(location, (224, 224))
        torch.testing.assert_close(geometry.matrix, expected.matrix, rtol=0, atol=0)


def vicregl_grid(top, left, height, width, cells, flip):
    """What the authors' code notes, as a naive loop: (y, x) of each cell's middle."""
    grid = torch.zeros(cells, cells, 2)
    for row in range(cells):
        for column in range(cells):
            shown = cells - 1 - column if flip else column
            grid[row, column, 0] = top + height * (row + 0.5) / cells
            grid[row, column, 1] = left + width * (shown + 0.5) / cells
    return grid


@given(height=sides, width=sides, seed=seeds, flip=st.booleans(), grid_size=cells)
def test_the_authors_grid_agrees_with_the_pixels(
    height, width, seed, flip, grid_size, ramps, agreement
):
    image = ramps(height, width)
    torch.manual_seed(seed)
    crop = v1.RandomResizedCrop.get_params(image, [0.3, 1.0], [0.75, 1.33])
    view = v1.functional.resized_crop(image, *crop, [40, 40], antialias=True)
    view = v1.functional.hflip(view) if flip else view
    grid = vicregl_grid(*crop, grid_size, flip)
    geometry = from_vicregl_grid(grid, (40, 40), (height, width))
    assert agreement(view, geometry).error < limit(geometry)


def test_the_other_kind_of_grid_is_refused():
    box = from_box((3.0, 4.0, 23.0, 18.0), (7, 7), (30, 40))
    torch.manual_seed(0)
    _, lightly = RandomResizedCropAndFlip(7, 40)(torch.zeros(3, 61, 90))
    authors = vicregl_grid(4, 3, 14, 20, 7, False)
    with pytest.raises(GeometryError, match="is it for from_lightly_grid"):
        from_vicregl_grid(lightly, (40, 40), (61, 90))
    with pytest.raises(GeometryError, match="is it for from_vicregl_grid"):
        from_lightly_grid(authors, (40, 40), (61, 90))
    torch.testing.assert_close(from_vicregl_grid(authors, (7, 7), (30, 40)).matrix, box.matrix)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda grid: grid / 907, "normalised"),
        (lambda grid: grid.half(), "half precision"),
        (lambda grid: grid * torch.tensor([1.0, float("nan")]), "not one of this kind"),
        (lambda grid: grid + 900, "reaches out of a source"),
    ],
)
def test_a_grid_that_was_changed_is_refused(change, message):
    torch.manual_seed(1)
    _, grid = RandomResizedCropAndFlip(7, 40, 0.3, 0.4)(torch.zeros(3, 613, 907))
    with pytest.raises(GeometryError, match=message):
        from_lightly_grid(change(grid), (40, 40), (613, 907))


def test_shapes_that_are_no_grid_are_refused():
    with pytest.raises(ShapeError, match=r"\(…, rows, cols, 2\), got \(7, 7, 3\)"):
        from_lightly_grid(torch.zeros(7, 7, 3), (40, 40), (61, 90))
    with pytest.raises(ShapeError, match="at least 2 × 2 cells"):
        from_lightly_grid(torch.zeros(1, 1, 2), (40, 40), (61, 90))
    with pytest.raises(ShapeError, match="got list"):
        from_lightly_grid([[1.0]], (40, 40), (61, 90))
