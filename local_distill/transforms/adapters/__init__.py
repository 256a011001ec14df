"""Geometry out of other libraries' augmentations: their view, our `CropGeometry`.

None of those libraries is imported here: each adapter reads what its library handed over. Whatever
tells its crop box needs no adapter, only `local_distill.from_box`.
"""

from __future__ import annotations

from local_distill.transforms.adapters.albumentations_replay import from_albumentations
from local_distill.transforms.adapters.hf_processors import from_hf_processor
from local_distill.transforms.adapters.kornia_matrix import from_kornia
from local_distill.transforms.adapters.lightly_grids import (
    from_lightly_grid,
    from_lightly_location,
    from_vicregl_grid,
)

__all__ = [
    "from_albumentations",
    "from_hf_processor",
    "from_kornia",
    "from_lightly_grid",
    "from_lightly_location",
    "from_vicregl_grid",
]
