"""VICRegL: VICReg's criterion on matched patch vectors, and on whole views."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import Axes, check_floating, check_fraction, check_sequence
from local_distill._precision import at_least_float32
from local_distill.errors import ShapeError
from local_distill.losses._pairs import Pair, Processes, check_index
from local_distill.losses.variance_covariance import VICRegLoss, weighted_invariance
from local_distill.structures import Matches

__all__ = ["VICRegLLoss", "VICRegLTerms"]

# Matches of all tokens of a view, or what `Matches.compact` makes of them.
Found = Matches | tuple[Tensor, Matches]
FoundPairs = Mapping[Pair, Found] | Sequence[Mapping[Pair, Found]]


class VICRegLTerms(NamedTuple):
    """What a step's loss is made of.

    Attributes:
        loss: the weighted sum; call ``backward`` on it.
        global_loss: of whole views, unweighted, with its graph.
        location_loss: of patches matched by place, unweighted, with its graph.
        feature_loss: of patches matched by features, unweighted, with its graph.
    """

    loss: Tensor
    global_loss: Tensor
    location_loss: Tensor
    feature_loss: Tensor


class VICRegLLoss(nn.Module):
    """VICReg's loss of whole views, and of the patch vectors that matches bring together.

    .. math:: L = α·L_global + (1 - α)·(L_location + L_feature)

    L_global is `VICRegLoss`. L_location and L_feature are means over their matches of

    .. math:: λ·s(x, y) + μ·(v(x) + v(y))/2 + ν·(c(x) + c(y))/2

    where x (b, n, d) are the student view's matched vectors and y (b, n, d) those that answer them.

    Convention: there is no teacher, both sides get a gradient. Variance and covariance run over the
    batch (of all processes) at each of the n positions by itself, and are averaged over the
    positions that two images or more have; never over positions together. With plain `Matches`
    position i is token i, wherever it is matched. With what ``matches.compact(count)`` returns
    position r is each image's r-th kept token in the order of the tokens, as published. Processes:
    as in `VICRegLoss`.

    Args:
        alpha: α in [0, 1].
        invariance_weight: λ, at least 0.
        variance_weight: μ, at least 0.
        covariance_weight: ν, at least 0.
        process_group: the processes over which gradients are averaged; None: all.

    Raises:
        ConfigError: an α outside [0, 1], a weight below 0.

    Example:
        >>> from local_distill.matching import KeepBest, SimilarityMatcher, match_views
        >>> from local_distill import Tokens
        >>> views = [torch.randn(4, 9, 3) for _ in range(2)]
        >>> found = match_views(KeepBest(SimilarityMatcher("l2"), count=5),
        ...                     [Tokens(view) for view in views], [Tokens(view) for view in views])
        >>> kept = {pair: matches.compact(5) for pair, matches in found.items()}
        >>> loss = VICRegLLoss(alpha=0.75)
        >>> loss([torch.randn(4, 8) for _ in range(2)], views, feature_matches=kept).loss.shape
        torch.Size([])

    Source: "VICRegL" (NeurIPS 2022, arXiv 2210.01571). Published: every global view in turn with
    every other, 20 matches from it and 4 back, by place with
    ``KeepBest(NearestMatcher(max_distance=None), count=20)`` and by features with
    ``KeepBest(SimilarityMatcher("l2"), count=20)``; two global views so meet with 20 and with 4
    both ways, which takes two mappings.

    Deviations from the authors' code: by default theirs keeps *all* matches of features
    (``l2_all_matches``), the paper 20; that is the caller's choice here. A batch of one has no
    variance and covariance, theirs are NaN. Its ``fast_vc_reg``, statistics once a view, overwrites
    the covariance of all views but the last and adds its mean to a vector; it is left out. Its
    gather of all embeddings wants equal batches on every rank; here moments are summed.
    """

    def __init__(
        self,
        *,
        alpha: float = 0.75,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.alpha = check_fraction("alpha", alpha)
        self.global_loss = VICRegLoss(
            invariance_weight, variance_weight, covariance_weight, process_group=process_group
        )

    def forward(
        self,
        embeddings: Sequence[Tensor],
        token_embeddings: Sequence[Tensor | None],
        location_matches: FoundPairs | None = None,
        feature_matches: FoundPairs | None = None,
        *,
        pairs: Iterable[Pair] | None = None,
    ) -> VICRegLTerms:
        """The loss of a step.

        Args:
            embeddings: per view (b, d) of the whole view.
            token_embeddings: per view (b, n_v, e) of its patches; None for a view in no match.
            location_matches: ``{(v, q): Matches}``, by place: view v's tokens look for an answer in
                view q. Instead of `Matches` what ``compact`` returns. Several mappings as a list;
                all their matches count alike. None: the term is 0.
            feature_matches: likewise, by features.
            pairs: of whole views, see `VICRegLoss`.

        Returns:
            `VICRegLTerms`, all in at least float32.

        Raises:
            ShapeError: axes that differ, matches of other views or grids; the message names them.
        """
        check_sequence("token_embeddings", token_embeddings, "a tensor of embeddings")
        whole: Tensor = self.global_loss(embeddings, pairs=pairs)
        group = self.global_loss.process_group
        processes = Processes(self.training and torch.is_grad_enabled(), group)
        local = []
        for name, found in (
            ("location_matches", location_matches),
            ("feature_matches", feature_matches),
        ):
            parts = [
                self._criterion(*_bring_together(label, token_embeddings, pair, one), processes)
                for label, pair, one in _each(name, found)
            ]
            local.append(torch.stack(parts).mean() if parts else torch.zeros_like(whole))
        loss = self.alpha * whole + (1 - self.alpha) * (local[0] + local[1])
        return VICRegLTerms(loss, whole, *local)

    def _criterion(self, x: Tensor, y: Tensor, weight: Tensor, processes: Processes) -> Tensor:
        """VICReg's criterion between matched vectors (b, n, d) of two views."""
        settings = self.global_loss
        # Both sides at once: every position has statistics of its own anyway.
        both = torch.cat((x, y), 1)
        valid = (weight > 0).repeat(1, 2)
        variance, covariance = settings.penalties(both, valid, processes)
        invariance = weighted_invariance(x, y, weight, processes)
        return settings.weighted(invariance, variance, covariance).to(both.dtype)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"alpha={self.alpha}"


