"""Global and local distillation together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from local_distill._check import check_sequence, check_weight
from local_distill.errors import ConfigError, ShapeError
from local_distill.losses.global_distillation import GlobalDistillationLoss
from local_distill.losses.local_distillation import LocalDistillationLoss
from local_distill.matching._match_checks import check_matcher
from local_distill.matching.match_views import cross_view_pairs, match_views
from local_distill.structures import Matcher, Matches, Tokens, ViewOutput

__all__ = ["DistillationTerms", "GlobalLocalDistillationLoss"]


class DistillationTerms(NamedTuple):
    """What a step's loss is made of.

    Attributes:
        loss: the weighted sum; call ``backward`` on it.
        global_loss: unweighted, with its graph.
        local_loss: unweighted, with its graph.
        matches: ``{(v, q): Matches}`` that the local loss used, to be looked at or logged.
    """

    loss: Tensor
    global_loss: Tensor
    local_loss: Tensor
    matches: dict[tuple[int, int], Matches]


class GlobalLocalDistillationLoss(nn.Module):
    """Weighted sum of the global and the local loss; the matcher pairs the tokens in between.

    .. math:: L = λ_g·L_global + λ_l·L_local

    Convention: every pair of different views takes part (teacher view q is the same view as student
    view q). Views without global logits take no part globally, views without token logits or tokens
    none locally.

    Args:
        global_loss: with its own targets.
        local_loss: with its own targets.
        matcher: any `Matcher`.
        global_weight: λ_g, at least 0.
        local_weight: λ_l, at least 0.

    Raises:
        ConfigError: a negative or non-finite weight.

    Example:
        >>> import torch
        >>> from local_distill import (
        ...     Centering, NearestMatcher, TokenGrid, Tokens, ViewOutput, from_box)
        >>> from local_distill.losses import GlobalDistillationLoss, LocalDistillationLoss
        >>> loss = GlobalLocalDistillationLoss(
        ...     GlobalDistillationLoss(Centering(8)), LocalDistillationLoss(Centering(8)),
        ...     NearestMatcher())
        >>> grid = TokenGrid.tiling(2, 3, view_size=(32, 48))
        >>> boxes = torch.tensor([[0.0, 0, 48, 32], [8, 0, 56, 32]])
        >>> geometry = from_box(boxes, view_size=(32, 48), source_size=(40, 60))
        >>> views = [ViewOutput(torch.randn(2, 8), torch.randn(2, 6, 8),
        ...                     Tokens(None, geometry, grid)) for _ in range(2)]
        >>> terms = loss(views, views, teacher_temp=0.04)
        >>> sorted(terms.matches)
        [(0, 1), (1, 0)]

    Source: "Global-Local Self-Distillation" (WACV 2023).
    """

    def __init__(
        self,
        global_loss: GlobalDistillationLoss,
        local_loss: LocalDistillationLoss,
        matcher: Matcher,
        *,
        global_weight: float = 0.5,
        local_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if global_loss.targets is local_loss.targets:
            raise ConfigError(
                "`global_loss` and `local_loss` share one `targets` object, so that each would "
                "center the other's logits; give each its own"
            )
        self.global_loss = global_loss
        self.local_loss = local_loss
        self.matcher = check_matcher(matcher)
        self.global_weight = check_weight("global_weight", global_weight)
        self.local_weight = check_weight("local_weight", local_weight)

    def forward(
        self,
        student: Sequence[ViewOutput],
        teacher: Sequence[ViewOutput],
        *,
        teacher_temp: float,
    ) -> DistillationTerms:
        """The loss of a step.

        Args:
            student: one `ViewOutput` per view.
            teacher: one `ViewOutput` per teacher view, the first views of ``student``.
            teacher_temp: τ_t of both losses, above 0.

        Returns:
            `DistillationTerms`.

        Raises:
            ShapeError: axes that do not fit; no pair of views with token logits and tokens.
        """
        check_sequence("student", student, "a ViewOutput")
        check_sequence("teacher", teacher, "a ViewOutput")
        pairs = cross_view_pairs(len(student), len(teacher))
        global_loss = self._global(student, teacher, pairs, teacher_temp)
        local_pairs = [(v, q) for v, q in pairs if _is_local(student[v]) and _is_local(teacher[q])]
        if not local_pairs:
            raise ShapeError(
                f"none of the {len(pairs)} pairs of different views has `token_logits` and `tokens`"
                " on both sides; use GlobalDistillationLoss where there is nothing local"
            )
        empty = Tokens()
        matches = match_views(
            self.matcher,
            [view.tokens or empty for view in student],
            [view.tokens or empty for view in teacher],
            local_pairs,
        )
        local_loss = self.local_loss(
            [view.token_logits for view in student],
            [view.token_logits for view in teacher],
            matches,
            teacher_temp=teacher_temp,
        )
        loss = self.global_weight * global_loss + self.local_weight * local_loss
        return DistillationTerms(loss, global_loss, local_loss, matches)

    def _global(
        self,
        student: Sequence[ViewOutput],
        teacher: Sequence[ViewOutput],
        pairs: list[tuple[int, int]],
        teacher_temp: float,
    ) -> Tensor:
        """The global loss over the views that have global logits, numbered anew."""
        s_views = [v for v, view in enumerate(student) if view.global_logits is not None]
        t_views = [q for q, view in enumerate(teacher) if view.global_logits is not None]
        kept = [
            (s_views.index(v), t_views.index(q)) for v, q in pairs if v in s_views and q in t_views
        ]
        result: Tensor = self.global_loss(
            [student[v].global_logits for v in s_views],
            [teacher[q].global_logits for q in t_views],
            teacher_temp=teacher_temp,
            pairs=kept,
        )
        return result


def _is_local(view: ViewOutput) -> bool:
    return view.token_logits is not None and view.tokens is not None
