"""albumentations' pixels against the geometry read from its replay."""

import json
import os

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from local_distill import ConfigError, GeometryError, from_box
from local_distill.transforms.adapters import from_albumentations

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else importing it asks the network
import albumentations as A

EXACT = 1e-3  # source px: float32 images
WARPED = 0.04  # before OpenCV 5, its warps know 32 places within a pixel
SCALE = 64  # of the ramps, so that they stay in [0, 1]

side = st.integers(12, 40)
shapes = st.tuples(st.integers(24, 50), st.integers(24, 50))
seeds = st.integers(0, 2**31)
border = st.sampled_from([cv2.BORDER_CONSTANT, cv2.BORDER_REFLECT_101])
position = st.sampled_from(["center", "top_left", "bottom_right", "random"])

MOVING = {
    "RandomCrop": st.builds(
        A.RandomCrop, side, side, st.just(True), pad_position=position, border_mode=border
    ),
    "CenterCrop": st.builds(A.CenterCrop, side, side, st.just(True), pad_position=position),
    "Crop": st.builds(A.Crop, st.just(2), st.just(3), side, side, st.just(True), position),
    "RandomCropFromBorders": st.builds(A.RandomCropFromBorders, st.just(0.3)),
    "PadIfNeeded": st.builds(A.PadIfNeeded, side, side, position=position, border_mode=border),
    "Pad": st.builds(A.Pad, st.sampled_from([0, 3, (2, 5), (1, 2, 3, 4)])),
    "CropAndPad": st.builds(
        A.CropAndPad, percent=st.just((-0.2, 0.2)), keep_size=st.just(False), border_mode=border
    ),
    "CropAndPad px": st.builds(A.CropAndPad, px=st.just((-5, 6)), keep_size=st.just(False)),
    "HorizontalFlip": st.builds(A.HorizontalFlip),
    "VerticalFlip": st.builds(A.VerticalFlip),
    "Transpose": st.builds(A.Transpose),
    "D4": st.builds(A.D4),
    "SquareSymmetry": st.builds(A.SquareSymmetry),
    "RandomRotate90": st.builds(A.RandomRotate90),
}
interpolation = st.sampled_from([cv2.INTER_LINEAR, cv2.INTER_LINEAR_EXACT])
RESIZING = {
    "Resize": st.builds(A.Resize, side, side, interpolation=interpolation),
    "RandomResizedCrop": st.builds(
        A.RandomResizedCrop, st.tuples(side, side), st.just((0.3, 1.0)), interpolation=interpolation
    ),
    "RandomSizedCrop": st.builds(A.RandomSizedCrop, st.just((12, 22)), st.tuples(side, side)),
    "RandomScale": st.builds(A.RandomScale, st.just((-0.4, 0.8))),
    "LongestMaxSize": st.builds(A.LongestMaxSize, side),
    "LongestMaxSize hw": st.builds(A.LongestMaxSize, max_size_hw=st.tuples(side, side)),
    "SmallestMaxSize": st.builds(A.SmallestMaxSize, side),
    "CropAndPad keep": st.builds(A.CropAndPad, percent=st.just((-0.2, 0.2)), border_mode=border),
}
fit = st.booleans()
WARPING = {
    "Rotate": st.builds(A.Rotate, crop_border=fit, border_mode=border),
    "SafeRotate": st.builds(A.SafeRotate),
    "Affine": st.builds(
        A.Affine,
        st.just((0.7, 1.4)),
        st.just((-0.2, 0.2)),
        rotate=st.just((-50, 50)),
        shear=st.just((-15, 15)),
        fit_output=fit,
        border_mode=border,
    ),
    "Perspective": st.builds(A.Perspective, keep_size=st.booleans(), fit_output=fit),
}
EVERYTHING = {**MOVING, **RESIZING, **WARPING}


def unchanged(image, **_):
    return image


def run(pipeline, shape, seed, ramps):
    """(view as a (3, h, w) tensor of ramps, its replay)."""
    image = ramps(*shape).permute(1, 2, 0).numpy() / (SCALE, SCALE, 1)
    pipeline.set_random_seed(seed)
    result = pipeline(image=image.astype(np.float32))
    view = torch.from_numpy(result["image"]).permute(2, 0, 1).double()
    return view * torch.tensor([SCALE, SCALE, 1]).reshape(3, 1, 1), result["replay"]


