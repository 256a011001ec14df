"""Every public transform class of torchvision v2 stands in one place, and is treated as it says."""

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.ramps import SpoilRing, error_bounds, send_ramp
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from local_distill import ConfigError, from_box
from local_distill.transforms import track
from local_distill.transforms.transform_classes import (
    TRANSFORM_CLASSES,
    TransformKind,
    class_entry,
    public_classes,
    transform_table,
)

# torchvision's own deprecations of ToTensor and of the decoder behind JPEG
pytestmark = [
    pytest.mark.filterwarnings("ignore:The transform `ToTensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning"),
]
BILINEAR = InterpolationMode.BILINEAR
PER_STEP = {"exact": 1e-4, "affine": 1e-3, "perspective": 1e-3, "resize": 0.1}


def names(kind):
    """Of the classes that the installed torchvision has."""
    return sorted(name for name in public_classes() if class_entry(getattr(v2, name)).kind is kind)


def unplaced():
    return sorted(name for name, kind in public_classes().items() if class_entry(kind) is None)


def test_every_public_class_is_placed():
    assert unplaced() == []
    assert len(public_classes()) > 50


def test_a_class_that_a_new_torchvision_adds_is_missed_and_refused(monkeypatch):
    class RandomSwirl(v2.Transform):
        def transform(self, inpt, params):
            return inpt

    RandomSwirl.__module__ = "torchvision.transforms.v2._geometry"
    monkeypatch.setattr(v2, "RandomSwirl", RandomSwirl, raising=False)
    assert unplaced() == ["RandomSwirl"]
    with pytest.raises(ConfigError, match="RandomSwirl: it is not known whether"):
        track(v2.Compose([RandomSwirl()]))


def test_public_classes_are_what_a_walk_over_the_module_finds():
    found = {
        name
        for name in dir(v2)
        if isinstance(getattr(v2, name), type)
        and issubclass(getattr(v2, name), nn.Module)
        and not name.startswith("_")
    }
    assert found == set(public_classes())
    assert found >= {"Compose", "MixUp", "Transform", "UniformTemporalSubsample", "ToPureTensor"}


def test_names_that_are_only_in_the_table_are_of_other_torchvisions():
    # A misspelt name would look like one: those that some torchvision since 0.21 lacks are these.
    newer = {"ClampKeyPoints", "SanitizeKeyPoints", "SetClampingMode"}
    assert set(TRANSFORM_CLASSES) - set(public_classes()) <= newer


@pytest.mark.parametrize("name", sorted(TRANSFORM_CLASSES))
def test_every_entry_says_why(name):
    entry = TRANSFORM_CLASSES[name]
    assert len(entry.reason) > 10
    if entry.kind is TransformKind.REFUSED:
        assert any(way in entry.reason for way in ("; use ", "; apply ", "; take ", "vouch"))
    else:
        assert not entry.can_be_trusted


# How each tracked class is built, so that it moves pixels; what resamples has a ring before it.
TRACKED = {
    "CenterCrop": [lambda: v2.CenterCrop((20, 50)), lambda: v2.CenterCrop(9)],
    "FiveCrop": [lambda: v2.FiveCrop((20, 11))],
    "Pad": [lambda: v2.Pad([1, 2, 3, 4]), lambda: v2.Pad(3, padding_mode="reflect")],
    "RandomAffine": [
        lambda: v2.RandomAffine(40, (0.1, 0.2), (0.6, 1.5), 20, interpolation=BILINEAR)
    ],
    "RandomCrop": [lambda: v2.RandomCrop((30, 60), padding=2, pad_if_needed=True)],
    "RandomHorizontalFlip": [lambda: v2.RandomHorizontalFlip(1.0)],
    "RandomPerspective": [lambda: v2.RandomPerspective(0.4, 1.0)],
    "RandomResize": [lambda: v2.RandomResize(20, 60)],
    "RandomResizedCrop": [lambda: v2.RandomResizedCrop((33, 24), (1.0, 1.0), (37 / 45, 37 / 45))],
    "RandomRotation": [
        lambda: v2.RandomRotation(180, BILINEAR),
        lambda: v2.RandomRotation(180, BILINEAR, expand=True),
    ],
    "RandomShortestSize": [lambda: v2.RandomShortestSize([20, 50], max_size=60)],
    "RandomVerticalFlip": [lambda: v2.RandomVerticalFlip(1.0)],
    "RandomZoomOut": [lambda: v2.RandomZoomOut(p=1.0)],
    "Resize": [lambda: v2.Resize((25, 60)), lambda: v2.Resize(30, max_size=50)],
    "ScaleJitter": [lambda: v2.ScaleJitter((50, 60), (0.6, 1.4))],
    "TenCrop": [lambda: v2.TenCrop((20, 11))],
}


