"""Upgraded v1 pipelines: the same pixels, the same random numbers, and geometry that is true."""

import copy
import pickle
import random
import threading

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.ramps import SpoilRing, pixels, planes, predicted_centers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFilter, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

from local_distill import ConfigError, GeometryError, ShapeError
from local_distill.transforms import MultiView, track
from local_distill.transforms.upgrading import Upgraded, UpgradedViews, upgrade
from local_distill.transforms.upgrading.photometric_probe import check_moves_nothing

BILINEAR, BICUBIC = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC
FILTER_ERROR = 0.1  # source px: sampled filters are not quite centred


chance = np.random.random_sample  # the generator that lightly draws from

# The forms in which the codebases have their own colour changes, each with its own generator.


class GaussianBlur:
    def __init__(self, p=0.5, least=0.1, largest=2.0):
        self.prob, self.least, self.largest = p, least, largest

    def __call__(self, image):
        if random.random() > self.prob:
            return image
        sigma = random.uniform(self.least, self.largest)
        return image.filter(ImageFilter.GaussianBlur(sigma))


class Solarization:
    def __init__(self, p=0.2):
        self.p = p

    def __call__(self, image):
        return ImageOps.solarize(image) if random.random() < self.p else image


class RandomSolarization:
    def __init__(self, prob=0.5):
        self.prob = prob

    def __call__(self, image):
        return ImageOps.solarize(image) if chance() < self.prob else image


class Equalization:
    def __call__(self, image):
        return ImageOps.equalize(image)


class MaybeToTensor(v1.ToTensor):
    def __call__(self, image):
        return image if isinstance(image, torch.Tensor) else super().__call__(image)


class BlurByChance(v1.RandomApply):
    """DINOv2's form: a container by inheritance."""

    def __init__(self, *, p):
        super().__init__([v1.GaussianBlur(9, sigma=(0.1, 2.0))], p=1 - p)


def seed_all(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002


def generator_states():
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), rest


def noise(height, width, *, pil, channels=3):
    values = np.random.default_rng(7).integers(0, 256, (height, width, channels), dtype=np.uint8)
    if pil:
        return PIL.Image.fromarray(values)
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


def assert_same_image(got, expected):
    assert type(got) is type(expected)
    if isinstance(got, torch.Tensor):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    else:
        assert got.mode == expected.mode
        assert got.size == expected.size
        assert got.tobytes() == expected.tobytes()


def assert_same_run(pipeline, upgraded, image, seed):
    """Pixels and generators as without, and a geometry that fits the view's size."""
    seed_all(seed)
    expected = pipeline(image)
    states = generator_states()
    seed_all(seed)
    got, geometry = upgraded(image)
    assert generator_states() == states
    if isinstance(expected, dict):
        expected = [*expected["global_crops"], *expected["local_crops"]]
    if not isinstance(expected, list):
        expected, got, geometry = [expected], [got], [geometry]
    assert len(got) == len(expected) == len(geometry)
    for one, other, where in zip(got, expected, geometry, strict=True):
        assert_same_image(one, other)
        height, width = one.shape[-2:] if isinstance(one, torch.Tensor) else one.size[::-1]
        assert where.view_size.tolist() == [height, width]
        assert where.matrix.dtype == torch.float32
        assert where.matrix.isfinite().all()


