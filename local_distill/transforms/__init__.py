"""Views of an image together with where they lie in it, on torchvision v2 (extra ``vision``)."""

from __future__ import annotations

from local_distill.errors import require_extra

require_extra("torchvision", "vision")

from local_distill.transforms.geometry_tensor import GeometryTensor  # noqa: E402
from local_distill.transforms.multi_crop import MultiCrop  # noqa: E402
from local_distill.transforms.tracking import Tracked, track  # noqa: E402

__all__ = ["GeometryTensor", "MultiCrop", "Tracked", "track"]
