"""The truth, worked out slowly: float64 numbers of Python in plain loops, no tensors, no tricks.

Nothing here is shared with the package's own maths, so that a fault there cannot hide itself. Use
them to test code of your own, such as a faster matcher or a loss in another framework.
"""

from __future__ import annotations

from local_distill.testing.oracles.geometry import (
    cell_diagonal,
    is_inside_source,
    token_center,
)
from local_distill.testing.oracles.losses import (
    local_loss,
    log_softmax,
    normalized_loss,
    softmax,
    token_cross_entropies,
)
from local_distill.testing.oracles.matching import NearestToken, nearest_teacher_tokens
from local_distill.testing.oracles.targets import centered_probs, moved_center

__all__ = [
    "NearestToken",
    "cell_diagonal",
    "centered_probs",
    "is_inside_source",
    "local_loss",
    "log_softmax",
    "moved_center",
    "nearest_teacher_tokens",
    "normalized_loss",
    "softmax",
    "token_center",
    "token_cross_entropies",
]
