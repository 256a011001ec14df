"""kornia's pixels against the geometry read from its matrices."""

import kornia
import kornia.augmentation as K
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from local_distill import ConfigError, CropGeometry, GeometryError
from local_distill.transforms.adapters import from_kornia

EXACT = 2e-3  # source px: float32 images and float32 sampling
BICUBIC = 0.06  # a sampled cubic filter is not quite centred

aligned = st.booleans()
modes = st.sampled_from(["slice", "resample"])
side = st.integers(12, 40)
sizes = st.tuples(side, side)
gates = st.sampled_from([0.5, 1.0])
same = st.booleans()
pads = st.sampled_from([None, 3, (2, 5), (1, 2, 3, 4)])
seeds = st.integers(0, 2**31)
shapes = st.tuples(st.integers(24, 50), st.integers(24, 50))

RESAMPLING = [
    st.builds(K.Resize, sizes, align_corners=aligned, antialias=st.booleans()),
    st.builds(K.Resize, side, side=st.sampled_from(["short", "long", "vert", "horz"])),
    st.builds(K.LongestMaxSize, side, align_corners=aligned),
    st.builds(K.SmallestMaxSize, side, align_corners=aligned),
    st.builds(
        K.RandomResizedCrop,
        sizes,
        scale=st.just((0.3, 1.0)),
        align_corners=aligned,
        cropping_mode=modes,
        same_on_batch=same,
    ),
]
CROPPING = [
    st.builds(K.CenterCrop, sizes.map(lambda s: (min(s), 12)), aligned, cropping_mode=modes),
    st.builds(
        K.RandomCrop,
        sizes,
        padding=pads,
        pad_if_needed=st.just(True),
        align_corners=aligned,
        cropping_mode=modes,
        same_on_batch=same,
    ),
    st.builds(K.PadTo, sizes, crop_if_exceeds=st.booleans()),
]
KEEPING_SIZE = [
    st.builds(K.RandomHorizontalFlip, p=gates, same_on_batch=same),
    st.builds(K.RandomVerticalFlip, p=gates, same_on_batch=same),
    st.builds(K.RandomRotation, st.just(40.0), align_corners=aligned, p=gates, same_on_batch=same),
    st.builds(K.RandomRotation90, st.just((-3, 3)), align_corners=aligned, p=gates),
    st.builds(
        K.RandomAffine,
        st.just(30.0),
        st.just((0.1, 0.2)),
        st.just((0.8, 1.3)),
        st.just((-9.0, 9.0)),
        align_corners=aligned,
        p=gates,
    ),
    st.builds(K.RandomShear, st.just((-15.0, 15.0)), align_corners=aligned, p=gates),
    st.builds(
        K.RandomTranslate,
        st.just((-0.2, 0.2)),
        st.just((-0.1, 0.2)),
        align_corners=aligned,
        p=gates,
    ),
    st.builds(K.RandomPerspective, st.just(0.3), align_corners=aligned, p=gates),
]
STEPS = st.one_of(*RESAMPLING, *CROPPING, *KEEPING_SIZE)


def check(augmentation, shape, seed, ramps, agreement, *, dtype=torch.float32, **limits):
    """The largest error of a batch of three; every sample its own geometry."""
    torch.manual_seed(seed)
    tolerance = limits.pop("tolerance", EXACT)
    images = ramps(*shape, dtype).expand(3, -1, -1, -1).clone()
    views = augmentation(images)
    geometry = from_kornia(augmentation, shape, tuple(views.shape[-2:]))
    assert geometry.matrix.shape == (3, 3, 3)
    found = [
        agreement(view, CropGeometry(*(field[i] for field in geometry)), **limits)
        for i, view in enumerate(views)
    ]
    assert max(each.error for each in found) < tolerance
    return sum(each.pixels for each in found)


