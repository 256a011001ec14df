"""What holds for every pipeline that says where its views lie, one function a property."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import PIL.Image
import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from local_distill.testing._transform_running import (
    Pipeline,
    copied,
    ensure_equal,
    parts_of,
    pixels_of,
    run,
    scratch_folder,
)
from local_distill.testing.properties import Property, ensure
from local_distill.transforms.generators import (
    generator_states,
    generators_kept,
    seed_generators,
)
from local_distill.transforms.verification import assert_tracks

__all__ = [
    "REGISTRY",
    "TransformExample",
    "a_call_does_not_reseed",
    "a_loader_collates_the_views",
    "a_pickled_copy_works_alike",
    "flat_images_stay_finite",
    "geometry_has_its_shapes_and_dtypes",
    "inputs_are_left_alone",
    "later_calls_do_not_write_into_earlier_views",
    "other_modes_are_served_or_refused",
    "pil_and_tensor_images_agree",
    "pixels_follow_the_geometry",
    "small_images_are_served_or_refused",
    "the_same_seed_gives_the_same",
    "transform_examples",
]


class TransformExample(NamedTuple):
    """What a pipeline is tried on.

    Attributes:
        size: (height, width) of the image in pixels.
        kind: ``"pil"`` (8-bit RGB) or ``"tensor"`` (uint8).
        seed: of the generators, and of the image.
    """

    size: tuple[int, int]
    kind: str
    seed: int = 0

    def image(self, number: int = 0, size: tuple[int, int] | None = None) -> Any:
        """An image of coarse noise, another for every number."""
        height, width = self.size if size is None else size
        generator = torch.Generator().manual_seed(1000 * number + self.seed)
        coarse = 255 * torch.rand(3, 5, 7, generator=generator)
        pixels = F.resize(coarse, [height, width]).round().to(torch.uint8)
        return F.to_pil_image(pixels) if self.kind == "pil" else pixels


REGISTRY: list[Property] = []


def transform_examples(
    sizes: Sequence[tuple[int, int]], kinds: Sequence[str], seeds: Sequence[int]
) -> SearchStrategy[TransformExample]:
    """All combinations of these, the first of each before the others."""
    return st.builds(
        TransformExample, st.sampled_from(sizes), st.sampled_from(kinds), st.sampled_from(seeds)
    )


def _property(check: Callable[[Pipeline, TransformExample], None]) -> Any:
    summary = (check.__doc__ or "").strip().splitlines()[0]
    REGISTRY.append(Property(check.__name__, summary, check, st.nothing()))
    return check


@_property
def pixels_follow_the_geometry(pipeline: Pipeline, example: TransformExample) -> None:
    """The geometry says where the view's pixels lie, and has both sizes: see assert_tracks."""
    # several seeds, as one alone may show hardly any pixel of the image
    seeds = range(example.seed, example.seed + 4)
    picture = scratch_folder() / "pixels_follow_the_geometry.png"
    assert_tracks(
        copied(pipeline), seeds=seeds, sizes=[example.size], kinds=[example.kind], picture=picture
    )


@_property
def geometry_has_its_shapes_and_dtypes(pipeline: Pipeline, example: TransformExample) -> None:
    """Every view has a matrix (3, 3) in at least float32 and sizes (2,) in int32, to be batched."""
    for index, geometry in enumerate(run(pipeline, example.image(), example.seed)[1]):
        for name, part, shape, dtypes in (
            ("matrix", geometry.matrix, (3, 3), (torch.float32, torch.float64)),
            ("view_size", geometry.view_size, (2,), (torch.int32,)),
            ("source_size", geometry.source_size, (2,), (torch.int32,)),
        ):
            what = f"{name} of view {index} is {part.dtype} of shape {tuple(part.shape)}"
            ensure(part.dtype in dtypes and tuple(part.shape) == shape, what)
            ensure(not part.requires_grad, f"{name} of view {index} requires a gradient")


@_property
def the_same_seed_gives_the_same(pipeline: Pipeline, example: TransformExample) -> None:
    """The global generators decide alone: the same seed gives the same after other calls too."""
    first = copy.deepcopy(run(pipeline, example.image(), example.seed, in_copy=False))
    again = run(pipeline, example.image(), example.seed, in_copy=False)
    ensure_equal(again, first, "under the same seed")
    run(pipeline, example.image(1), example.seed + 1, in_copy=False)
    again = run(pipeline, example.image(), example.seed, in_copy=False)
    ensure_equal(again, first, "under the same seed after another call")


@_property
def later_calls_do_not_write_into_earlier_views(
    pipeline: Pipeline, example: TransformExample
) -> None:
    """What a call returned stays as it is when the pipeline is called again."""
    first = run(pipeline, example.image(), example.seed, in_copy=False)
    before = copy.deepcopy(first)
    for number in (1, 2):
        run(pipeline, example.image(number), example.seed + number, in_copy=False)
    ensure_equal(first, before, "after later calls")


@_property
def a_call_does_not_reseed(pipeline: Pipeline, example: TransformExample) -> None:
    """A call draws from the global generators and never sets them to a state of its own."""
    ends = []
    for seed in (example.seed, example.seed + 1):
        with generators_kept():
            seed_generators(seed)
            copied(pipeline)(example.image())
            torch_state, python, _, numpy, *_ = generator_states()
            ends.append({"torch": torch_state, "Python": python, "NumPy": numpy})
    for name in ends[0]:
        ensure(ends[0][name] != ends[1][name], f"{name}'s generator was reset to a fixed state")


