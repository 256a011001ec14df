"""Tracked geometry against what the pixels show: ramps whose value is their own source position."""

import random

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import pipelines
from helpers.ramps import SpoilRing, error_bounds, pixels, planes, predicted_centers, send_ramp
from hypothesis import given, reject
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from local_distill import GeometryError
from local_distill.transforms import GeometryTensor, track

BICUBIC = InterpolationMode.BICUBIC
BILINEAR = InterpolationMode.BILINEAR
LANCZOS = InterpolationMode.LANCZOS
NEAREST = InterpolationMode.NEAREST
REACH = {BILINEAR: 1, BICUBIC: 2, LANCZOS: 3}  # a filter's radius, in the coarser of the two grids
FILTER_ERROR = 0.1  # source px: sampled filters are not quite centred
LINEAR_ERROR = 1e-3  # px: bilinear interpolation of a ramp is exact but for rounding
PIL_CUBIC_ERROR = 3**0.5 / 18  # px: the cubic that PIL warps with (a = −1) bends a ramp; no bias
PER_STEP = {
    "exact": 1e-4,
    "affine": LINEAR_ERROR,
    "perspective": LINEAR_ERROR,
    "resize": FILTER_ERROR,
}


def shown_and_predicted(pipeline, height, width, *, pil, seed):
    sent = send_ramp(pipeline, height, width, pil=pil, seed=seed)
    return sent.shown, sent.predicted, sent.geometry


def filters(pil):
    """The filters that a resize of this image takes in the installed torchvision."""
    return pipelines.FILTERS if pil else pipelines.resize_filters()


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
def resizes(draw, pil):
    """A transform that resamples the whole image; the ring before it keeps its border out."""
    kernel = {"interpolation": draw(st.sampled_from(filters(pil)))}
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
    after=moves(depth=0),
    height=st.integers(9, 41),
    width=st.integers(9, 41),
    pil=st.booleans(),
    seed=seeds,
    data=st.data(),
)
def test_a_resize_among_others_errs_by_its_filter_alone(
    before, after, height, width, pil, seed, data
):
    pipeline = v2.Compose([before, data.draw(resizes(pil)), after])
    shown, predicted, _ = shown_and_predicted(pipeline, height, width, pil=pil, seed=seed)
    if len(shown):
        assert float((shown - predicted).abs().max()) <= FILTER_ERROR


@pytest.mark.parametrize("pil", [False, True])
@pytest.mark.parametrize("interpolation", list(REACH))
@pytest.mark.parametrize("size", [(12, 13), (20, 33), (50, 64), (71, 29)])
def test_a_resize_has_no_bias(size, interpolation, pil):
    if interpolation not in filters(pil):
        pytest.skip("the installed torchvision does not resize tensors with this filter")
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
    pil=st.booleans(),
    seed=seeds,
    data=st.data(),
)
def test_a_random_resized_crop_errs_by_its_filter_alone(height, width, size, pil, seed, data):
    interpolation = data.draw(st.sampled_from(filters(pil)))
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


def drawn(draw, kinds, pil, most=8):
    return pipelines.pipeline(
        lambda options: draw(st.sampled_from(options)),
        lambda low, high: draw(st.integers(low, high)),
        kinds,
        filters(pil),
        most,
    )


@st.composite
def whole_pipelines(draw, kinds):
    """A pipeline of up to eight transforms, a source from 1 px on, and an image kind."""
    image = draw(st.sampled_from(["pil", "float32", "float64"]))
    size = st.one_of(st.integers(1, 3), st.integers(4, 60))
    return drawn(draw, kinds, image == "pil"), draw(size), draw(size), image, draw(seeds)


def send(case):
    pipeline, height, width, image, seed = case
    dtype = torch.float32 if image == "float32" else torch.float64
    try:
        return send_ramp(pipeline, height, width, pil=image == "pil", seed=seed, dtype=dtype)
    except GeometryError as error:
        assert any(text in str(error) for text in ("would", "no finite")), error  # noqa: PT017
        reject()  # a resize that leaves no pixels
    except torch.linalg.LinAlgError:
        reject()  # torchvision itself can't fit a perspective to an image of one pixel


@given(case=whole_pipelines(("exact",)))
def test_whole_pipelines_of_exact_transforms_are_exact(case):
    sent = send(case)
    assert torch.equal(sent.shown, sent.predicted)


@given(case=whole_pipelines(("exact", "affine", "perspective")))
def test_whole_pipelines_with_warps(case):
    sent = send(case)
    seen = sent.predicted.isfinite().all(-1)  # NaN beyond a perspective's horizon
    assert bool((sent.error.abs() <= error_bounds(sent, PER_STEP))[seen].all())