@pytest.mark.parametrize("steps", [*RESAMPLING, *CROPPING, *KEEPING_SIZE])
def test_one_augmentation_agrees_with_its_pixels(steps, ramps, agreement):
    compared = 0

    @given(augmentation=steps, shape=shapes, seed=seeds)
    def holds(augmentation, shape, seed):
        nonlocal compared
        if isinstance(augmentation, K.CenterCrop):
            shape = tuple(max(length, 42) for length in shape)
        compared += check(augmentation, shape, seed, ramps, agreement)

    holds()
    assert compared > 1000


@given(
    steps=st.lists(STEPS, min_size=2, max_size=4), shape=shapes, seed=seeds, nested=st.booleans()
)
def test_a_sequence_agrees_with_its_pixels(steps, shape, seed, nested, ramps, agreement):
    steps = [step for step in steps if not isinstance(step, K.CenterCrop)]
    nested_steps = K.ImageSequential(*steps[:1]) if nested else K.PadTo((30, 31))
    colour = K.Normalize(torch.zeros(3), torch.ones(3))
    augmentation = K.AugmentationSequential(colour, *steps[1:], nested_steps)
    # A perspective leaves the ramp bent, and each resampling after it cuts its corners a little.
    bent = any(isinstance(step, K.RandomPerspective) for step in steps)
    tolerance = 0.02 if bent else EXACT
    check(augmentation, shape, seed, ramps, agreement, margin=12, tolerance=tolerance)


@given(seed=seeds, count=st.sampled_from([1, 2, (1, 3), True]))
def test_steps_in_random_order_agree_with_their_pixels(seed, count, ramps, agreement):
    flip = K.RandomHorizontalFlip(p=0.5)
    augmentation = K.AugmentationSequential(
        K.RandomAffine(20.0, p=0.7),
        flip,
        K.RandomResizedCrop((40, 37), scale=(0.5, 1.0)),
        K.RandomGaussianBlur((3, 3), (0.1, 0.2), p=0.0),
        random_apply=count,
    )
    check(augmentation, (45, 33), seed, ramps, agreement, margin=6)


def test_an_augmentation_that_stands_twice_is_read_twice(ramps, agreement):
    turn = K.RandomRotation(25.0, p=1.0)
    for seed in range(5):
        pixels = check(K.ImageSequential(turn, turn), (41, 53), seed, ramps, agreement)
        assert pixels > 100


@pytest.mark.parametrize("align_corners", [True, False])
def test_bicubic_agrees_but_for_the_filter(align_corners, ramps, agreement):
    crop = K.RandomResizedCrop(
        (57, 65), (0.3, 0.9), resample="bicubic", align_corners=align_corners
    )
    for seed in range(20):
        assert check(crop, (31, 47), seed, ramps, agreement, tolerance=BICUBIC)


def test_nearest_is_within_half_a_pixel(ramps, agreement):
    crop = K.RandomResizedCrop((57, 65), (0.3, 0.9), resample="nearest")
    for seed in range(20):
        assert check(crop, (31, 47), seed, ramps, agreement, tolerance=0.5 + EXACT)


def test_the_matrix_does_not_depend_on_the_images_dtype():
    geometries = []
    for dtype in (torch.float16, torch.float64):
        torch.manual_seed(0)
        augmentation = K.RandomAffine(20.0, p=1.0)
        augmentation(torch.zeros(2, 3, 301, 407, dtype=dtype))
        geometries.append(from_kornia(augmentation, (301, 407), (301, 407)))
    assert geometries[0].matrix.dtype == torch.float32
    torch.testing.assert_close(geometries[0].matrix, geometries[1].matrix, rtol=0, atol=0)


def test_a_crop_of_one_pixel_shows_that_pixel_everywhere():
    crop = K.RandomResizedCrop((6, 8), scale=(0.001, 0.0011), ratio=(1.0, 1.0))
    torch.manual_seed(0)
    images = torch.stack(torch.meshgrid(torch.arange(31.0), torch.arange(33.0), indexing="ij"))
    views = crop(images.expand(4, 2, 31, 33))
    assert (views.amax((-2, -1)) == views.amin((-2, -1))).all()  # it is one pixel
    geometry = from_kornia(crop, (31, 33), (6, 8))
    for view, matrix in zip(views, geometry.matrix, strict=True):
        row, column = view[:, 0, 0].tolist()
        corners = matrix @ torch.tensor([[0.0, 8], [0, 6], [1, 1]])
        expected = torch.tensor([[column, column + 1], [row, row + 1]])
        torch.testing.assert_close(corners[:2], expected)


