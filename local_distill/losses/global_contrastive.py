"""Contrast of whole views with those of other images: MoCo's loss, half of DenseCL's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import Axes, check_sequence, check_view_pairs
from local_distill.errors import ShapeError
from local_distill.losses._pairs import Pair
from local_distill.losses.dense_contrastive import DenseContrastiveLoss
from local_distill.losses.negative_queue import NegativeQueue
from local_distill.matching.match_views import cross_view_pairs
from local_distill.structures import Matches

__all__ = ["GlobalContrastiveLoss"]


class GlobalContrastiveLoss(nn.Module):
    """InfoNCE of whole views with a queue of negatives: MoCo's loss.

    .. math:: L = mean_{(v,q), v≠q} mean_b -log[e^{x_v·y_q/τ} / (e^{x_v·y_q/τ} + Σ_r e^{x_v·n_r/τ})]

    A whole view is a grid of one token, answered by the one of the other view; all else is as in
    `DenseContrastiveLoss`. DenseCL's loss is half of this and half of that.

    Convention: teacher view q is the same image region as student view q (global views first), and
    a view is not compared with itself. The queue takes in the teacher's features after use, when
    training with grad enabled.

    Args:
        queue: of the features' dimension; its own, not shared with the dense loss.
        temp: τ, above 0.
        process_group: the processes over which gradients are averaged; None: all.

    Raises:
        ConfigError: a temperature not above 0.

    Example:
        >>> loss = GlobalContrastiveLoss(NegativeQueue(num_keys=1, dim=2), temp=1.0)
        >>> loss.queue.update(torch.tensor([[0.0, 1.0]]))
        >>> view = torch.tensor([[1.0, 0.0], [5.0, 0.0]])
        >>> loss([view, view], [view, view])
        tensor(0.3133)

    Source: "Momentum Contrast for Unsupervised Visual Representation Learning" (MoCo, CVPR 2020),
    equation 1; DenseCL (CVPR 2021), its L_q.

    Deviations from the authors' code: as `DenseContrastiveLoss`.
    """

    def __init__(
        self,
        queue: NegativeQueue,
        *,
        temp: float = 0.2,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.dense = DenseContrastiveLoss(queue, temp=temp, process_group=process_group)

    @property
    def queue(self) -> NegativeQueue:
        """The negatives."""
        return self.dense.queue

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        *,
        pairs: Iterable[Pair] | None = None,
    ) -> Tensor:
        """The loss of a step.

        Args:
            student: per view (b, d) features.
            teacher: per view (b, d) features.
            pairs: (v, q) pairs of student and teacher views; by default all with v ≠ q.

        Returns:
            A scalar in at least float32.

        Raises:
            ShapeError: axes that do not fit, a pair of views that are not there, no pair at all.
        """
        check_sequence("student", student, "a tensor of features")
        check_sequence("teacher", teacher, "a tensor of features")
        axes = Axes()
        for name, views in (("student", student), ("teacher", teacher)):
            for view, features in enumerate(views):
                axes.bind(f"{name}[{view}]", features, "b d")
        wanted = list(cross_view_pairs(len(student), len(teacher)) if pairs is None else pairs)
        if not wanted:
            raise ShapeError(
                f"`pairs` is empty: {len(student)} student and {len(teacher)} teacher views make no"
                " pair of different views; give two views, or `pairs`"
            )
        check_view_pairs(wanted, len(student), len(teacher))
        whole = Matches.identity(student[0].new_ones(axes["b"], 1, dtype=torch.bool))
        loss: Tensor = self.dense(
            [features[:, None] for features in student],
            [features[:, None] for features in teacher],
            dict.fromkeys(wanted, whole),
        )
        return loss
