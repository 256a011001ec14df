"""The test kit for pipelines of views: what `assert_tracks` proves, and what loaders rely on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from local_distill.errors import ConfigError, require_extra
from local_distill.testing.properties import Property, check_properties, properties_test

require_extra("torchvision", "vision")

from local_distill.testing._transform_properties import (  # noqa: E402
    REGISTRY,
    TransformExample,
    transform_examples,
)
from local_distill.transforms.generators import generators_kept, seed_generators  # noqa: E402
from local_distill.transforms.verification.cases import (  # noqa: E402
    check_seeds,
    check_sizes,
    with_geometry,
)

__all__ = ["check_transform", "transform_properties", "transform_test"]

Pipeline = Callable[..., Any]
Sizes = Sequence[tuple[int, int]]

_SIZES: Sizes = ((224, 301), (257, 190))
_KINDS = ("pil", "tensor")


def check_transform(
    pipeline: Pipeline,
    *,
    image_sizes: Sizes = _SIZES,
    seeds: int | Iterable[int] = 20,
    trust: Iterable[type | Callable[..., Any]] = (),
    properties: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    examples: Iterable[TransformExample] | None = None,
    max_examples: int = 6,
) -> list[str]:
    """Check that a pipeline's views come with right geometry, and that loaders can use it.

    Args:
        pipeline: image → (view, `CropGeometry`), or → (list of views, list of `CropGeometry`), as
            `MultiCrop` and `MultiView`; or a torchvision v2 pipeline, which is tracked with
            `track`.
        image_sizes: (height, width) of the images that are sent, in pixels, at least 16.
        seeds: how many seeds, or which ones, examples are drawn with.
        trust: passed on to `track`.
        properties: names of the properties to check; by default all, see `transform_properties`.
        exclude: names of properties to leave out, such as one that takes too long here.
        examples: look at these instead of searching: what a failure's snippet does.
        max_examples: how many examples to try for each property.

    Returns:
        The names of the properties that hold.

    Raises:
        PropertyFailed: an AssertionError that names each property that fails, the smallest example
            found, and the lines that repeat it.
        ConfigError: an unknown property, a setting that cannot be, or a pipeline that serves no
            image; see `assert_tracks`.
        MissingExtraError: torchvision is not installed.

    Example:
        >>> from torchvision.transforms import v2
        >>> recipe = v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip()])
        >>> check_transform(recipe, properties=["pixels_follow_the_geometry"], max_examples=2)
        ['pixels_follow_the_geometry']
    """
    sizes, numbers = check_sizes(image_sizes), check_seeds(seeds)
    tracked = with_geometry(pipeline, trust, sizes[0])
    return check_properties(
        tracked,
        _properties(tracked, sizes, numbers),
        checker="check_transform",
        names=properties,
        exclude=exclude,
        examples=examples,
        max_examples=max_examples,
    )


def transform_test(
    pipeline: Pipeline,
    *,
    image_sizes: Sizes = _SIZES,
    seeds: int | Iterable[int] = 20,
    trust: Iterable[type | Callable[..., Any]] = (),
    xfail: Mapping[str, str] | None = None,
    exclude: Iterable[str] = (),
    max_examples: int = 6,
) -> Callable[[str], None]:
    """A pytest test of a pipeline, with one id for each property.

    Args:
        pipeline: see `check_transform`.
        image_sizes: see `check_transform`.
        seeds: see `check_transform`.
        trust: see `check_transform`.
        xfail: ``{name: reason}`` of the properties that it is known not to keep. Strict: the test
            fails once it keeps them.
        exclude: names of properties to leave out, such as one that takes too long here.
        max_examples: how many examples to try for each property.

    Returns:
        A test function. Assign it to a name that starts with ``test_``.

    Raises:
        ConfigError: an unknown property in ``xfail`` or ``exclude``.
        MissingExtraError: pytest or torchvision is not installed.

    Example:
        >>> from local_distill import MultiCrop
        >>> views = MultiCrop(global_size=32, local_size=16, local_count=1)
        >>> test_views = transform_test(views, image_sizes=[(60, 80)])
        >>> test_views("geometry_has_its_shapes_and_dtypes")  # pytest calls it for every property
    """
    numbers = check_seeds(seeds)
    trusted = list(trust)

    def check(name: str) -> object:
        return check_transform(
            pipeline,
            image_sizes=image_sizes,
            seeds=numbers,
            trust=trusted,
            properties=[name],
            max_examples=max_examples,
        )

    return properties_test(
        pipeline, transform_properties(), check, xfail=xfail or {}, exclude=exclude
    )


def transform_properties() -> list[Property]:
    """The properties that pipelines with geometry have to keep.

    Example:
        >>> len(transform_properties()) >= 8
        True
    """
    return _with_examples(_SIZES, _KINDS, range(20))


def _properties(pipeline: Pipeline, sizes: Sizes, seeds: Sequence[int]) -> list[Property]:
    """The properties, over the kinds of image that the pipeline takes."""
    taken = []
    last: Exception | None = None
    for kind in _KINDS:
        for seed in seeds:
            example = TransformExample(sizes[0], kind, seed)
            try:
                with generators_kept():
                    seed_generators(seed)
                    pipeline(example.image())
            except Exception as error:  # any exception may be how a pipeline refuses a kind
                last = error
            else:
                taken.append(kind)
                break
    if not taken:
        raise ConfigError(
            f"`pipeline` serves neither a PIL image nor a uint8 tensor of {sizes[0]}; the last "
            f"error was {type(last).__name__}: {last}"
        ) from last
    return _with_examples(sizes, taken, seeds)


def _with_examples(sizes: Sizes, kinds: Sequence[str], seeds: Sequence[int]) -> list[Property]:
    examples = transform_examples(list(sizes), list(kinds), list(seeds))
    return [Property(one.name, one.summary, one.check, examples) for one in REGISTRY]
