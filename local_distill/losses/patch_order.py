"""Patch-neighbour consistency: student and teacher put references in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from local_distill._check import Axes, check_floating, check_positive
from local_distill._precision import at_least_float32, no_autocast
from local_distill.errors import ConfigError, ShapeError
from local_distill.losses._batch_statistics import all_reduce_sum_with_gradient
from local_distill.losses._pairs import Pair, Processes, check_index
from local_distill.losses._unit_rows import unit_directions
from local_distill.structures import Matches

__all__ = ["PatchOrderLoss", "soft_sort"]

Network = Literal["bitonic", "odd_even"]
_NETWORKS = get_args(Network)

# What the tables of one block of rows may take, all layers of the network together.
_BLOCK_BYTES = 256 * 2**20


def soft_sort(
    scores: Tensor, *, steepness: float = 100.0, network: Network = "bitonic"
) -> tuple[Tensor, Tensor]:
    """Sort by a network of soft comparators, and say which number went where.

    .. math:: min(a, b) = w·a + (1 - w)·b, w = 1/2 + arctan(β (b - a)) / π

    Convention: ascending. The larger β, the harder the swaps; rows and columns of the permutation
    sum to 1 for every β.

    Args:
        scores: (…, r).
        steepness: β, above 0.
        network: ``"bitonic"``: log²r layers; ``"odd_even"``: r layers.

    Returns:
        The sorted scores (…, r), and the permutation (…, r, r): how much of number i (second to
        last axis) stands at place j (last axis). Differentiable.

    Raises:
        ConfigError: a steepness not above 0, an unknown network.

    Example:
        >>> ordered, permutation = soft_sort(torch.tensor([3.0, 1.0, 2.0]), steepness=1e6)
        >>> ordered
        tensor([1.0000, 2.0000, 3.0000])
        >>> permutation.argmax(-1)  # the first goes last
        tensor([2, 0, 1])

    Source: "Monotonic Differentiable Sorting Networks" (ICLR 2022), its Cauchy distribution.
    """
    check_positive("steepness", steepness)
    _check_network(network)
    size = scores.shape[-1]
    x = at_least_float32(scores)
    permutation = torch.eye(size, dtype=x.dtype, device=x.device).expand(*x.shape, size)
    # Numbers are not put back after each layer: column[place] says where a place's number is.
    column = list(range(size))
    for pairs in _layers(network, size):
        paired = {place for pair in pairs for place in pair}
        idle = [place for place in range(size) if place not in paired]
        low, high, rest = (
            torch.tensor([column[place] for place in places], dtype=torch.int64, device=x.device)
            for places in ([i for i, _ in pairs], [j for _, j in pairs], idle)
        )
        step = x.index_select(-1, high) - x.index_select(-1, low)
        keeps = torch.atan(steepness * step) / torch.pi + 0.5
        x = _swap(x, low, high, rest, keeps)
        permutation = _swap(permutation, low, high, rest, keeps[..., None, :])
        order = [i for i, _ in pairs] + [j for _, j in pairs] + idle
        for now, place in enumerate(order):
            column[place] = now
    order_back = torch.tensor(column, dtype=torch.int64, device=x.device)
    return x.index_select(-1, order_back), permutation.index_select(-1, order_back)


def _swap(values: Tensor, low: Tensor, high: Tensor, rest: Tensor, keeps: Tensor) -> Tensor:
    """Columns ``low`` and ``high`` after soft swaps, then the rest; saves half a table at most."""
    a, b = values.index_select(-1, low), values.index_select(-1, high)
    kept = keeps * (b - a)
    return torch.cat((b - kept, a + kept, values.index_select(-1, rest)), -1)


class PatchOrderLoss(nn.Module):
    """Cross-entropy between the orders in which student and teacher put reference patches.

    .. math:: L = -(1/N) Σ_i m_i (1/r) Σ_l Σ_j Q_ilj log P_ilj

    where P_i and Q_i are the soft permutations (`soft_sort`) that order the r references by their
    cosine with the student's patch i and with the teacher's patches that answer it; m_i is the
    match's weight and N = Σ m_i.

    Convention: teacher and references receive no gradient. Patches without a match take no part.
    Every rank returns the whole batch's value with its share's gradient, and assumes that gradients
    are averaged, as DDP does; each uses the references it is given. In evaluation and under
    ``no_grad`` nothing is sent.

    Memory and time: a patch takes about r²·(L/2 + 6) numbers for L layers (21 for r = 49, bitonic);
    above 256 MiB patches are worked out in blocks, and once more in the backward pass. Time is
    proportional to b·s·r²·L.

    Args:
        student_steepness: β of the student's sorting, above 0.
        teacher_steepness: β of the teacher's, above 0.
        network: ``"bitonic"`` or ``"odd_even"``.
        process_group: the processes over which gradients are averaged; None: all.

    Raises:
        ConfigError: a steepness not above 0, an unknown network.

    Example:
        >>> loss = PatchOrderLoss()
        >>> student, teacher = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
        >>> loss(student, teacher, teacher.flatten(0, 1)[::2]).shape
        torch.Size([])

    Source: "NeCo" (ICLR 2025, arXiv 2408.11054). Published: steepness 100 for both, bitonic,
    references drawn from the teacher's patches of the batch or of a queue, 49 for each image, and
    student and teacher brought to a common 7 × 7 grid by RoI-align; here `Matches` do that.

    Deviations from the authors' code: its comparators multiply by dense matrices and it keeps a
    table for every layer; here they are index look-ups that keep half a table, in blocks. The
    logarithm is of at least the smallest normal number, where theirs may be of 0. Its class
    defaults to Euclidean distances and a steepness of 5, its published runs to what is here.
    """

    def __init__(
        self,
        *,
        student_steepness: float = 100.0,
        teacher_steepness: float = 100.0,
        network: Network = "bitonic",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.student_steepness = check_positive("student_steepness", student_steepness)
        self.teacher_steepness = check_positive("teacher_steepness", teacher_steepness)
        self.network: Network = _check_network(network)
        self.process_group = process_group

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        references: Tensor,
        matches: Matches | None = None,
    ) -> Tensor:
        """The loss of one pair of views.

        Args:
            student: (b, s, d) patch features.
            teacher: (b, t, d) patch features.
            references: (r, d), or (b, r, d) where each image has its own.
            matches: which teacher patches answer each of the student's; None: patch i answers i.

        Returns:
            A scalar in at least float32; 0 where nothing counts.

        Raises:
            ShapeError: axes that do not fit.
        """
        axes = Axes()
        check_floating("student", axes.bind("student", student, "b s d"))
        tokens = "b s d" if matches is None else "b t d"
        check_floating("teacher", axes.bind("teacher", teacher, tokens))
        own = isinstance(references, Tensor) and references.dim() == 3
        check_floating("references", axes.bind("references", references, "b r d" if own else "r d"))
        x = at_least_float32(student)
        if matches is None:
            y = at_least_float32(teacher.detach())
            mass = x.new_ones(x.shape[:2])
        else:
            if not isinstance(matches, Matches):
                raise ShapeError(
                    "`matches` must be Matches of this pair of views, got "
                    f"{type(matches).__name__}; of what match_views gives say matches[v, q]"
                )
            axes.bind("matches.weight", matches.weight, "b s k")
            index = axes.bind("matches.teacher_index", matches.teacher_index, "b s k")
            check_index("matches.teacher_index", index, "teacher", axes["t"])
            mass = matches.weight.to(x.dtype).sum(-1)
            y = matches.gather(teacher.detach())
            x = torch.where((mass > 0)[..., None], x, 0.0)
        # In the student's precision, whichever those of the teacher and of the references are.
        y = y.to(x.dtype)
        anchors = unit_directions(references.detach().to(x.dtype))[0]
        with no_autocast(x):
            ours = (unit_directions(x)[0] @ anchors.mT).flatten(0, 1)
            theirs = (unit_directions(y)[0] @ anchors.mT).flatten(0, 1)
        processes = Processes(self.training and torch.is_grad_enabled(), self.process_group)
        total = all_reduce_sum_with_gradient(self._sum(ours, theirs, mass.flatten()), processes)
        count = processes.sum(mass.sum()) * axes["r"]
        return total / torch.where(count > 0, count, 1.0)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return (
            f"student_steepness={self.student_steepness}, "
            f"teacher_steepness={self.teacher_steepness}, network={self.network!r}"
        )

    def _sum(self, ours: Tensor, theirs: Tensor, mass: Tensor) -> Tensor:
        """Weighted sum over patches (p,) of similarities (p, r), in blocks of patches."""
        patches, size = ours.shape
        # Half a table for each layer, and a few that come and go.
        tables = _num_layers(self.network, size) // 2 + 6
        table = tables * size * size * ours.element_size()
        length = max(1, _BLOCK_BYTES // max(1, table))
        if patches <= length:
            return self._block(ours, theirs, mass)
        total = ours.new_zeros(())
        for first in range(0, patches, length):
            part = slice(first, first + length)
            total = total + checkpoint(
                self._block, ours[part], theirs[part], mass[part], use_reentrant=False
            )
        return total

    def _block(self, ours: Tensor, theirs: Tensor, mass: Tensor) -> Tensor:
        with torch.no_grad():
            target = soft_sort(theirs, steepness=self.teacher_steepness, network=self.network)[1]
        places = soft_sort(ours, steepness=self.student_steepness, network=self.network)[1]
        logs = places.clamp_min(torch.finfo(places.dtype).tiny).log()
        return -(mass * (target * logs).sum((-2, -1))).sum()


def _check_network(network: str) -> Network:
    if network not in _NETWORKS:
        raise ConfigError(f"`network` must be one of {', '.join(_NETWORKS)}, got {network!r}")
    known: Network = network  # type: ignore[assignment]
    return known


def _num_layers(network: Network, size: int) -> int:
    levels = max(size - 1, 0).bit_length()
    return (size if size > 1 else 0) if network == "odd_even" else levels * (levels + 1) // 2


def _layers(network: Network, size: int) -> Iterator[list[Pair]]:
    """Of each layer the pairs of places that are compared; the first takes the smaller number."""
    if network == "odd_even":
        for layer in range(_num_layers(network, size)):
            yield [(low, low + 1) for low in range(layer % 2, size - 1, 2)]
        return
    # Batcher's network of the next power of two, whose first places are left out.
    levels = max(size - 1, 0).bit_length()
    missing = 2**levels - size
    for level in range(levels):
        for step in reversed(range(level + 1)):
            pairs = []
            for low in range(missing, 2**levels):
                high = low ^ (1 << step)
                if high > low:
                    ascending = not low >> (level + 1) & 1
                    pair = (low - missing, high - missing)
                    pairs.append(pair if ascending else pair[::-1])
            yield pairs
