"""KoLeo: spreads the vectors of a batch by pushing each away from its nearest neighbour."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import Axes, check_floating, check_positive, check_sequence
from local_distill._precision import at_least_float32, no_autocast
from local_distill.distributed import (
    all_gather_rows,
    all_gather_with_gradient,
    process_rank,
    row_counts,
)
from local_distill.errors import ShapeError
from local_distill.losses._batch_statistics import all_reduce_sum_with_gradient
from local_distill.losses._pairs import Processes
from local_distill.losses._unit_rows import unit_directions

__all__ = ["KoLeoLoss", "koleo_loss"]


def koleo_loss(features: Tensor, *, eps: float = 1e-8, valid: Tensor | None = None) -> Tensor:
    """Kozachenko-Leonenko regulariser: minus the mean log distance to the nearest other row.

    .. math:: L = -(1/N) Σ_i log(min_{j≠i} ||x_i - x_j + ε|| + ε), x_i = f_i / ||f_i||

    Convention: the nearest is that of largest inner product, found without a gradient; both ends of
    the distance get one. Rows of zero norm have no direction and are left out. Two equal rows count
    with their distance ε·√d but are not pushed, as there is no direction to push them in. No
    collectives.

    Args:
        features: (b, d).
        eps: ε, above 0, in the distance and under the logarithm.
        valid: (b,) bool or None: rows that count; the others may be NaN.

    Returns:
        A scalar in at least float32; 0 where fewer than two rows count.

    Raises:
        ShapeError: axes that do not fit, no floating-point numbers, flags that are not bool.
        ConfigError: an ε that is not above 0.

    Example:
        >>> koleo_loss(torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]))  # -log √2
        tensor(-0.3466)

    Source: "Spreading vectors for similarity search" (ICLR 2019), its entropic regulariser; DINOv2
    (arXiv 2304.07193).

    Deviations from the authors' code: DINOv2's marks each row's product with itself by -1, which is
    also that of opposite rows, so a row may become its own neighbour; with b = 1 it always does. It
    works in the features' own dtype; in bfloat16 that picks another neighbour for many rows. Rows
    of zero norm stand at the origin there.
    """
    check_positive("eps", eps)
    _check("features", features, valid)
    return _koleo(features, valid, eps, Processes(active=False), across=False)


class KoLeoLoss(nn.Module):
    """`koleo_loss` of one view, or its mean over several; views are never mixed.

    Convention: each row looks for its neighbour within its process, as in DINOv2, or with
    ``across_processes`` in the whole batch. Either way every rank returns the whole batch's value
    with its share's gradient, whatever the batch sizes, and assumes that gradients are averaged, as
    DDP does. In evaluation and under ``no_grad`` nothing is sent.

    Args:
        eps: ε, above 0.
        across_processes: whether neighbours are looked for on all processes.
        process_group: the processes over which gradients are averaged; None: all. Its ranks are
            those that are looked at with ``across_processes``.

    Raises:
        ConfigError: an ε that is not above 0.

    Example:
        >>> loss = KoLeoLoss()
        >>> views = [torch.randn(4, 8), torch.randn(4, 8)]
        >>> torch.allclose(loss(views), (koleo_loss(views[0]) + koleo_loss(views[1])) / 2)
        True

    Source: see `koleo_loss`. DINOv2 and DINOv3 add 0.1 times the *sum* over the two global views,
    on the backbone's [CLS] tokens before the head: 0.2 times this mean.

    Deviations from the authors' code: see `koleo_loss`. DINOv3's version for several processes
    wants equal batches on every rank; its ``topk`` and ``loss_group_size`` are left out (published
    runs keep topk = 1, and ``process_group`` says who is looked at).
    """

    def __init__(
        self,
        eps: float = 1e-8,
        *,
        across_processes: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.eps = check_positive("eps", eps)
        self.across_processes = bool(across_processes)
        self.process_group = process_group

    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        valid: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """The loss of a step.

        Args:
            features: (b, d), or a list with one per view.
            valid: (b,) bool or None, or a list with one per view: rows that count.

        Returns:
            A scalar in at least float32.

        Raises:
            ShapeError: see `koleo_loss`; no view; another number of flags than of views.
        """
        views = [features] if isinstance(features, Tensor) else features
        check_sequence("features", views, "a tensor of features")
        flags = [valid] * len(views) if valid is None or isinstance(valid, Tensor) else valid
        if not views or len(flags) != len(views):
            raise ShapeError(
                f"`features` has {len(views)} views and `valid` {len(flags)}; give one view or "
                "more, and flags for each"
            )
        for view, (values, keep) in enumerate(zip(views, flags, strict=True)):
            _check(f"features[{view}]", values, keep)
        processes = Processes(self.training and torch.is_grad_enabled(), self.process_group)
        parts = [
            _koleo(values, keep, self.eps, processes, across=self.across_processes)
            for values, keep in zip(views, flags, strict=True)
        ]
        return torch.stack(parts).mean()

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"eps={self.eps}, across_processes={self.across_processes}"


def _check(name: str, features: Tensor, valid: Tensor | None) -> None:
    axes = Axes()
    check_floating(name, axes.bind(name, features, "b d"))
    if valid is not None and axes.bind("valid", valid, "b").dtype != torch.bool:
        raise ShapeError(f"`valid` must be bool, got {valid.dtype}; convert with .bool()")


def _koleo(
    features: Tensor, valid: Tensor | None, eps: float, processes: Processes, *, across: bool
) -> Tensor:
    values = at_least_float32(features)
    if valid is not None:
        values = torch.where(valid[:, None], values, 0.0)
    rows, present = unit_directions(values)
    if across and processes.size > 1:
        # Every rank works out the whole batch's loss. Its gradient, the same on all of them, is
        # summed on the way back through the gather, which the wrappers' average undoes.
        counts = row_counts(rows, processes.group)
        everyone = all_gather_with_gradient(rows, processes.group, counts=counts)
        all_present = all_gather_rows(present, processes.group, counts=counts)
        first = sum(counts[: process_rank(processes.group)])
        nearest = _nearest(rows, everyone, all_present, first)
        nearest = all_gather_rows(nearest, processes.group, counts=counts)
        rows, present = everyone, all_present
    else:
        across = False
        nearest = _nearest(rows, rows, present, 0)
    counted = present & (present.sum() >= 2)
    difference = rows - rows[nearest]
    same = (difference == 0).all(-1) | ~counted
    difference = torch.where(same[:, None], difference.detach(), difference)
    distance = torch.linalg.vector_norm(difference + eps, dim=-1)
    total = torch.where(counted, -torch.log(distance + eps), 0.0).sum()
    count = counted.sum().to(total.dtype)
    if not across:
        total = all_reduce_sum_with_gradient(total, processes)
        count = processes.sum(count)
    return total / count.clamp_min(1.0)


@torch.no_grad()
def _nearest(rows: Tensor, everyone: Tensor, present: Tensor, first: int) -> Tensor:
    """(b,) which other row has the largest product with each; row i is ``everyone``'s first + i."""
    if not rows.shape[0]:
        return torch.zeros(0, dtype=torch.int64, device=rows.device)
    with no_autocast(rows):
        products = rows @ everyone.T
    own = torch.arange(first, first + rows.shape[0], device=rows.device)
    everybody = torch.arange(everyone.shape[0], device=rows.device)
    hidden = (own[:, None] == everybody) | ~present
    return products.masked_fill(hidden, -torch.inf).argmax(1)
