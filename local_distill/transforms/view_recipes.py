"""What one kind of view looks like: size, scale, counts and the odds of its augmentations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from local_distill._check import check_at_least, check_fraction
from local_distill.errors import ConfigError
from local_distill.transforms.setting_checks import check_range, check_size
from local_distill.transforms.tracking import Tracked, track

__all__ = ["ViewRecipe", "ViewSettings", "check_recipes"]


@dataclass(frozen=True)
class ViewRecipe:
    """How some of the views of `MultiCrop` are made; it takes a list of these as ``recipes``.

    Whatever is None is `MultiCrop`'s own setting, so a recipe says only what sets its views apart.
    A plain dataclass: in YAML it is a mapping with these keys.

    Convention: views come in the order of the recipes, global ones first.

    Args:
        size: side, or (height, width), of the views in pixels.
        scale: least and largest share of the image's area that a view shows.
        count: number of views made in this way, at least 1.
        is_global: whether the teacher sees them.
        ratio: least and largest width / height of the crop in the source.
        hflip_p: probability of mirroring left to right.
        vflip_p: probability of mirroring top to bottom.
        blur_p: probability of blur.
        solarize_p: probability of solarising.
        pipeline: a torchvision v2 pipeline in place of the built-in colours, from jitter to
            normalising; it gets the view as (3, height, width) float32 in [0, 1]. Or what `track`
            returns. Where it moves pixels too, the view's geometry takes that in; it must keep the
            size.

    Raises:
        ConfigError: a setting that cannot be; `MultiCrop` refuses a pipeline that can't be tracked.

    Example:
        >>> import torch
        >>> from torchvision.transforms import v2
        >>> from local_distill.transforms import MultiCrop
        >>> crop = MultiCrop(recipes=[
        ...     ViewRecipe(224, (0.4, 1.0), count=2, is_global=True),
        ...     ViewRecipe(96, (0.05, 0.4), count=4),
        ...     ViewRecipe(64, (0.02, 0.05), count=2, pipeline=v2.Grayscale(3)),
        ... ])
        >>> views, geometries = crop(torch.rand(3, 60, 80))
        >>> [view.shape[-1] for view in views]
        [224, 224, 96, 96, 96, 96, 64, 64]
    """

    size: int | Sequence[int]
    scale: Sequence[float]
    count: int = 1
    is_global: bool = False
    ratio: Sequence[float] | None = None
    hflip_p: float | None = None
    vflip_p: float | None = None
    blur_p: float | None = None
    solarize_p: float | None = None
    pipeline: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be, where it is written."""
        check_size("size", self.size)
        check_range("scale", self.scale, high=1.0)
        check_at_least("count", self.count, 1)
        if self.ratio is not None:
            check_range("ratio", self.ratio)
        for name in ("hflip_p", "vflip_p", "blur_p", "solarize_p"):
            if getattr(self, name) is not None:
                check_fraction(name, getattr(self, name))
        if self.pipeline is not None and (self.blur_p, self.solarize_p) != (None, None):
            raise ConfigError(
                "`pipeline` takes the place of the built-in colours, so `blur_p` and `solarize_p` "
                "would do nothing: leave them out, or put the blur into the pipeline"
            )


class ViewSettings(NamedTuple):
    """One view's settings, nothing left open."""

    size: tuple[int, int]
    scale: tuple[float, float]
    is_global: bool
    ratio: tuple[float, float]
    hflip_p: float
    vflip_p: float
    blur_p: float
    solarize_p: float
    pipeline: Tracked | None

    @classmethod
    def of(cls, recipe: ViewRecipe, **defaults: Any) -> ViewSettings:
        """``recipe``, with ``defaults`` where it says nothing."""
        given = {name: getattr(recipe, name) for name in defaults}
        filled = {name: defaults[name] if v is None else v for name, v in given.items()}
        filled["ratio"] = check_range("ratio", filled["ratio"])
        pipeline = recipe.pipeline
        if pipeline is not None and not isinstance(pipeline, Tracked):
            pipeline = track(pipeline)
        return cls(
            size=check_size("size", recipe.size),
            scale=check_range("scale", recipe.scale, high=1.0),
            is_global=recipe.is_global,
            pipeline=pipeline,
            **filled,
        )


def check_recipes(
    recipes: Sequence[ViewRecipe], simple: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """Refuse recipes out of order, and settings beside them that say the same in another way.

    Args:
        recipes: in the order of the views.
        simple: the settings that would say sizes, counts and scales without recipes.
        defaults: what these are where nobody set them.
    """
    for name, value in simple.items():
        plain = tuple(value) if isinstance(value, Sequence) else value
        if plain != defaults[name]:
            raise ConfigError(
                f"`{name}` is {value!r} beside `recipes`, which say the sizes, counts and scales "
                f"of all views: leave out `{name}`, or `recipes`"
            )
    if not isinstance(recipes, Sequence) or not all(isinstance(r, ViewRecipe) for r in recipes):
        raise ConfigError(f"`recipes` must be a list of ViewRecipe, got {recipes!r}")
    kinds = [recipe.is_global for recipe in recipes]
    if not any(kinds):
        raise ConfigError(
            f"`recipes` has {len(kinds)} entries and none with is_global=True; the teacher needs "
            "a view to see"
        )
    if kinds != sorted(kinds, reverse=True):
        raise ConfigError(
            f"`recipes` must name the global views first, got is_global={kinds}: reorder them"
        )
