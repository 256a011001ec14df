"""What two views say to each other in MoCo v3, BYOL and SimCLR, as functions of all views."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from local_distill._check import check_positive
from local_distill.errors import ShapeError
from local_distill.losses._info_nce import info_nce
from local_distill.losses._pairs import Pair, Processes
from local_distill.losses._view_rows import ViewRows
from local_distill.losses.pairwise_objective import PairwiseObjective

__all__ = ["ByolObjective", "MocoV3Objective", "SimclrObjective"]


class MocoV3Objective(PairwiseObjective):
    """MoCo v3's symmetric InfoNCE: the other view of the same image, among those of all images.

    .. math:: L = 2τ·Σ_{(v,q)} mean_i [-log( e^{s_i·t_i/τ} / Σ_j e^{s_i·t_j/τ} )]

    with s of view v and t of view q of length 1, and j over the images of all processes.

    Convention: as `PairwiseObjective`; both orders of two views are *summed*. With matches i runs
    over the student tokens that are matched, t_i is the gathered answer to token i, and the
    negatives are the answers to all other matched tokens of this pair of views, those of the same
    image included, in the whole batch; two tokens with one answer are negatives of each other, so
    matches that are one to one (`Mutual`) serve best. With b·s tokens and B images on all processes
    that would be a table of (l·b·s) × (B·s) logits a pair: it is worked out in blocks, with the
    student's gradient on the way, and can be differentiated once.

    Args:
        temp: τ, above 0.
        detach_targets: False lets the gradient flow back to the targets, to those of other
            processes as well: for targets without a teacher.
        process_group: the processes over which gradients are averaged; None: all.

    Raises:
        ConfigError: a temperature not above 0.

    Example:
        >>> import torch
        >>> objective = MocoV3Objective(temp=0.2)
        >>> one, two = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
        >>> objective([one, two], [one, two])  # 2 · 0.4 · ln(1 + e^-5)
        tensor(0.0054)

    Source: "An Empirical Study of Training Self-Supervised Vision Transformers" (MoCo v3, ICCV
    2021), eq. 1 and algorithm 1; τ = 0.2 as there for ViTs and in SDSSL.

    Deviations from the authors' code: none in the value for equal numbers of images on all
    processes; each image counts alike where they differ. Any number of views.
    """

    def __init__(
        self,
        temp: float = 0.2,
        *,
        detach_targets: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(detach_targets=detach_targets, process_group=process_group)
        self.temp = check_positive("temp", temp)

    def pair_losses(self, rows: ViewRows, processes: Processes) -> dict[Pair, Tensor]:
        """See `PairwiseObjective`."""
        return info_nce(rows, self.temp, processes)

    def factor(self, pairs: int) -> float:
        """2τ: the sum over the pairs, with a gradient that depends little on τ."""
        return 2 * self.temp

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"temp={self.temp}, {super().extra_repr()}"


class ByolObjective(PairwiseObjective):
    """BYOL's regression: the squared distance of predictions and targets of length 1.

    .. math:: L = Σ_{(v,q)} mean_i [2 - 2·s_i·t_i]

    Convention: as `PairwiseObjective`; both orders of two views are *summed*. With matches i runs
    over the student tokens that are matched, and t_i is the gathered answer to token i.

    Args:
        detach_targets: False lets the gradient flow to the targets: without a teacher.
        process_group: the processes over which gradients are averaged; None: all.

    Example:
        >>> import torch
        >>> one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> ByolObjective()([one, one], [one, two])  # (0, 1) is at a right angle, (1, 0) agrees
        tensor(2.)

    Source: "Bootstrap Your Own Latent" (NeurIPS 2020), eq. 2.

    Deviations from the authors' code: none in the value.
    """

    def __init__(
        self, *, detach_targets: bool = True, process_group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__(detach_targets=detach_targets, process_group=process_group)

    def pair_losses(self, rows: ViewRows, processes: Processes) -> dict[Pair, Tensor]:
        """See `PairwiseObjective`."""
        return {
            (v, q): 2 - 2 * (rows.student[v] * rows.keys[name]).sum(-1)
            for (v, q), name in rows.answer.items()
        }


class SimclrObjective(PairwiseObjective):
    """SimCLR's NT-Xent: the other view of the same image, among both views of all images.

    .. math::
        L = mean_{(v,q)} mean_i [log(Σ_j e^{s_i·t_j/τ} + Σ_{j≠i} e^{s_i·o_j/τ}) - s_i·t_i/τ]

    with s and o of view v and t of view q, all of length 1, and j over the images of all processes:
    a row is compared with everything but its own image in its own view.

    Convention: as `PairwiseObjective`, but pairs are *averaged*, as the published loss is the mean
    over both views' rows. There is no teacher: targets are the last layer's own projections, those
    of the same views as ``student``, and receive a gradient; detach them for lower layers. With
    more than two views each pair is a loss of two views. With matches i runs over the student
    tokens that are matched, t_i is the gathered answer to token i; negatives are the answers to all
    other matched tokens of this pair, and the own view's targets of all *other* images at the
    places of matched tokens.

    Args:
        temp: τ, above 0; SDSSL's code uses 0.2.
        legacy: let no gradient flow back to the keys of other processes, as SDSSL's code.
        process_group: the processes over which gradients are averaged; None: all.

    Raises:
        ConfigError: a temperature not above 0.
        ShapeError: at forward, matches of a view with itself.

    Example:
        >>> import torch
        >>> one, two = torch.eye(2), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
        >>> SimclrObjective(temp=0.2)([one, two], [one, two])  # ln(1 + 2·e^-5)
        tensor(0.0134)

    Source: "A Simple Framework for Contrastive Learning of Visual Representations" (SimCLR, ICML
    2020), eq. 1; SDSSL (WACV 2023) for lower layers.

    Deviations from the authors' code: SDSSL's gather hands each process only the gradient of its
    own loss, so that what the other processes' losses say of its rows is lost; here they are
    summed, as on one process with the whole batch, and ``legacy=True`` gives theirs. Its setting
    ``temperature`` (0.07) is never read: 0.2 is written into the code. SimCLR's own code sums the
    two views' means, SDSSL's averages them; this one averages.
    """

    def __init__(
        self,
        temp: float = 0.2,
        *,
        legacy: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(detach_targets=False, process_group=process_group)
        self.temp = check_positive("temp", temp)
        self.legacy = bool(legacy)

    @property
    def needs_own_targets(self) -> bool:
        """The rows of the same view of other images are negatives."""
        return True

    def pair_losses(self, rows: ViewRows, processes: Processes) -> dict[Pair, Tensor]:
        """See `PairwiseObjective`."""
        for v, q in rows.mass:
            if v == q:
                raise ShapeError(
                    f"`matches` has the pair {(v, q)}, a view with itself, which SimCLR excludes; "
                    "leave it out"
                )
        return info_nce(rows, self.temp, processes, lost_gradient=self.legacy)

    def factor(self, pairs: int) -> float:
        """The mean over the pairs."""
        return 1 / pairs

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"temp={self.temp}, legacy={self.legacy}"
