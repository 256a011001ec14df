"""`check_transform`: right pipelines pass; every property has a wrong one that it alone sees."""

import re

import pytest
import torch
from helpers import wrong_pipelines
from helpers.views import PLAIN
from helpers.wrong_pipelines import WRONG, OffByFivePixels, Right
from torchvision.transforms import v2

from local_distill import ConfigError, MultiCrop, MultiView, track
from local_distill.testing import PropertyFailed, check_transform
from local_distill.testing._transform_properties import TransformExample
from local_distill.testing.transform_kit import transform_properties, transform_test

SIZES = [(120, 150), (160, 110)]
CROP = v2.RandomResizedCrop(32, scale=(0.3, 1.0))

test_multi_crop = transform_test(
    MultiCrop(global_size=96, local_size=(64, 48), local_count=2), image_sizes=SIZES
)
test_multi_view = transform_test(
    MultiView([(CROP, 2), (v2.Compose([v2.CenterCrop((50, 40)), v2.RandomRotation(20)]), 1)]),
    image_sizes=SIZES,
)
test_tracked_pipeline = transform_test(
    track(v2.Compose([CROP, v2.RandomHorizontalFlip(), v2.ColorJitter(0.4, 0.4)])),
    image_sizes=SIZES,
)
test_v2_pipeline = transform_test(
    v2.Compose([v2.Pad(5), v2.RandomCrop(40), v2.Resize((20, 30))]), image_sizes=SIZES
)
test_trusted_pipeline = transform_test(
    v2.Compose([CROP, v2.Lambda(torch.nn.Identity())]), image_sizes=SIZES, trust=[v2.Lambda]
)
test_strict_xfail = transform_test(
    OffByFivePixels(),
    image_sizes=SIZES[:1],
    seeds=[3],
    xfail={"pixels_follow_the_geometry": "five pixels off"},
    max_examples=2,
)


def failing(pipeline):
    """The names of the properties that a pipeline does not keep."""
    found = set()
    examples = [TransformExample(SIZES[0], "tensor", 0), TransformExample(SIZES[1], "pil", 5)]
    for one in transform_properties():
        try:
            check_transform(pipeline, image_sizes=SIZES, properties=[one.name], examples=examples)
        except PropertyFailed:
            found.add(one.name)
    return found


def test_every_property_has_a_wrong_pipeline():
    assert set(WRONG) == {one.name for one in transform_properties()}


def test_what_the_wrong_pipelines_are_made_of_is_right():
    assert failing(Right()) == set()


@pytest.mark.parametrize("name", WRONG)
def test_exactly_this_property_sees_it(name):
    assert failing(WRONG[name]()) == {name}


def test_a_failure_says_where_and_its_snippet_repeats_it():
    name = "pixels_follow_the_geometry"
    with pytest.raises(PropertyFailed) as caught:
        check_transform(OffByFivePixels(), image_sizes=SIZES[:1], seeds=[3], properties=[name])
    message = str(caught.value)
    assert "the geometry does not say where the view's pixels lie" in message
    snippet = message.split("to repeat:\n\n")[1]
    code = "\n".join(line.removeprefix("    ") for line in snippet.splitlines())
    code = re.sub(r"subject = \.\.\..*", "", code)
    with pytest.raises(PropertyFailed, match=name):
        exec(code, {"subject": OffByFivePixels()})
    exec(code, {"subject": Right()})


@pytest.mark.parametrize(
    ("pipeline", "text"),
    [
        (wrong_pipelines.without_geometry, "not .view, CropGeometry."),
        (wrong_pipelines.one_geometry_too_few, "2 views and 1 geometries"),
        (wrong_pipelines.no_crop_geometry, "Tensor and tuple|not CropGeometry|Image and tuple"),
    ],
)
def test_what_returns_no_geometry_fails(pipeline, text):
    with pytest.raises(PropertyFailed, match=text):
        check_transform(
            pipeline, image_sizes=SIZES, properties=["geometry_has_its_shapes_and_dtypes"]
        )


def test_what_serves_no_image_is_refused():
    def broken(image):
        raise OSError("no disk")

    with pytest.raises(ConfigError, match=r"serves neither .* OSError: no disk"):
        check_transform(broken)
    with pytest.raises(ConfigError, match="cannot track RandAugment"):
        check_transform(v2.RandAugment())
    with pytest.raises(ConfigError, match="`sizes`"):
        check_transform(MultiCrop(**PLAIN), image_sizes=[(3, 3)])
    with pytest.raises(ConfigError, match="no property"):
        check_transform(CROP, image_sizes=SIZES, properties=["nothing"])


def test_a_pipeline_for_tensors_alone_is_tried_on_tensors():
    def tensors_only(image):
        if not isinstance(image, torch.Tensor):
            raise TypeError("tensors only")
        return track(CROP)(image)

    names = ["pixels_follow_the_geometry", "pil_and_tensor_images_agree"]
    assert check_transform(tensors_only, image_sizes=SIZES, properties=names) == names
