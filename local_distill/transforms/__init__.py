"""Views of an image together with where they lie in it, on torchvision v2 (extra ``vision``)."""

from __future__ import annotations

from local_distill.errors import require_extra

require_extra("torchvision", "vision")

from local_distill.transforms.geometry_tensor import GeometryTensor  # noqa: E402
from local_distill.transforms.multi_crop import MultiCrop  # noqa: E402
from local_distill.transforms.multi_view import MultiView  # noqa: E402
from local_distill.transforms.tracking import Tracked, track  # noqa: E402
from local_distill.transforms.upgrading import Upgraded, UpgradedViews, upgrade  # noqa: E402
from local_distill.transforms.verification import (  # noqa: E402
    TrackingError,
    TrackingReport,
    assert_tracks,
)
from local_distill.transforms.view_recipes import ViewRecipe  # noqa: E402

__all__ = [
    "GeometryTensor",
    "MultiCrop",
    "MultiView",
    "Tracked",
    "TrackingError",
    "TrackingReport",
    "Upgraded",
    "UpgradedViews",
    "ViewRecipe",
    "assert_tracks",
    "track",
    "upgrade",
]
