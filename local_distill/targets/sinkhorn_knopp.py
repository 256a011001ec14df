"""SwAV's and DINOv2's targets: the prototypes share the batch's tokens evenly."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import check_at_least, check_positive
from local_distill._logits import Logits, detached, no_rows
from local_distill._precision import at_least_float32
from local_distill.distributed import all_reduce_sum, world_size
from local_distill.structures import TeacherTargets
from local_distill.targets._logits import check_logits, row_blocks

__all__ = ["SinkhornKnopp"]

# Scores beyond this part of their dtype's range count as not finite: the sum of a score and an
# offset, which can be three times as large as the largest score, must not overflow.
_RANGE = 2.0**-6
# Tables of a block's size that are alive at once: scores, log-softmax, the terms of the sum.
_TABLES = 4


class SinkhornKnopp(nn.Module):
    r"""SwAV's and DINOv2's targets: every prototype gets the same share of the batch's tokens.

    .. math:: P_{ij} = softmax_j(t_{ij} / τ_t + g_j), \quad g_j ← g_j - log Σ_i P_{ij}

    from :math:`g_j = -log Σ_i exp(t_{ij} / τ_t)`, ``iterations`` steps with this one. That is the
    Sinkhorn-Knopp algorithm on exp(t / τ_t): columns are brought to equal sums, then rows. Rows
    come last, so a row's own factor is the denominator of its softmax, and only the prototypes'
    factors exp(g) have to be known; the masses 1/c and 1/n of columns and rows are constant factors
    and cancel.

    Convention: i runs over all tokens of all images of all teacher views and of all processes, so
    views share one offset; ranks may hold different numbers of tokens, or none. Every row sums to
    1 exactly, the columns to n/c the more nearly the more iterations. A row left out by ``valid``,
    and one with a NaN or an infinity, does not count, but has its distribution like the others.
    Without any row that counts the offset is 0: a plain softmax. Logarithms throughout, in at least
    float32: nothing overflows, and no prototype loses all of its mass. Logits are read a block at a
    time, ``iterations`` times; no table of their size is made.

    There is no state: `update` and `accumulate` do nothing, a micro-batch of an accumulated step
    stands for itself. Something is sent to other processes only when training with grad enabled, as
    the losses do: in evaluation and under no_grad each process balances its own batch.

    Args:
        num_prototypes: the number c of prototypes.
        iterations: how often columns and rows are scaled.
        process_group: the processes to reduce over; None: all of them.

    Raises:
        ConfigError: a number of prototypes or of iterations below 1.

    Example:
        >>> targets = SinkhornKnopp(num_prototypes=2)
        >>> logits = [torch.tensor([[3.0, 0.0], [1.0, 0.0]])]  # both would take the first
        >>> targets(logits, teacher_temp=1.0)[0].probs()
        tensor([[0.7272, 0.2728],
                [0.2651, 0.7349]])

    Source: "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (SwAV,
    NeurIPS 2020), eq. 3 to 5; 3 iterations on the teacher's outputs as in "DINOv2:
    Learning Robust Visual Features without Supervision" (2023), section 4.

    Deviations from the authors' code: it works on logarithms; theirs takes exp(t / τ_t) in float32,
    which at τ_t = 0.04 is infinite for logits above 3.5. DINOv2's number of tokens, which cancels,
    is not needed, so neither are equal batches on all ranks nor a process group. SwAV balances each
    view with itself and, later on, a queue; DINOv2, and this, all teacher views together.
    """

    def __init__(
        self,
        num_prototypes: int,
        iterations: int = 3,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.num_prototypes = check_at_least("num_prototypes", num_prototypes, 1)
        self.iterations = check_at_least("iterations", iterations, 1)
        self.process_group = process_group

    def forward(
        self,
        teacher_logits: Sequence[Logits],
        *,
        teacher_temp: float,
        valid: Sequence[Tensor | None] | None = None,
    ) -> list[TeacherTargets]:
        """The targets of all teacher views, balanced together.

        Args:
            teacher_logits: per view (b, c) or (b, t, c), or as `PrototypeLogits`, which are
                multiplied out a part at a time in each iteration; they never receive a gradient.
            teacher_temp: τ_t, above 0.
            valid: per view (b,) or (b, t) bool, or None: rows that do not count.

        Returns:
            One `TeacherTargets` per view, all with the same offset (c,).

        Raises:
            ShapeError: logits or ``valid`` that do not fit.
            ConfigError: a temperature not above 0.
        """
        teacher_temp = check_positive("teacher_temp", teacher_temp)
        check_logits(teacher_logits, valid, self.num_prototypes)
        if not teacher_logits:
            return []
        together = self.training and torch.is_grad_enabled() and world_size(self.process_group) > 1
        with torch.no_grad():
            offset = self._offset(teacher_logits, teacher_temp, valid, together)
        return [TeacherTargets(view, offset, teacher_temp) for view in detached(teacher_logits)]

    def update(
        self, teacher_logits: Sequence[Logits], valid: Sequence[Tensor | None] | None = None
    ) -> None:
        """Check the logits; there is no state that could learn from them.

        Args:
            teacher_logits: as in `forward`.
            valid: as in `forward`.
        """
        check_logits(teacher_logits, valid, self.num_prototypes)

    @contextmanager
    def accumulate(self, enabled: bool = True) -> Iterator[None]:
        """A context in which nothing is different, for loops that serve any targets.

        Args:
            enabled: of no consequence.
        """
        yield

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"num_prototypes={self.num_prototypes}, iterations={self.iterations}"

    def _offset(
        self,
        teacher_logits: Sequence[Logits],
        temp: float,
        valid: Sequence[Tensor | None] | None,
        together: bool,
    ) -> Tensor:
        """(c,) logarithms of the prototypes' factors."""
        offset: Tensor | None = None
        for _ in range(self.iterations):
            masses = _log_masses(teacher_logits, temp, valid, offset)
            if together:
                masses = _over_processes(masses, self.process_group)
            before = torch.zeros_like(masses) if offset is None else offset
            # No mass at all, that is no row that counts, asks for no factor.
            offset = torch.where(masses == -torch.inf, before, before - masses)
        assert offset is not None  # at least one iteration
        return offset