def _each(name: str, found: FoundPairs | None) -> Iterator[tuple[str, Pair, Found]]:
    """Every match with its pair, and how to name it in a message."""
    if found is None:
        return
    listed = not isinstance(found, Mapping)
    mappings: Sequence[Mapping[Pair, Found]] = found if listed else [found]  # type: ignore[assignment,list-item]
    for i, mapping in enumerate(mappings):
        for pair, one in mapping.items():
            yield (f"{name}[{i}][{pair}]" if listed else f"{name}[{pair}]"), pair, one


def _bring_together(
    label: str, values: Sequence[Tensor | None], pair: Pair, found: Found
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's vectors (b, n, d), those that answer them, and (b, n) each match's weight."""
    v, q = pair
    if not (0 <= v < len(values) and 0 <= q < len(values)):
        raise ShapeError(
            f"`{label}` is between views {v} and {q} but `token_embeddings` has {len(values)} views"
        )
    axes = Axes()
    x = axes.bind(f"token_embeddings[{v}]", values[v], "b s d")
    x = at_least_float32(check_floating(f"token_embeddings[{v}]", x))
    y = axes.bind(f"token_embeddings[{q}]", values[q], "b t d")
    check_floating(f"token_embeddings[{q}]", y)
    if isinstance(found, Matches):
        matches = found
        axes.bind(f"{label}.weight", matches.weight, "b s k")
        index = axes.bind(f"{label}.teacher_index", matches.teacher_index, "b s k")
        check_index(f"{label}.teacher_index", index, f"token_embeddings[{q}]", axes["t"])
    else:
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Matches)):
            raise ShapeError(
                f"`{label}` must be Matches, or what their compact() returns, got "
                f"{type(found).__name__}"
            )
        rows, matches = found
        axes.bind(f"{label}[0]", rows, "b n")
        check_index(f"{label}[0]", rows, f"token_embeddings[{v}]", axes["s"])
        axes.bind(f"{label}[1].weight", matches.weight, "b n k")
        index = axes.bind(f"{label}[1].teacher_index", matches.teacher_index, "b n k")
        check_index(f"{label}[1].teacher_index", index, f"token_embeddings[{q}]", axes["t"])
        # In the order of the tokens; those without a match last, as there may be fewer of them in
        # another image.
        place = torch.where((matches.weight > 0).any(-1), rows, axes["s"])
        order = place.argsort(dim=1, stable=True)
        candidates = order[..., None].expand_as(matches.weight)
        matches = Matches(
            matches.teacher_index.gather(1, candidates),
            matches.weight.gather(1, candidates),
            matches.cost.gather(1, order),
        )
        rows = rows.gather(1, order)
        x = x.gather(1, rows[..., None].expand(-1, -1, axes["d"]))
    mass = matches.weight.to(x.dtype).sum(-1)
    # Weights that sum to less than 1 say how much a match counts, not how long its answer is.
    y = matches.gather(y) / torch.where(mass > 0, mass, 1.0)[..., None]
    return x, y, mass
