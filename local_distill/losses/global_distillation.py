"""Distillation of whole-view tokens: DINO's loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import (
    Axes,
    check_floating,
    check_positive,
    check_sequence,
    check_view_pairs,
)
from local_distill._logits import Logits, stand_in, with_token_axis
from local_distill.errors import ShapeError
from local_distill.losses._pairs import Pair, Processes, check_loss_targets, paired_cross_entropy
from local_distill.matching.match_views import cross_view_pairs
from local_distill.structures import Matches, Targets, TeacherTargets

__all__ = ["GlobalDistillationLoss"]


class GlobalDistillationLoss(nn.Module):
    """Cross-entropy between the views' whole-view distributions, student against teacher.

    .. math:: L = mean_{(v,q), v≠q} mean_b [-P_q·log softmax(s_v / τ)]

    Convention: teacher view q is the same image region as student view q (global views first), and
    a view is not compared with itself. The targets are updated after use, when training with grad
    enabled. With a process group: as `LocalDistillationLoss`.

    Args:
        targets: such as `Centering`.
        student_temp: τ, above 0.
        process_group: the processes over which gradients are averaged; None: all.

    Raises:
        ConfigError: a temperature not above 0, targets that are none.

    Example:
        >>> from local_distill.targets import Centering
        >>> loss = GlobalDistillationLoss(Centering(num_prototypes=2), student_temp=1.0)
        >>> student = [torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 2)]
        >>> teacher = [torch.randn(3, 2), torch.randn(3, 2)]
        >>> loss(student, teacher, teacher_temp=0.04)  # a flat student: ln 2
        tensor(0.6931)

    Source: DINO (ICCV 2021), eq. 3 and algorithm 1.

    Deviations from the authors' code: none in the value. Works without a process group, with any
    number of views on either side.
    """

    def __init__(
        self,
        targets: Targets,
        *,
        student_temp: float = 0.1,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.targets = check_loss_targets(targets)
        self.student_temp = check_positive("student_temp", student_temp)
        self.process_group = process_group

    def forward(
        self,
        student_logits: Sequence[Logits],
        teacher_logits: Sequence[Logits],
        *,
        teacher_temp: float,
        pairs: Iterable[Pair] | None = None,
    ) -> Tensor:
        """The loss of a step.

        Args:
            student_logits: per view (b, c), or as `PrototypeLogits`.
            teacher_logits: per view (b, c), or as `PrototypeLogits`.
            teacher_temp: τ_t, above 0.
            pairs: (v, q) pairs of student and teacher views; by default all with v ≠ q.

        Returns:
            A scalar in at least float32.

        Raises:
            ShapeError: axes that do not fit, a pair of views that are not there, no pair at all.
            ConfigError: a temperature not above 0.
        """
        check_sequence("student_logits", student_logits, "a tensor of logits")
        check_sequence("teacher_logits", teacher_logits, "a tensor of logits")
        axes = Axes()
        for name, views in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            for view, logits in enumerate(views):
                label = f"{name}[{view}]"
                bound = check_floating(label, axes.bind(label, stand_in(label, logits), "b c"))
        wanted = list(
            cross_view_pairs(len(student_logits), len(teacher_logits)) if pairs is None else pairs
        )
        if not wanted:
            raise ShapeError(
                f"`pairs` is empty: {len(student_logits)} student and {len(teacher_logits)} teacher"
                " views make no pair of different views; give two views, or `pairs`"
            )
        check_view_pairs(wanted, len(student_logits), len(teacher_logits))
        targets = self.targets(teacher_logits, teacher_temp=teacher_temp)
        learning = self.training and torch.is_grad_enabled()
        # A whole view is a grid of one token, each answered by the one of the other view.
        whole = Matches.identity(torch.ones(axes["b"], 1, dtype=torch.bool, device=bound.device))
        loss = paired_cross_entropy(
            [with_token_axis(logits) for logits in student_logits],
            {
                q: TeacherTargets(with_token_axis(t.logits), t.offset, t.temp)
                for q, t in enumerate(targets)
            },
            dict.fromkeys(wanted, whole),
            student_temp=self.student_temp,
            normalize="all",
            processes=Processes(learning, self.process_group),
        )
        if learning:
            self.targets.update(teacher_logits)
        return loss

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"student_temp={self.student_temp}"