def _log_masses(
    teacher_logits: Sequence[Logits],
    temp: float,
    valid: Sequence[Tensor | None] | None,
    offset: Tensor | None,
) -> Tensor:
    """(c,) log Σ_i of each prototype's part of this process's rows, -inf where there are none.

    Of exp(t / τ_t) as it is before there is an offset, of the softmax with it from then on.
    """
    kinds = [no_rows(logits) for logits in teacher_logits]
    dtype = functools.reduce(torch.promote_types, (kind.dtype for kind in kinds))
    total = kinds[0].new_full((kinds[0].shape[1],), -torch.inf, dtype=dtype)
    for view, logits in enumerate(teacher_logits):
        keep = None if valid is None else valid[view]
        for rows, counted in row_blocks(logits, keep, tables=_TABLES):
            scores = at_least_float32(rows) / temp
            # One comparison for NaN, infinities and what would become one.
            taken = scores.abs().amax(-1) <= torch.finfo(scores.dtype).max * _RANGE
            if counted is not None:
                taken = taken & counted
            if offset is not None:
                scores = (scores + offset.to(scores.dtype)).log_softmax(-1)
            # After the softmax, which does not mix rows: one table less.
            scores = torch.where(taken[:, None], scores, -torch.inf)
            total = torch.logaddexp(total, scores.logsumexp(0).to(dtype))
    return total


def _over_processes(log_masses: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The logarithm of all processes' masses together; equal to the bit on every rank."""
    top = log_masses.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    top = torch.where(top > -torch.inf, top, 0.0)
    return top + all_reduce_sum((log_masses - top).exp(), group).log()