@given(case=whole_pipelines(("exact", "affine", "perspective", "resize")))
def test_whole_pipelines_of_all_kinds(case):
    sent = send(case)
    seen = sent.predicted.isfinite().all(-1)
    assert bool((sent.error.abs() <= error_bounds(sent, PER_STEP))[seen].all())


WARPS = {
    "affine": lambda **how: v2.RandomAffine(40, (0.2, 0.1), (0.7, 1.4), (9, 15, -8, 12), **how),
    "affine about a point": lambda **how: v2.RandomAffine(170, center=(3, 21), **how),
    "rotation": lambda **how: v2.RandomRotation(180, **how),
    "rotation about a point": lambda **how: v2.RandomRotation(180, center=(7.5, 30), **how),
    "rotation that expands": lambda **how: v2.RandomRotation(180, expand=True, **how),
    "rotation that expands about a point": lambda **how: v2.RandomRotation(
        180, expand=True, center=[30, 4], **how
    ),
    "perspective": lambda **how: v2.RandomPerspective(0.5, 1.0, **how),
    "strong perspective": lambda **how: v2.RandomPerspective(0.9, 1.0, **how),
}


def errors_of(warp, image, interpolation, *, runs=12, ring=True):
    """Errors of one warp over several seeds, in px of its input."""
    parts = [SpoilRing()] if ring else []
    pipeline = v2.Compose([*parts, WARPS[warp](interpolation=interpolation)])
    dtype = torch.float32 if image == "float32" else torch.float64
    sent = [
        send_ramp(pipeline, 37, 52, pil=image == "pil", seed=seed, dtype=dtype)
        for seed in range(runs)
    ]
    error = torch.cat([one.error[one.predicted.isfinite().all(-1)] for one in sent])
    assert len(error) > 300 * runs
    return error


@pytest.mark.parametrize("image", ["pil", "float32", "float64"])
@pytest.mark.parametrize("warp", WARPS)
def test_bilinear_warps_are_exact_but_for_rounding(warp, image):
    error = errors_of(warp, image, BILINEAR)
    assert float(error.abs().max()) <= LINEAR_ERROR
    assert float(error.mean(0).abs().max()) <= 1e-5


@pytest.mark.parametrize("image", ["pil", "float32", "float64"])
@pytest.mark.parametrize("warp", WARPS)
def test_nearest_warps_are_off_by_half_a_pixel_at_most_without_bias(warp, image):
    # 1e-3: PIL steps over the image in 16 binary places
    error = errors_of(warp, image, NEAREST, ring=False)
    assert float(error.abs().max()) <= 0.5 + LINEAR_ERROR
    # uniform in ± ½ px would have a mean within 0.29 / √n
    assert float(error.mean(0).abs().max()) <= 0.02


@pytest.mark.parametrize("warp", WARPS)
def test_pil_cubic_warps_bend_a_ramp_without_bias(warp):
    error = errors_of(warp, "pil", BICUBIC)
    assert float(error.abs().max()) <= PIL_CUBIC_ERROR + LINEAR_ERROR
    assert float(error.mean(0).abs().max()) <= 0.01


@pytest.mark.parametrize("interpolation", [BILINEAR, NEAREST])
@pytest.mark.parametrize("warp", WARPS)
def test_eight_bit_tensors_follow_the_same_geometry(warp, interpolation):
    # the value is the index, so half a pixel less; rounded once when it is put back into 8 bits
    height, width = 37, 52
    tracked = track(WARPS[warp](interpolation=interpolation))
    x, y, ones = (plane.to(torch.uint8) for plane in planes(height, width))
    image = torch.stack((x, y, 200 * ones))
    pil = PIL.Image.fromarray(image.permute(1, 2, 0).numpy())
    for picture in (image, pil):
        torch.manual_seed(4)
        view, geometry = tracked(picture)
        if not isinstance(view, torch.Tensor):
            view = F.pil_to_tensor(view)
        predicted = predicted_centers(geometry)
        # a full pixel inside, as PIL repeats the border where a tensor darkens it
        inner = torch.tensor([width, height]) - 1
        clean = ((predicted > 1) & (predicted < inner)).all(-1) & (view[2] == 200)
        # PIL cuts fractions off instead of rounding: half a value less on the average
        cut = 0.5 if picture is pil and interpolation == BILINEAR else 0.0
        error = (view[:2].permute(1, 2, 0) + 0.5 + cut - predicted)[clean]
        assert len(error) > 200
        assert float(error.abs().max()) <= 0.5 + LINEAR_ERROR