GEOMETRIC = {
    "resize-int": v1.Resize(20),
    "resize-pair": v1.Resize((31, 18), BICUBIC),
    "resize-list-of-one": v1.Resize([25]),
    "resize-max": v1.Resize(30, max_size=40),
    "resize-pil-code": v1.Resize((20, 21), interpolation=2),
    "resize-to-itself": v1.Resize((33, 46)),
    "resize-nearest-exact": v1.Resize((21, 13), InterpolationMode.NEAREST_EXACT),
    "center-crop": v1.CenterCrop((14, 21)),
    "center-crop-pads": v1.CenterCrop((50, 21)),
    "pad-1": v1.Pad(3),
    "pad-list-of-one": v1.Pad([2]),
    "pad-2": v1.Pad((1, 4), fill=9),
    "pad-4": v1.Pad((1, 2, 3, 4), padding_mode="reflect"),
    "pad-edge": v1.Pad((5, 0, 1, 2), padding_mode="edge"),
    "crop": v1.RandomCrop((20, 30)),
    "crop-padding": v1.RandomCrop((30, 45), padding=(2, 3)),
    "crop-pad-if-needed": v1.RandomCrop((40, 50), pad_if_needed=True),
    "crop-pad-one-axis": v1.RandomCrop((20, 60), padding=(1, 2, 3, 4), pad_if_needed=True),
    "crop-whole": v1.RandomCrop((33, 46)),
    "hflip": v1.RandomHorizontalFlip(),
    "vflip": v1.RandomVerticalFlip(0.3),
    "resized-crop": v1.RandomResizedCrop(24, scale=(0.2, 1)),
    "resized-crop-bicubic": v1.RandomResizedCrop((20, 37), interpolation=BICUBIC),
    "resized-crop-pil-code": v1.RandomResizedCrop(24, interpolation=PIL.Image.BICUBIC),
    "resized-crop-fallback": v1.RandomResizedCrop(24, scale=(3, 4), ratio=(0.1, 0.2)),
    "rotation": v1.RandomRotation(30),
    "rotation-expand": v1.RandomRotation((-80, 170), BILINEAR, expand=True, fill=7),
    "rotation-center": v1.RandomRotation(20, center=(3, 5)),
    "rotation-quarter-expand": v1.RandomRotation((90, 90), expand=True),  # PIL: of another size
    "affine": v1.RandomAffine(20, (0.2, 0.1), (0.7, 1.4), 8, BILINEAR),
    "affine-shear-4": v1.RandomAffine((5, 15), shear=(-5, 5, 3, 9), center=(4, 9), fill=3),
    "perspective": v1.RandomPerspective(0.4, p=0.7),
}
PHOTOMETRIC = {
    "jitter": v1.ColorJitter(0.4, 0.4, 0.2, 0.1),
    "grayscale": v1.Grayscale(3),
    "random-grayscale": v1.RandomGrayscale(0.5),
    "blur": v1.GaussianBlur(9),
    "invert": v1.RandomInvert(),
    "posterize": v1.RandomPosterize(3),
    "solarize": v1.RandomSolarize(128),
    "sharpness": v1.RandomAdjustSharpness(2),
    "autocontrast": v1.RandomAutocontrast(),
    "equalize": v1.RandomEqualize(),
}
TO_FLOAT = v1.Compose([v1.ToTensor(), v1.Normalize((0.5,), (0.2,)), v1.RandomErasing(0.5)])
CONVERTING = {
    "to-tensor": (TO_FLOAT, True),
    "pil-to-tensor": (v1.Compose([v1.PILToTensor(), v1.ConvertImageDtype(torch.float64)]), True),
    "to-pil": (v1.ToPILImage(), False),
    "no-antialias": (v1.Resize((17, 60), antialias=False), False),  # PIL warns of it
    "erasing-random": (v1.RandomErasing(0.7, value="random"), False),
}
FLIP, CROP, TURN = v1.RandomHorizontalFlip(), v1.RandomCrop((25, 31)), v1.RandomRotation(9)
CONTAINERS = {
    "apply": v1.RandomApply([v1.RandomCrop((30, 40)), FLIP], p=0.4),
    "apply-modules": v1.RandomApply(nn.ModuleList([CROP, v1.ColorJitter(0.4)]), p=0.4),
    "choice": v1.RandomChoice([CROP, FLIP, TURN]),
    "choice-p": v1.RandomChoice([CROP, FLIP, v1.Pad(2)], p=[0.2, 1.0, 0.7]),
    "order": v1.RandomOrder([v1.CenterCrop((30, 44)), v1.Resize((30, 44)), FLIP, TURN]),
    "sequential": nn.Sequential(CROP, nn.Identity(), nn.Sequential(FLIP, v1.RandomGrayscale(0.5))),
    "inherits": v1.Compose([CROP, BlurByChance(p=0.6), FLIP]),
    "v2-among-v1": v1.Compose(
        [v2.RandomResizedCrop(28), v1.RandomApply([v2.RandomRotation(20, expand=True)]), FLIP]
    ),
    "v1-among-v2": v2.Compose(
        [v2.RandomOrder([CROP, v2.RandomVerticalFlip()]), v2.ColorJitter(0.3)]
    ),
    "v2-containers": v2.RandomApply([v2.RandomChoice([FLIP, TURN], p=[0.3, 0.9])], p=0.6),
    "empty": v1.Compose([]),
    "nested": v1.Compose(
        [v1.RandomChoice([v1.Compose([CROP, FLIP]), v1.RandomOrder([FLIP, TURN])]), v1.Resize(19)]
    ),
}
BOTH = {**GEOMETRIC, **PHOTOMETRIC, **CONTAINERS}
CASES = [
    *[
        pytest.param(case, pil, id=f"{n}-{pil}")
        for n, case in BOTH.items()
        for pil in (True, False)
    ],
    *[pytest.param(*case, id=name) for name, case in CONVERTING.items()],
]


@pytest.mark.parametrize(("pipeline", "pil"), CASES)
def test_every_class_makes_the_same_pixels_of_the_same_random_numbers(pipeline, pil):
    upgraded = upgrade(pipeline)
    image = noise(33, 46, pil=pil)
    for seed in range(50):
        assert_same_run(pipeline, upgraded, image, seed)