@pytest.mark.parametrize(
    "refused",
    [
        K.RandomElasticTransform(),
        K.RandomThinPlateSpline(),
        K.RandomFisheye(*torch.tensor([[-0.1, 0.1]] * 3)),
        K.RandomJigsaw(),
        K.RandomMixUpV2(),
        K.RandomCutMixV2(use_correct_lambda=True),
        K.RandomMosaic(),
        K.auto.RandAugment(2, 5),
        K.PatchSequential(K.ColorJitter(0.1), grid_size=(2, 2), patchwise_apply=False),
        nn.AvgPool2d(2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_a_matrix_cannot_say_is_refused_by_name(refused):
    augmentation = K.ImageSequential(K.RandomHorizontalFlip(), K.ImageSequential(refused))
    with pytest.raises(ConfigError, match=type(refused).__name__):
        from_kornia(augmentation, (30, 40), (30, 40))


def test_a_module_can_be_vouched_for(ramps, agreement):
    augmentation = K.ImageSequential(nn.Hardtanh(-99.0, 99.0), K.RandomHorizontalFlip(p=1.0))
    views = augmentation(ramps(20, 30)[None])
    geometry = from_kornia(augmentation, (20, 30), (20, 30), trust=[nn.Hardtanh])
    assert agreement(views[0], CropGeometry(*(field[0] for field in geometry))).error == 0


@pytest.mark.parametrize("batch", [None, 2])
def test_an_augmentation_that_never_ran_is_refused(batch):
    for augmentation in (K.ImageSequential(K.RandomHorizontalFlip()), K.RandomHorizontalFlip()):
        with pytest.raises(ConfigError, match="call it on a batch first"):
            from_kornia(augmentation, (30, 40), (30, 40), batch=batch)


def test_a_call_that_applied_nothing_needs_the_batch():
    augmentation = K.ImageSequential(K.RandomHorizontalFlip(p=1.0), random_apply=(0, 1))
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        augmentation(torch.zeros(2, 3, 20, 30))
        geometry = from_kornia(augmentation, (20, 30), (20, 30), batch=2)
        assert geometry.matrix.shape == (2, 3, 3)
        seen |= set(geometry.matrix[:, 0, 0].tolist())
        if not augmentation._params:
            with pytest.raises(ConfigError, match="batch=…"):
                from_kornia(augmentation, (20, 30), (20, 30))
    assert seen == {1.0, -1.0}
    augmentation = K.RandomHorizontalFlip()
    augmentation(torch.zeros(2, 3, 20, 30))
    with pytest.raises(GeometryError, match="saw 2 images"):
        from_kornia(augmentation, (20, 30), (20, 30), batch=3)


def test_sizes_of_another_call_are_refused():
    augmentation = K.AugmentationSequential(K.RandomHorizontalFlip(), K.Resize((8, 9)))
    augmentation(torch.zeros(2, 3, 30, 40))
    with pytest.raises(GeometryError, match=r"\(30, 40\).*\(40, 30\)"):
        from_kornia(augmentation, (40, 30), (8, 9))
    with pytest.raises(GeometryError, match="view_size"):
        from_kornia(augmentation, (30, 40), (9, 8))


def test_a_module_of_another_library_is_refused():
    with pytest.raises(ConfigError, match="must be one of kornia's, got Sequential"):
        from_kornia(nn.Sequential(K.RandomHorizontalFlip()), (30, 40), (30, 40))


def test_an_older_kornia_is_refused(monkeypatch):
    monkeypatch.setattr(kornia, "__version__", "0.8.2rc1")
    with pytest.raises(ConfigError, match=r"kornia 0\.8\.2rc1 has matrices that disagree"):
        from_kornia(K.RandomHorizontalFlip(), (30, 40), (30, 40))