@pytest.mark.parametrize("pil", [False, True])
@pytest.mark.parametrize("angle", [0, 90, 180, 270, -90, 450])
@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("size", [(7, 7), (6, 9), (8, 5), (1, 2), (1, 1)])
def test_quarter_turns_are_whole_where_torchvision_transposes(size, expand, angle, pil):
    sent = send_ramp(v2.RandomRotation((angle, angle), expand=expand), *size, pil=pil, seed=0)
    if expand or size[0] == size[1] or angle % 180 == 0:
        assert len(sent.shown) == size[0] * size[1]
        assert torch.equal(sent.shown, sent.predicted)
    else:
        # Not transposed but sampled; where the sides differ by an odd number all positions lie
        # between two pixels, and PIL takes the later one.
        assert float(sent.error.abs().amax()) <= 0.5 + LINEAR_ERROR


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    angle=st.one_of(st.floats(-720, 720), st.integers(-8, 8).map(lambda n: 45.0 * n)),
    center=st.one_of(st.none(), st.tuples(st.floats(-50, 300), st.floats(-50, 300))),
    pil=st.booleans(),
)
def test_an_expanding_rotation_has_the_size_that_is_said(height, width, angle, center, pil):
    # Tracked raises where the sizes differ
    rotate = v2.RandomRotation((angle, angle), expand=True, center=center)
    image = PIL.Image.new("L", (width, height)) if pil else torch.zeros(1, height, width)
    view, geometry = track(rotate)(image)
    size = [view.height, view.width] if pil else list(view.shape[1:])
    assert geometry.view_size.tolist() == size


@pytest.mark.parametrize(
    ("height", "width", "angle", "center"),
    [
        (31, 30, 45, (52, 9)),
        (59, 5, 135, (47, 17)),
        (21, 60, 120, (40, 21)),
        (59, 52, -120, (52, 39)),
    ],
)
def test_the_size_is_said_where_pil_and_tensors_expand_differently(height, width, angle, center):
    rotate = v2.RandomRotation((angle, angle), expand=True, center=center)
    _, beside_pil = track(rotate)(PIL.Image.new("L", (width, height)))
    _, beside_tensor = track(rotate)(torch.zeros(1, height, width))
    # a corner on a whole number, rounded up by the one and cut off by the other
    assert beside_pil.view_size.tolist() != beside_tensor.view_size.tolist()
    # the image's kind as it is at the rotation, not as it came in
    for convert, same in ((v2.ToImage(), beside_tensor), (v2.ToPILImage(), beside_pil)):
        start = torch.zeros(1, height, width, dtype=torch.uint8)
        image = F.to_pil_image(start) if same is beside_tensor else start
        _, geometry = track(v2.Compose([convert, rotate]))(image)
        assert geometry.view_size.tolist() == same.view_size.tolist()
        assert torch.equal(geometry.matrix, same.matrix)


@pytest.mark.parametrize("pil", [False, True])
def test_perspective_by_points_is_perspective_by_coefficients(pil):
    start, end = [[0, 0], [29, 0], [29, 19], [0, 19]], [[3, 1], [27, 4], [25, 17], [2, 18]]

    geometry = F.perspective(GeometryTensor.identity(20, 30), start, end).crop_geometry()
    for plane, axis in zip(planes(20, 30)[:2], (0, 1), strict=True):
        image = PIL.Image.fromarray(plane.numpy().astype(np.float32)) if pil else plane[None]
        view = pixels(F.perspective(image, start, end))
        predicted = predicted_centers(geometry)
        inner = ((predicted > 1) & (predicted < torch.tensor([29, 19]))).all(-1)
        assert int(inner.sum()) > 200
        error = view[inner] - predicted[inner][:, axis]
        assert float(error.abs().max()) <= LINEAR_ERROR


def test_whole_pipelines_are_not_vacuous():
    # the properties above say nothing of a pipeline that leaves no clean pixel
    rng, kept = random.Random(0), []
    for _ in range(60):
        kinds = ("exact", "affine", "perspective", "resize")
        pipeline = pipelines.pipeline(rng.choice, rng.randint, kinds, filters(False))
        try:
            sent = send_ramp(pipeline, 40, 50, pil=False, seed=rng.randint(0, 99))
        except GeometryError:
            continue
        kept.append(len(sent.shown))
    assert sum(count > 20 for count in kept) > 30
