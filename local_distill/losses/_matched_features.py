"""The checks that losses on features share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from local_distill._check import check_sequence
from local_distill.losses._pairs import Pair, check_pairs
from local_distill.structures import Matches


def check_feature_pairs(
    student: Sequence[Tensor | None],
    teacher: Sequence[Tensor | None],
    matches: Mapping[Pair, Matches],
) -> None:
    """Check all that the pairs name before anything is computed."""
    check_sequence("student", student, "a tensor of features")
    check_sequence("teacher", teacher, "a tensor of features")
    check_pairs(student, teacher, matches, names=("student", "teacher"), last_axis="d")
