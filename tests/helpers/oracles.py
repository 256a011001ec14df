"""The shipped oracles under the short names that the tests use."""

from local_distill.testing.oracles import (
    cell_diagonal,
    is_inside_source,
    log_softmax,
    nearest_teacher_tokens,
    normalized_loss,
    softmax,
    token_center,
    token_cross_entropies,
)

__all__ = [
    "center",
    "diagonal",
    "is_inside",
    "log_softmax",
    "nearest",
    "normalized",
    "softmax",
    "token_cross_entropies",
]

center = token_center
diagonal = cell_diagonal
is_inside = is_inside_source
nearest = nearest_teacher_tokens
normalized = normalized_loss
