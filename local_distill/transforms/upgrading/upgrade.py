"""torchvision v1 pipelines, handing on where the view lies beside the view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import PIL.Image
from torch import Tensor

from local_distill.errors import ConfigError
from local_distill.structures import CropGeometry
from local_distill.transforms.finished_views import finish_view
from local_distill.transforms.geometry_tensor import GeometryTensor
from local_distill.transforms.images import image_size
from local_distill.transforms.upgrading.admission import admit, check_trust, only_v2
from local_distill.transforms.upgrading.views import check_same_views, view_pipelines

__all__ = ["Upgraded", "UpgradedViews", "upgrade"]


class Upgraded:
    """What `upgrade` returns for one pipeline: image → (view, `CropGeometry`).

    Attributes:
        pipeline: the pipeline that runs, for printing.
    """

    def __init__(
        self, pipeline: Callable[..., Any], trust: Iterable[type | Callable[..., Any]] = ()
    ) -> None:
        self.pipeline: Callable[[tuple[Any, Any]], tuple[Any, Any]] = admit(
            pipeline, check_trust(trust)
        )

    def __call__(self, image: PIL.Image.Image | Tensor) -> tuple[Any, CropGeometry]:
        """Transform one image.

        Args:
            image: a PIL image or a (channels, height, width) tensor.

        Returns:
            What the v1 pipeline makes of it, and where that lies in ``image``: float32 matrix,
            int32 sizes, on the view's device.

        Raises:
            ShapeError: not one image.
            GeometryError: a transform changed the image's size in a way that was not tracked.
        """
        height, width = image_size(image)
        geometry, view = self.pipeline((GeometryTensor.identity(height, width), image))
        return view, finish_view(geometry, view)

    def __repr__(self) -> str:
        return f"Upgraded({self.pipeline!r})"


class UpgradedViews:
    """What `upgrade` returns for an object that makes several views: image → (views, geometries).

    Attributes:
        pipelines: one `Upgraded` per view, in the order in which the views are made.
    """

    def __init__(
        self,
        pipelines: Sequence[Callable[..., Any]],
        trust: Iterable[type | Callable[..., Any]] = (),
    ) -> None:
        trusted = list(trust)
        # Local views share one pipeline: look at it once.
        made: dict[int, Upgraded] = {}
        for pipeline in pipelines:
            if id(pipeline) not in made:
                made[id(pipeline)] = Upgraded(pipeline, trusted)
        self.pipelines = [made[id(pipeline)] for pipeline in pipelines]

    def __call__(self, image: PIL.Image.Image | Tensor) -> tuple[list[Any], list[CropGeometry]]:
        """Transform one image into its views; the errors are those of `Upgraded`."""
        made = [pipeline(image) for pipeline in self.pipelines]
        return [view for view, _ in made], [geometry for _, geometry in made]

    def __repr__(self) -> str:
        return f"UpgradedViews({self.pipelines!r})"


def upgrade(
    pipeline: Callable[..., Any], *, trust: Iterable[type | Callable[..., Any]] = ()
) -> Upgraded | UpgradedViews:
    """Make a torchvision v1 pipeline return where its view lies in the image, beside the view.

    The pixels are the same as without, under the same seeds of torch, ``random`` and NumPy, and the
    generators are left in the same state: the v1 objects themselves run, and the geometry is read
    off the parameters that they draw.

    Tracked are all v1 crops, resizes, flips, pads, rotations, affine maps and perspectives, however
    nested in ``Compose``, ``RandomApply``, ``RandomChoice``, ``RandomOrder`` and
    ``nn.Sequential``, also in subclasses that bring no ``forward`` of their own. v2 transforms may
    stand among them, as in lightly, whose ``RandomRotate`` is tracked too.

    Other callables are refused unless they are named in ``trust``, with one exception: classes
    called as the blurs, solarisations, equalisations and tensor conversions of DINO, DINOv2,
    lightly and solo-learn are let in once they left the dots of a test image where they were, under
    several seeds. Such a test alone can't clear a class, as it does not see what happens in one of
    a thousand calls, and a name alone can't either; here the two go together.

    Objects that make several views are upgraded whole: lightly's ``MultiViewTransform`` and its
    kind, solo-learn's ``FullTransformPipeline`` and ``NCropAugmentation``, and
    ``DataAugmentationDINO`` of DINO and DINOv2. That the same views come out is checked on one
    image. Neither test uses up your random numbers.

    Convention: as in `CropGeometry`. Outside the source is outside; reflected or repeated padding
    shows pixels that are not where they seem, and their positions lie beyond the image. Padding
    *after* a crop is not told from the image: pad first.

    Args:
        pipeline: one v1 transform, a v1 container, or an object of several views as above.
        trust: transforms, or classes of transforms, that move no pixels although this package does
            not know them. They are shown the image alone.

    Returns:
        A callable from an image to ``(view, CropGeometry)``, or to ``(views, geometries)``, two
        lists, for an object of several views: one after the other, DINOv2's global ones first. It
        can be pickled for loader workers if the pipeline can.

    Raises:
        ConfigError: a transform that would move the pixels and not the geometry, or might; a
            pipeline of v2 transforms alone, which is for `track`.

    Example:
        >>> import torch
        >>> from torchvision import transforms
        >>> upgraded = upgrade(
        ...     transforms.Compose([transforms.CenterCrop((10, 20)), transforms.Resize((5, 5))])
        ... )
        >>> view, geometry = upgraded(torch.zeros(3, 30, 40))
        >>> geometry.matrix
        tensor([[ 4.,  0., 10.],
                [ 0.,  2., 10.],
                [ 0.,  0.,  1.]])
        >>> upgrade(transforms.RandAugment())
        Traceback (most recent call last):
        ...
        local_distill.errors.ConfigError: cannot upgrade RandAugment: it shears and rotates the
        image without saying how; use ColorJitter, ...
    """
    if only_v2(pipeline):
        raise ConfigError(
            f"cannot upgrade {type(pipeline).__name__}: it is a torchvision v2 pipeline already; "
            "use local_distill.transforms.track(pipeline)"
        )
    views = view_pipelines(pipeline)
    if views is None:
        return Upgraded(pipeline, trust)
    if not views:
        raise ConfigError(f"cannot upgrade {type(pipeline).__name__}: it makes no views")
    upgraded = UpgradedViews(views, trust)
    check_same_views(pipeline, upgraded)
    return upgraded