def test_every_v1_class_is_tracked_or_refused_by_name():
    shown = [*BOTH.values(), *(case for case, _ in CONVERTING.values())]
    known = {type(part).__name__ for part in shown}
    known |= {"Compose", "ToTensor", "PILToTensor", "Normalize", "ConvertImageDtype"}
    refused = {type(transform).__name__ for transform, _ in REFUSED} | {"Lambda"}
    enums = {"AutoAugmentPolicy", "InterpolationMode"}
    public = {name for name, value in vars(v1).items() if isinstance(value, type)}
    assert public - enums == (known & public) | refused
    assert not known & refused


# Geometry, proven on pixels.


def shown_and_predicted(upgraded, height, width, *, pil, seed):
    """Per view pixel: the source position its value shows, and the one that is predicted.

    Ramps of x and y go in, and ones: where they come out as something else, there is padding.
    """
    outputs = []
    for plane in planes(height, width):
        image = plane.to(torch.float64)[None]
        if pil:
            image = PIL.Image.fromarray(plane.numpy().astype(np.float32))
        seed_all(seed)
        view, geometry = upgraded(image)
        outputs.append(pixels(view))
    assert geometry.source_size.tolist() == [height, width]
    assert list(outputs[0].shape) == geometry.view_size.tolist()
    predicted = predicted_centers(geometry).double().reshape(-1, 2)
    shown = torch.stack(outputs[:2], -1).reshape(-1, 2)
    clean = ((outputs[2] - 1).abs() < 1e-6).reshape(-1)  # False for NaN
    return shown[clean], predicted[clean]


sides, seeds = st.integers(5, 41), st.integers(0, 2**31)


def whole_pixel_moves(draw):
    """One transform that moves pixels without resampling them."""
    return draw(
        st.one_of(
            st.builds(v1.CenterCrop, st.tuples(sides, sides)),
            st.builds(v1.Pad, st.integers(0, 4)),
            st.builds(v1.Pad, st.tuples(*[st.integers(0, 5)] * 4)),
            st.builds(v1.RandomCrop, st.tuples(sides, sides), pad_if_needed=st.just(True)),
            st.builds(
                v1.RandomCrop,
                st.tuples(st.integers(1, 5), st.integers(1, 5)),
                padding=st.sampled_from([None, 2, (1, 3), (0, 1, 2, 3)]),
                pad_if_needed=st.just(True),
            ),
            st.builds(v1.RandomHorizontalFlip),
            st.builds(v1.RandomVerticalFlip),
        )
    )


@st.composite
def nested_moves(draw, depth=2):
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        if depth and draw(st.booleans()):
            parts.append(draw(nested_moves(depth=depth - 1)))
        else:
            parts.append(whole_pixel_moves(draw))
    containers = [v1.Compose, v1.RandomApply, v1.RandomChoice, v1.RandomOrder]
    if all(isinstance(part, nn.Module) for part in parts):
        containers.append(lambda some: nn.Sequential(*some))
    return draw(st.sampled_from(containers))(parts)


@settings(max_examples=100)
@given(pipeline=nested_moves(), height=sides, width=sides, pil=st.booleans(), seed=seeds)
def test_whole_pixels_lie_exactly_where_the_geometry_says(pipeline, height, width, pil, seed):
    upgraded = upgrade(pipeline)
    shown, predicted = shown_and_predicted(upgraded, height, width, pil=pil, seed=seed)
    torch.testing.assert_close(shown, predicted, rtol=0, atol=0)
    seed_all(seed)
    image = noise(height, width, pil=pil)
    assert_same_run(pipeline, upgraded, image, seed)


RESAMPLING = {
    "resize": (v1.Resize((20, 33)), FILTER_ERROR),
    "resize-int-bicubic": (v1.Resize(71, BICUBIC), FILTER_ERROR),
    "resize-max": (v1.Resize(30, max_size=36), FILTER_ERROR),
    "resize-no-antialias": (v1.Resize((71, 60), antialias=False), FILTER_ERROR),
    "nearest-exact": (v1.Resize((20, 71), InterpolationMode.NEAREST_EXACT), 0.5 + 1e-5),
    "rotation": (v1.RandomRotation(180, BILINEAR), 1e-3),
    "rotation-nearest": (v1.RandomRotation(180), 0.5 + 1e-3),
    "rotation-expand": (v1.RandomRotation(180, BILINEAR, expand=True), 1e-3),
    "rotation-quarter-expand": (v1.RandomRotation((90, 90), BILINEAR, expand=True), 1e-3),
    "rotation-center": (v1.RandomRotation(40, BILINEAR, center=(7, 12)), 1e-3),
    "affine": (v1.RandomAffine(90, (0.3, 0.2), (0.6, 1.7), 15, BILINEAR), 1e-3),
    "affine-4": (
        v1.RandomAffine(9, shear=(-9, 9, 5, 20), center=(9, 3), interpolation=BILINEAR),
        1e-3,
    ),
    "perspective": (v1.RandomPerspective(0.5, p=0.9), 2e-3),
}


