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
    v2.RandomIoUCrop(),
    v2.SanitizeBoundingBoxes(),
    v2.UniformTemporalSubsample(2),
]


class Mine(v2.RandomCrop):
    """Overrides nothing, but could."""


class MineToo(v2.ColorJitter):
    def transform(self, inpt, params):
        return super().transform(inpt, params).roll(3, -1)


class MyCompose(v2.Compose):
    def forward(self, *inputs):
        return super().forward(*inputs)


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
    with pytest.raises(ConfigError, match=rf"{type(transform).__name__}: .*(use|apply|take)"):
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
        (nn.ModuleList([v2.ToImage()]), "ModuleList"),
        (Mine(4), r"Mine: .*subclass of RandomCrop.*use RandomCrop.*trust=\[Mine\]"),
        (MineToo(), r"MineToo: .*subclass of ColorJitter.*trust=\[MineToo\]"),
        (MyCompose([v2.ToImage()]), r"MyCompose: .*subclass of Compose"),
        (v2.Transform(), r"Transform: .*use Identity"),
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


@pytest.mark.parametrize("name", ["transform", "make_params", "forward", "check_inputs"])
def test_refuses_an_object_whose_method_was_replaced(name):
    crop = v2.RandomCrop(4)
    setattr(crop, name, lambda *inputs: inputs[0])
    with pytest.raises(ConfigError, match=f"RandomCrop: its `{name}` was replaced.*trust"):
        track(v2.Compose([crop]))


@pytest.mark.parametrize("container", [False, True])
def test_refuses_forward_hooks(container):
    flip = v2.RandomHorizontalFlip()
    pipeline = v2.Compose([flip])
    (pipeline if container else flip).register_forward_hook(lambda module, args, out: out)
    with pytest.raises(ConfigError, match="forward hooks"):
        track(pipeline)


@pytest.mark.parametrize("interpolation", [InterpolationMode.NEAREST, "nearest", 0])
@pytest.mark.parametrize("transform", [v2.RandomAffine, v2.RandomRotation])
def test_warps_take_the_nearest_pixel(transform, interpolation):
    track(transform(10, interpolation=interpolation))


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


class ClassicCrops:
    """Makes several views by itself, as many codes have it."""

    def __call__(self, image):
        return [image, image]


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (ClassicCrops(), r"trust=\[ClassicCrops\]`; if it moves pixels or makes several views, "
         r"give the pipelines inside of it to MultiView\(\[\(pipeline, 2\), ...\]\), .*from_box"),
        ([v2.CenterCrop(8)], r"^cannot track a list of transforms: wrap it in v2.Compose\("),
        ((v2.CenterCrop(8),), "a tuple of transforms: wrap it in v2.Compose"),
        (lambda image: image, r"name the function \(def brighten ...\), then `trust=\[brighten\]`"),
    ],
    ids=["several", "list", "tuple", "lambda"],
)  # fmt: skip
def test_what_is_not_known_has_a_way_out_that_works(transform, message):
    with pytest.raises(ConfigError, match=message):
        track(transform)


def test_several_views_of_a_vouched_transform_are_named():
    with pytest.raises(GeometryError, match=r"returned a list of 2, wanted one view: .*MultiView"):
        track(ClassicCrops(), trust=[ClassicCrops])(photograph())


def pixels(view):
    if isinstance(view, PIL.Image.Image):
        return torch.from_numpy(np.array(view))
    return view.as_subclass(torch.Tensor)


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
    parts.append(v2.ElasticTransform())
    view, _ = tracked(photograph())
    assert torch.equal(view, F.center_crop(photograph(), [8, 8]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), dtype=np.uint8), "ndarray.*to_image"),
        (torch.zeros(2, 3, 0, 8), r"\(2, 3, 0, 8\)"),
        (tv_tensors.Video(torch.zeros(2, 3, 8, 8)), "Video"),
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


def test_elastic_raises_instead_of_passing_by():
    with pytest.raises(GeometryError, match="`elastic` moves pixels"):
        F.elastic(GeometryTensor.identity(8, 8), displacement=torch.zeros(1, 8, 8, 2))
    sample = (tv_tensors.Image(photograph()), GeometryTensor.identity(40, 50))
    with pytest.raises(GeometryError, match="moves pixels"):
        v2.ElasticTransform()(sample)


