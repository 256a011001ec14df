"""What track admits, what it refuses, and what it hands on."""

import copy
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms as v1
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from local_distill import ConfigError, CropGeometry, GeometryError, ShapeError, compose, from_box
from local_distill.transforms import GeometryTensor, Tracked, track
from local_distill.transforms.tracking import _PHOTOMETRIC


class Shift(v2.Transform):
    """A user's transform, which moves pixels or not: it can't be seen from outside."""

    def transform(self, inpt, params):
        return inpt + 1  # every tensor it is shown, the geometry as well


def brighten(image):
    return image * 2


def narrow(image):
    return image[..., :-1]


def example_pipeline():
    return v2.Compose(
        [
            v2.RandomResizedCrop((24, 16), antialias=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.5,) * 3, (0.2,) * 3),
        ]
    )


def photograph(height=40, width=50):
    torch.manual_seed(1)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


MOVING = [
    v2.AutoAugment(),
    v2.RandAugment(),
    v2.TrivialAugmentWide(),
    v2.AugMix(),
    v2.MixUp(num_classes=2),
    v2.CutMix(num_classes=2),
    v2.ElasticTransform(),
    v2.FiveCrop(4),
    v2.TenCrop(4),
    v2.RandomAffine(10),
    v2.RandomPerspective(),
    v2.RandomRotation(10),
    v2.RandomIoUCrop(),
]