# PIL has no resizing without antialias, and torchvision warns of it.
@pytest.mark.parametrize(
    ("name", "pil"),
    [
        (name, pil)
        for name in RESAMPLING
        for pil in (True, False)
        if not (pil and "no-anti" in name)
    ],
)
def test_resampled_pixels_lie_where_the_geometry_says(name, pil):
    transform, allowed = RESAMPLING[name]
    before, after = v1.RandomCrop((38, 34)), v1.RandomHorizontalFlip()
    upgraded = upgrade(v1.Compose([before, SpoilRing(), transform, after]), trust=[SpoilRing])
    compared = 0
    for seed in range(12):
        shown, predicted = shown_and_predicted(upgraded, 45, 37, pil=pil, seed=seed)
        error = (shown - predicted).abs()
        assert float(error.max()) <= allowed
        compared += len(error)
    assert compared > 12 * 150


@pytest.mark.parametrize("pil", [True, False])
@pytest.mark.parametrize("interpolation", [BILINEAR, BICUBIC])
def test_a_resized_crop_lies_where_the_geometry_says(interpolation, pil):
    transform = v1.RandomResizedCrop((23, 31), scale=(0.2, 1), interpolation=interpolation)
    upgraded = upgrade(v1.Compose([transform, FLIP, v1.RandomVerticalFlip()]))
    inner = torch.zeros(23, 31, dtype=torch.bool)
    inner[6:-6, 6:-6] = True  # beyond a filter's reach of the crop's border, where it is clamped
    errors = []
    for seed in range(20):
        shown, predicted = shown_and_predicted(upgraded, 60, 47, pil=pil, seed=seed)
        errors.append((shown - predicted)[inner.reshape(-1)])
    assert float(torch.cat(errors).abs().max()) <= FILTER_ERROR
    assert float(torch.stack(errors).mean((0, 1)).abs().max()) <= 1e-4


# What is let in, and what is not.

OPAQUE = v1.Compose(
    [
        v1.RandomResizedCrop(24, scale=(0.3, 1), interpolation=BICUBIC),
        GaussianBlur(0.7),
        v1.RandomApply([Equalization()], p=0.4),
        Solarization(0.5),
        RandomSolarization(),
        v1.RandomHorizontalFlip(),
        MaybeToTensor(),
    ]
)


def test_pil_blurs_and_solarisations_are_let_in_and_draw_their_own_numbers():
    upgraded = upgrade(OPAQUE)
    image = noise(50, 61, pil=True)
    for seed in range(60):
        assert_same_run(OPAQUE, upgraded, image, seed)


def test_upgrading_uses_up_no_random_numbers():
    seed_all(3)
    states = generator_states()
    upgrade(OPAQUE)
    upgrade(DataAugmentationDINO())
    with pytest.raises(ConfigError):
        upgrade(named("GaussianBlur", lambda image: image.rotate(random.random())))
    assert generator_states() == states


class Locked:
    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, image):
        return image


def named(name, act):
    """An object of a class called ``name`` that does ``act``."""
    kind = type(name, (), {"__call__": lambda self, image: self.act(image)})
    made = kind()
    made.act = act
    return made


def sometimes(act, p):
    return lambda image: act(image) if random.random() < p else image


def roll(by, axis=1):
    return lambda image: PIL.Image.fromarray(np.roll(np.array(image), by, axis))


def warp(*coefficients):
    how = PIL.Image.Transform.AFFINE
    return lambda image: image.transform(
        image.size, how, coefficients, resample=PIL.Image.Resampling.BILINEAR
    )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (ImageOps.mirror, "moves pixels|is gone"),
        (ImageOps.flip, "moves pixels|is gone"),
        (lambda image: image.rotate(180), "moves pixels|is gone"),
        (lambda image: image.rotate(1, PIL.Image.Resampling.BILINEAR), "moves pixels"),
        (roll(1), "1.0 px off"),
        (roll(-2, 0), "2.0 px off"),
        (roll(32), "moves pixels|is gone"),
        (sometimes(roll(1), 0.3), "1.0 px off"),
        (warp(1, 0, 0.5, 0, 1, 0), "0.5 px off"),
        (warp(0.98, 0, 0, 0, 1, 0), "moves pixels"),
        (lambda image: image.crop((0, 0, 127, 96)), "96 × 127 pixels of 96 × 128"),
        (lambda image: image.resize((64, 48)), "48 × 64 pixels of 96 × 128"),
        (lambda image: image.point(lambda _: 0), "is gone"),
        (lambda image: torch.full((3, 96, 128), torch.nan), "is gone"),
        (lambda image: 3, "makes a int of an image"),
        (Locked(), "can.t be copied"),
        (lambda image: image.no_such_method(), "neither a PIL image nor a float tensor"),
    ],
)
def test_a_name_alone_lets_nothing_in(act, message):
    with pytest.raises(GeometryError, match=message):
        check_moves_nothing(act)
    with pytest.raises(ConfigError, match=f"cannot upgrade GaussianBlur: .*({message})"):
        upgrade(v1.Compose([named("GaussianBlur", act)]))


