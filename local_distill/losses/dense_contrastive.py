"""Contrast of patch tokens with keys of other images, through matches: DenseCL's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import Axes, check_positive
from local_distill._precision import at_least_float32
from local_distill.errors import ShapeError
from local_distill.kernels.log_normalizer import log_normalizer, runs_plainly
from local_distill.losses._matched_features import check_feature_pairs
from local_distill.losses._pairs import Pair, Processes, graph_zero, pair_scales
from local_distill.losses._unit_rows import unit_rows
from local_distill.losses.negative_queue import NegativeQueue
from local_distill.structures import Matches

__all__ = ["DenseContrastiveLoss", "dense_contrastive_loss"]


def dense_contrastive_loss(
    student: Tensor,
    teacher: Tensor,
    matches: Matches,
    negatives: Tensor,
    *,
    temp: float = 0.2,
    negatives_valid: Tensor | None = None,
) -> Tensor:
    """InfoNCE of each student token: its teacher answer against keys of other images, for one pair.

    .. math:: L = mean_i -log[e^{x_i·a_i/τ} / (e^{x_i·a_i/τ} + Σ_r e^{x_i·n_r/τ})]

    over the matched tokens i of the whole batch, with x student features, n negatives and
    a_i = Σ_k w_ik y_j(i,k) the teacher's answer, y teacher features, all of length 1.

    Convention: all matched tokens count alike, however small the mass of their match, as an answer
    has a direction only. Where nothing is matched the loss is 0. Student features, teacher features
    and negatives may come in any length; those of zero norm have a similarity of 0 to all.

    Args:
        student: (b, s, d) features.
        teacher: (b, t, d) features; they receive no gradient.
        matches: for this pair of views.
        negatives: (r, d) keys of other images.
        temp: τ, above 0.
        negatives_valid: (r,) bool: the negatives that count; None: all. With none of them the loss
            is 0.

    Returns:
        A scalar in at least float32, differentiable in ``student``. No collectives.

    Raises:
        ShapeError: axes that do not fit; matches that point beyond the teacher's tokens.
        ConfigError: a temperature not above 0.

    Example:
        >>> student = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]])
        >>> teacher = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
        >>> matches = Matches.identity(torch.tensor([[True], [False]]))
        >>> dense_contrastive_loss(student, teacher, matches, torch.tensor([[0.0, 1.0]]), temp=1.0)
        tensor(0.3133)

    Source: "Dense Contrastive Learning for Self-Supervised Visual Pre-Training" (DenseCL, CVPR
    2021), its L_r.
    """
    check_feature_pairs([student], [teacher], {(0, 0): matches})
    axes = Axes()
    axes.bind("student", student, "b s d")
    axes.bind("negatives", negatives, "r d")
    if negatives_valid is None:
        negatives_valid = torch.ones(axes["r"], dtype=torch.bool, device=negatives.device)
    valid = axes.bind("negatives_valid", negatives_valid, "r").bool()
    negatives = unit_rows(torch.where(valid[:, None], negatives.detach(), 0.0))
    return _contrast(
        [student],
        [teacher],
        {(0, 0): matches},
        negatives,
        valid,
        check_positive("temp", temp),
        Processes(active=False),
    )


class DenseContrastiveLoss(nn.Module):
    """`dense_contrastive_loss` over all pairs of views of a step, with a queue of negatives.

    Convention: pairs are averaged; a pair without a match gives 0. Tokens meet the queue in blocks,
    with the gradient worked out on the way (`kernels.log_normalizer`): there is no table of tokens
    and keys, and no second derivative. After use, when training with grad enabled, the queue takes
    in one key an image for each teacher view that takes part: the mean of its tokens' features,
    brought to length 1. With a process group the loss returns the
    whole batch's value on every rank, with this rank's share of the gradient, and assumes that
    gradients are averaged over processes, as DDP does; in evaluation and under ``no_grad`` nothing
    is sent.

    Args:
        queue: of the features' dimension; its own, not shared with the global loss.
        temp: τ, above 0.
        process_group: the processes over which gradients are averaged; None: all.

    Raises:
        ConfigError: a temperature not above 0.

    Example:
        >>> loss = DenseContrastiveLoss(NegativeQueue(num_keys=16, dim=4))
        >>> student, teacher = [torch.randn(2, 9, 4)], [torch.randn(2, 6, 4), torch.randn(2, 6, 4)]
        >>> index = torch.randint(0, 6, (2, 9, 1))
        >>> matches = {(0, 1): Matches(index, torch.ones(2, 9, 1), torch.zeros(2, 9))}
        >>> loss(student, teacher, matches)  # no negatives yet
        tensor(0.)
        >>> int(loss.queue.count), bool(loss(student, teacher, matches) > 0)
        (2, True)

    Source: "Dense Contrastive Learning for Self-Supervised Visual Pre-Training" (DenseCL, CVPR
    2021), its L_r; temperature 0.2 and 65,536 keys in its published settings.

    Deviations from the authors' code: any list of views, pairs and matches, where it has one query
    and one key view and the most similar token; the queue starts empty, see `NegativeQueue`.
    """

    def __init__(
        self,
        queue: NegativeQueue,
        *,
        temp: float = 0.2,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.queue = queue
        self.temp = check_positive("temp", temp)
        self.process_group = process_group

    def forward(
        self,
        student: Sequence[Tensor | None],
        teacher: Sequence[Tensor | None],
        matches: Mapping[Pair, Matches],
    ) -> Tensor:
        """The loss of a step.

        Args:
            student: per view (b, s_v, d) features; None for a view that no pair names.
            teacher: per view (b, t_q, d) features; None for a view that no pair names.
            matches: ``{(v, q): Matches}``; its keys are the pairs.

        Returns:
            A scalar in at least float32.

        Raises:
            ShapeError: see `dense_contrastive_loss`; the message names the view.
        """
        check_feature_pairs(student, teacher, matches)
        for v, q in matches:
            for name, features in ((f"student[{v}]", student[v]), (f"teacher[{q}]", teacher[q])):
                if features is not None and features.shape[-1] != self.queue.dim:
                    raise ShapeError(
                        f"axis `d` is {features.shape[-1]} in `{name}` (shape "
                        f"{tuple(features.shape)}) but this queue was made for dim={self.queue.dim}"
                    )
        learning = self.training and torch.is_grad_enabled()
        negatives = self.queue.keys
        if learning and not all(runs_plainly(view) for view in student if view is not None):
            # The plain form's backward pass reads them, and `update` writes to the queue before it.
            negatives = negatives.clone()
        loss = _contrast(
            student,
            teacher,
            matches,
            negatives,
            self.queue.valid,
            self.temp,
            Processes(learning, self.process_group),
        )
        if learning:
            for q in sorted({q for _, q in matches}):
                features = teacher[q]
                if features is not None:
                    self.queue.update(at_least_float32(features.detach()).mean(1))
        return loss

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"temp={self.temp}"


def _contrast(
    student: Sequence[Tensor | None],
    teacher: Sequence[Tensor | None],
    matches: Mapping[Pair, Matches],
    negatives: Tensor,
    valid: Tensor,
    temp: float,
    processes: Processes,
) -> Tensor:
    """Mean over the pairs of their tokens' InfoNCE; ``negatives`` are of length 1.

    A student view meets the negatives once, however many teacher views answer it.
    """
    # All matched tokens alike. Not > 0: a weight of NaN is to be seen in the loss.
    counted = {
        pair: Matches(
            found.teacher_index, (found.weight.sum(-1) != 0)[..., None].float(), found.cost
        )
        for pair, found in matches.items()
    }
    scales = pair_scales(counted, "matched", processes)
    total: Tensor | None = None
    for v, features in enumerate(student):
        own = [pair for pair in matches if pair[0] == v]
        if features is None or not own:
            continue
        some = torch.stack([counted[pair].weight[..., 0] for pair in own]).any(0)
        # Before it is brought to length 1, not after: 0 · NaN is NaN, in the gradient too.
        x = unit_rows(torch.where(some[..., None], at_least_float32(features), 0.0))
        against = log_normalizer(x.flatten(0, 1), negatives.to(x.dtype), temp, valid=valid).reshape(
            x.shape[:2]
        )
        for pair in own:
            weight = counted[pair].weight[..., 0].to(x.dtype)
            answer = _answers(teacher[pair[1]], matches[pair])
            loss = -nn.functional.logsigmoid((x * answer).sum(-1) / temp - against)
            loss = torch.where(weight == 0, 0.0, loss) * weight
            part = (loss.sum(-1) * scales[pair].to(x.dtype)).sum()
            total = part if total is None else total + part
    if total is None:
        total = graph_zero(student)
    return processes.whole_batch(total)


@torch.no_grad()
def _answers(teacher: Tensor | None, matches: Matches) -> Tensor:
    """(b, s, d) of length 1: the direction in which each student token's matches lie."""
    assert teacher is not None  # checked with the pairs
    return unit_rows(matches.gather(unit_rows(teacher.detach())))
