"""VICRegL: VICReg's criterion on whole views and on patches that match."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import check_at_least, check_sequence
from local_distill.errors import ConfigError, ShapeError
from local_distill.losses.local_variance_covariance import VICRegLLoss, VICRegLTerms
from local_distill.matching.match_views import match_views
from local_distill.matching.nearest import NearestMatcher
from local_distill.matching.similarity import SimilarityMatcher
from local_distill.structures import CropGeometry, Matcher, Matches, Tokens

__all__ = ["VICRegL", "vicregl"]

Pair = tuple[int, int]
Counts = tuple[int, int]
Compact = tuple[Tensor, Matches]


class VICRegL(nn.Module):
    """A step of VICRegL: matches by place and by features, and the loss on them.

    Made by `vicregl`, which says the rest.

    Args:
        loss: the criterion and its weights.
        location_counts: see `vicregl`.
        feature_counts: see `vicregl`.
        legacy: see `vicregl`.

    Raises:
        ConfigError: counts that are not two whole numbers of at least 1.
    """

    def __init__(
        self,
        loss: VICRegLLoss,
        *,
        location_counts: Counts = (20, 4),
        feature_counts: Counts | None = (20, 4),
        legacy: bool = False,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.location_counts = _check_counts("location_counts", location_counts)
        self.feature_counts = (
            None if feature_counts is None else _check_counts("feature_counts", feature_counts)
        )
        self.legacy = bool(legacy)
        self.location_matcher = NearestMatcher(max_distance=None)
        self.feature_matcher = SimilarityMatcher("l2")

    def forward(
        self,
        embeddings: Sequence[Tensor],
        token_embeddings: Sequence[Tensor],
        tokens: Sequence[Tokens],
        *,
        global_views: int = 2,
    ) -> VICRegLTerms:
        """The loss of a step.

        Args:
            embeddings: per view (b, d), the projector's embeddings of whole views, global ones
                first.
            token_embeddings: per view (b, n_v, e), the maps' projector's embeddings of patches.
            tokens: per view `Tokens` with geometry and grid; features are not looked at.
            global_views: how many views at the front are global: each of them meets every other
                view.

        Returns:
            `VICRegLTerms`: loss, global_loss, location_loss, feature_loss.

        Raises:
            ShapeError: lists of other lengths, fewer than two views, axes that differ.
            GeometryError: as `nearest_matches`.
        """
        check_sequence("embeddings", embeddings, "a tensor of embeddings")
        check_sequence("token_embeddings", token_embeddings, "a tensor of embeddings")
        check_sequence("tokens", tokens, "Tokens")
        views = len(embeddings)
        for name, given in (("token_embeddings", token_embeddings), ("tokens", tokens)):
            if len(given) != views:
                raise ShapeError(
                    f"`{name}` has {len(given)} views but `embeddings` has {views}: give each view"
                )
        if not 1 <= global_views <= views:
            raise ShapeError(
                f"`global_views` must lie in [1, {views}], the number of views, got {global_views}"
            )
        forth = [(v, q) for v in range(global_views) for q in range(views) if v != q]
        back = [(q, v) for v, q in forth]
        places = [Tokens(None, self._geometry(view), view.grid) for view in tokens]
        features = [Tokens(values.detach()) for values in token_embeddings]
        location = _kept(self.location_matcher, places, (forth, back), self.location_counts)
        feature = _kept(self.feature_matcher, features, (forth, back), self.feature_counts)
        terms: VICRegLTerms = self.loss(
            embeddings, token_embeddings, location, feature, pairs=forth
        )
        return terms

    def extra_repr(self) -> str:
        """The settings, for print."""
        return (
            f"location_counts={self.location_counts}, feature_counts={self.feature_counts}, "
            f"legacy={self.legacy}"
        )

    def _geometry(self, tokens: Tokens) -> CropGeometry | None:
        if not self.legacy or tokens.geometry is None:
            return tokens.geometry
        return _without_flip(tokens.geometry)


def vicregl(
    *,
    alpha: float = 0.75,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    location_counts: Counts = (20, 4),
    feature_counts: Counts | None = (20, 4),
    legacy: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> VICRegL:
    """VICRegL: whole views agree, and so do the patches that lie or look alike.

    .. math:: L = α·L_global + (1 - α)·(L_location + L_feature)

    Every global view v meets every other view q: of v's patches those ``location_counts[0]`` that
    lie nearest to a patch of q, and of q's patches those ``location_counts[1]`` nearest to one of
    v; likewise by the distance of their embeddings. See `VICRegLLoss` for the terms.

    Convention: there is no teacher, every view gets a gradient; matching has none. Two global views
    meet twice, each with both counts. Variance and covariance run over the batch at the r-th kept
    patch. A view with fewer patches than wanted keeps all of them.

    Args:
        alpha: α in [0, 1].
        invariance_weight: λ, at least 0.
        variance_weight: μ, at least 0.
        covariance_weight: ν, at least 0.
        location_counts: matches by place kept from the global view and back to it.
        feature_counts: likewise by features; None keeps all, the default of the authors' code
            (``l2_all_matches``).
        legacy: take places as if no view were flipped, the default of the authors' code
            (``no-flip-grid``).
        process_group: the processes over which gradients are averaged; None: all.

    Returns:
        `VICRegL`.

    Raises:
        ConfigError: an α outside [0, 1], a weight below 0, counts below 1.

    Example:
        >>> from local_distill import TokenGrid, from_box
        >>> grid = TokenGrid.tiling(3, 3, view_size=(48, 48))
        >>> boxes = torch.tensor([[0.0, 0, 48, 48], [8, 0, 56, 48], [4, 4, 52, 52]])
        >>> one = from_box(boxes, view_size=(48, 48), source_size=(64, 64))
        >>> two = from_box(boxes.flip(0), (48, 48), (64, 64), hflip=torch.tensor([True] * 3))
        >>> tokens = [Tokens(None, one, grid), Tokens(None, two, grid)]
        >>> step = vicregl(location_counts=(5, 2), feature_counts=(5, 2))
        >>> step([torch.randn(3, 8)] * 2, [torch.randn(3, 9, 4)] * 2, tokens).loss.shape
        torch.Size([])

    Source: "VICRegL: Self-Supervised Learning of Local Visual Features" (NeurIPS 2022, arXiv
    2210.01571). Published: α = 0.75, λ = μ = 25, ν = 1, 2 global views of 224 pixels with 7 × 7
    patches and 6 small ones of 96 with 3 × 3, 20 matches from a global view and 4 back; projectors
    8192-8192-8192 for views and 512-512-512 for patches.

    Deviations from the authors' code: its grid of places does not flip with the image unless asked
    to (``no-flip-grid`` is 1), so that patches of a flipped view are matched to the wrong places;
    here they flip as the paper has it, and ``legacy=True`` gives theirs for horizontal flips. By
    default it keeps all matches by features, the paper 20. Its classifier, which is trained
    alongside without reaching the network, is left out. Better here: any number of global views and
    any grids, where theirs are 7 × 7 and 3 × 3; places that a rotation or a rescaled source moved;
    a batch of one is finite; unequal batches on several processes.
    """
    loss = VICRegLLoss(
        alpha=alpha,
        invariance_weight=invariance_weight,
        variance_weight=variance_weight,
        covariance_weight=covariance_weight,
        process_group=process_group,
    )
    return VICRegL(
        loss, location_counts=location_counts, feature_counts=feature_counts, legacy=legacy
    )


def _kept(
    matcher: Matcher,
    tokens: Sequence[Tokens],
    ways: tuple[list[Pair], list[Pair]],
    counts: Counts | None,
) -> list[dict[Pair, Matches]] | list[dict[Pair, Compact]]:
    """Both ways' matches: all of them, or the ``counts`` of lowest cost in compact form."""
    # Pairs of two global views go both ways: match them once.
    found = match_views(matcher, tokens, tokens, list(dict.fromkeys(ways[0] + ways[1])))
    if counts is None:
        return [{pair: found[pair] for pair in pairs} for pairs in ways]
    return [
        {pair: found[pair].compact(min(count, found[pair].cost.shape[1])) for pair in pairs}
        for pairs, count in zip(ways, counts, strict=True)
    ]


def _without_flip(geometry: CropGeometry) -> CropGeometry:
    """The geometry of the same crop before it was flipped left to right."""
    matrix = geometry.matrix
    width = geometry.view_size[..., 1].to(matrix.dtype)
    # x → width - x in the view, before the way to the source
    first, third = matrix[..., 0], matrix[..., 2]
    turned = torch.stack((-first, matrix[..., 1], third + width[..., None] * first), -1)
    flipped = matrix[..., 0, 0] < 0
    return CropGeometry(
        torch.where(flipped[..., None, None], turned, matrix),
        geometry.view_size,
        geometry.source_size,
    )


def _check_counts(name: str, counts: Counts) -> Counts:
    if not isinstance(counts, (tuple, list)) or len(counts) != 2:
        raise ConfigError(
            f"`{name}` must be two numbers, from a global view and back to it, got {counts!r}"
        )
    return check_at_least(name, counts[0], 1), check_at_least(name, counts[1], 1)
