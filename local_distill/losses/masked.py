"""Distillation of the tokens that the student did not see: iBOT's masked image modelling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import Axes, check_sequence
from local_distill._logits import Logits, stand_in
from local_distill.errors import ShapeError
from local_distill.losses.local_distillation import LocalDistillationLoss
from local_distill.structures import Matches, Targets

__all__ = ["MaskedDistillationLoss"]


class MaskedDistillationLoss(nn.Module):
    """Cross-entropy at masked places, against the teacher's token at the same place of the view.

    .. math:: L = mean_v mean_b Σ_{i masked} [-P_i·log softmax(s_i / τ)] / |masked|

    The student sees view v with some tokens masked, the teacher sees it whole. It is
    `LocalDistillationLoss` with the view matched to itself, ``Matches.identity(valid)``, and
    ``normalize="image"``.

    Convention: an image without a masked token adds 0 to its view's mean, and counts in it. The
    targets learn from all teacher tokens, after use, when training with grad enabled. With a
    process group: as `LocalDistillationLoss`.

    Args:
        targets: such as `Centering`; its own, not shared with the global loss.
        student_temp: τ, above 0.
        process_group: the processes over which gradients are averaged; None: all.

    Raises:
        ConfigError: a temperature not above 0.

    Example:
        >>> from local_distill.targets import Centering
        >>> loss = MaskedDistillationLoss(Centering(num_prototypes=2), student_temp=1.0)
        >>> masked = torch.tensor([[True, False, True], [True, False, False]])
        >>> student, teacher = torch.zeros(2, 3, 2), torch.randn(2, 3, 2)
        >>> loss([student], [teacher], [masked], teacher_temp=0.04)  # a flat student: ln 2
        tensor(0.6931)

    Source: "iBOT: Image BERT Pre-Training with Online Tokenizer" (ICLR 2022), equation 3.

    Deviations from the authors' code: none in the value with batches of one size on all processes;
    with others the mean is over all images, theirs weighs every process alike.
    """

    def __init__(
        self,
        targets: Targets,
        *,
        student_temp: float = 0.1,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.local = LocalDistillationLoss(
            targets, student_temp=student_temp, normalize="image", process_group=process_group
        )

    @property
    def targets(self) -> Targets:
        """What makes the teacher's distributions."""
        return self.local.targets

    @property
    def student_temp(self) -> float:
        """τ."""
        return self.local.student_temp

    def forward(
        self,
        student_logits: Sequence[Logits | None],
        teacher_logits: Sequence[Logits | None],
        valid: Sequence[Tensor | None],
        *,
        teacher_temp: float,
        teacher_valid: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """The loss of a step.

        Args:
            student_logits: per view (b, n_v, c); None for a view without masks.
            teacher_logits: per view (b, n_v, c), the same views; None for one without masks.
            valid: per student view (b, n_v) bool, True where the student's token was masked: there
                the loss is taken. None for a view without masks, which takes no part.
            teacher_temp: τ_t, above 0.
            teacher_valid: per teacher view (b, n_v) bool or None: tokens that count in the targets'
                statistics.

        Returns:
            A scalar in at least float32.

        Raises:
            ShapeError: axes that do not fit, masks that are not bool, or of views that are not
                there.
            ConfigError: a temperature not above 0.
        """
        check_sequence("student_logits", student_logits, "a tensor of logits")
        check_sequence("teacher_logits", teacher_logits, "a tensor of logits")
        check_sequence("valid", valid, "a bool tensor or None")
        if len(valid) != len(student_logits):
            raise ShapeError(
                f"`valid` has {len(valid)} views but `student_logits` has {len(student_logits)}; "
                "give None for a view without masks"
            )
        matches = {}
        for view, masked in enumerate(valid):
            if masked is None:
                continue
            if view >= len(teacher_logits):
                raise ShapeError(
                    f"`valid[{view}]` has masks but there are {len(teacher_logits)} teacher views: "
                    "a masked view is compared with the same view of the teacher"
                )
            axes = Axes()
            axes.bind(f"valid[{view}]", masked, "b n")
            for name, logits in (
                (f"student_logits[{view}]", student_logits[view]),
                (f"teacher_logits[{view}]", teacher_logits[view]),
            ):
                axes.bind(name, stand_in(name, logits), "b n c")
            if masked.dtype != torch.bool:
                raise ShapeError(
                    f"`valid[{view}]` must be bool, got {masked.dtype}; convert with .bool()"
                )
            matches[view, view] = Matches.identity(masked)
        loss: Tensor = self.local(
            student_logits,
            teacher_logits,
            matches,
            teacher_temp=teacher_temp,
            teacher_valid=teacher_valid,
        )
        return loss