@pytest.mark.parametrize("pil", [False, True])
@pytest.mark.parametrize("name", names(TransformKind.TRACKED))
def test_tracked_classes_agree_with_the_pixels(name, pil):
    assert name in TRACKED, f"say in this test how a {name} is built"
    for build in TRACKED[name]:
        transform = build()
        assert type(transform).__name__ == name
        if name in ("FiveCrop", "TenCrop"):
            several_agree(transform, pil)
            continue
        for seed in range(3):
            # resized crops clamp at the crop's border, which is the whole image here
            sent = send_ramp(v2.Compose([SpoilRing(), transform]), 45, 37, pil=pil, seed=seed)
            assert len(sent.shown) > 60
            inside = ((sent.predicted > 0) & (sent.predicted < torch.tensor([37, 45]))).all(-1)
            if name != "Pad":  # which repeats pixels outside, where it is said to
                assert bool(inside.all())
            assert bool((sent.error.abs() <= error_bounds(sent, PER_STEP))[inside].all())
            identity = torch.eye(3)
            size = sent.geometry.view_size.tolist() == [45, 37]
            assert not (size and torch.equal(sent.geometry.matrix, identity)), "it moved nothing"


def several_agree(transform, pil):
    y, x = torch.meshgrid(torch.arange(45.0), torch.arange(37.0), indexing="ij")
    for plane, axis in ((x, 0), (y, 1)):
        image = PIL.Image.fromarray(plane.numpy()) if pil else plane[None]
        views, geometries = track(transform)(image)
        for view, geometry in zip(views, geometries, strict=True):
            shown = torch.from_numpy(np.array(view)) if pil else view[0]
            rows, cols = torch.meshgrid(
                torch.arange(20) + 0.5, torch.arange(11) + 0.5, indexing="ij"
            )
            m = geometry.matrix[axis]
            assert torch.equal(shown + 0.5, m[0] * cols + m[1] * rows + m[2])


# What photometric classes need to be built; the others need nothing.
ARGUMENTS = {
    "ColorJitter": ((0.4, 0.4, 0.4, 0.1), {}),
    "ConvertBoundingBoxFormat": (("XYXY",), {}),
    "GaussianBlur": ((3,), {}),
    "JPEG": ((50,), {}),
    "Normalize": (((0.5,) * 3, (0.2,) * 3), {}),
    "RandomAdjustSharpness": ((2.0, 1.0), {}),
    "RandomErasing": ((1.0,), {}),
    "RandomPosterize": ((3, 1.0), {}),
    "RandomSolarize": ((0.5, 1.0), {}),
    "SetClampingMode": (("hard",), {}),
    "ToDtype": (({tv_tensors.Image: torch.float32, "others": torch.float16},), {}),
}


def build(name):
    args, kwargs = ARGUMENTS.get(name, ((), {}))
    return getattr(v2, name)(*args, **kwargs)


def photograph():
    torch.manual_seed(1)
    return torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)


def pixels(view):
    if isinstance(view, PIL.Image.Image):
        return torch.from_numpy(np.array(view)).permute(2, 0, 1)
    return view.as_subclass(torch.Tensor)


@pytest.mark.parametrize("name", names(TransformKind.PHOTOMETRIC))
def test_photometric_classes_leave_the_geometry_alone(name):
    convert = v2.ToPILImage() if name in ("PILToTensor", "ToTensor") else v2.ToImage()
    parts = [convert, build(name)]
    if name in ("GaussianNoise", "Normalize"):
        parts.insert(1, v2.ToDtype(torch.float32, scale=True))
    pipeline = v2.Compose([v2.CenterCrop((12, 16)), *parts, v2.RandomHorizontalFlip(1.0)])
    image = photograph()
    torch.manual_seed(0)
    view, geometry = track(pipeline)(image)
    torch.manual_seed(0)
    alone = pipeline(image)
    assert type(view) is type(alone)
    assert torch.equal(pixels(view), pixels(alone))
    expected = from_box((17, 14, 33, 26), (12, 16), (40, 50), hflip=True)
    assert torch.equal(geometry.matrix, expected.matrix)