@pytest.mark.parametrize("transform", MOVING, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize(
    "inside",
    [
        lambda t: t,
        lambda t: v2.Compose([v2.ToImage(), v2.RandomApply([v2.RandomChoice([t])])]),
        lambda t: v2.RandomApply(nn.ModuleList([v2.RandomOrder([v2.ToImage(), t])])),
        lambda t: nn.Sequential(v2.ToImage(), t),
    ],
    ids=["alone", "compose", "module-list", "sequential"],
)
def test_refuses_what_moves_pixels_untracked(transform, inside):
    with pytest.raises(ConfigError, match=rf"{type(transform).__name__}: .*(use|apply)"):
        track(inside(transform))


@pytest.mark.parametrize("transform", MOVING, ids=lambda t: type(t).__name__)
def test_nobody_can_vouch_for_what_is_known_to_move_pixels(transform):
    for trust in (transform, type(transform)):
        with pytest.raises(ConfigError, match=f"trust.*{type(transform).__name__}"):
            track(v2.Compose([transform]), trust=[trust])


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (v2.Lambda(brighten), r"Lambda: .*trust=\[it\]"),
        (Shift(), r"Shift: .*trust=\[Shift\]"),
        (brighten, r"brighten: .*trust=\[brighten\]"),
        (v2.LinearTransformation(torch.eye(3), torch.zeros(3)), "LinearTransformation"),
        (v1.RandomCrop(4), r"RandomCrop: .*v1.*use torchvision.transforms.v2.RandomCrop"),
        (v1.ToTensor(), r"ToTensor: .*v1.*use torchvision.transforms.v2.ToTensor"),
        (v1.Compose([v2.ToImage()]), r"Compose: .*v1.*use torchvision.transforms.v2.Compose"),
        (v2.ToImage, r"the class ToImage; pass an instance"),
        (None, "NoneType"),
        (3, "int"),
        ([v2.ToImage()], "list"),
        (track(v2.ToImage()), "Tracked"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_refuses_what_it_does_not_know(transform, message):
    pipelines = [transform] if isinstance(transform, v1.Compose) else [transform, None]
    for wrapped in pipelines:
        pipeline = transform if wrapped is transform else v2.Compose([transform])
        with pytest.raises(ConfigError, match=message):
            track(pipeline)


@pytest.mark.parametrize("interpolation", [InterpolationMode.NEAREST, "nearest", 0])
@pytest.mark.parametrize("transform", [v2.Resize, v2.RandomResizedCrop])
def test_refuses_the_biased_interpolation(transform, interpolation):
    with pytest.raises(ConfigError, match=rf"{transform.__name__}.*NEAREST_EXACT"):
        track(transform(8, interpolation=interpolation))


@pytest.mark.parametrize("trust", [Shift, "instance"])
def test_a_trusted_transform_is_shown_the_image_alone(trust):
    shift = Shift()
    tracked = track(
        v2.Compose([v2.CenterCrop(8), shift]), trust=[shift if trust == "instance" else trust]
    )
    image = photograph()
    view, geometry = tracked(image)
    assert torch.equal(view, F.center_crop(image, [8, 8]) + 1)
    assert torch.equal(geometry.matrix, from_box((21, 16, 29, 24), (8, 8), (40, 50)).matrix)


def test_trust_covers_functions_lambdas_and_v1():
    lam = v2.Lambda(brighten)
    jitter = v1.ColorJitter()
    pipeline = v2.Compose([lam, brighten, jitter, v2.RandomHorizontalFlip(1.0)])
    view, geometry = track(pipeline, trust=[lam, brighten, v1.ColorJitter])(photograph() // 4)
    assert torch.equal(view, (photograph() // 4 * 4).flip(-1))
    assert geometry.matrix[0].tolist() == [-1, 0, 50]


def test_a_trusted_base_class_does_not_cover_its_subclasses():
    with pytest.raises(ConfigError, match="Shift"):
        track(Shift(), trust=[v2.Transform])


def test_a_vouched_transform_that_changes_the_size_is_caught():
    with pytest.raises(GeometryError, match=r"\(40, 49\).*\(40, 50\).*vouched"):
        track(v2.Compose([narrow]), trust=[narrow])(photograph())


def pixels(view):
    if isinstance(view, PIL.Image.Image):
        return torch.from_numpy(np.array(view))
    return view.as_subclass(torch.Tensor)


def arguments(kind):
    """What a photometric class needs to be built, if anything."""
    return {
        v2.ColorJitter: ((0.4, 0.4, 0.4, 0.1), {}),
        v2.GaussianBlur: ((3,), {}),
        v2.JPEG: ((50,), {}),
        v2.Normalize: (((0.5,) * 3, (0.2,) * 3), {}),
        v2.RandomAdjustSharpness: ((2.0, 1.0), {}),
        v2.RandomErasing: ((1.0,), {}),
        v2.RandomPosterize: ((3, 1.0), {}),
        v2.RandomSolarize: ((0.5, 1.0), {}),
        v2.ToDtype: (({tv_tensors.Image: torch.float32, "others": torch.float16},), {}),
    }.get(kind, ((), {}))


# torchvision's own deprecations of ToTensor and of the decoder behind JPEG
@pytest.mark.filterwarnings("ignore:The transform `ToTensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")
@pytest.mark.parametrize("kind", sorted(_PHOTOMETRIC, key=lambda k: k.__name__))
def test_photometric_transforms_leave_the_geometry_alone(kind):
    args, kwargs = arguments(kind)
    from_pil = kind.__name__ in ("PILToTensor", "ToTensor")
    convert = v2.ToPILImage() if from_pil else v2.ToImage()
    parts = [convert, kind(*args, **kwargs)]
    if kind in (v2.GaussianNoise, v2.Normalize):
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


def test_the_geometry_survives_to_pure_tensor():
    pipeline = v2.Compose([v2.ToImage(), v2.ToPureTensor(), v2.RandomHorizontalFlip(1.0)])
    view, geometry = track(pipeline)(photograph())
    assert type(view) is torch.Tensor
    assert torch.equal(view, photograph().flip(-1))
    assert geometry.matrix[0].tolist() == [-1, 0, 50]


@pytest.mark.parametrize("kind", ["pil", "tensor", "image"])
@pytest.mark.parametrize("seed", range(5))
def test_the_pixels_are_the_same_as_without_tracking(kind, seed):
    image = photograph()
    if kind == "pil":
        image = F.to_pil_image(image)
    elif kind == "image":
        image = tv_tensors.Image(image)
    pipeline = example_pipeline()
    torch.manual_seed(seed)
    view, geometry = track(pipeline)(image)
    torch.manual_seed(seed)
    assert torch.equal(view, pipeline(image))
    assert geometry.matrix.dtype == torch.float32
    assert geometry.view_size.tolist() == [24, 16]
    assert geometry.source_size.tolist() == [40, 50]
    assert geometry.view_size.dtype == geometry.source_size.dtype == torch.int32


def test_random_choice_keeps_its_odds():
    pipeline = v2.RandomChoice([v2.RandomHorizontalFlip(1.0), v2.RandomVerticalFlip(1.0)], p=[3, 1])
    tracked = track(pipeline)
    torch.manual_seed(0)
    seen = [tracked(photograph())[1].matrix[0, 0].item() for _ in range(400)]
    torch.manual_seed(0)
    without = [float(pipeline(photograph()).eq(photograph().flip(-1)).all()) for _ in range(400)]
    assert [value == -1 for value in seen] == [value == 1 for value in without]


def test_later_changes_to_the_callers_list_do_not_slip_past_the_walk():
    parts = [v2.CenterCrop(8)]
    tracked = track(v2.Compose(parts))
    parts.append(v2.RandomRotation(90))
    view, _ = tracked(photograph())
    assert torch.equal(view, F.center_crop(photograph(), [8, 8]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), dtype=np.uint8), "ndarray.*to_image"),
        (torch.zeros(2, 3, 8, 8), r"\(2, 3, 8, 8\).*batch"),
        (torch.zeros(8, 8), r"\(8, 8\)"),
        (torch.zeros(3, 0, 8), r"\(3, 0, 8\)"),
        (tv_tensors.Mask(torch.zeros(1, 8, 8)), "Mask"),
        ("photo.jpg", "str"),
        (None, "NoneType"),
    ],
)
def test_refuses_what_is_no_image(image, message):
    with pytest.raises(ShapeError, match=message):
        track(example_pipeline())(image)


@pytest.mark.parametrize("name", ["affine", "rotate", "perspective", "elastic"])
def test_untracked_functionals_raise_instead_of_passing_by(name):
    arguments = {
        "affine": {"angle": 1.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0]},
        "rotate": {"angle": 90.0},
        "perspective": {"startpoints": None, "endpoints": None, "coefficients": [1.0] * 8},
        "elastic": {"displacement": torch.zeros(1, 8, 8, 2)},
    }
    with pytest.raises(GeometryError, match=f"`{name}` moves pixels"):
        getattr(F, name)(GeometryTensor.identity(8, 8), **arguments[name])


@pytest.mark.parametrize("name", ["five_crop", "ten_crop"])
def test_crops_into_several_views_raise(name):
    with pytest.raises(GeometryError, match=f"`{name}` moves pixels"):
        getattr(F, name)(GeometryTensor.identity(8, 8), size=[4, 4])


@pytest.mark.parametrize(
    "transform", [v2.RandomRotation((90, 90)), v2.ElasticTransform(), v2.TenCrop(4)]
)
def test_untracked_transforms_raise_in_a_pipeline_of_ones_own(transform):
    sample = (tv_tensors.Image(photograph()), GeometryTensor.identity(40, 50))
    with pytest.raises(GeometryError, match="moves pixels"):
        transform(sample)


def test_a_view_without_pixels_is_an_error():
    with pytest.raises(GeometryError, match="no pixels"):
        F.crop(GeometryTensor.identity(8, 8), 0, 0, 0, 4)
    with pytest.raises(GeometryError, match="8 × 100"):
        F.resize(GeometryTensor.identity(8, 100), None, max_size=10)
    with pytest.raises(GeometryError, match="8 × 100"):
        track(v2.Resize(None, max_size=10))(torch.zeros(3, 8, 100))


def test_a_cast_geometry_tensor_is_an_error():
    geometry = GeometryTensor.identity(8, 8)
    for broken in (geometry.to(torch.float16), geometry.float(), torch.stack([geometry] * 2)):
        with pytest.raises(GeometryError, match="13 float64"):
            F.horizontal_flip(broken.as_subclass(GeometryTensor))


def test_the_geometry_survives_clone_deepcopy_and_pickling():
    geometry = F.crop(GeometryTensor.identity(20, 30), 3, 4, 10, 12)
    for copied in (
        geometry.clone(),
        copy.deepcopy(geometry),
        geometry.to("cpu"),
        geometry.detach(),
    ):
        assert isinstance(copied, GeometryTensor)
        assert F.get_size(copied) == [10, 12]
        assert torch.equal(copied.crop_geometry().matrix, geometry.crop_geometry().matrix)
    loaded = pickle.loads(pickle.dumps(geometry))
    assert F.get_size(F.vertical_flip(loaded.as_subclass(GeometryTensor))) == [10, 12]


def test_sizes_are_asked_of_the_image():
    # v2 raises where two inputs of a sample disagree on the size
    sample = (photograph(), GeometryTensor.identity(40, 50))
    view, geometry = v2.RandomCrop((10, 20))(sample)
    assert tuple(view.shape[1:]) == tuple(F.get_size(geometry)) == (10, 20)
    assert v2.query_size([photograph(), geometry]) == (40, 50)


def test_a_long_pipeline_stays_exact_to_float32():
    # 60 transforms on a 4K source: float32 steps would have added up
    torch.manual_seed(0)
    parts, size = [], (4096, 2731)
    geometry = GeometryTensor.identity(*size)
    expected = from_box(torch.tensor([0, 0, size[1], size[0]], dtype=torch.float64), size, size)
    for index in range(60):
        height, width = F.get_size(geometry)
        if index % 2:
            new = [height + 7 - index % 13, width - 5 + index % 11]
            box = torch.tensor([0, 0, width, height], dtype=torch.float64)
            geometry = F.resize(geometry, new)
            step = from_box(box, new, (height, width))
        else:
            new = [height - 3, width - 2]
            box = torch.tensor([1, 2, width - 1, height - 1], dtype=torch.float64)
            geometry = F.horizontal_flip(F.crop(geometry, 2, 1, *new))
            step = from_box(box, new, (height, width), hflip=True)
        expected = compose(expected, step)
        parts.append(new)
    handed_on = geometry.crop_geometry()
    wide = geometry.crop_geometry(torch.float64)
    torch.testing.assert_close(wide.matrix, expected.matrix, rtol=1e-12, atol=1e-9)
    assert wide.view_size.tolist() == expected.view_size.tolist()
    corner = torch.tensor([float(parts[-1][1]), float(parts[-1][0]), 1.0], dtype=torch.float64)
    error = handed_on.matrix.double() @ corner - wide.matrix @ corner
    assert float(error.abs().max()) <= 2**-22 * 4096


def test_pickle_and_deepcopy_make_the_same_views():
    tracked = track(v2.Compose([example_pipeline(), brighten]), trust=[brighten])
    for copied in (pickle.loads(pickle.dumps(tracked)), copy.deepcopy(tracked)):
        assert isinstance(copied, Tracked)
        outputs = []
        for either in (tracked, copied):
            torch.manual_seed(3)
            outputs.append(either(photograph()))
        assert torch.equal(outputs[0][0], outputs[1][0])
        assert torch.equal(outputs[0][1].matrix, outputs[1][1].matrix)
    assert "RandomResizedCrop" in repr(tracked)


class Photographs(Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return self.transform(F.to_pil_image(photograph(30 + index, 41)))


@pytest.mark.parametrize("workers", [0, 2])
def test_through_a_loader(workers):
    torch.manual_seed(0)
    loader = DataLoader(Photographs(track(example_pipeline())), batch_size=3, num_workers=workers)
    batches = list(loader)
    assert len(batches) == 2
    for start, (views, geometry) in zip((0, 3), batches, strict=True):
        assert views.shape == (3, 3, 24, 16)
        assert isinstance(geometry, CropGeometry)
        assert geometry.matrix.shape == (3, 3, 3)
        assert geometry.matrix.dtype == torch.float32
        assert geometry.source_size.tolist() == [[30 + start + i, 41] for i in range(3)]
        assert geometry.view_size.dtype == torch.int32


def test_collate_stacks_plain_tensors():
    samples = [track(example_pipeline())(photograph()) for _ in range(2)]
    _, geometry = default_collate(samples)
    assert all(type(part) is torch.Tensor for part in geometry)
