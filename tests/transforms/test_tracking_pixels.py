"""Tracked geometry against what the pixels show: ramps whose value is their own source position."""

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms import InterpolationMode, v2

from local_distill import to_source
from local_distill.transforms import track

BICUBIC = InterpolationMode.BICUBIC
BILINEAR = InterpolationMode.BILINEAR
LANCZOS = InterpolationMode.LANCZOS
REACH = {BILINEAR: 1, BICUBIC: 2, LANCZOS: 3}  # a filter's radius, in the coarser of the two grids
FILTER_ERROR = 0.1  # source px: sampled filters are not quite centred


class SpoilRing(nn.Module):
    """Sets the outermost pixels to NaN.

    Resampling clamps its filter at the border, which bends a ramp there. With this before it, every
    view pixel whose filter reaches the border is NaN and takes no part in the comparison.
    """

    def forward(self, image):
        if isinstance(image, PIL.Image.Image):
            array = np.array(image)
            array[[0, -1]] = np.nan
            array[:, [0, -1]] = np.nan
            return PIL.Image.fromarray(array)
        image = image.clone()
        image[..., [0, -1], :] = torch.nan
        image[..., :, [0, -1]] = torch.nan
        return image


def planes(height, width):
    """The x and the y of every pixel's centre, and ones: all that padding spoils is not one."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return [x + 0.5, y + 0.5, torch.ones(height, width)]


def pixels(view):
    """(h, w) float64 of a view with one channel."""
    view = view if isinstance(view, torch.Tensor) else torch.from_numpy(np.array(view))
    return view.double().reshape(view.shape[-2:])


def predicted_centers(geometry):
    """(h, w, 2) source position (x, y) of every view pixel's centre."""
    height, width = geometry.view_size.tolist()
    centers = torch.stack(planes(height, width)[:2], -1).reshape(-1, 2)
    return to_source(geometry, centers).reshape(height, width, 2)


def shown_and_predicted(pipeline, height, width, *, pil, seed):
    """Per view pixel: the source position its value shows, the one its geometry predicts, (h·w, 2).

    Only pixels that show the source alone: no padding, no spoiled border.
    """
    tracked = track(pipeline, trust=[SpoilRing])
    outputs = []
    for plane in planes(height, width):
        image = plane.to(torch.float64)[None]
        if pil:
            image = PIL.Image.fromarray(plane.numpy().astype(np.float32))
        torch.manual_seed(seed)
        view, geometry = tracked(image)
        outputs.append(pixels(view))
    x, y, ones = outputs
    assert tuple(geometry.view_size.tolist()) == tuple(ones.shape)
    assert tuple(geometry.source_size.tolist()) == (height, width)
    predicted = predicted_centers(geometry).double().reshape(-1, 2)
    shown = torch.stack((x, y), -1).reshape(-1, 2)
    clean = ((ones - 1).abs() < 1e-6).reshape(-1)  # False for NaN
    return shown[clean], predicted[clean], geometry


sides = st.integers(5, 41)
seeds = st.integers(0, 2**31)


def moving(draw):
    """One transform that moves pixels without resampling them."""
    return draw(
        st.one_of(
            st.builds(v2.CenterCrop, st.tuples(sides, sides)),
            st.builds(v2.CenterCrop, st.integers(1, 50)),
            st.builds(v2.Pad, st.integers(0, 4)),
            st.builds(v2.Pad, st.lists(st.integers(0, 5), min_size=2, max_size=2)),
            st.builds(v2.Pad, st.lists(st.integers(0, 5), min_size=4, max_size=4)),
            st.builds(v2.RandomCrop, st.tuples(sides, sides), pad_if_needed=st.just(True)),
            st.builds(
                v2.RandomCrop,
                st.tuples(st.integers(1, 5), st.integers(1, 5)),
                padding=st.sampled_from([None, 2, [1, 3], [0, 1, 2, 3]]),
                pad_if_needed=st.just(True),
            ),
            st.builds(v2.RandomHorizontalFlip),
            st.builds(v2.RandomVerticalFlip),
            st.builds(v2.RandomHorizontalFlip, st.just(1.0)),
            st.builds(v2.RandomVerticalFlip, st.just(1.0)),
            st.builds(v2.RandomZoomOut, side_range=st.just((1.0, 1.7))),
        )
    )