def error(pipeline, shape, seed, ramps, agreement, margin=None):
    view, replay = run(pipeline, shape, seed, ramps)
    once = ["SomeOf", "RandomOrder"]  # these here have replace=False
    geometry = from_albumentations(replay, shape, tuple(view.shape[-2:]), trust=once)
    return agreement(view, geometry, margin)


@pytest.mark.parametrize("name", EVERYTHING)
def test_one_transform_agrees_with_its_pixels(name, ramps, agreement):
    compared = 0

    @given(transform=EVERYTHING[name], shape=shapes, seed=seeds)
    def holds(transform, shape, seed):
        nonlocal compared
        transform.p = 0.8
        found = error(A.ReplayCompose([transform]), shape, seed, ramps, agreement)
        assert found.error < (WARPED if name in WARPING else EXACT)
        compared += found.pixels

    holds()
    assert compared > 1000


@pytest.mark.parametrize("name", ["RandomResizedCrop", "Affine"])
def test_cubic_agrees_but_for_the_filter(name, ramps, agreement):
    make = {
        "RandomResizedCrop": lambda: A.RandomResizedCrop((41, 38), interpolation=cv2.INTER_CUBIC),
        "Affine": lambda: A.Affine(rotate=(-40, 40), interpolation=cv2.INTER_CUBIC, p=1),
    }[name]
    for seed in range(20):
        found = error(A.ReplayCompose([make()]), (47, 33), seed, ramps, agreement, margin=8)
        assert found.error < 0.08


def test_area_and_nearest_agree_but_for_the_filter(ramps, agreement):
    for interpolation, shape in ((cv2.INTER_AREA, (17, 15)), (cv2.INTER_NEAREST_EXACT, (61, 70))):
        for seed in range(20):
            steps = [A.RandomResizedCrop(shape, (0.6, 0.9), interpolation=interpolation)]
            found = error(A.ReplayCompose(steps), (47, 33), seed, ramps, agreement, margin=4)
            assert found.error < (0.13 if interpolation == cv2.INTER_AREA else 0.5 + EXACT)
            assert found.pixels


containers = st.sampled_from(
    [
        lambda steps, p: A.Compose(steps, p=p),
        lambda steps, p: A.Sequential(steps, p=p),
        lambda steps, p: A.OneOf(steps, p=p),
        lambda steps, p: A.SomeOf(steps, n=max(1, len(steps) - 1), p=p),
        lambda steps, p: A.RandomOrder([A.Sequential(steps), A.ToGray(p=0.0)], n=2, p=p),
    ]
)


@st.composite
def nested(draw, depth=2):
    steps = []
    for _ in range(draw(st.integers(1, 3))):
        if depth and draw(st.booleans()):
            steps.append(draw(nested(depth=depth - 1)))
        else:
            steps.append(draw(st.one_of(*EVERYTHING.values())))
    steps.append(A.GaussNoise(std_range=(0.0, 0.0), p=0.5))
    return draw(containers)(steps, draw(st.sampled_from([0.5, 1.0])))


@given(pipeline=nested(), shape=shapes, seed=seeds)
def test_nested_containers_agree_with_their_pixels(pipeline, shape, seed, ramps, agreement):
    found = error(A.ReplayCompose([pipeline]), shape, seed, ramps, agreement, margin=10)
    assert found.error < 4 * WARPED


def test_nothing_applied_is_the_whole_image():
    result = A.ReplayCompose([A.HorizontalFlip(p=0.0)])(image=np.zeros((20, 30, 3), np.uint8))
    geometry = from_albumentations(result["replay"], (20, 30), (20, 30))
    expected = from_box((0.0, 0, 30, 20), (20, 30), (20, 30))
    torch.testing.assert_close(geometry.matrix, expected.matrix, rtol=0, atol=0)


