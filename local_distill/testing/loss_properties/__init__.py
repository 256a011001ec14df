"""What holds for every distillation loss, one function a property; importing a file declares it."""

from __future__ import annotations

from local_distill.testing.loss_properties import (
    bad_input,
    contract,
    gradients,
    matched_tokens,
    numbers,
    state,
    symmetries,
)
from local_distill.testing.loss_properties._registry import (
    REGISTRY,
    Declared,
    LossExample,
    LossFactory,
    LossKind,
    loss_examples,
)

__all__ = [
    "REGISTRY",
    "Declared",
    "LossExample",
    "LossFactory",
    "LossKind",
    "bad_input",
    "contract",
    "gradients",
    "loss_examples",
    "matched_tokens",
    "numbers",
    "state",
    "symmetries",
]
