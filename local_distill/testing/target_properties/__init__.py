"""What holds for all targets, one function a property; importing a file declares its own."""

from __future__ import annotations

from local_distill.testing.target_properties import bad_input, distributions, state
from local_distill.testing.target_properties._registry import (
    REGISTRY,
    TargetsExample,
    TargetsFactory,
    targets_examples,
)

__all__ = [
    "REGISTRY",
    "TargetsExample",
    "TargetsFactory",
    "bad_input",
    "distributions",
    "state",
    "targets_examples",
]