def test_a_rare_move_behind_a_probability_is_tried_for_certain():
    class Solarization:
        def __init__(self):
            self.p = 1e-9

        def __call__(self, image):
            return ImageOps.mirror(image) if random.random() < self.p else image

    with pytest.raises(ConfigError, match="cannot upgrade Solarization"):
        upgrade(Solarization())


@pytest.mark.parametrize(
    "act",
    [
        lambda image: image.filter(ImageFilter.GaussianBlur(4)),
        lambda image: image.filter(ImageFilter.BoxBlur(3)),
        lambda image: ImageOps.solarize(image, 30),
        lambda image: ImageOps.solarize(image, 200),
        ImageOps.equalize,
        ImageOps.invert,
        ImageOps.autocontrast,
        ImageOps.grayscale,
        lambda image: ImageOps.posterize(image, 2),
        v1.functional.to_tensor,
        v1.Compose([v1.ToTensor(), v1.Normalize((0.4, 0.5, 0.6), (0.2, 0.1, 0.3))]),
        lambda image: v1.functional.gaussian_blur(v1.functional.to_tensor(image), 23, 2.0),
        lambda tensor: tensor.mul(0.5),  # takes no PIL image
    ],
)
def test_what_changes_colours_passes_the_trial(act):
    check_moves_nothing(act)


def brighten(image):
    return image.point(lambda level: min(255, 2 * level))


def narrow(image):
    return image.crop((1, 0, *image.size))


class Own(v1.RandomHorizontalFlip):
    def forward(self, image):
        return image


class OwnJitter(v1.ColorJitter):
    def forward(self, image):
        return image


class OwnSampling(v1.RandomResizedCrop):
    """A subclass that only draws in another way is tracked."""

    @staticmethod
    def get_params(image, scale, ratio):
        del image, scale, ratio
        return torch.randint(0, 9, (1,)).item(), 2, 20, 25


def test_trust_shows_the_image_alone():
    transform = v1.Lambda(brighten)
    for pipeline, trust in (
        (v1.Compose([v1.CenterCrop(20), brighten]), [brighten]),
        (v1.Compose([v1.CenterCrop(20), transform]), [transform]),
        (v1.Compose([v1.CenterCrop(20), OwnJitter()]), [OwnJitter]),
    ):
        upgraded = upgrade(pipeline, trust=trust)
        assert_same_run(pipeline, upgraded, noise(33, 46, pil=True), 0)
        with pytest.raises(ConfigError, match="vouch for it"):
            upgrade(pipeline)


def test_a_trusted_transform_that_changes_the_size_is_caught_where_it_stands():
    upgraded = upgrade(v1.Compose([narrow, v1.CenterCrop(20)]), trust=[narrow])
    with pytest.raises(GeometryError, match=r"narrow turned .* \(33, 46\) into \(33, 45\)"):
        upgraded(noise(33, 46, pil=True))


@pytest.mark.parametrize(
    "entry",
    [
        *(v1.RandomCrop, v1.RandAugment(), v1.Compose, v1.RandomRotation(3), Own),
        *(v2.RandomHorizontalFlip, v2.RandAugment()),
    ],
)
def test_nobody_can_vouch_for_what_is_known_to_move_pixels(entry):
    with pytest.raises(ConfigError, match=r"`trust` names .*, which moves pixels"):
        upgrade(v1.CenterCrop(3), trust=[entry])


