"""All diagnostics of one pair of views at once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from local_distill.matching.diagnostics._means import matched_tokens, mean_of, share
from local_distill.matching.diagnostics.correspondence import (
    geometry_type,
    reachable_tokens,
    wide_error,
)
from local_distill.matching.diagnostics.spread import (
    coverage,
    distinct_targets,
    entropy,
    hubness,
    mutual_rate,
)
from local_distill.structures import Matches, Tokens

__all__ = ["MatchDiagnostics", "diagnose"]

# In larger cell diagonals: what `NearestMatcher` takes by default.
_THRESHOLD = 0.5


class MatchDiagnostics(NamedTuple):
    """0-d tensors; None where what a number is worked out from was not given.

    Attributes:
        coverage: see `coverage`.
        distinct_targets: see `distinct_targets`.
        hubness: see `hubness`.
        entropy: see `entropy`.
        mutual_rate: see `mutual_rate`; needs the reverse matches.
        correspondence_error: see `mean_correspondence_error`; needs both views' geometry.
        correspondence_accuracy: see `correspondence_accuracy`; likewise.
        correspondence_tokens: how many tokens of the batch the error is the mean of; likewise.
            Weigh by it where several steps' or processes' errors are averaged.

    Example:
        >>> import torch
        >>> numbers = MatchDiagnostics(*(torch.tensor(float(i)) for i in range(4)))
        >>> numbers.as_dict("local/")["local/entropy"]
        tensor(3.)
    """

    coverage: Tensor
    distinct_targets: Tensor
    hubness: Tensor
    entropy: Tensor
    mutual_rate: Tensor | None = None
    correspondence_error: Tensor | None = None
    correspondence_accuracy: Tensor | None = None
    correspondence_tokens: Tensor | None = None

    def as_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """{prefix + name: number} of those that are there, for a logger."""
        return {
            prefix + name: value
            for name, value in zip(self._fields, self, strict=True)
            if value is not None
        }


def diagnose(
    matches: Matches, student: Tokens, teacher: Tokens, reverse: Matches | None = None
) -> MatchDiagnostics:
    """Every diagnostic that can be worked out from what is given.

    Args:
        matches: student → teacher, (b, s, k), any k.
        student: `Tokens` of the student view.
        teacher: `Tokens` of the teacher view.
        reverse: teacher → student, for `mutual_rate`.

    Returns:
        `MatchDiagnostics` of 0-d tensors without gradient; nothing waits for the device until one
        of them is read.

    Raises:
        ShapeError, GeometryError: as the single functions.

    Example:
        >>> import torch
        >>> from local_distill import SimilarityMatcher
        >>> features = torch.eye(3)[None]
        >>> view = Tokens(features)
        >>> diagnose(SimilarityMatcher()(view, view), view, view).as_dict("match/")
        {'match/coverage': tensor(1.),
         'match/distinct_targets': tensor(1.),
         'match/hubness': tensor(0.),
         'match/entropy': tensor(0.)}
    """
    t = _num_tokens(teacher)
    spread = (
        coverage(matches),
        distinct_targets(matches, t),
        hubness(matches, t),
        entropy(matches),
        None if reverse is None else mutual_rate(matches, reverse),
    )
    if any(part is None for side in (student, teacher) for part in (side.geometry, side.grid)):
        return MatchDiagnostics(*spread)
    dtype = geometry_type(student, teacher)
    error = wide_error(matches, student, teacher)
    reachable = reachable_tokens(student, teacher, _THRESHOLD)
    counted = reachable & error.isfinite()
    judged = reachable & matched_tokens(matches)
    return MatchDiagnostics(
        *spread,
        correspondence_error=mean_of(error, counted).to(dtype),
        correspondence_accuracy=share(error < _THRESHOLD, judged, dtype),
        correspondence_tokens=counted.sum().to(dtype),
    )


def _num_tokens(tokens: Tokens) -> int:
    """`Tokens.num_tokens`, in a form that torch 2.6 can trace for tokens made in the graph."""
    if tokens.features is not None:
        return tokens.features.shape[1]
    return tokens.num_tokens if tokens.grid is None else tokens.grid.rows * tokens.grid.cols