@pytest.mark.parametrize("name", names(TransformKind.PHOTOMETRIC))
def test_photometric_classes_move_no_pixel(name):
    # One bright block on noise: where the result differs most from the same noise without the block
    # is where the block was, whatever was done to its colours.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(60, 120, (3, 48, 64), dtype=torch.uint8, generator=generator)
    marked = noise.clone()
    marked[:, 8:16, 40:56] += 100
    outputs = []
    for image in (noise, marked):
        if name in ("PILToTensor", "ToTensor"):
            image = F.to_pil_image(image)
        elif name in ("GaussianNoise", "Normalize"):
            image = F.to_dtype(image, torch.float32, scale=True)
        torch.manual_seed(6)  # under which RandomErasing leaves the block
        outputs.append(pixels(build(name)(image)).double())
    difference = (outputs[1] - outputs[0]).abs().sum(0)
    assert difference.shape == (48, 64)
    inside = difference[8:16, 40:56].mean()
    difference[6:18, 38:58] = 0  # a blur or a sharpening reaches beyond the block
    assert float(difference.max()) < 0.4 * float(inside)


REFUSED = {
    "CutMix": lambda: v2.CutMix(num_classes=2),
    "Lambda": lambda: v2.Lambda(lambda image: image),
    "LinearTransformation": lambda: v2.LinearTransformation(torch.eye(12), torch.zeros(12)),
    "MixUp": lambda: v2.MixUp(num_classes=2),
    "UniformTemporalSubsample": lambda: v2.UniformTemporalSubsample(2),
}


@pytest.mark.parametrize("name", names(TransformKind.REFUSED))
def test_refused_classes_are_named_with_the_way_out(name):
    transform = REFUSED.get(name, getattr(v2, name))()
    assert type(transform).__name__ == name
    entry = class_entry(type(transform))
    for pipeline in (
        transform,
        v2.Compose([v2.ToImage(), v2.RandomApply([v2.RandomChoice([transform])])]),
        nn.Sequential(v2.RandomOrder([transform])),
    ):
        with pytest.raises(ConfigError) as raised:
            track(pipeline)
        assert str(raised.value) == f"cannot track {name}: {entry.reason}"
    if entry.can_be_trusted:
        track(v2.Compose([transform]), trust=[transform])
    else:
        with pytest.raises(ConfigError, match=f"`trust` names {name}"):
            track(v2.Compose([transform]), trust=[transform])


@pytest.mark.parametrize("name", names(TransformKind.CONTAINER))
def test_containers_are_walked(name):
    container = getattr(v2, name)
    tracked = track(container([v2.RandomHorizontalFlip(1.0), v2.RandomHorizontalFlip(1.0)]))
    assert type(tracked.pipeline) is container
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        view, geometry = tracked(photograph())
        flipped = bool(geometry.matrix[0, 0] < 0)
        assert torch.equal(view, photograph().flip(-1) if flipped else photograph())
        seen.add(flipped)
    assert seen == {name == "RandomChoice"}


@pytest.mark.parametrize("name", names(TransformKind.TRACKED) + names(TransformKind.PHOTOMETRIC))
def test_a_tracked_step_does_what_torchvision_s_forward_does(name):
    # A step asks for parameters and transforms by itself. That is all that these classes' forward
    # does, alone or with a chance before it.
    own = getattr(v2, name).forward
    assert own in (v2.Transform.forward, v2.RandomHorizontalFlip.forward)
    if own is v2.RandomHorizontalFlip.forward:
        transform = TRACKED[name][0]() if name in TRACKED else build(name)
        assert 0 <= transform.p <= 1


def test_the_table_as_markdown():
    lines = transform_table().splitlines()
    assert len(lines) == 2 + len(TRANSFORM_CLASSES)
    assert all(line.count("|") == 4 for line in lines)
    for name in public_classes():
        assert sum(line.startswith(f"| `{name}` |") for line in lines) == 1
