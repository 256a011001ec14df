"""What holds for every matcher, one function a property; importing a file declares its own."""

from __future__ import annotations

from local_distill.testing.matcher_properties import (
    bad_input,
    batches,
    contract,
    numbers,
    places,
    symmetries,
)
from local_distill.testing.matcher_properties._registry import (
    REGISTRY,
    Declared,
    MatcherExample,
    MatcherKind,
    matcher_examples,
    same_cell_examples,
)

__all__ = [
    "REGISTRY",
    "Declared",
    "MatcherExample",
    "MatcherKind",
    "bad_input",
    "batches",
    "contract",
    "matcher_examples",
    "numbers",
    "places",
    "same_cell_examples",
    "symmetries",
]
