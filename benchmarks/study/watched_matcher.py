"""A matcher that keeps count of how right it was: matches are wrong where nobody looks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from local_distill.matching import match_views
from local_distill.matching.diagnostics import correspondence_error
from local_distill.structures import Matcher, Matches, Tokens

__all__ = ["WatchedMatcher"]

# In larger cell diagonals: a match farther off than one cell shows another place of the image.
_TRUE = 1.0


class WatchedMatcher(nn.Module):
    """Hands on another matcher's matches, and looks at those of one step in so many.

    Args:
        matcher: does the matching.
        every: looks at the first of so many steps.
    """

    def __init__(self, matcher: Matcher, every: int) -> None:
        super().__init__()
        self.matcher, self.every = matcher, every
        self._calls = 0
        self._seen: list[tuple[float, float]] = []

    def forward(self, student: Tokens, teacher: Tokens) -> Matches:
        """The matcher's matches of one pair of views, not looked at."""
        return self.matcher(student, teacher)

    def match_views(
        self,
        student: Sequence[Tokens],
        teacher: Sequence[Tokens],
        pairs: Iterable[tuple[int, int]] | None = None,
    ) -> dict[tuple[int, int], Matches]:
        """The matcher's matches of all pairs of views."""
        found = match_views(self.matcher, student, teacher, pairs)
        if self._calls % self.every == 0:
            self._look(found, student, teacher)
        self._calls += 1
        return found

    def summary(self) -> dict[str, float]:
        """Share of student tokens matched; share of the matches that are true, early and late.

        Early is the first fifth of the steps, late the last; a match is true where it lies within
        one larger cell diagonal of the student token's own place.
        """
        matched, true = zip(*self._seen, strict=True)
        fifth = max(1, len(true) // 5)
        return {
            "matched": sum(matched) / len(matched),
            "true_early": sum(true[:fifth]) / fifth,
            "true_late": sum(true[-fifth:]) / fifth,
        }

    def _look(
        self,
        found: dict[tuple[int, int], Matches],
        student: Sequence[Tokens],
        teacher: Sequence[Tokens],
    ) -> None:
        flags: list[Tensor] = []
        errors: list[Tensor] = []
        for (v, q), matches in found.items():
            flags.append(matches.matched.flatten())
            errors.append(correspondence_error(matches, student[v], teacher[q])[matches.matched])
        true = (torch.cat(errors) < _TRUE).float().mean().nan_to_num(0.0)
        self._seen.append((float(torch.cat(flags).float().mean()), float(true)))
