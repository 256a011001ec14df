"""Cheap numbers on matches that any training loop can log."""

from local_distill.matching.diagnostics.correspondence import (
    correspondence_accuracy,
    correspondence_error,
    mean_correspondence_error,
    reachable_tokens,
)
from local_distill.matching.diagnostics.spread import (
    coverage,
    distinct_targets,
    entropy,
    hubness,
    mutual_rate,
)
from local_distill.matching.diagnostics.summary import MatchDiagnostics, diagnose

__all__ = [
    "MatchDiagnostics",
    "correspondence_accuracy",
    "correspondence_error",
    "coverage",
    "diagnose",
    "distinct_targets",
    "entropy",
    "hubness",
    "mean_correspondence_error",
    "mutual_rate",
    "reachable_tokens",
]
