"""Keep the matches of lowest cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from local_distill._check import Axes, check_at_least, check_fraction
from local_distill._precision import widest
from local_distill.errors import ConfigError
from local_distill.matching._match_checks import check_matcher, check_matches
from local_distill.matching.match_views import match_views
from local_distill.structures import Matcher, Matches, Tokens

__all__ = ["KeepBest", "keep_best"]

Pair = tuple[int, int]


def keep_best(
    matches: Matches, *, count: int | None = None, fraction: float | None = None
) -> Matches:
    r"""Keep each image's matches of lowest cost, ``count`` of them or a ``fraction``.

    .. math:: \text{token } i \text{ stays} \iff \mathrm{rank}_i < n, \quad
        n = \text{count or } \lceil \text{fraction} \cdot \text{matched} \rceil

    with rank the place of i among the image's matched tokens in order of cost.

    Convention: ties go to the lower student index, so that exactly n stay. Fewer stay where fewer
    are matched. The fraction is of the image's matched tokens, not of all; a product that is whole
    but for rounding counts as whole (0.07 of 100 is 7).

    Args:
        matches: (b, s, k), any k.
        count: matches to keep in each image, at least 1.
        fraction: share of the matches to keep in each image, in (0, 1].

    Returns:
        `Matches` of the same shape and dtypes; the rest has weight 0 and cost +inf. So has a token
        whose cost is not finite.

    Raises:
        ConfigError: both or neither of ``count`` and ``fraction``, or one out of its range.
        ShapeError: axes that do not belong together.

    Example:
        >>> matches = Matches.identity(torch.ones(1, 4, dtype=torch.bool))
        >>> matches = matches._replace(cost=torch.tensor([[0.3, 0.1, 0.4, 0.1]]))
        >>> keep_best(matches, count=2).matched
        tensor([[False,  True, False,  True]])
        >>> keep_best(matches, fraction=0.3).matched
        tensor([[False,  True, False,  True]])

    Source: VICRegL (NeurIPS 2022), its top-γ matches of each pair of feature maps: 20 from the
    first view to the second and 4 back, by distance of place and by distance of features.

    Deviations from the authors' code: there the nearest is never refused, and a map with fewer
    tokens than matches wanted ends in an error. Its costs are source pixels and ‖f − g‖; here they
    are the matcher's, so cells with `NearestMatcher`. By default it keeps *all* matches of features
    and takes the best of those of places alone. Ties there fall as an unstable sort has them. Its
    first view is each global one in turn and its second every other view, global ones included:
    ``KeepBest(NearestMatcher(max_distance=None), count=20)`` with pairs (global, any other), and
    one with ``count=4`` with those pairs turned around.
    """
    _check_settings(count, fraction)
    matches = check_matches("matches", matches, Axes())
    found = (matches.weight > 0).any(-1) & matches.cost.isfinite()
    keep = found & (_ranks(found, matches.cost) < _how_many(found, count, fraction))
    return Matches(
        matches.teacher_index,
        torch.where(keep[..., None], matches.weight, 0.0),
        torch.where(keep, matches.cost, torch.inf),
    )


class KeepBest(nn.Module):
    """Keep a matcher's matches of lowest cost: `keep_best`.

    Args:
        matcher: any `Matcher`; one that is a Module becomes a submodule.
        count: matches to keep in each image; or
        fraction: share of the matches to keep in each image. Exactly one of the two.

    Raises:
        ConfigError: both or neither of the two, one out of its range, or a matcher that cannot be
            called.

    Example:
        >>> from local_distill.matching import NearestMatcher
        >>> KeepBest(NearestMatcher(), count=20)
        KeepBest(
          count=20
          (matcher): NearestMatcher(max_distance=0.5, method='lattice')
        )
    """

    def __init__(
        self, matcher: Matcher, *, count: int | None = None, fraction: float | None = None
    ) -> None:
        super().__init__()
        _check_settings(count, fraction)
        self.matcher = check_matcher(matcher)
        self.count = count
        self.fraction = fraction

    def forward(self, student: Tokens, teacher: Tokens) -> Matches:
        """See `keep_best`."""
        return self._best(self.matcher(student, teacher))

    def match_views(
        self,
        student: Sequence[Tokens],
        teacher: Sequence[Tokens],
        pairs: Iterable[Pair] | None = None,
    ) -> dict[Pair, Matches]:
        """All pairs of views, with the inner matcher's way of doing so; see `match_views`."""
        found = match_views(self.matcher, student, teacher, pairs)
        return {pair: self._best(matches) for pair, matches in found.items()}

    def extra_repr(self) -> str:
        """The settings, for print."""
        setting = f"fraction={self.fraction}" if self.count is None else f"count={self.count}"
        inner = "" if isinstance(self.matcher, nn.Module) else f"matcher={self.matcher!r}, "
        return inner + setting

    def _best(self, matches: Matches) -> Matches:
        return keep_best(matches, count=self.count, fraction=self.fraction)


def _check_settings(count: int | None, fraction: float | None) -> None:
    if (count is None) == (fraction is None):
        raise ConfigError(
            "exactly one of `count` and `fraction` must be given, got "
            f"count={count!r} and fraction={fraction!r}"
        )
    if count is not None:
        check_at_least("count", count, 1)
    if fraction is not None and check_fraction("fraction", fraction) == 0:
        raise ConfigError("`fraction` must lie in (0, 1], got 0: nothing would be kept")


def _ranks(found: Tensor, cost: Tensor) -> Tensor:
    """(b, s) place of each token in the order of cost; tokens without a match come last."""
    order = torch.where(found, cost, torch.inf).argsort(dim=1, stable=True)
    places = torch.arange(cost.shape[1], device=cost.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, places)


def _how_many(found: Tensor, count: int | None, fraction: float | None) -> Tensor | int:
    """How many tokens each image keeps: a number, or (b, 1) whole numbers."""
    if fraction is None:
        assert count is not None
        return count
    share = widest(found.sum(1, keepdim=True)) * fraction
    # 0.07 · 100 is 7.000000000000001
    return (share * (1 - 4 * torch.finfo(share.dtype).eps)).ceil()
