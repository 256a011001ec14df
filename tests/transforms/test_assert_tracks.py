"""`assert_tracks` catches wrong geometry, says what is wrong, and lets every right recipe pass."""

import importlib.util
import random
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from local_distill import from_box
from local_distill.errors import ConfigError, LocalDistillError
from local_distill.structures import CropGeometry
from local_distill.transforms import MultiCrop, track
from local_distill.transforms.verification import TrackingError, assert_tracks
from local_distill.transforms.verification.displacement import shown_map
from local_distill.transforms.verification.structured_light import measure, patterns, read_signals


def recipes():
    """The recipes of benchmarks/false_alarms.py, which runs them with 200 seeds."""
    path = Path(__file__).parents[2] / "benchmarks" / "false_alarms.py"
    spec = importlib.util.spec_from_file_location("false_alarms", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPES = recipes()
SIZE = (83, 131)  # odd, and neither side is the other's


def tensor(image):
    return image if isinstance(image, torch.Tensor) else F.pil_to_tensor(image)


class Wrong:
    """A right pipeline, and what is then done to its view or its geometry alone."""

    def __init__(self, view=None, geometry=None, colours=(), size=(96, 112)):
        crop = v2.RandomResizedCrop(size, scale=(0.3, 1.0))
        pipeline = v2.Compose([crop, v2.RandomHorizontalFlip(), *colours])
        self.right = track(pipeline, trust=[RECIPES.PilJpeg])
        self.view = view or (lambda view: view)
        self.geometry = geometry or (lambda geometry: geometry)

    def __call__(self, image):
        view, geometry = self.right(image)
        return self.view(view), self.geometry(geometry)


class Crop:
    """A crop of 70 × 90 px whose box is told wrong by (dx, dy)."""

    def __init__(self, dx=0.0, dy=0.0, scale=1.0):
        self.dx, self.dy, self.scale = dx, dy, scale

    def __call__(self, image):
        view = F.resized_crop(image, 30, 41, 70, 90, [70, 90])
        x, y = 41 - self.dx, 30 - self.dy
        box = (x, y, x + 90 * self.scale, y + 70 * self.scale)
        return view, from_box(box, (70, 90), F.get_size(image))


def times(matrix):
    return lambda geometry: geometry._replace(matrix=geometry.matrix @ torch.tensor(matrix))


def failure(pipeline, tmp_path, **settings):
    with pytest.raises(TrackingError) as caught:
        assert_tracks(pipeline, picture=tmp_path / "wrong.png", **settings)
    return str(caught.value)


# What is right passes.


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("DINO", RECIPES.dino(64, 48, 1)),
        ("DINOv2", RECIPES.dinov2(98, 56, 1)),
        ("DINOv2, much blurred", RECIPES.dinov2(70, 40, 1, most=5.0)),
        ("SimCLR", RECIPES.simclr(80)),
        ("lightly DINO", RECIPES.lightly_dino(64, 48, 1)),
        ("lightly SimCLR", RECIPES.lightly_simclr(64)),
        ("lightly MoCo", RECIPES.lightly_moco(64)),
        ("MultiCrop", MultiCrop(global_size=64, local_size=48, local_count=1)),
        ("harsh", RECIPES.harsh(64)),
    ],
)
def test_right_recipes_pass(name, pipeline):
    report = assert_tracks(pipeline, seeds=10)
    assert report.kinds == ("pil", "tensor")
    assert report.views >= 8
    assert report.judged > {"harsh": 0.5, "DINOv2, much blurred": 0.7}.get(name, 0.9)
    assert report.largest_median <= report.largest < 0.9


COLOURS = {
    "jitter": v2.ColorJitter(0.8, 0.8, 0.8, 0.5),
    "dim": v2.ColorJitter((0.3, 0.3), (0.3, 0.3)),
    "gray": v2.RandomGrayscale(1.0),
    "blur": v2.GaussianBlur(15, 2.0),
    "solarize": v2.RandomSolarize(60, 1.0),
    "posterize": v2.RandomPosterize(2, 1.0),
    "equalize": v2.RandomEqualize(1.0),
    "autocontrast": v2.RandomAutocontrast(1.0),
    "invert": v2.RandomInvert(1.0),
    "jpeg": RECIPES.PilJpeg((10, 20)),
    "erase": v2.Compose([v2.ToImage(), v2.RandomErasing(1.0, value="random")]),
    "noise": v2.Compose([*RECIPES.FLOAT, v2.GaussianNoise(sigma=0.2)]),
    "normalize": v2.Compose([*RECIPES.FLOAT, RECIPES.NORMALIZE]),
    "channels": v2.RandomChannelPermutation(),
    "distort": v2.RandomPhotometricDistort(p=1.0),
}