REFUSED = [
    (v1.AutoAugment(), "shears and rotates"),
    (v1.RandAugment(), "shears and rotates"),
    (v1.TrivialAugmentWide(), "shears and rotates"),
    (v1.AugMix(), "shears, rotates and mixes"),
    (v1.ElasticTransform(), "RandomAffine or RandomPerspective"),
    (v1.LinearTransformation(torch.eye(3), torch.zeros(3)), "mixes all pixels"),
    (v1.FiveCrop(5), "several views"),
    (v1.TenCrop(5), "several views"),
]


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        *REFUSED,
        (v1.Lambda(brighten), "what it does can't be seen"),
        (brighten, r"cannot upgrade brighten: it is not known.*trust=\[brighten\]"),
        (v1.RandomCrop, r"cannot upgrade the class RandomCrop; pass an instance, RandomCrop\("),
        (v2.FiveCrop(5), "several views"),
        (Own(), "a subclass of RandomHorizontalFlip.*use RandomHorizontalFlip itself"),
        (OwnJitter(), r"a subclass of ColorJitter.*trust=\[OwnJitter\]"),
        (3, "can't be called"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_refuses_by_name_and_shows_a_way_out(transform, message, inside):
    pipeline = v1.RandomApply([v1.CenterCrop(3), transform]) if inside else transform
    if isinstance(transform, v2.Transform) and not inside:
        message = "use local_distill.transforms.track"
    with pytest.raises(ConfigError, match=f"cannot upgrade .*{message}|{message}"):
        upgrade(pipeline)


class ClassicCrops:
    def __call__(self, image):
        return [image, image]


def test_several_views_are_named_and_their_pipelines_can_be_given_one_by_one():
    with pytest.raises(ConfigError, match=r"MultiView\(\[\(upgrade\(pipeline\), 2\), ...\]\)"):
        upgrade(ClassicCrops())
    with pytest.raises(GeometryError, match=r"returned a list of 2, wanted one view: .*MultiView"):
        upgrade(ClassicCrops(), trust=[ClassicCrops])(noise(33, 46, pil=True))
    views, geometries = MultiView([(upgrade(v1.CenterCrop(8)), 2)])(noise(33, 46, pil=True))
    assert len(views) == len(geometries) == 2


def test_a_list_or_a_function_without_a_name_has_a_way_out():
    with pytest.raises(ConfigError, match=r"a list of transforms: wrap it in transforms.Compose"):
        upgrade([v1.CenterCrop(8)])
    with pytest.raises(ConfigError, match=r"name the function \(def brighten"):
        upgrade(lambda image: image)


@pytest.mark.parametrize("interpolation", [InterpolationMode.NEAREST, 0])
@pytest.mark.parametrize("kind", [v1.Resize, v1.RandomResizedCrop])
def test_refuses_the_biased_interpolation(kind, interpolation):
    with pytest.raises(ConfigError, match=f"cannot upgrade {kind.__name__}: .*NEAREST_EXACT"):
        upgrade(v1.Compose([kind((8, 9), interpolation=interpolation)]))


@pytest.mark.parametrize(
    "pipeline",
    [
        v2.CenterCrop(3),
        v2.Compose([v2.CenterCrop(3), v2.RandomApply([v2.ColorJitter()])]),
        nn.Sequential(v2.CenterCrop(3)),
    ],
)
def test_a_v2_pipeline_is_sent_to_track(pipeline):
    with pytest.raises(ConfigError, match=r"v2 pipeline already; use .*track\(pipeline\)"):
        upgrade(pipeline)
    track(pipeline)


@pytest.mark.parametrize("how", ["forward", "hook", "pre-hook"])
def test_an_altered_object_is_refused(how):
    transform = v1.RandomHorizontalFlip()
    if how == "forward":
        transform.forward = lambda image: image
    elif how == "hook":
        transform.register_forward_hook(lambda *_: None)
    else:
        transform.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="`forward` was replaced, or it has hooks"):
        upgrade(transform)


def test_a_subclass_that_only_draws_otherwise_is_tracked():
    pipeline = OwnSampling((11, 12))
    upgraded = upgrade(pipeline)
    for seed in range(10):
        assert_same_run(pipeline, upgraded, noise(33, 46, pil=False), seed)
        seed_all(seed)
        top = torch.randint(0, 9, (1,)).item()
        seed_all(seed)
        matrix = upgraded(noise(33, 46, pil=False))[1].matrix
        assert matrix[:2, 2].tolist() == [2, top]
        assert matrix[0, 0] == pytest.approx(25 / 12)


def test_later_changes_to_the_callers_list_do_not_slip_past_the_walk():
    parts = [v1.CenterCrop((10, 12))]
    upgraded = upgrade(v1.Compose(parts))
    parts.append(v1.RandAugment())
    assert upgraded(noise(33, 46, pil=True))[0].size == (12, 10)


def test_the_geometry_is_on_the_view_s_device():
    view, geometry = upgrade(v1.CenterCrop(3))(torch.zeros(3, 9, 9, device="meta"))
    assert view.device == geometry.matrix.device == geometry.view_size.device


@pytest.mark.parametrize("image", [torch.zeros(2, 3, 9, 9), np.zeros((9, 9, 3)), torch.zeros(9, 9)])
def test_refuses_what_is_no_image(image):
    with pytest.raises(ShapeError, match="`image` must be"):
        upgrade(v1.CenterCrop(3))(image)


# Objects that make several views.


class DataAugmentationDINO:
    """DINO's form, in small."""

    def __init__(self, local=3):
        shared = v1.Compose(
            [
                v1.RandomHorizontalFlip(),
                v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v1.RandomGrayscale(0.2),
            ]
        )
        end = v1.Compose([v1.ToTensor(), v1.Normalize((0.5,) * 3, (0.2,) * 3)])

        def view(side, scale, *colours):
            crop = v1.RandomResizedCrop(side, scale=scale, interpolation=PIL.Image.BICUBIC)
            return v1.Compose([crop, shared, *colours, end])

        self.global_transfo1 = view(24, (0.4, 1.0), GaussianBlur(1.0))
        self.global_transfo2 = view(24, (0.4, 1.0), GaussianBlur(0.1), Solarization(0.2))
        self.local_crops_number = local
        self.local_transfo = view(12, (0.05, 0.4), GaussianBlur(0.5))

    def __call__(self, image):
        views = [self.global_transfo1(image), self.global_transfo2(image)]
        return views + [self.local_transfo(image) for _ in range(self.local_crops_number)]


