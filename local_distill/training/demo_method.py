"""The method of the demo, small enough for two CPU cores."""

from __future__ import annotations

from typing import Any

from local_distill.structures import Matcher
from local_distill.training.methods.dino import Dino
from local_distill.training.methods.glsd import Glsd
from local_distill.training.options import HeadOptions, TemperatureOptions

__all__ = ["demo_method"]

_HEAD = HeadOptions(num_prototypes=256, hidden_dim=256, bottleneck_dim=64)
_SETTINGS: dict[str, Any] = {"head": _HEAD, "temps": TemperatureOptions(), "fused": False}


def demo_method(matcher: Matcher | None = None, *, local: bool = True) -> Dino:
    """GLSD with small heads, where matched tokens alone count; DINO where not ``local``.

    Args:
        matcher: pairs the tokens; None: by place.
        local: whether there is a local loss.
    """
    if not local:
        return Dino(**_SETTINGS)
    return Glsd(**_SETTINGS, matcher=matcher, normalize="matched")