@st.composite
def moves(draw, depth=2):
    """A pipeline of such transforms, nested in v2's containers."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        if depth and draw(st.booleans()):
            parts.append(draw(moves(depth=depth - 1)))
        else:
            parts.append(moving(draw))
    container = draw(
        st.sampled_from(
            [
                v2.Compose,
                v2.RandomApply,
                v2.RandomChoice,
                v2.RandomOrder,
                lambda p: nn.Sequential(*p),
            ]
        )
    )
    return container(parts)


@given(pipeline=moves(), height=sides, width=sides, pil=st.booleans(), seed=seeds)
def test_crops_flips_and_pads_are_exact(pipeline, height, width, pil, seed):
    shown, predicted, _ = shown_and_predicted(pipeline, height, width, pil=pil, seed=seed)
    torch.testing.assert_close(shown, predicted, rtol=0, atol=0)


@given(
    padding=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    pipeline=moves(depth=0),
    height=sides,
    width=sides,
    pil=st.booleans(),
    seed=seeds,
)
def test_padding_around_the_source_is_what_is_predicted_outside(
    padding, pipeline, height, width, pil, seed
):
    # Only padding around the whole source can be told from its position: what a crop cuts off and
    # a later pad fills again lies inside the source, where the view shows nothing of it.
    whole = v2.Compose([v2.Pad(padding), v2.CenterCrop((50, 50)), v2.RandomHorizontalFlip()])
    tracked = track(whole)
    ones = torch.ones(1, height, width)
    torch.manual_seed(seed)
    view, geometry = tracked(PIL.Image.fromarray(ones[0].numpy()) if pil else ones)
    x, y = predicted_centers(geometry).unbind(-1)
    inside = (x > 0) & (x < width) & (y > 0) & (y < height)
    assert torch.equal(inside, pixels(view) == 1)
    torch.manual_seed(seed)
    view, geometry = track(pipeline)(PIL.Image.fromarray(ones[0].numpy()) if pil else ones)
    x, y = predicted_centers(geometry).unbind(-1)
    inside = (x > 0) & (x < width) & (y > 0) & (y < height)
    assert bool(inside[pixels(view) == 1].all())


@pytest.mark.parametrize("mode", ["edge", "reflect", "symmetric"])
def test_repeated_and_reflected_padding_lies_outside(mode):
    tracked = track(v2.Pad([3, 1, 2, 4], padding_mode=mode))
    for plane, axis in zip(planes(9, 13)[:2], (0, 1), strict=True):
        view, geometry = tracked(plane[None])
        predicted = predicted_centers(geometry)
        size = torch.tensor([13, 9])
        inside = ((predicted > 0) & (predicted < size)).all(-1)
        assert int(inside.sum()) == 9 * 13
        assert torch.equal(view[0][inside], predicted[inside][:, axis])


@st.composite
def resizes(draw):
    """A transform that resamples the whole image; the ring before it keeps its border out."""
    kernel = {"interpolation": draw(st.sampled_from(list(REACH)))}
    side, pair = st.integers(4, 60), st.tuples(st.integers(4, 60), st.integers(4, 60))
    resize = draw(
        st.one_of(
            st.builds(v2.Resize, pair, **{k: st.just(v) for k, v in kernel.items()}),
            st.builds(v2.Resize, side, **{k: st.just(v) for k, v in kernel.items()}),
            st.builds(v2.Resize, st.integers(4, 30), max_size=st.integers(31, 60)),
            st.builds(v2.Resize, st.none(), max_size=st.integers(41, 60)),
            st.builds(v2.ScaleJitter, pair, st.just((0.5, 2.0))),
            st.builds(v2.RandomShortestSize, st.lists(st.integers(8, 40), min_size=2, max_size=3)),
            st.builds(v2.RandomResize, st.integers(8, 20), st.integers(21, 50)),
        )
    )
    return v2.Compose([SpoilRing(), resize])


@given(
    before=moves(depth=0),
    resize=resizes(),
    after=moves(depth=0),
    height=st.integers(9, 41),
    width=st.integers(9, 41),
    pil=st.booleans(),
    seed=seeds,
)
def test_a_resize_among_others_errs_by_its_filter_alone(
    before, resize, after, height, width, pil, seed
):
    pipeline = v2.Compose([before, resize, after])
    shown, predicted, _ = shown_and_predicted(pipeline, height, width, pil=pil, seed=seed)
    if len(shown):
        assert float((shown - predicted).abs().max()) <= FILTER_ERROR


@pytest.mark.parametrize("pil", [False, True])
@pytest.mark.parametrize("interpolation", list(REACH))
@pytest.mark.parametrize("size", [(12, 13), (20, 33), (50, 64), (71, 29)])
def test_a_resize_has_no_bias(size, interpolation, pil):
    pipeline = v2.Compose([SpoilRing(), v2.Resize(size, interpolation)])
    shown, predicted, _ = shown_and_predicted(pipeline, 45, 37, pil=pil, seed=0)
    error = shown - predicted
    assert len(shown) > 20
    assert float(error.abs().max()) <= FILTER_ERROR
    # the clean pixels lie symmetrically, so what is left of the mean is no ripple but a shift
    assert float(error.mean(0).abs().max()) <= 1e-5


@pytest.mark.parametrize("interpolation", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("size", [(7, 11), (71, 60)])
def test_a_resize_without_antialias_has_no_bias(size, interpolation):
    pipeline = v2.Compose([SpoilRing(), v2.Resize(size, interpolation, antialias=False)])
    shown, predicted, _ = shown_and_predicted(pipeline, 45, 37, pil=False, seed=0)
    error = shown - predicted
    assert len(shown) > 20
    assert float(error.abs().max()) <= FILTER_ERROR
    assert float(error.mean(0).abs().max()) <= 1e-5


@pytest.mark.parametrize("pil", [False, True])
def test_nearest_exact_shows_the_pixel_that_is_predicted(pil):
    pipeline = v2.Resize((20, 71), InterpolationMode.NEAREST_EXACT)
    shown, predicted, _ = shown_and_predicted(pipeline, 45, 37, pil=pil, seed=0)
    assert len(shown) == 20 * 71
    assert float((shown - predicted).abs().max()) <= 0.5 + 1e-5


@given(
    height=st.integers(12, 60),
    width=st.integers(12, 60),
    size=st.tuples(st.integers(4, 70), st.integers(4, 70)),
    interpolation=st.sampled_from(list(REACH)),
    pil=st.booleans(),
    seed=seeds,
)
def test_a_random_resized_crop_errs_by_its_filter_alone(
    height, width, size, interpolation, pil, seed
):
    crop = v2.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=interpolation)
    pipeline = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()])
    shown, predicted, geometry = shown_and_predicted(pipeline, height, width, pil=pil, seed=seed)
    # Here the crop's border, where the filter is clamped, is inside the transform: leave out the
    # view pixels within a filter's reach of it, on both axes.
    far = torch.ones(size, dtype=torch.bool)
    for axis, side in enumerate(size):
        scale = float(geometry.matrix[1 - axis, 1 - axis].abs())
        reach = REACH[interpolation] * max(1.0, 1 / scale)
        center = torch.arange(side) + 0.5
        inner = (center > reach) & (center < side - reach)
        far &= inner[:, None] if axis == 0 else inner
    error = (shown - predicted)[far.reshape(-1)]
    assert len(shown) == far.numel()
    if len(error):
        assert float(error.abs().max()) <= FILTER_ERROR
        assert float(error.mean(0).abs().max()) <= 1e-4


@pytest.mark.parametrize("pil", [False, True])
def test_two_resizes_compose(pil):
    # the second filter's error is in px of the first's output, each 3 source px wide
    pipeline = v2.Compose(
        [
            SpoilRing(),
            v2.Resize((30, 20)),
            v2.CenterCrop((24, 14)),
            SpoilRing(),
            v2.Resize((41, 33)),
        ]
    )
    shown, predicted, _ = shown_and_predicted(pipeline, 90, 61, pil=pil, seed=0)
    assert len(shown) > 100
    assert float((shown - predicted).abs().max()) <= FILTER_ERROR * (1 + 61 / 20)
    assert float((shown - predicted).mean(0).abs().max()) <= 1e-4
