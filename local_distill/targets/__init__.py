"""Teacher logits → teacher distributions."""

from __future__ import annotations

from local_distill.targets.centering import Centering
from local_distill.targets.sinkhorn_knopp import SinkhornKnopp

__all__ = ["Centering", "SinkhornKnopp"]
