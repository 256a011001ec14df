"""PixPro: tokens that propagate, consistent with the teacher's within a radius."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import check_weight
from local_distill._logits import multiplied_out
from local_distill.losses.global_local import DistillationTerms
from local_distill.losses.pixel_propagation import PixelConsistencyLoss, PixelPropagation
from local_distill.matching.radius import RadiusMatcher
from local_distill.recipes._pixpro_places import PublishedRadiusMatcher
from local_distill.recipes._views import global_views, local_pairs, match_locally
from local_distill.structures import Matcher, Matches, ViewOutput

__all__ = ["PixproLoss", "pixpro"]


class PixproLoss(nn.Module):
    """Propagation of the student's tokens, then their consistency with the teacher's.

    .. math:: L = λ_l·mean_{(v,q), v≠q} L_pixel + λ_g·mean_{(v,q), v≠q} mean_b [-cos(z_v, z'_q)]

    Convention: it has parameters, those of ``propagation``, which the optimiser has to know.

    Args:
        propagation: of the student's tokens.
        consistency: between tokens.
        matcher: any `Matcher`.
        global_weight: λ_g, at least 0; at 0 global features are not looked at.
        local_weight: λ_l, at least 0.

    Raises:
        ConfigError: a negative or non-finite weight.

    Example:
        >>> loss = PixproLoss(PixelPropagation(dim=4), PixelConsistencyLoss(), RadiusMatcher())
        >>> loss.local_weight
        4.0
    """

    def __init__(
        self,
        propagation: PixelPropagation,
        consistency: PixelConsistencyLoss,
        matcher: Matcher,
        *,
        global_weight: float = 0.0,
        local_weight: float = 4.0,
    ) -> None:
        super().__init__()
        self.propagation = propagation
        self.consistency = consistency
        self.matcher = matcher
        self.global_weight = check_weight("global_weight", global_weight)
        self.local_weight = check_weight("local_weight", local_weight)

    def forward(
        self, student: Sequence[ViewOutput], teacher: Sequence[ViewOutput]
    ) -> DistillationTerms:
        """The loss of a step.

        Args:
            student: one `ViewOutput` per view, with *features* in place of logits:
                ``token_logits`` (b, n, d) of the projector, before propagation, and ``tokens`` with
                geometry and grid. With a weight of whole views also ``global_logits`` (b, any), of
                the instance predictor. Of any length.
            teacher: likewise, one per teacher view, of the teacher's projectors; view q is the same
                as student view q.

        Returns:
            `DistillationTerms`, the terms between -1 and 1.

        Raises:
            ShapeError: axes that do not fit; no pair of different views with token features and
                tokens, or, where they weigh, none with global features.
        """
        pairs = local_pairs(student, teacher)
        matches = match_locally(self.matcher, student, teacher, pairs)
        needed = {v for v, _ in pairs}
        local_loss: Tensor = self.consistency(
            [
                self.propagation(view.token_logits) if v in needed else None
                for v, view in enumerate(student)
            ],
            [view.token_logits for view in teacher],
            matches,
        )
        loss = self.local_weight * local_loss
        global_loss = local_loss.new_zeros(())
        if self.global_weight:
            global_loss = self._global(student, teacher)
            loss = loss + self.global_weight * global_loss
        return DistillationTerms(loss, global_loss, local_loss, matches)

    def _global(self, student: Sequence[ViewOutput], teacher: Sequence[ViewOutput]) -> Tensor:
        """A whole view is a grid of one token, answered by the one of the other view."""
        views = global_views(student, teacher)
        ours = [multiplied_out(features) for features in views.student]
        theirs = [multiplied_out(features) for features in views.teacher]
        whole = Matches.identity(ours[0].new_ones(len(ours[0]), 1).bool())
        result: Tensor = self.consistency(
            [features[:, None] for features in ours],
            [features[:, None] for features in theirs],
            dict.fromkeys(views.pairs, whole),
        )
        return result

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"global_weight={self.global_weight}, local_weight={self.local_weight}"


def pixpro(
    dim: int = 256,
    *,
    gamma: float = 2.0,
    num_layers: int = 1,
    radius: float = 0.7,
    instance_weight: float = 0.0,
    legacy: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> PixproLoss:
    """PixPro: the student's propagated tokens agree with all teacher tokens that lie near them.

    .. math:: L = -2·Σ_{(v,q)} mean_b mean_{(i,j) near} cos(y_i, x'_j)

    with y = `PixelPropagation` of the student's tokens x, over both ways between the two views.

    Convention: ``loss(student, teacher)``, with features in place of logits, see
    `PixproLoss.forward`. With other than two pairs of views it is 4 times their mean. Published
    settings that are not part of the loss: ResNet-50 whose last map has 7 × 7 tokens; a projector
    of two 1 × 1 convolutions, 4,096 to 256, with BatchNorm between; teacher momentum from 0.99 to 1
    along a cosine; two views of 224 × 224 of 8 to 100 % of the image; LARS, learning rate
    1.0 · batch / 256, weight decay 1e-5, 1,024 images a step, 100 or 400 epochs.

    Args:
        dim: d, of the projector's features.
        gamma: γ of the propagation, above 0.
        num_layers: linear layers of the propagation.
        radius: in larger cell diagonals: nearer tokens are to agree.
        instance_weight: of the term between whole views, BYOL's; published: 0, and 1 together with
            an instance branch. Above 0 the views need ``global_logits``.
        legacy: measure as the published code does, see below.
        process_group: the processes over which gradients are averaged; None: all.

    Returns:
        `PixproLoss`, whose forward gives `DistillationTerms`.

    Raises:
        ConfigError: a setting out of range.

    Example:
        >>> import torch
        >>> from local_distill import TokenGrid, Tokens, from_box
        >>> loss = pixpro(dim=4)
        >>> grid = TokenGrid.tiling(2, 3, view_size=(32, 48))
        >>> boxes = [torch.tensor([[0.0, 0, 48, 32]]), torch.tensor([[8.0, 4, 56, 36]])]
        >>> views = [ViewOutput(None, torch.ones(1, 6, 4),
        ...                     Tokens(None, from_box(box, (32, 48), (40, 64)), grid))
        ...          for box in boxes]
        >>> terms = loss(views, views)
        >>> terms.loss.shape, bool(terms.loss == 4 * terms.local_loss)
        (torch.Size([]), True)

    Source: "Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual
    Representation Learning" (PixPro, CVPR 2021), equations 1 and 3 to 5; settings of its code.
    The paper adds the two ways; its code, as here, doubles that sum.

    Deviations from the authors' code: the paper measures in the image; the code divides x by the
    source's width - 1 and y by its height - 1 before, so that in a photograph of 3 : 2 a step down
    counts half as much again as one across, and takes a crop of w pixels as w - 1 long. On crops of
    photographs of usual shapes the pairs that differ are a fifth as many as all. Here both are
    source pixels; ``legacy=True`` measures as the code does, for upright crops, mirrored or not.
    The code divides by the number of pairs + 1e-6.

    What does better in this package: any number of views, grids of different sizes, and rotated or
    padded crops; `KeepBest` and `OverlapMatcher` in place of a radius.
    """
    consistency = PixelConsistencyLoss(normalize="image", process_group=process_group)
    return PixproLoss(
        PixelPropagation(dim, gamma=gamma, num_layers=num_layers),
        consistency,
        PublishedRadiusMatcher(radius) if legacy else RadiusMatcher(radius),
        # Both ways are summed and doubled, ours is their mean.
        global_weight=4.0 * instance_weight,
        local_weight=4.0,
    )