def test_a_replay_out_of_json_gives_the_same_geometry():
    pipeline = A.ReplayCompose(
        [A.RandomResizedCrop((8, 9)), A.HorizontalFlip(), A.RandomRotate90()]
    )
    replay = pipeline(image=np.zeros((20, 30, 3), np.uint8))["replay"]
    view = (8, 9) if replay["transforms"][2]["params"]["factor"] % 2 == 0 else (9, 8)
    through_json = json.loads(json.dumps(replay))
    expected = from_albumentations(replay, (20, 30), view)
    found = from_albumentations(through_json, (20, 30), view)
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=0, atol=0)


@pytest.mark.parametrize(
    "refused",
    [
        A.ElasticTransform(p=0.0),
        A.GridDistortion(p=0.0),
        A.OpticalDistortion(p=0.0),
        A.ThinPlateSpline(p=0.0),
        A.GridElasticDeform((3, 3), 2, p=0.0),
        A.RandomGridShuffle(p=0.0),
        A.Morphological(p=0.0),
        A.Lambda(name="mine", image=unchanged, p=0.0),
        A.SelectiveChannelTransform([A.HorizontalFlip()], p=0.0),
    ],
    ids=lambda transform: type(transform).__name__,
)
def test_what_a_replay_cannot_say_is_refused_by_name(refused):
    pipeline = A.ReplayCompose([A.OneOf([refused, A.HorizontalFlip(p=1.0)], p=1.0)])
    replay = pipeline(image=np.zeros((20, 30, 3), np.uint8))["replay"]
    with pytest.raises(ConfigError, match=type(refused).__name__):
        from_albumentations(replay, (20, 30), (20, 30))


def test_a_transform_can_be_vouched_for():
    same = A.Lambda(name="mine", image=unchanged, p=1.0)
    replay = A.ReplayCompose([same])(image=np.zeros((20, 30, 3), np.uint8))["replay"]
    assert from_albumentations(replay, (20, 30), (20, 30), trust=["Lambda"]).matrix.shape == (3, 3)


def refusal(pipeline, **settings):
    replay = A.ReplayCompose(pipeline)(image=np.zeros((20, 30, 3), np.uint8))["replay"]
    with pytest.raises(ConfigError) as caught:
        from_albumentations(replay, (20, 30), (20, 30), **settings)
    return str(caught.value)


def test_what_hides_the_order_or_the_parameters_is_refused():
    flip, swap = A.HorizontalFlip(p=1.0), A.Transpose(p=0.0)
    found = refusal([A.RandomOrder([flip, swap], n=2)], trust=["RandomOrder"])
    assert "RandomOrder with HorizontalFlip and Transpose" in found
    found = refusal([A.SomeOf([flip, A.NoOp(p=1.0)], n=5, replace=True)])
    assert "whether it may apply one twice" in found
    assert "one object that stands twice" in refusal([flip, flip])


def test_colours_may_be_drawn_in_any_order():
    pipeline = A.ReplayCompose([A.RandomOrder([A.ToGray(), A.InvertImg()], n=2, replace=True)])
    replay = pipeline(image=np.zeros((20, 30, 3), np.uint8))["replay"]
    assert from_albumentations(replay, (20, 30), (20, 30)).matrix.shape == (3, 3)


def test_a_biased_interpolation_is_refused():
    found = refusal([A.Resize(8, 9, interpolation=cv2.INTER_NEAREST, p=0.0)])
    assert "INTER_NEAREST_EXACT" in found


def test_sizes_of_another_image_are_refused():
    pipeline = A.ReplayCompose([A.Transpose(p=1.0), A.Resize(8, 9)])
    replay = pipeline(image=np.zeros((20, 30, 3), np.uint8))["replay"]
    with pytest.raises(GeometryError, match=r"Transpose was given an image of \(20, 30\)"):
        from_albumentations(replay, (30, 20), (8, 9))
    with pytest.raises(GeometryError, match="view_size"):
        from_albumentations(replay, (20, 30), (9, 8))


def test_what_is_no_replay_is_refused():
    with pytest.raises(ConfigError, match="a plain Compose keeps no replay"):
        from_albumentations({"image": np.zeros((3, 3))}, (20, 30), (20, 30))