@pytest.mark.parametrize("name", COLOURS)
def test_colours_raise_no_alarm_and_hide_no_fault(name, tmp_path):
    colours = [COLOURS[name]]
    assert assert_tracks(Wrong(colours=colours), seeds=3).views == 3
    shifted = failure(Wrong(lambda view: tensor(view).roll(8, -1), colours=colours), tmp_path)
    moved = re.search(r"moves the view's content by \((\S+), (\S+)\) px", shifted)
    assert float(moved[1]) == pytest.approx(8.0, abs=0.5)
    assert float(moved[2]) == pytest.approx(0.0, abs=0.5)
    flipped = failure(Wrong(F.horizontal_flip, colours=colours), tmp_path)
    assert "mirrored left to right" in flipped


@pytest.mark.parametrize("kind", ["pil", "tensor", "float"])
def test_each_kind_of_image(kind):
    pipeline = MultiCrop(global_size=64, local_count=0)
    report = assert_tracks(pipeline, seeds=3, kinds=[kind], sizes=[SIZE])
    assert report.kinds == (kind,)
    assert report.views == 6
    assert report.largest < 0.3


@pytest.mark.parametrize("padding_mode", ["constant", "reflect", "edge"])
def test_what_lies_outside_the_source_is_left_out(padding_mode):
    pipeline = v2.Compose([v2.Pad(40, padding_mode=padding_mode), v2.RandomCrop(100)])
    assert assert_tracks(pipeline, seeds=6).largest < 0.1


def test_a_plain_crop_is_read_to_a_hundredth_of_a_pixel():
    report = assert_tracks(Crop(), seeds=2, kinds=["float"])
    assert report.judged == 1
    assert report.largest < 1e-4


# What is wrong does not, and is named.

FLIP_X, SWAP = [[-1.0, 0, 112], [0, 1, 0], [0, 0, 1]], [[0.0, 1, 0], [1, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        (Wrong(F.horizontal_flip), "mirrored left to right"),
        (Wrong(v2.RandomHorizontalFlip(0.5)), "mirrored left to right"),
        (Wrong(geometry=times(FLIP_X)), "mirrored left to right"),
        (Wrong(F.vertical_flip), "mirrored top to bottom"),
        (Wrong(v2.RandomVerticalFlip(0.5)), "mirrored top to bottom"),
        (Wrong(lambda view: tensor(view).flip(-1, -2)), "turned by 180°"),
        (Wrong(geometry=times(SWAP)), "x and y are swapped"),
        (
            Wrong(geometry=lambda g: g._replace(matrix=torch.tensor(SWAP) @ g.matrix)),
            "x and y are swapped",
        ),
        (Crop(8), "shifted by (8.0, 0.0) px"),
        (Crop(0, -8), "shifted by (0.0, -8.0) px"),
        (Crop(2.5, 1.5), "shifted by (2.5, 1.5) px"),
        (Crop(-41, -30, 0.5), "scaled by (2.00, 2.00)"),
        (Wrong(lambda view: F.rotate(view, 30), size=(96, 96)), "turned counterclockwise by 30.0°"),
        (
            Wrong(geometry=lambda g: g._replace(matrix=g.matrix.inverse())),
            "the matrix maps source to view",
        ),
        (
            Wrong(geometry=lambda g: g._replace(view_size=g.view_size.flip(-1))),
            "view_size (112, 96), but the view is (height, width) = (96, 112): it was given as "
            "(width, height)",
        ),
        (
            Wrong(geometry=lambda g: g._replace(source_size=g.source_size.flip(-1))),
            "source_size (301, 224), but the source is (height, width) = (224, 301): it was given "
            "as (width, height)",
        ),
        (Wrong(geometry=lambda g: g._replace(view_size=g.view_size + 1)), "view_size (97, 113)"),
        (Wrong(geometry=lambda g: g._replace(matrix=g.matrix * torch.nan)), "NaN"),
        (Wrong(geometry=lambda g: CropGeometry(*(part[None] for part in g))), "of one view"),
        (Wrong(v2.ElasticTransform(80.0)), "moved unevenly"),
        (Wrong(lambda view: F.crop(tensor(view), 0, 0, 48, 112).repeat(1, 2, 1)), "several places"),
    ],
)
def test_faults_are_caught_and_named(pipeline, words, tmp_path):
    assert words in failure(pipeline, tmp_path, seeds=8)