class OtherOrder(DataAugmentationDINO):
    def __call__(self, image):
        return super().__call__(image)[::-1]


class OneMore(DataAugmentationDINO):
    def __call__(self, image):
        return [*super().__call__(image), self.global_transfo1(image)]


class DrawsMore(DataAugmentationDINO):
    """Turns the order round in one of a thousand calls: not under the seed of the trial."""

    def __call__(self, image):
        views = super().__call__(image)
        return views[::-1] if random.random() < 0.001 else views


class Broken(DataAugmentationDINO):
    def __call__(self, image):
        raise RuntimeError("no images here")


class DataAugmentationDINOv2:
    """DINOv2's form, in small: cut first, colour afterwards, a dict at the end."""

    def __init__(self):
        def cut(side, scale):
            crop = v1.RandomResizedCrop(side, scale=scale, interpolation=BICUBIC)
            return v1.Compose([crop, v1.RandomHorizontalFlip()])

        self.geometric_augmentation_global = cut(24, (0.32, 1.0))
        self.geometric_augmentation_local = cut(12, (0.05, 0.32))
        jitter = v1.RandomApply([v1.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        colour = v1.Compose([jitter, v1.RandomGrayscale(0.2)])
        extra = v1.Compose([BlurByChance(p=0.1), v1.RandomSolarize(128, p=0.2)])
        end = v1.Compose([MaybeToTensor(), v1.Normalize((0.5,) * 3, (0.2,) * 3)])
        self.global_transfo1 = v1.Compose([colour, BlurByChance(p=1.0), end])
        self.global_transfo2 = v1.Compose([colour, extra, end])
        self.local_transfo = v1.Compose([colour, BlurByChance(p=0.5), end])
        self.local_crops_number = 3

    def __call__(self, image):
        whole = self.geometric_augmentation_global
        views = [self.global_transfo1(whole(image)), self.global_transfo2(whole(image))]
        part = self.geometric_augmentation_local
        local = [self.local_transfo(part(image)) for _ in range(self.local_crops_number)]
        return {"global_crops": views, "global_crops_teacher": views, "local_crops": local}


class NCropAugmentation:
    """solo-learn's forms."""

    def __init__(self, transform, num_crops):
        self.transform, self.num_crops = transform, num_crops

    def __call__(self, image):
        return [self.transform(image) for _ in range(self.num_crops)]


class FullTransformPipeline:
    def __init__(self, transforms):
        self.transforms = transforms

    def __call__(self, image):
        return [view for transform in self.transforms for view in transform(image)]


@pytest.mark.parametrize(
    ("pipeline", "views"),
    [
        (DataAugmentationDINO(), 5),
        (DataAugmentationDINO(local=0), 2),
        (DataAugmentationDINOv2(), 5),
        (NCropAugmentation(OPAQUE, 3), 3),
        (
            FullTransformPipeline(
                [NCropAugmentation(OPAQUE, 2), NCropAugmentation(v1.Compose([CROP, TO_FLOAT]), 1)]
            ),
            3,
        ),
    ],
)
def test_objects_of_several_views_are_upgraded_whole(pipeline, views):
    upgraded = upgrade(pipeline)
    assert isinstance(upgraded, UpgradedViews)
    assert len(upgraded.pipelines) == views
    image = noise(50, 61, pil=True)
    for seed in range(50):
        assert_same_run(pipeline, upgraded, image, seed)


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (OtherOrder(), "its 5 views, or the random .* are not those of the 5 that"),
        (OneMore(), "its 6 views, or .* the 5 that"),
        (DrawsMore(), "or the random numbers that it draws, are not those"),
        (Broken(), r"could not be tried on an RGB image \(RuntimeError: no images here\)"),
        (NCropAugmentation(OPAQUE, 0), "it makes no views"),
        (v1.Compose([DataAugmentationDINO()]), "inside a pipeline: it makes several views"),
    ],
)
def test_objects_that_do_other_things_with_known_names_are_refused(pipeline, message):
    with pytest.raises(ConfigError, match=message):
        upgrade(pipeline)


def test_what_is_in_an_object_of_several_views_is_looked_at_too():
    with pytest.raises(ConfigError, match="cannot upgrade brighten"):
        upgrade(NCropAugmentation(v1.Compose([brighten]), 2))
    assert (
        len(upgrade(NCropAugmentation(v1.Compose([brighten]), 2), trust=[brighten]).pipelines) == 2
    )


