"""DINO: whole views alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from local_distill.losses.global_distillation import GlobalDistillationLoss
from local_distill.losses.global_local import DistillationTerms
from local_distill.recipes._views import global_views
from local_distill.structures import ViewOutput
from local_distill.targets.centering import Centering

__all__ = ["DinoLoss", "dino"]


class DinoLoss(nn.Module):
    """`GlobalDistillationLoss` behind the interface that all recipes have; `dino` makes it.

    Args:
        global_loss: with its targets.

    Example:
        >>> DinoLoss(GlobalDistillationLoss(Centering(8))).global_loss.student_temp
        0.1
    """

    def __init__(self, global_loss: GlobalDistillationLoss) -> None:
        super().__init__()
        self.global_loss = global_loss

    def forward(
        self,
        student: Sequence[ViewOutput],
        teacher: Sequence[ViewOutput],
        *,
        teacher_temp: float,
    ) -> DistillationTerms:
        """The loss of a step.

        Args:
            student: one `ViewOutput` per view, of which ``global_logits`` (b, c) are read.
            teacher: one per teacher view, the first views of ``student``.
            teacher_temp: τ_t, above 0.

        Returns:
            `DistillationTerms`; the local loss is 0 and there are no matches.

        Raises:
            ShapeError: axes that do not fit; no pair of different views with global logits.
            ConfigError: a temperature not above 0.
        """
        views = global_views(student, teacher)
        loss = self.global_loss(
            views.student, views.teacher, teacher_temp=teacher_temp, pairs=views.pairs
        )
        return DistillationTerms(loss, loss, loss.new_zeros(()), {})


def dino(
    num_prototypes: int = 65_536,
    *,
    student_temp: float = 0.1,
    center_momentum: float = 0.9,
    process_group: dist.ProcessGroup | None = None,
) -> DinoLoss:
    """DINO: cross-entropy between whole views, against a centered and sharpened teacher.

    .. math:: L = mean_{(v,q), v≠q} mean_b [-softmax((t_q - center) / τ_t)·log softmax(s_v / τ)]

    Convention: ``loss(student, teacher, teacher_temp=...)``; the teacher sees the global views, the
    first of the student's. Published settings that are not part of the loss: `ProjectionHead` with
    3 layers of 2,048, a bottleneck of 256 and 65,536 prototypes, their norm frozen (for ViT-S it is
    learnt); τ_t from 0.04 to 0.07 over 30 epochs, linearly, where training is stable, otherwise
    0.04; teacher momentum from 0.996 to 1 along a cosine; two views of 224 × 224 of 40 to 100 % of
    the image and eight of 96 × 96 of 5 to 40 %; the prototypes stand still for one epoch; AdamW,
    learning rate 5e-4 · batch / 256 after ten epochs of warm-up, weight decay from 0.04 to 0.4.

    Args:
        num_prototypes: c.
        student_temp: τ, above 0.
        center_momentum: of the running mean of the teacher's logits, in [0, 1).
        process_group: the processes over which gradients are averaged; None: all.

    Returns:
        `DinoLoss`, whose forward gives `DistillationTerms`.

    Raises:
        ConfigError: a setting out of range.

    Example:
        >>> import torch
        >>> loss = dino(num_prototypes=8)
        >>> student = [ViewOutput(torch.zeros(2, 8)) for _ in range(4)]  # two of them small
        >>> teacher = [ViewOutput(torch.randn(2, 8)) for _ in range(2)]
        >>> loss(student, teacher, teacher_temp=0.04).loss  # a flat student: ln 8
        tensor(2.0794)

    Source: "Emerging Properties in Self-Supervised Vision Transformers" (DINO, ICCV 2021),
    equations 3 and 4, algorithm 1; settings of its published code.

    Deviations from the authors' code: none in loss, gradient and center. It needs a process group,
    fixes the number of views and of epochs when it is built, always has two teacher views, and one
    NaN stays in its center for good; here any views do, the temperature comes from the caller, and
    a bad batch is left out of the center. Processes with batches of different sizes weigh by the
    number of images, not alike. Logits in half precision are computed with in float32.
    """
    targets = Centering(num_prototypes, center_momentum, process_group=process_group)
    return DinoLoss(
        GlobalDistillationLoss(targets, student_temp=student_temp, process_group=process_group)
    )
