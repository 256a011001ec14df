"""DenseCL: whole views and tokens, each against keys of other images."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from local_distill._check import check_fraction, check_weight
from local_distill.errors import ConfigError
from local_distill.losses.dense_contrastive import DenseContrastiveLoss
from local_distill.losses.global_contrastive import GlobalContrastiveLoss
from local_distill.losses.global_local import DistillationTerms
from local_distill.losses.negative_queue import NegativeQueue
from local_distill.matching.similarity import SimilarityMatcher
from local_distill.recipes._views import global_views, local_pairs, match_locally
from local_distill.structures import Matcher, ViewOutput

__all__ = ["DenseclLoss", "densecl"]


class DenseclLoss(nn.Module):
    """Weighted sum of the global and the dense contrast; the matcher pairs the tokens in between.

    .. math:: L = λ_g·L_global + λ_l·L_dense

    Args:
        global_loss: with its own queue.
        dense_loss: with its own queue.
        matcher: any `Matcher`.
        global_weight: λ_g, at least 0.
        local_weight: λ_l, at least 0.

    Raises:
        ConfigError: a negative or non-finite weight, a queue that both share.

    Example:
        >>> DenseclLoss(GlobalContrastiveLoss(NegativeQueue(16, 4)),
        ...             DenseContrastiveLoss(NegativeQueue(16, 4)), SimilarityMatcher()).matcher
        SimilarityMatcher(metric='cosine')
    """

    def __init__(
        self,
        global_loss: GlobalContrastiveLoss,
        dense_loss: DenseContrastiveLoss,
        matcher: Matcher,
        *,
        global_weight: float = 0.5,
        local_weight: float = 0.5,
    ) -> None:
        super().__init__()
        if global_loss.queue is dense_loss.queue:
            raise ConfigError(
                "`global_loss` and `dense_loss` share one `queue`, whose keys are of whole views or"
                " of tokens; give each its own"
            )
        self.global_loss = global_loss
        self.dense_loss = dense_loss
        self.matcher = matcher
        self.global_weight = check_weight("global_weight", global_weight)
        self.local_weight = check_weight("local_weight", local_weight)

    def forward(
        self, student: Sequence[ViewOutput], teacher: Sequence[ViewOutput]
    ) -> DistillationTerms:
        """The loss of a step.

        Args:
            student: one `ViewOutput` per view, with *features* in place of logits:
                ``global_logits`` (b, d) of the global head, ``token_logits`` (b, n, d) of the dense
                head, ``tokens.features`` (b, n, any) of the backbone, by which tokens are matched.
                Of any length, not normalised: the dense queue takes the mean over the tokens.
            teacher: likewise, one per teacher view; view q is the same as student view q. An empty
                `ViewOutput` keeps the place of a view that the teacher does not see.

        Returns:
            `DistillationTerms`.

        Raises:
            ShapeError: axes that do not fit; no pair of different views with global features, or
                none with token features and tokens.
        """
        views = global_views(student, teacher)
        pairs = local_pairs(student, teacher)
        matches = match_locally(self.matcher, student, teacher, pairs)
        local_loss = self.dense_loss(
            [view.token_logits for view in student],
            [view.token_logits for view in teacher],
            matches,
        )
        global_loss = self.global_loss(views.student, views.teacher, pairs=views.pairs)
        loss = self.global_weight * global_loss + self.local_weight * local_loss
        return DistillationTerms(loss, global_loss, local_loss, matches)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"global_weight={self.global_weight}, local_weight={self.local_weight}"


def densecl(
    dim: int = 128,
    *,
    num_keys: int = 65_536,
    temp: float = 0.2,
    local_weight: float = 0.5,
    process_group: dist.ProcessGroup | None = None,
) -> DenseclLoss:
    """DenseCL: MoCo's contrast of whole views, and the same for each token with the most similar.

    .. math:: L = (1 - λ)·L_global + λ·mean_i -log[e^{x_i·y_j(i)/τ} / (e^{x_i·y_j(i)/τ} + Σ_r
        e^{x_i·n_r/τ})]

    with j(i) the teacher's token whose backbone features are most similar to those of the student's
    token i, x and y the dense features, n keys of other images, all of length 1.

    Convention: ``loss(student, teacher)``, with features in place of logits, see
    `DenseclLoss.forward`. As published, one view goes through the student and the other through the
    teacher: ``loss([one], [ViewOutput(), two])``. With both views on both sides the two ways are
    averaged. Published settings that are not part of the loss: ResNet-50, two heads of two layers,
    2,048 to 128; teacher momentum 0.999; two views of 224 × 224 of 20 to 100 % of the image; SGD,
    learning rate 0.03 with a cosine, weight decay 1e-4, 256 images a step, 200 epochs.

    Args:
        dim: d, of both kinds of features.
        num_keys: r, the length of each of the two queues.
        temp: τ, above 0.
        local_weight: λ, in [0, 1].
        process_group: the processes over which gradients are averaged; None: all.

    Returns:
        `DenseclLoss`, whose forward gives `DistillationTerms`.

    Raises:
        ConfigError: a setting out of range.

    Example:
        >>> import torch
        >>> from local_distill import Tokens
        >>> loss = densecl(dim=4, num_keys=16)
        >>> one, two = (ViewOutput(torch.randn(2, 4), torch.randn(2, 9, 4),
        ...                        Tokens(torch.randn(2, 9, 6))) for _ in range(2))
        >>> loss([one], [ViewOutput(), two]).loss  # the queues are still empty
        tensor(0.)
        >>> bool(loss([one], [ViewOutput(), two]).loss > 0)
        True

    Source: "Dense Contrastive Learning for Self-Supervised Visual Pre-Training" (DenseCL, CVPR
    2021): its L_q and L_r, and their sum; settings of its published code.

    Deviations from the authors' code: none in loss, gradient and queues once the queues hold the
    same keys. There they start with random directions; here they are empty, so that no student is
    held against noise: ``loss.global_loss.queue.update(torch.randn(num_keys, dim))`` and likewise
    ``loss.dense_loss.queue`` start as there. There the queue's length has to be a multiple of the
    batch.

    What does better in this package: matches by place (`NearestMatcher`), which are right from the
    first step on, where similarities of untrained features are not.
    """
    check_fraction("local_weight", local_weight)
    return DenseclLoss(
        GlobalContrastiveLoss(
            NegativeQueue(num_keys, dim, process_group=process_group),
            temp=temp,
            process_group=process_group,
        ),
        DenseContrastiveLoss(
            NegativeQueue(num_keys, dim, process_group=process_group),
            temp=temp,
            process_group=process_group,
        ),
        SimilarityMatcher(),
        global_weight=1 - local_weight,
        local_weight=local_weight,
    )
