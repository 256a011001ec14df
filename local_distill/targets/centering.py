"""DINO's targets: a softmax around the running mean of the teacher's logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import check_at_least, check_fraction, check_positive
from local_distill._logits import Logits, detached
from local_distill._precision import at_least_float32, no_autocast, undo_half_precision
from local_distill.distributed import all_reduce_sum
from local_distill.structures import PrototypeLogits, TeacherTargets
from local_distill.targets._logits import check_logits

__all__ = ["Centering"]


class Centering(nn.Module):
    """DINO's targets: subtract the running mean of the teacher's logits, then sharpen.

    .. math:: p = softmax((t - center) / τ_t), center ← m·center + (1 - m)·mean(t)

    The mean is over all tokens of all images of all teacher views and of all processes: sums *and
    counts* are reduced, so ranks may hold different numbers of tokens, or none.

    Convention: `forward` changes nothing; `update` alone does, and the losses call it after use.
    A batch with a NaN or an infinity never enters the center: that update is skipped on every rank,
    without a host sync, and counted in ``skipped``; of accumulated ones at the step they belong to,
    those of all ranks together. The state stays float32 under ``half()``.

    Args:
        num_prototypes: the number c of prototypes.
        momentum: m, in [0, 1).
        process_group: the processes to reduce over; None: all of them.

    Raises:
        ConfigError: a number of prototypes below 1, a momentum outside [0, 1).

    Example:
        >>> targets = Centering(num_prototypes=2, momentum=0.5)
        >>> logits = [torch.tensor([[2.0, 0.0], [4.0, 0.0]])]
        >>> targets.update(logits)
        >>> targets.center
        tensor([1.5000, 0.0000])
        >>> targets(logits, teacher_temp=1.0)[0].probs()
        tensor([[0.6225, 0.3775],
                [0.9241, 0.0759]])

    Source: "Emerging Properties in Self-Supervised Vision Transformers" (DINO, ICCV 2021), eq. 4.
    """

    center: Tensor
    skipped: Tensor
    _sum: Tensor
    _count: Tensor
    _left_out: Tensor

    def __init__(
        self,
        num_prototypes: int,
        momentum: float = 0.9,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.num_prototypes = check_at_least("num_prototypes", num_prototypes, 1)
        self.momentum = check_fraction("momentum", momentum, upper_open=True)
        self.process_group = process_group
        self._accumulating = False
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        # What `accumulate` has summed so far; buffers, so that a checkpoint in between is whole.
        self.register_buffer("_sum", torch.zeros(num_prototypes))
        self.register_buffer("_count", torch.zeros(()))
        self.register_buffer("_left_out", torch.zeros(()))

    def forward(
        self,
        teacher_logits: Sequence[Logits],
        *,
        teacher_temp: float,
        valid: Sequence[Tensor | None] | None = None,
    ) -> list[TeacherTargets]:
        """The targets of all teacher views.

        Args:
            teacher_logits: per view (b, c) or (b, t, c), or as `PrototypeLogits`; they never
                receive a gradient.
            teacher_temp: τ_t, above 0.
            valid: per view (b,) or (b, t) bool, or None; not needed for centering's targets.

        Returns:
            One `TeacherTargets` per view.
        """
        teacher_temp = check_positive("teacher_temp", teacher_temp)
        self._check_logits(teacher_logits, valid)
        # A new tensor: `update` may change the center before the targets are worked out.
        offset = -self.center / teacher_temp
        return [TeacherTargets(view, offset, teacher_temp) for view in detached(teacher_logits)]

    @torch.no_grad()
    def update(
        self, teacher_logits: Sequence[Logits], valid: Sequence[Tensor | None] | None = None
    ) -> None:
        """Take these logits into the center.

        Args:
            teacher_logits: as in `forward`.
            valid: per view (b,) or (b, t) bool, or None: rows left out of the mean.
        """
        self._check_logits(teacher_logits, valid)
        total, count = self._sum.clone(), self._count.clone()
        for view, logits in enumerate(teacher_logits):
            summed, rows = _sum_of_rows(logits, None if valid is None else valid[view])
            total, count = total + summed, count + rows
        if self._accumulating:
            good = total.isfinite().all()
            self._sum.copy_(torch.where(good, total, self._sum))
            self._count.copy_(torch.where(good, count, self._count))
            self._left_out.add_((~good).to(self._left_out.dtype))
            return
        parts = total, count[None], self._left_out[None].to(total.dtype)
        reduced = all_reduce_sum(torch.cat(parts), self.process_group)
        total, count, left_out = reduced[:-2], reduced[-2], reduced[-1]
        mean = total / count.clamp_min(1.0)
        finite = mean.isfinite().all()
        moved = self.momentum * self.center + (1 - self.momentum) * mean
        self.center.copy_(torch.where(finite & (count > 0), moved, self.center))
        self.skipped.add_((~finite).to(torch.int64) + left_out.to(torch.int64))
        for part in (self._sum, self._count, self._left_out):
            part.zero_()

    @contextmanager
    def accumulate(self, enabled: bool = True) -> Iterator[None]:
        """Within it `update` only sums; the first update outside applies one step, as `no_sync`.

        Args:
            enabled: False makes the context do nothing: ``accumulate(not last_micro_batch)``.

        Example:
            >>> targets = Centering(1, momentum=0.0)
            >>> with targets.accumulate():
            ...     targets.update([torch.tensor([[1.0]])])
            >>> targets.update([torch.tensor([[5.0]])])
            >>> targets.center
            tensor([3.])
        """
        before = self._accumulating
        self._accumulating = before or enabled
        try:
            yield
        finally:
            self._accumulating = before

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"num_prototypes={self.num_prototypes}, momentum={self.momentum}"

    def _check_logits(
        self, teacher_logits: Sequence[Logits], valid: Sequence[Tensor | None] | None
    ) -> None:
        check_logits(teacher_logits, valid, self.num_prototypes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Centering:
        # A running mean kept in half precision would stop moving: half() and to(bfloat16) change
        # the network around it, not this state.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        undo_half_precision(self, before)
        return self


def _sum_of_rows(logits: Logits, keep: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """(c,) sum of the rows that count, and how many they are."""
    values = logits.features if isinstance(logits, PrototypeLogits) else logits
    rows = at_least_float32(values.detach()).reshape(-1, values.shape[-1])
    count: Tensor | int = rows.shape[0]
    if keep is not None:
        flags = keep.reshape(-1)
        rows = torch.where(flags[:, None], rows, 0.0)
        count = flags.sum()
    summed = rows.sum(0)
    if not isinstance(logits, PrototypeLogits):
        return summed, count
    # The product is linear: the sum of the logits is the product with the features' sum.
    weight = at_least_float32(logits.weight.detach())
    dtype = torch.promote_types(summed.dtype, weight.dtype)
    with no_autocast(summed):
        total = torch.mv(weight.to(dtype), summed.to(dtype))
    return total if logits.bias is None else total + count * logits.bias.detach(), count
