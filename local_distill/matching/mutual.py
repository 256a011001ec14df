"""Keep the pairs that choose each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from local_distill._check import Axes
from local_distill.kernels import block_length
from local_distill.matching._match_checks import check_matcher, check_matches, check_targets
from local_distill.matching.match_views import cross_view_pairs, match_views
from local_distill.structures import Matcher, Matches, Tokens

__all__ = ["Mutual", "mutual_matches"]

Pair = tuple[int, int]

# Up to this many (forward, reverse) candidates a token, they are compared one by one.
_FEW_COMPARISONS = 16


def mutual_matches(matches: Matches, reverse: Matches) -> Matches:
    r"""Keep the candidates that have the student token among their own candidates.

    .. math:: w'_{ic} = w_{ic} \text{ where some } c' \text{ has }
        r_{j c'} = i \text{ and } v_{j c'} > 0, \text{ with } j = j_{ic}; \text{ else } 0

    with j and w the student's indices and weights, r and v the teacher's in ``reverse``. With one
    candidate on both sides these are the mutual nearest neighbours.

    Convention: weights that stay are not scaled up. A token keeps its cost while any candidate
    stays, also where that was worked out over more of them.

    Args:
        matches: student → teacher, (b, s, k).
        reverse: teacher → student, (b, t, k'): its ``teacher_index`` counts student tokens.

    Returns:
        `Matches` of ``matches``' shape and dtypes.

    Raises:
        ShapeError: batches that differ, or an index that the other side's tokens do not reach
            (seen where that needs no device sync).

    Example:
        >>> one = Matches(torch.tensor([[[0], [0]]]), torch.ones(1, 2, 1), torch.tensor([[0.1, 0]]))
        >>> back = Matches(torch.tensor([[[1]]]), torch.ones(1, 1, 1), torch.tensor([[0.0]]))
        >>> mutual_matches(one, back).cost  # token 0 chose a teacher token that chose token 1
        tensor([[inf, 0.]])

    Source: the cross check of descriptor matching; with several candidates each way it is the
    mutual k-nearest-neighbour relation.
    """
    axes = Axes()
    matches = check_matches("matches", matches, axes)
    reverse = check_matches("reverse", reverse, axes, "b t r")
    check_targets("matches", matches.teacher_index, axes["t"], "`reverse`")
    check_targets("reverse", reverse.teacher_index, axes["s"], "`matches`")
    if matches.teacher_index.numel() == 0 or reverse.teacher_index.numel() == 0:
        returned = torch.zeros_like(matches.weight, dtype=torch.bool)
    elif axes["k"] * axes["r"] <= min(_FEW_COMPARISONS, axes["t"]):
        returned = _by_comparison(matches.teacher_index, reverse)
    else:
        returned = _by_table(matches.teacher_index, reverse)
    keep = returned & (matches.weight > 0)
    return Matches(
        matches.teacher_index,
        torch.where(keep, matches.weight, 0.0),
        torch.where(keep.any(-1), matches.cost, torch.inf),
    )


class Mutual(nn.Module):
    """Keep what a matcher finds from the student's side and from the teacher's: `mutual_matches`.

    The matcher runs twice, the second time with student and teacher swapped. It has to take either
    side as its teacher: the lattice of `NearestMatcher` does so for crops and flips.

    Args:
        matcher: any `Matcher`; one that is a Module becomes a submodule.

    Raises:
        ConfigError: something that cannot be called.

    Example:
        >>> from local_distill.matching import SimilarityMatcher
        >>> one, two = torch.tensor([[[1.0, 0], [1, 0.2]]]), torch.tensor([[[1.0, 0], [-1, 0]]])
        >>> Mutual(SimilarityMatcher())(Tokens(one), Tokens(two)).matched
        tensor([[ True, False]])
    """

    def __init__(self, matcher: Matcher) -> None:
        super().__init__()
        self.matcher = check_matcher(matcher)

    def forward(self, student: Tokens, teacher: Tokens) -> Matches:
        """See `mutual_matches`."""
        return mutual_matches(self.matcher(student, teacher), self.matcher(teacher, student))

    def match_views(
        self,
        student: Sequence[Tokens],
        teacher: Sequence[Tokens],
        pairs: Iterable[Pair] | None = None,
    ) -> dict[Pair, Matches]:
        """All pairs of views, with one run of the inner matcher's each way; see `match_views`."""
        if pairs is None:
            pairs = cross_view_pairs(len(student), len(teacher))
        pairs = list(pairs)
        forward = match_views(self.matcher, student, teacher, pairs)
        reverse = match_views(self.matcher, teacher, student, [(q, v) for v, q in pairs])
        return {(v, q): mutual_matches(forward[v, q], reverse[q, v]) for v, q in pairs}

    def extra_repr(self) -> str:
        """The matcher, where it is no Module and so is not printed as a submodule."""
        return "" if isinstance(self.matcher, nn.Module) else f"matcher={self.matcher!r}"


def _by_comparison(index: Tensor, reverse: Matches) -> Tensor:
    """(b, s, k) bool, one reverse candidate after the other: (b, s, k) temporaries, no table."""
    b, s, _ = index.shape
    t = reverse.cost.shape[1]
    own = torch.arange(s, device=index.device)[:, None]
    partners = torch.where(reverse.weight > 0, reverse.teacher_index, -1)
    returned = torch.zeros_like(index, dtype=torch.bool)
    for partner in partners.unbind(-1):
        returned = returned | (partner[:, None].expand(b, s, t).gather(2, index) == own)
    return returned


def _by_table(index: Tensor, reverse: Matches) -> Tensor:
    """(b, s, k) bool, from (t, s) tables of who chose whom, a few images and tokens at a time."""
    b, s, k = index.shape
    _, t, r = reverse.teacher_index.shape
    # A byte an entry of the table, and the int64 partners beside it.
    images = block_length(t * (s + 8 * r), index.device)
    tokens = block_length(min(images, b) * (t + k), index.device)
    found = []
    for first in range(0, b, images):
        part = slice(first, first + images)
        partners = torch.where(reverse.weight[part] > 0, reverse.teacher_index[part], s)
        rows = [
            _look_up(index[part, start : start + tokens], partners, start)
            for start in range(0, s, tokens)
        ]
        found.append(torch.cat(rows, 1))
    return torch.cat(found, 0)


def _look_up(index: Tensor, partners: Tensor, start: int) -> Tensor:
    """(b, n, k) bool for the n student tokens from ``start`` on; a partner of s is none."""
    b, n, _ = index.shape
    column = partners - start
    # All others go to a column of their own, so that every write is the same True: the order of
    # the writes says nothing.
    column = torch.where((column >= 0) & (column < n), column, n)
    table = torch.zeros((b, partners.shape[1], n + 1), dtype=torch.bool, device=index.device)
    return table.scatter(2, column, True)[..., :n].mT.gather(2, index)