def test_every_geometric_functional_has_a_kernel():
    # without one, a transform passes the geometry by in silence
    registry = F._utils._KERNEL_REGISTRY
    geometric = {
        functional
        for functional, kernels in registry.items()
        if tv_tensors.Mask in kernels and tv_tensors.BoundingBoxes in kernels
    }
    assert {F.affine, F.crop, F.elastic, F.perspective, F.resize} <= geometric
    moved = {functional for functional in geometric if functional not in (F.get_size, F.to_dtype)}
    for functional in moved | {F.five_crop, F.ten_crop, F.get_size}:
        assert GeometryTensor in registry[functional], functional.__name__


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("five_crop", {"size": [9, 4]}, r"\(9, 4\).*\(8, 8\)"),
        ("ten_crop", {"size": 9}, r"\(9, 9\).*\(8, 8\)"),
        ("affine", {"angle": 0.0, "translate": [0, 0], "scale": 0.0, "shear": [0]}, "`scale`.*0.0"),
        ("perspective", {"startpoints": None, "endpoints": None}, "`startpoints`"),
        (
            "perspective",
            {"startpoints": None, "endpoints": None, "coefficients": [1.0] * 7},
            "eight `coefficients`",
        ),
        (
            "perspective",
            {"startpoints": [[0, 0]] * 4, "endpoints": [[0, 0]] * 4},
            "no finite coefficients",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(name, how, message):
    with pytest.raises(GeometryError, match=message):
        getattr(F, name)(GeometryTensor.identity(8, 8), **how)


@pytest.mark.parametrize(
    "transform",
    [
        v2.RandomRotation(180, expand=True),
        v2.RandomAffine(30, (0.1, 0.2), (0.5, 2.0), 10),
        v2.RandomPerspective(0.5, 1.0),
        v2.RandomResizedCrop((9, 7)),
    ],
    ids=lambda t: type(t).__name__,
)
def test_a_geometry_goes_through_a_pipeline_of_ones_own(transform):
    torch.manual_seed(5)
    _, expected = track(transform)(tv_tensors.Image(photograph()))
    torch.manual_seed(5)
    _, geometry = transform((tv_tensors.Image(photograph()), GeometryTensor.identity(40, 50)))
    assert isinstance(geometry, GeometryTensor)
    assert torch.equal(geometry.crop_geometry().matrix, expected.matrix)
    assert torch.equal(geometry.crop_geometry().view_size, expected.view_size)


def test_the_view_s_middle_has_a_positive_third_coordinate():
    # so that what a turned-over perspective shows in its middle is not beyond the horizon
    geometry = F.perspective(
        GeometryTensor.identity(20, 30), None, None, coefficients=[1, 0, 0, 0, 1, 0, -0.2, 0.0]
    )
    for handed_on in (
        geometry.crop_geometry().matrix,
        GeometryTensor(torch.stack([geometry] * 2)).crop_geometry().matrix[1],
    ):
        assert float((handed_on @ torch.tensor([15.0, 10.0, 1.0]))[2]) == pytest.approx(2.0)
        assert float((handed_on @ torch.tensor([0.0, 0.0, 1.0]))[2]) < 0


def test_a_geometry_that_no_image_has_is_not_negative():
    # a zero angle must not leave −0 behind, which prints as a turn
    _, geometry = track(v2.RandomRotation((0, 0)))(photograph())
    assert torch.equal(geometry.matrix, torch.eye(3))


def test_a_view_without_pixels_is_an_error():
    with pytest.raises(GeometryError, match="no pixels"):
        F.crop(GeometryTensor.identity(8, 8), 0, 0, 0, 4)
    with pytest.raises(GeometryError, match="8 × 100"):
        F.resize(GeometryTensor.identity(8, 100), None, max_size=10)
    with pytest.raises(GeometryError, match="8 × 100"):
        track(v2.Resize(None, max_size=10))(torch.zeros(3, 8, 100))


def test_a_cast_geometry_tensor_is_an_error():
    geometry = GeometryTensor.identity(8, 8)
    for broken in (geometry.to(torch.float16), geometry.float(), geometry[:12], geometry[0]):
        with pytest.raises(GeometryError, match="13 float64"):
            F.horizontal_flip(broken.as_subclass(GeometryTensor))
        with pytest.raises(GeometryError, match="13 float64"):
            broken.as_subclass(GeometryTensor).crop_geometry()


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
