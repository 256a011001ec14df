"""What the objectives of pairs of views share: MoCo v3's, BYOL's, SimCLR's, and your own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._precision import widest
from local_distill.losses._pairs import Pair, Processes, safe_inverse
from local_distill.losses._view_rows import ViewRows, nothing_to_compare, view_rows
from local_distill.structures import Matches

__all__ = ["PairwiseObjective"]


class PairwiseObjective(nn.Module, ABC):
    """Base of the objectives that are sums over pairs of views, of one layer or of many at once.

    .. math:: L = f·Σ_{(v,q)} Σ_i m_i·loss_i / Σ_i m_i

    over the rows i of all images of all processes; without matches each m_i is 1 and the pairs are
    all (v, q) with v ≠ q.

    Convention: student view v and target view q of the same number are the same view. Computed in
    at least float32. With a process group and in training the loss returns the whole batch's value
    on every rank, with this rank's share of the gradient, and assumes that gradients are averaged
    over processes, as DDP does; in evaluation and under ``no_grad`` nothing is sent. Ranks may hold
    different numbers of images, or none; pairs and token numbers must agree. A pair without a match
    gives 0.

    A new objective says `pair_losses`, for which ``rows.student[v]`` (l, b, s, d) and
    ``rows.keys[rows.answer[v, q]]`` (b, s, d) hold what is compared, of length 1.
    `IntermediateDistillationLoss` takes any callable of ``(student, targets)`` besides.

    Args:
        detach_targets: whether the targets come from a teacher and receive no gradient.
        process_group: the processes over which gradients are averaged; None: all.

    Example:
        >>> class Agreement(PairwiseObjective):
        ...     def pair_losses(self, rows, processes):
        ...         return {(v, q): -(rows.student[v] * rows.keys[name]).sum(-1)
        ...                 for (v, q), name in rows.answer.items()}
        >>> views = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.6, 0.8]])]
        >>> Agreement(detach_targets=True)(views, views)  # -0.6 in either order
        tensor(-1.2000)
    """

    def __init__(
        self, *, detach_targets: bool, process_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.detach_targets = bool(detach_targets)
        self.process_group = process_group

    @abstractmethod
    def pair_losses(self, rows: ViewRows, processes: Processes) -> dict[Pair, Tensor]:
        """Per pair (l, b, s): the loss of each row; whatever is finite where a row's mass is 0."""

    def factor(self, pairs: int) -> float:
        """What the sum over so many pairs is multiplied with."""
        return 1.0

    @property
    def needs_own_targets(self) -> bool:
        """Whether `pair_losses` looks at the targets of the student's own view."""
        return False

    def forward(
        self,
        student: Sequence[Tensor | None],
        targets: Sequence[Tensor | None],
        *,
        matches: Mapping[Pair, Matches] | None = None,
    ) -> Tensor:
        """The objective of one layer.

        Args:
            student: per view (b, d); with ``matches`` (b, s_v, d). Predictions, not normalised.
            targets: per view (b, d); with ``matches`` (b, t_q, d). Projections, not normalised.
            matches: ``{(v, q): Matches}``; its keys are the pairs. None: whole views.

        Returns:
            A scalar in at least float32; 0 where nothing is matched.

        Raises:
            ShapeError: axes that do not fit, no pair of views, matches beyond the target's tokens.
        """
        return self._values(student, targets, matches, layered=False)[0]

    def per_layer(
        self,
        student: Sequence[Tensor | None],
        targets: Sequence[Tensor | None],
        *,
        matches: Mapping[Pair, Matches] | None = None,
    ) -> Tensor:
        """The objective of several layers against the same targets, which are gathered once.

        Args:
            student: per view (l, b, d); with ``matches`` (l, b, s_v, d).
            targets: as in `forward`.
            matches: as in `forward`.

        Returns:
            (l,) in at least float32.
        """
        return self._values(student, targets, matches, layered=True)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"detach_targets={self.detach_targets}"

    def _values(
        self,
        student: Sequence[Tensor | None],
        targets: Sequence[Tensor | None],
        matches: Mapping[Pair, Matches] | None,
        *,
        layered: bool,
    ) -> Tensor:
        rows = view_rows(
            student,
            targets,
            matches,
            layered=layered,
            with_own=self.needs_own_targets,
            detach_targets=self.detach_targets,
        )
        if not rows.mass:
            return nothing_to_compare(student, layered=layered)
        processes = Processes(self.training and torch.is_grad_enabled(), self.process_group)
        losses = self.pair_losses(rows, processes)
        masses = processes.sum(torch.stack([widest(mass).sum() for mass in rows.mass.values()]))
        scales = safe_inverse(masses)
        parts = [
            (rows.mass[pair] * loss).sum((1, 2)) * scale.to(loss.dtype)
            for scale, (pair, loss) in zip(scales.unbind(), losses.items(), strict=True)
        ]
        total = torch.stack(parts).sum(0) * self.factor(len(parts))
        return processes.whole_batch(total)
