"""Several views of an image, each by a pipeline of its own, with where they lie in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import PIL.Image
from torch import Tensor, nn
from torchvision.transforms import v2

from local_distill._check import check_at_least
from local_distill.errors import ConfigError, GeometryError
from local_distill.structures import CropGeometry
from local_distill.transforms.tracking import track

__all__ = ["MultiView"]

Pipeline = Callable[[Any], Any]


class MultiView:
    """Views by pipelines of your own: one torchvision v2 pipeline per view, or per kind of view.

    Each pipeline sees the image itself and goes through `track`, so the views come with their
    geometry. `MultiCrop` is quicker, and can constrain its boxes; here no pipeline knows of the
    others, so overlap can't be asked for.

    Args:
        views: per view, or kind of view, a pipeline, or (pipeline, count). A pipeline is a
            torchvision v2 transform, what `track` returned, or any other callable from an image to
            (view, `CropGeometry`), such as an adapter of another library.
        num_global: how many of the first views the teacher sees; the first entry's count by
            default.
        trust: as for `track`: transforms that move no pixels although the package does not know
            them.

    Returns:
        From a call with an image: the views and their geometries, lists in the order of ``views``,
        as `MultiCrop` gives them.

    Raises:
        ConfigError: a pipeline that can't be tracked, or a count that can't be. A call raises
            GeometryError where a callable does not return a view with its geometry.

    Example:
        >>> import torch
        >>> large = v2.RandomResizedCrop(32, scale=(0.4, 1.0))
        >>> small = v2.Compose([v2.RandomCrop(16), v2.RandomHorizontalFlip()])
        >>> multi_view = MultiView([(large, 2), (small, 3)])
        >>> views, geometries = multi_view(torch.rand(3, 40, 60))
        >>> [view.shape[-1] for view in views]
        [32, 32, 16, 16, 16]
        >>> geometries[4].source_size
        tensor([40, 60], dtype=torch.int32)
    """

    def __init__(
        self,
        views: Sequence[Pipeline | tuple[Pipeline, int]],
        *,
        num_global: int | None = None,
        trust: Iterable[type | Callable[..., Any]] = (),
    ) -> None:
        if not isinstance(views, Sequence) or not views:
            raise ConfigError(f"`views` must be a list with at least one pipeline, got {views!r}")
        trusted = list(trust)
        kinds: list[tuple[Pipeline, int]] = []
        for index, entry in enumerate(views):
            pipeline, count = entry if isinstance(entry, (tuple, list)) else (entry, 1)
            check_at_least(f"views[{index}]: count", count, 1)
            kinds.append((_tracked(index, pipeline, trusted), count))
        self.pipelines = tuple(pipeline for pipeline, count in kinds for _ in range(count))
        self.num_views = len(self.pipelines)
        self.num_global = kinds[0][1] if num_global is None else num_global
        check_at_least("num_global", self.num_global, 1)
        if self.num_global > self.num_views:
            raise ConfigError(
                f"`num_global` is {self.num_global} but there are {self.num_views} views in all"
            )

    def __call__(self, image: PIL.Image.Image | Tensor) -> tuple[list[Any], list[CropGeometry]]:
        """Make the views of one image; see the class."""
        views, geometries = [], []
        for index, pipeline in enumerate(self.pipelines):
            made = pipeline(image)
            if not (
                isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], CropGeometry)
            ):
                raise GeometryError(
                    f"the pipeline of view {index} must return (view, CropGeometry), got "
                    f"{type(made).__name__}: give a torchvision v2 pipeline, or wrap yours so that "
                    "it says where its view lies (from_box, from_matrix)"
                )
            views.append(made[0])
            geometries.append(made[1])
        return views, geometries

    def __repr__(self) -> str:
        lines = "".join(f"\n  {pipeline!r}," for pipeline in self.pipelines)
        return f"MultiView({self.num_global} global of {self.num_views} views:{lines}\n)"


def _tracked(index: int, pipeline: Any, trusted: Sequence[Any]) -> Pipeline:
    if isinstance(pipeline, (v2.Transform, nn.Sequential)) or (
        # v1 transforms and classes: `track` says what is wrong with them
        isinstance(pipeline, type) or type(pipeline).__module__.startswith("torchvision.")
    ):
        return track(pipeline, trust=trusted)
    if not callable(pipeline):
        raise ConfigError(
            f"`views[{index}]` must be a pipeline or (pipeline, count), got {pipeline!r}"
        )
    return pipeline  # type: ignore[no-any-return]