@_property
def inputs_are_left_alone(pipeline: Pipeline, example: TransformExample) -> None:
    """The image that goes in is not written to."""
    image = example.image()
    run(pipeline, image, example.seed)
    now, before = (pixels_of(each) for each in (image, example.image()))
    ensure(now.shape == before.shape and torch.equal(now, before), "the image was changed")


@_property
def pil_and_tensor_images_agree(pipeline: Pipeline, example: TransformExample) -> None:
    """A PIL image and a tensor of the same pixels give the same geometry under one seed."""
    outputs = []
    for kind in ("pil", "tensor"):
        try:
            output = run(pipeline, example._replace(kind=kind).image(), example.seed)
        except Exception:  # any exception may be how a pipeline refuses a kind
            return
        outputs.append(output[1])
    for index, (one, two) in enumerate(zip(*outputs, strict=True)):
        same = all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        ensure(same, f"view {index} lies at {one.matrix.tolist()} and at {two.matrix.tolist()}")


@_property
def small_images_are_served_or_refused(pipeline: Pipeline, example: TransformExample) -> None:
    """Images of one pixel, and of one row or column, have right geometry or give an error."""
    for size in ((1, 1), (1, 9), (9, 1), (3, 2)):
        image = example.image(0, size)
        _ensure_right_or_refused(pipeline, image, size, example.seed, f"an image of {size}")


@_property
def other_modes_are_served_or_refused(pipeline: Pipeline, example: TransformExample) -> None:
    """Grey, 16-bit, palette, CMYK and transparent images have right geometry or give an error."""
    colour = example._replace(kind="pil").image()
    deep = PIL.Image.new("I;16", colour.size, 40_000)
    modes = [colour.convert(mode) for mode in ("L", "1", "P", "RGBA", "CMYK")]
    for image in (*modes, deep):
        what = f"an image of mode {image.mode}"
        _ensure_right_or_refused(pipeline, image, example.size, example.seed, what)


@_property
def flat_images_stay_finite(pipeline: Pipeline, example: TransformExample) -> None:
    """Images of one colour, black and white, give views without NaN or infinity."""
    for level in (0, 255):
        flat = torch.full((3, *example.size), level, dtype=torch.uint8)
        image = F.to_pil_image(flat) if example.kind == "pil" else flat
        for index, view in enumerate(run(pipeline, image, example.seed)[0]):
            finite = bool(pixels_of(view).double().isfinite().all())
            ensure(finite, f"view {index} of an image of {level} alone is not finite")


@_property
def a_pickled_copy_works_alike(pipeline: Pipeline, example: TransformExample) -> None:
    """A pipeline goes through pickle, as it does to the workers of a loader."""
    again = pickle.loads(pickle.dumps(pipeline))
    wanted = run(pipeline, example.image(), example.seed)
    ensure_equal(run(again, example.image(), example.seed), wanted, "a pickled copy")


@_property
def a_loader_collates_the_views(pipeline: Pipeline, example: TransformExample) -> None:
    """A DataLoader with 0 and with 2 workers makes batches of views and of geometry."""
    images = _Images(copied(pipeline), example)
    for workers in (0, 2):
        with generators_kept():
            seed_generators(example.seed)
            loader: DataLoader[Any] = DataLoader(
                images, batch_size=2, num_workers=workers, timeout=60 * workers
            )
            batches = [parts_of(batch) for batch in loader]
        ensure(len(batches) == 2, f"{len(batches)} batches with {workers} workers")
        for views, geometries in batches:
            for index, (view, geometry) in enumerate(zip(views, geometries, strict=True)):
                shape = tuple(view.shape)
                ensure(shape[0] == 2, f"view {index} has shape {shape} with {workers} workers")
                shape = tuple(geometry.matrix.shape)
                ensure(shape == (2, 3, 3), f"matrix {index} has shape {shape}")


class _Images(Dataset[Any]):
    """Four images of one size, as a data set."""

    def __init__(self, pipeline: Pipeline, example: TransformExample) -> None:
        self.pipeline = pipeline
        self.example = example

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        # an image that is a PIL image stays one in some pipelines, and can't be batched
        made = self.pipeline(self.example.image(index))
        views, geometries = parts_of(made)
        tensors = [
            F.pil_to_tensor(view) if isinstance(view, PIL.Image.Image) else view for view in views
        ]
        return tensors, geometries


def _ensure_right_or_refused(
    pipeline: Pipeline, image: Any, size: tuple[int, int], seed: int, what: str
) -> None:
    try:
        views, geometries = run(pipeline, image, seed)
    except Exception:  # an error is no silent fault, whatever its class
        return
    for index, (view, geometry) in enumerate(zip(views, geometries, strict=True)):
        shown = list(pixels_of(view).shape[-2:])
        said = geometry.view_size.tolist()
        ensure(said == shown, f"{what}: view_size {said} for view {index} of {shown}")
        said = geometry.source_size.tolist()
        ensure(said == list(size), f"{what}: source_size {said} for view {index}")
        det = float(torch.linalg.det(geometry.matrix.double()))
        sound = bool(geometry.matrix.isfinite().all()) and det != 0
        ensure(sound, f"{what}: matrix {geometry.matrix.tolist()} of view {index}")