def test_counting_from_pixel_centres_after_a_strong_downscale(tmp_path):
    def pipeline(image):
        view, geometry = track(v2.Resize((44, 52)))(image)
        matrix = geometry.matrix.clone()
        matrix[:2, 2] -= (matrix.diagonal()[:2] - 1) / 2
        return view, geometry._replace(matrix=matrix)

    message = failure(pipeline, tmp_path, seeds=1)
    assert "are centres counted as i + 0.5?" in message


def test_views_in_another_order_than_their_geometries(tmp_path):
    multi_crop = MultiCrop(global_size=64, local_size=48, local_count=3)

    def permuted(image):
        views, geometries = multi_crop(image)
        return views, [*geometries[:3], geometries[4], geometries[3]]

    message = failure(permuted, tmp_path, seeds=2)
    assert "geometry 3 of 5 does not say" in message
    assert "geometry 4 describes this view" in message


@given(dx=st.integers(-40, 40), dy=st.integers(-30, 30), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_any_shift_is_measured(dx, dy, seed):
    source = (112, 150)
    views, geometry = [], None
    for pattern in patterns(*source):
        view, geometry = Crop(dx, dy)(pattern[None] * (seed + 1) / 255)
        views.append(view)
    found = measure(read_signals(views, source), geometry)
    if dx == dy == 0:
        assert found.agreeing == 1
        assert found.largest < 0.01
    elif max(abs(dx), abs(dy)) <= 2:  # a fifth of the shorter period is 2.6 px
        assert found.median == pytest.approx((dx**2 + dy**2) ** 0.5, rel=0.1)
    else:
        # beyond it most pixels agree no more, save by chance, and not with both periods
        assert found.agreeing < 0.5 or found.median > 1.2
    shown = shown_map(read_signals(views, source, every_pixel=True), source)
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [41.0, 30.0]], dtype=torch.float64)
    torch.testing.assert_close(shown, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("shift", range(3, 33))
def test_no_shift_along_both_axes_passes_for_an_inverted_image(shift):
    # (14, 14) px is about half of both periods along both axes of a source of this size
    source = (224, 301)
    views, geometry = [], None
    for pattern in patterns(*source):
        view, geometry = Crop(shift, shift)(pattern[None] / 255)
        views.append(view)
    found = measure(read_signals(views, source), geometry)
    assert found.agreeing < 0.5 or found.median > 1.5
    inverted = measure(read_signals([1 - view for view in views], source), geometry)
    assert inverted.agreeing < 0.5 or inverted.median > 1.5


def test_the_tolerance_can_be_set(tmp_path):
    assert "shifted by (2.0, 0.0) px" in failure(Crop(2.0), tmp_path, seeds=1)
    assert assert_tracks(Crop(2.0), seeds=2, tolerance=2.5).largest_median == pytest.approx(2, 0.02)
    assert "tolerance=1.5" in failure(Crop(2.0), tmp_path, seeds=1, tolerance=1.5)
    assert assert_tracks(Crop(0.5), seeds=2).largest_median == pytest.approx(0.5, 0.05)
    assert "0.3" in failure(Crop(0.5), tmp_path, seeds=1, tolerance=0.3)


def test_the_message_repeats_itself(tmp_path):
    pipeline = Wrong(v2.RandomHorizontalFlip(0.2))
    message = failure(pipeline, tmp_path, seeds=30)
    case, call = (re.search(f"{name} (.*)", message)[1] for name in ("seen in:", "repeat: "))
    with pytest.raises(TrackingError) as caught:
        eval(call, {"assert_tracks": assert_tracks, "pipeline": pipeline})
    Path(str(caught.value).rpartition("picture: ")[2]).unlink()
    assert case in str(caught.value)
    assert "off by:  median" in message
    # that seed, that size and that kind decide
    assert re.search(r"seeds=\[\d+\], sizes=\[\(\d+, \d+\)\], kinds=\['(pil|tensor)'\]", call)


def test_the_error_serves_test_runners_and_this_package():
    assert issubclass(TrackingError, AssertionError)
    assert issubclass(TrackingError, LocalDistillError)


# A check that checked nothing does not pass.


def test_a_view_that_shows_nothing_is_an_error(tmp_path):
    message = failure(Wrong(lambda view: tensor(view) * 0), tmp_path, seeds=3)
    assert "nothing can be said about the view: only 0 of" in message


def test_a_blur_that_leaves_nothing_to_read_is_no_disagreement(tmp_path):
    drowned = Wrong(colours=[v2.GaussianBlur(51, 12.0)], size=(96, 96))
    assert "nothing can be said" in failure(drowned, tmp_path, seeds=4)


def test_one_such_view_among_others_is_an_error(tmp_path):
    multi_crop = MultiCrop(global_size=64, local_size=48, local_count=2)

    def blind(image):
        views, geometries = multi_crop(image)
        views[2] = torch.zeros_like(views[2])
        return views, geometries

    assert "nothing can be said about view 2" in failure(blind, tmp_path, seeds=2)


def test_a_geometry_beside_the_source_is_an_error(tmp_path):
    message = failure(Crop(500), tmp_path, seeds=2)
    assert "puts only 0 of the pixels looked at inside the source" in message


# Random numbers.


def states():
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


@pytest.mark.parametrize("wrong", [False, True])
def test_the_callers_generators_are_put_back(wrong, tmp_path):
    view = F.horizontal_flip if wrong else None
    before = states()
    if wrong:
        failure(Wrong(view), tmp_path, seeds=1)
    else:
        assert_tracks(RECIPES.lightly_simclr(48), seeds=2)
        assert_tracks(RECIPES.dino(48, 48, 1), seeds=2)
    after = states()
    assert torch.equal(before[0], after[0])
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert before[2] == after[2]


@pytest.mark.parametrize(
    "draw",
    [lambda: float(torch.rand(())), lambda: np.random.rand(), random.random],  # noqa: NPY002
)
def test_seeds_govern_all_three_generators(draw, tmp_path):
    right = track(v2.CenterCrop((90, 110)))

    def sometimes(image):
        view, geometry = right(image)
        return (F.horizontal_flip(view) if draw() < 0.3 else view), geometry

    # had the 16 images of a seed not been flipped alike, no flip could have been read off them
    message = failure(sometimes, tmp_path, seeds=20)
    assert "mirrored left to right" in message
    assert "generator of its own" not in message
    assert (
        message.partition("repeat:")[2]
        == failure(sometimes, tmp_path, seeds=20).partition("repeat:")[2]
    )


class OwnGenerator:
    """Draws from a generator that no seed reaches."""

    def __init__(self, wrong):
        self.generator = np.random.default_rng(3)
        self.wrong = wrong
        self.boxes = set()

    def __call__(self, image):
        top, left = self.generator.integers(0, 80, 2).tolist()
        self.boxes.add((top, left))
        view = F.crop(image, top, left, 100, 110)
        if self.wrong and self.generator.random() < 0.5:
            view = F.horizontal_flip(view)
        box = (left, top, left + 110, top + 100)
        return view, from_box(box, (100, 110), F.get_size(image))


def test_a_generator_of_the_pipelines_own(tmp_path):
    pipeline = OwnGenerator(wrong=False)
    assert assert_tracks(pipeline, seeds=6).views == 6
    assert len(pipeline.boxes) > 6  # it goes on from seed to seed
    message = failure(OwnGenerator(wrong=True), tmp_path, seeds=8)
    assert "mirrored left to right" in message
    assert "generator of its own" in message


def test_what_cannot_be_repeated_is_said(tmp_path):
    hidden = OwnGenerator(wrong=False)
    message = failure(lambda image: hidden(image), tmp_path, seeds=2)
    assert "does not give the same twice under one seed" in message


# What goes in.


def test_a_bare_pipeline_is_tracked_with_its_trust():
    class Darker(nn.Module):
        def forward(self, image):
            return F.adjust_brightness(image, 0.7)

    pipeline = v2.Compose([v2.RandomCrop(90), Darker()])
    with pytest.raises(ConfigError, match="Darker"):
        assert_tracks(pipeline)
    assert assert_tracks(pipeline, seeds=2, trust=[Darker]).views == 2
    sequence = nn.Sequential(v2.RandomCrop(90), v2.RandomVerticalFlip())
    assert assert_tracks(sequence, seeds=2).views == 2


def test_a_container_that_ends_in_ones_own_geometry():
    pipeline = v2.Compose([v2.ToImage(), MultiCrop(global_size=48, local_count=0)])
    assert assert_tracks(pipeline, seeds=2).views == 4


def test_kinds_that_a_pipeline_never_takes_are_left_out():
    for_tensors = v2.Compose([v2.RandomCrop(90), v2.RandomErasing(0.5)])

    def only_tensors(image):
        if isinstance(image, PIL.Image.Image):
            raise TypeError("want a tensor")
        return track(for_tensors)(image)

    assert assert_tracks(only_tensors, seeds=3).kinds == ("tensor",)
    only_pil = v2.Compose([v2.RandomCrop(90), F.pil_to_tensor])
    assert assert_tracks(only_pil, seeds=3, trust=[F.pil_to_tensor]).kinds == ("pil",)
    with pytest.raises(ConfigError, match="raised TypeError on seed 0, a PIL image"):
        assert_tracks(only_tensors, seeds=3, kinds=["tensor", "pil"][::-1])


def test_a_pipeline_that_takes_nothing_is_an_error():
    def broken(image):
        raise RuntimeError("no weights")

    with pytest.raises(ConfigError, match=r"RuntimeError on seed 0, a PIL image .* no weights"):
        assert_tracks(broken, seeds=2)


def test_a_pipeline_that_fails_for_some_seeds_is_an_error():
    right = track(v2.CenterCrop(90))

    def moody(image):
        if torch.rand(()) < 0.3:
            raise RuntimeError("out of luck")
        return right(image)

    with pytest.raises(ConfigError, match="out of luck"):
        assert_tracks(moody, seeds=20)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (lambda view, geometry: view, "got a"),
        (lambda view, geometry: (view, geometry.matrix), "CropGeometry"),
        (lambda view, geometry: ([view, view], [geometry]), r"2 × \w+, 1 × CropGeometry"),
        (lambda view, geometry: ([], []), "as many CropGeometry"),
    ],
)
def test_a_pipeline_without_geometry_is_an_error(output, words):
    right = track(v2.CenterCrop(90))
    with pytest.raises(ConfigError, match=words):
        assert_tracks(lambda image: output(*right(image)), seeds=1, kinds=["pil"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": 0}, "seeds"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [-1]}, "seeds"),
        ({"sizes": []}, "sizes"),
        ({"sizes": [224]}, "sizes"),
        ({"sizes": [(8, 200)]}, "sizes"),
        ({"kinds": "pil"}, "kinds"),
        ({"kinds": ["jpeg"]}, "kinds"),
        ({"kinds": []}, "kinds"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        assert_tracks(v2.CenterCrop(90), **settings)
    with pytest.raises(ConfigError, match="pipeline"):
        assert_tracks(v2.CenterCrop)


# The picture.


def test_the_picture_shows_both_outlines(tmp_path):
    path = tmp_path / "wrong.png"
    message = failure(Crop(20), tmp_path, seeds=1)
    assert message.endswith(f"picture: {path}")
    with PIL.Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 3 * 320
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert {(0, 90, 255), (230, 0, 0)} <= colours


def test_the_picture_goes_to_the_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(TrackingError) as caught:
        assert_tracks(Crop(20), seeds=[7])
    (path,) = tmp_path.glob("assert_tracks_seed7_view0_*.png")
    assert str(caught.value).endswith(str(path))


def test_a_picture_that_cannot_be_written_hides_no_disagreement(tmp_path):
    with pytest.raises(TrackingError, match=r"shifted by \(20\.0(.|\n)*picture: none"):
        assert_tracks(Crop(20), seeds=1, picture=tmp_path / "no such folder" / "wrong.png")
