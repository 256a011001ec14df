"""Distillation of patch tokens through matches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import check_positive, check_sequence
from local_distill._logits import Logits
from local_distill.errors import ShapeError
from local_distill.losses._pairs import (
    Normalize,
    Pair,
    Processes,
    check_loss_targets,
    check_normalize,
    check_pairs,
    paired_cross_entropy,
)
from local_distill.structures import Matches, Targets, TeacherTargets

__all__ = ["LocalDistillationLoss", "local_distillation_loss"]


def local_distillation_loss(
    student_logits: Logits,
    teacher_targets: TeacherTargets,
    matches: Matches,
    *,
    student_temp: float = 0.1,
    normalize: Normalize = "matched",
) -> Tensor:
    """Cross-entropy between student tokens and the teacher tokens that answer them, for one pair.

    .. math:: L = Σ_i [m_i logsumexp(z_i) - p_i·z_i] / N, z_i = s_i/τ - max, p_i = Σ_k w_ik P_j(i,k)

    with m_i = Σ_k w_ik and N by ``normalize``.

    Args:
        student_logits: (b, s, c), or as `PrototypeLogits`.
        teacher_targets: with logits (b, t, c), or as `PrototypeLogits`.
        matches: for this pair of views.
        student_temp: τ, above 0.
        normalize: ``"all"``: N = b·s; ``"matched"``: N = Σ m; ``"image"``: each image by its own
            mass, then the mean over the images. Where there is no mass the loss is 0.

    Returns:
        A scalar in at least float32, differentiable in ``student_logits``, once. No collectives.

    Raises:
        ShapeError: axes that do not fit; matches that point beyond the teacher's tokens; targets
            or matches of another type.
        ConfigError: a temperature not above 0, an unknown normalisation.

    Example:
        >>> student = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]])
        >>> targets = TeacherTargets(torch.tensor([[[9.0, 0.0]], [[9.0, 0.0]]]), None, 0.1)
        >>> matches = Matches.identity(torch.tensor([[True], [False]]))
        >>> local_distillation_loss(student, targets, matches, student_temp=1.0)
        tensor(0.1269)

    Source: "Global-Local Self-Distillation" (WACV 2023); EsViT (ICLR 2022).
    """
    if not isinstance(teacher_targets, TeacherTargets):
        raise ShapeError(
            "`teacher_targets` must be TeacherTargets(logits, offset, temp), as targets such as "
            f"Centering give them, got {type(teacher_targets).__name__}"
        )
    logits = [student_logits]
    check_pairs(logits, [teacher_targets.logits], {(0, 0): matches})
    return paired_cross_entropy(
        logits,
        {0: teacher_targets},
        {(0, 0): matches},
        student_temp=check_positive("student_temp", student_temp),
        normalize=check_normalize(normalize),
        processes=Processes(active=False),
    )


class LocalDistillationLoss(nn.Module):
    """`local_distillation_loss` over all pairs of views of a step, with the targets' state.

    Convention: pairs are averaged; a pair without a match gives 0. The targets are updated after
    use, when training with grad enabled. With a process group the loss returns the whole batch's
    value on every rank, with this rank's share of the gradient, and assumes that gradients are
    averaged over processes, as DDP does; in evaluation and under ``no_grad`` nothing is sent.

    Args:
        targets: such as `Centering`; its own, not shared with the global loss.
        student_temp: τ, above 0.
        normalize: see `local_distillation_loss`; ``"all"`` is GLSD's and EsViT's, ``"image"``
            iBOT's and PixPro's.
        process_group: the processes over which gradients are averaged; None: all.

    Raises:
        ConfigError: a temperature not above 0, an unknown normalisation, targets that are none.

    Example:
        >>> from local_distill.targets import Centering
        >>> loss = LocalDistillationLoss(Centering(num_prototypes=4))
        >>> student = [torch.randn(2, 9, 4), torch.randn(2, 6, 4)]
        >>> teacher = [torch.randn(2, 9, 4)]
        >>> valid = torch.ones(2, 6, dtype=torch.bool)
        >>> loss(student, teacher, {(1, 0): Matches.identity(valid)}, teacher_temp=0.04).shape
        torch.Size([])

    Source: "Global-Local Self-Distillation" (WACV 2023).

    Deviations from the authors' code: ``normalize="matched"`` by default, as unmatched tokens
    otherwise dilute the loss; any list of views of any sizes; no batch size, epoch or number of
    crops in the constructor.
    """

    def __init__(
        self,
        targets: Targets,
        *,
        student_temp: float = 0.1,
        normalize: Normalize = "matched",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.targets = check_loss_targets(targets)
        self.student_temp = check_positive("student_temp", student_temp)
        self.normalize = check_normalize(normalize)
        self.process_group = process_group

    def forward(
        self,
        student_logits: Sequence[Logits | None],
        teacher_logits: Sequence[Logits | None],
        matches: Mapping[Pair, Matches],
        *,
        teacher_temp: float,
        teacher_valid: Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """The loss of a step.

        Args:
            student_logits: per view (b, s_v, c), or as `PrototypeLogits`; None for a view that no
                pair names.
            teacher_logits: per view (b, t_q, c), or as `PrototypeLogits`; None for a view that no
                pair names.
            matches: ``{(v, q): Matches}``; its keys are the pairs.
            teacher_temp: τ_t, above 0.
            teacher_valid: per teacher view (b, t_q) bool or None: tokens that count in the targets'
                statistics (padding does not).

        Returns:
            A scalar in at least float32.

        Raises:
            ShapeError: see `local_distillation_loss`; the message names the view.
            ConfigError: a temperature not above 0.
        """
        check_sequence("student_logits", student_logits, "a tensor of logits")
        check_sequence("teacher_logits", teacher_logits, "a tensor of logits")
        check_pairs(student_logits, teacher_logits, matches)
        if teacher_valid is not None and len(teacher_valid) != len(teacher_logits):
            raise ShapeError(
                f"`teacher_valid` has {len(teacher_valid)} views but `teacher_logits` has "
                f"{len(teacher_logits)}"
            )
        given = [(q, logits) for q, logits in enumerate(teacher_logits) if logits is not None]
        logits = [logits for _, logits in given]
        valid = None if teacher_valid is None else [teacher_valid[q] for q, _ in given]
        targets = self.targets(logits, teacher_temp=teacher_temp, valid=valid)
        learning = self.training and torch.is_grad_enabled()
        loss = paired_cross_entropy(
            student_logits,
            {q: target for (q, _), target in zip(given, targets, strict=True)},
            matches,
            student_temp=self.student_temp,
            normalize=self.normalize,
            processes=Processes(learning, self.process_group),
        )
        if learning:
            self.targets.update(logits, valid)
        return loss

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"student_temp={self.student_temp}, normalize={self.normalize!r}"