# lightly itself.


def lightly_transforms():
    import lightly.transforms as module  # here, as it takes a second

    return module


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DINOTransform", {"global_crop_size": 32, "local_crop_size": 16}),
        ("DINOTransform", {"rr_prob": 0.5, "rr_degrees": (-30.0, 60.0), "vf_prob": 0.5}),
        ("SimCLRTransform", {"input_size": 32, "rr_prob": 0.5, "vf_prob": 0.5}),
        ("MoCoV1Transform", {"input_size": 32}),
        ("MoCoV2Transform", {"input_size": 32}),
        ("BYOLTransform", {}),
        ("DenseCLTransform", {"input_size": 32}),
        ("SwaVTransform", {}),
        ("MAETransform", {"input_size": 32}),
        ("VICRegTransform", {"input_size": 32}),
        ("DINOViewTransform", {"crop_size": 32, "rr_prob": 0.5}),
        ("GaussianBlur", {}),
        ("RandomSolarization", {}),
        ("RandomRotate", {"angle": 30}),
        ("RandomRotateDegrees", {"prob": 0.5, "degrees": 20}),
    ],
)
def test_lightly_makes_the_same_views(name, settings):
    pipeline = getattr(lightly_transforms(), name)(**settings)
    upgraded = upgrade(pipeline)
    image = noise(50, 61, pil=True)
    for seed in range(50 if "input_size" in settings else 12):
        assert_same_run(pipeline, upgraded, image, seed)


def test_lightly_s_several_views_are_in_its_order():
    pipeline = lightly_transforms().DINOTransform(n_local_views=2)
    views, geometries = upgrade(pipeline)(noise(50, 61, pil=True))
    assert [tuple(view.shape[-2:]) for view in views] == [(224, 224)] * 2 + [(96, 96)] * 2
    assert [geometry.view_size.tolist()[0] for geometry in geometries] == [224, 224, 96, 96]


@pytest.mark.parametrize(("angle", "allowed"), [(90, 1e-5), (30, 0.5 + 1e-3)])
@pytest.mark.parametrize("pil", [True, False])
def test_lightly_s_rotation_is_where_the_geometry_says(angle, allowed, pil):
    lightly = lightly_transforms()
    pipeline = v1.Compose([v1.RandomCrop(36), lightly.RandomRotate(prob=0.5, angle=angle)])
    upgraded, turned = upgrade(pipeline), 0
    for seed in range(10):
        shown, predicted = shown_and_predicted(upgraded, 45, 37, pil=pil, seed=seed)
        assert float((shown - predicted).abs().max()) <= allowed
        seed_all(seed)
        turned += bool(upgraded(noise(45, 37, pil=pil))[1].matrix[0, 1] != 0)
    assert 0 < turned < 10


@pytest.mark.parametrize("name", ["FDATransform", "PIRLTransform", "Jigsaw", "VICRegLTransform"])
def test_what_else_lightly_has_is_refused(name):
    with pytest.raises(ConfigError, match="it is not known whether it moves pixels"):
        upgrade(getattr(lightly_transforms(), name)())


# Loaders.


@pytest.mark.parametrize("again", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
@pytest.mark.parametrize("pipeline", [OPAQUE, DataAugmentationDINO(), CONTAINERS["nested"]])
def test_pickle_and_deepcopy_make_the_same_views(pipeline, again):
    twin = again(upgrade(pipeline))
    for seed in range(5):
        assert_same_run(pipeline, twin, noise(50, 61, pil=True), seed)


class Images(Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 4

    def __getitem__(self, index):
        seed_all(index)
        return self.transform(noise(50, 61, pil=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_through_a_loader(workers):
    loader = DataLoader(Images(upgrade(DataAugmentationDINO())), batch_size=2, num_workers=workers)
    views, geometries = zip(*loader, strict=True)
    assert [view.shape for view in views[0]] == [(2, 3, 24, 24)] * 2 + [(2, 3, 12, 12)] * 3
    assert [geometry.matrix.shape for geometry in geometries[1]] == [(2, 3, 3)] * 5
    seed_all(3)
    expected = DataAugmentationDINO()(noise(50, 61, pil=True))
    for view, other in zip(views[1], expected, strict=True):
        assert torch.equal(view[1], other)


def test_prints_what_it_runs():
    text = repr(upgrade(v1.Compose([v1.CenterCrop(7), v1.RandomHorizontalFlip(0.25)])))
    assert text.startswith("Upgraded(Compose(")
    assert "CenterCrop(size=(7, 7))" in text
    assert "RandomHorizontalFlip(p=0.25)" in text
    assert isinstance(upgrade(v1.CenterCrop(3)), Upgraded)
    assert "UpgradedViews" in repr(upgrade(DataAugmentationDINO()))
