"""iBOT: whole views, and the tokens that were hidden from the student."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import check_sequence, check_weight
from local_distill.errors import ConfigError, ShapeError
from local_distill.losses.global_distillation import GlobalDistillationLoss
from local_distill.losses.global_local import DistillationTerms
from local_distill.losses.masked import MaskedDistillationLoss
from local_distill.recipes._views import global_views
from local_distill.structures import Matches, ViewOutput
from local_distill.targets.centering import Centering

__all__ = ["IbotLoss", "ibot"]


class IbotLoss(nn.Module):
    """Weighted sum of the global loss over different views and the masked loss of each view.

    .. math:: L = λ_g·L_global + λ_l·L_masked

    Args:
        global_loss: with its own targets.
        masked_loss: with its own targets.
        global_weight: λ_g, at least 0.
        local_weight: λ_l, at least 0.

    Raises:
        ConfigError: a negative or non-finite weight, targets that both share.

    Example:
        >>> IbotLoss(GlobalDistillationLoss(Centering(8)), MaskedDistillationLoss(Centering(4)),
        ...          local_weight=0.5).local_weight
        0.5
    """

    def __init__(
        self,
        global_loss: GlobalDistillationLoss,
        masked_loss: MaskedDistillationLoss,
        *,
        global_weight: float = 1.0,
        local_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if global_loss.targets is masked_loss.targets:
            raise ConfigError(
                "`global_loss` and `masked_loss` share one `targets` object, so that each would "
                "center the other's logits; give each its own"
            )
        self.global_loss = global_loss
        self.masked_loss = masked_loss
        self.global_weight = check_weight("global_weight", global_weight)
        self.local_weight = check_weight("local_weight", local_weight)

    def forward(
        self,
        student: Sequence[ViewOutput],
        teacher: Sequence[ViewOutput],
        valid: Sequence[Tensor | None],
        *,
        teacher_temp: float,
        teacher_token_temp: float | None = None,
    ) -> DistillationTerms:
        """The loss of a step.

        Args:
            student: one `ViewOutput` per view, of which the logits are read.
            teacher: one per teacher view, the first views of ``student``, without masks.
            valid: per student view (b, n_v) bool, True where the student's token was masked: there
                the loss is taken. None for a view without masks, such as the small ones.
            teacher_temp: τ_t of whole views, above 0.
            teacher_token_temp: τ_t of tokens, above 0; None: ``teacher_temp``.

        Returns:
            `DistillationTerms`; a view with masks is matched to itself.

        Raises:
            ShapeError: axes that do not fit; no pair of different views with global logits; no view
                with masks.
            ConfigError: a temperature not above 0.
        """
        views = global_views(student, teacher)
        check_sequence("valid", valid, "a bool tensor or None")
        masked = {v: hidden for v, hidden in enumerate(valid) if hidden is not None}
        if not masked:
            raise ShapeError(
                "`valid` has no masks: it is None for every view; give (b, n) bool for at least one"
                " view, all False where nothing is masked"
            )
        # First, so that masks that do not fit are refused before any state has changed.
        masked_loss = self.masked_loss(
            [view.token_logits for view in student],
            # Views that have no masks have no part in the center either.
            [view.token_logits if q in masked else None for q, view in enumerate(teacher)],
            valid,
            teacher_temp=teacher_temp if teacher_token_temp is None else teacher_token_temp,
        )
        global_loss = self.global_loss(
            views.student, views.teacher, teacher_temp=teacher_temp, pairs=views.pairs
        )
        loss = self.global_weight * global_loss + self.local_weight * masked_loss
        matches = {(v, v): Matches.identity(hidden) for v, hidden in masked.items()}
        return DistillationTerms(loss, global_loss, masked_loss, matches)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"global_weight={self.global_weight}, local_weight={self.local_weight}"


def ibot(
    num_prototypes: int = 8_192,
    *,
    num_token_prototypes: int | None = None,
    student_temp: float = 0.1,
    center_momentum: float = 0.9,
    process_group: dist.ProcessGroup | None = None,
) -> IbotLoss:
    """iBOT: DINO's loss, and the same between a masked token and the teacher's at its place.

    .. math:: L = L_global + mean_v mean_b Σ_{i masked} [-P_i·log softmax(s_i / τ)] / |masked|

    Convention: ``loss(student, teacher, valid, teacher_temp=...)``: whole views are compared with
    other views, tokens with those of the same view, which the teacher sees without masks. Small
    views take part as whole views only. An image without masks adds 0. Masks come from
    `random_block_mask`, whose defaults are the published ones: half of the images keep all tokens,
    of the others 10 to 50 % are masked.

    Published settings that are not part of the loss: one `ProjectionHead` for both, with 3 layers
    of 2,048, a bottleneck of 256 and 8,192 prototypes, whose norm is learnt for ViT-S; both teacher
    temperatures from 0.04 to 0.07 over 30 epochs; teacher momentum from 0.996 to 1 along a cosine;
    two views of 224 × 224 of 25 to 100 % of the image and ten of 96 × 96 of 5 to 25 %; AdamW,
    learning rate 5e-4 · batch / 256, 1,024 images a step.

    Args:
        num_prototypes: c of whole views.
        num_token_prototypes: c of tokens; None: as many.
        student_temp: τ, above 0.
        center_momentum: of both running means of the teacher's logits, in [0, 1).
        process_group: the processes over which gradients are averaged; None: all.

    Returns:
        `IbotLoss`, whose forward gives `DistillationTerms`.

    Raises:
        ConfigError: a setting out of range.

    Example:
        >>> import torch
        >>> from local_distill import random_block_mask
        >>> loss = ibot(num_prototypes=8)
        >>> views = [ViewOutput(torch.zeros(2, 8), torch.zeros(2, 35, 8)) for _ in range(2)]
        >>> small = ViewOutput(torch.zeros(2, 8))
        >>> masks = [random_block_mask(2, 5, 7, ratio_ranges=[(0.3, 0.5)]) for _ in range(2)]
        >>> terms = loss([*views, small], views, [*masks, None], teacher_temp=0.04)
        >>> terms.loss  # flat students: 2 · ln 8
        tensor(4.1589)

    Source: "iBOT: Image BERT Pre-Training with Online Tokenizer" (ICLR 2022), equations 2
    and 3, section 3.2; settings of its published commands.

    Deviations from the authors' code: none in loss, gradient and centers. It needs a process group,
    fixes the numbers of views and of epochs when it is built, and one NaN stays in its centers for
    good. Processes with batches of different sizes weigh by the number of images, not alike.

    What does better in this package: ``normalize="matched"`` of `LocalDistillationLoss` with
    `Matches.identity` counts every masked token alike, where an image with one masked token
    otherwise weighs as much as one with many, and one with none dilutes the loss.
    """
    return IbotLoss(
        GlobalDistillationLoss(
            Centering(num_prototypes, center_momentum, process_group=process_group),
            student_temp=student_temp,
            process_group=process_group,
        ),
        MaskedDistillationLoss(
            Centering(
                num_prototypes if num_token_prototypes is None else num_token_prototypes,
                center_momentum,
                process_group=process_group,
            ),
            student_temp=student_temp,
            process_group=process_group,
        ),
    )
