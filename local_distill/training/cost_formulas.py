"""What a run holds and sends on each process, from formulas that the tests compare with a run."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from local_distill._check import check_at_least

__all__ = ["HeldBytes", "NetworkCounts", "SentBytes", "held_bytes", "sent_bytes"]


class NetworkCounts(NamedTuple):
    """How many numbers a network has, parted as `shard` parts it.

    Attributes:
        blocks: parameters of the backbone's blocks, each of which is sharded by itself.
        rest: the other parameters that are sharded.
        whole: those of projection heads, which every process has in any case.
        frozen: of the whole ones those that are never trained (magnitudes of prototypes).
    """

    blocks: int
    rest: int
    whole: int
    frozen: int

    @classmethod
    def of(cls, network: nn.Module) -> NetworkCounts:
        """Count.

        Args:
            network: of a method, on any device, "meta" too; not sharded.

        Example:
            >>> from local_distill import ProjectionHead
            >>> from local_distill.backbones import tiny_vit
            >>> from local_distill.training.network import DistillationNetwork
            >>> backbone = tiny_vit(depth=1, width=24, patch_size=8, img_size=16)
            >>> head = ProjectionHead(24, 16, hidden_dim=32, bottleneck_dim=8)
            >>> NetworkCounts.of(DistillationNetwork(backbone, head))
            NetworkCounts(blocks=7224, rest=4824, whole=2264, frozen=16)
        """
        from local_distill.training.sharding import sharded_blocks, whole_parameters

        whole = whole_parameters(network)
        blocks = {p for block in sharded_blocks(network) for p in block.parameters()}
        rest = set(network.parameters()) - whole - blocks
        return cls(
            sum(p.numel() for p in blocks),
            sum(p.numel() for p in rest),
            sum(p.numel() for p in whole),
            sum(p.numel() for p in whole if not p.requires_grad),
        )

    @property
    def total(self) -> int:
        """All parameters."""
        return self.blocks + self.rest + self.whole


class HeldBytes(NamedTuple):
    """Bytes that a process holds throughout a run, without activations.

    Attributes:
        parameters: of the student.
        gradients: of the student, at their fullest.
        buckets: DDP's second copy of them.
        moments: of the optimiser.
        teacher: its parameters.
    """

    parameters: float
    gradients: float
    buckets: float
    moments: float
    teacher: float

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(self))


class SentBytes(NamedTuple):
    """Bytes that a process sends in a step, by ring algorithms.

    Attributes:
        gradients: their averages.
        parameters: gathered from the others' shares; 0 where all are whole.
        centers: sums and counts of the teacher's logits.
        keys: features that every process wants of all images.
    """

    gradients: float
    parameters: float
    centers: float
    keys: float

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(self))


def held_bytes(
    counts: NetworkCounts,
    *,
    processes: int,
    sharded: bool = False,
    has_teacher: bool = True,
    moments: int = 2,
    number_bytes: int = 4,
) -> HeldBytes:
    r"""What a process holds throughout a run.

    .. math:: P/k + G/k + G_{DDP} + m·G/k + P/k

    of P parameters and G trained ones; k is the number of processes for those that are sharded,
    and 1 for the others.

    Args:
        counts: of the network.
        processes: how many there are.
        sharded: FSDP2 instead of DDP.
        has_teacher: whether there is a slow copy.
        moments: numbers that the optimiser keeps for each parameter: 2 for AdamW, 1 for LARS.
        number_bytes: 4, or 8 in float64; mixed precision keeps 4.

    Example:
        >>> counts = NetworkCounts(blocks=800, rest=100, whole=100, frozen=0)
        >>> held_bytes(counts, processes=1).total
        20000.0
        >>> held_bytes(counts, processes=8, sharded=True).total
        4250.0
    """
    shares = check_at_least("processes", processes, 1) if sharded else 1
    parameters = number_bytes * ((counts.blocks + counts.rest) / shares + counts.whole)
    gradients = parameters - number_bytes * counts.frozen
    buckets = gradients if not sharded and processes > 1 else 0.0
    return HeldBytes(
        parameters, gradients, buckets, moments * gradients, parameters if has_teacher else 0.0
    )


def sent_bytes(
    counts: NetworkCounts,
    *,
    processes: int,
    sharded: bool = False,
    accumulate: int = 1,
    student_passes: int = 2,
    teacher_passes: int = 1,
    center_sizes: tuple[int, ...] = (),
    gathered: int = 0,
    number_bytes: int = 4,
) -> SentBytes:
    r"""What a process sends in a step of the optimiser.

    With n processes an all-reduce of B bytes sends 2·(n − 1)/n·B by a ring, an all-gather to B
    bytes and a reduce-scatter of B bytes half of that. DDP: one all-reduce of the gradient, however
    many micro-batches there are. FSDP2: each micro-batch gathers every block once a pass forward
    and once a pass backward, and the rest once; the last one scatters the gradient, and a block's
    twice where it has to add to what micro-batches before left; what is whole is all-reduced.

    Left out: the losses' denominators, some numbers for each pair of views; buffers; statistics of
    BatchNorm, which are two numbers a channel and pass on GPUs.

    Args:
        counts: of the network.
        processes: n.
        sharded: FSDP2 instead of DDP.
        accumulate: micro-batches in a step.
        student_passes: how often a micro-batch goes through the student's backbone: once for each
            size of view; in SDSSL once for each view.
        teacher_passes: likewise through the teacher's; 0: no teacher.
        center_sizes: c of each `Centering`.
        gathered: numbers of one process that all others get in a step: images times dimension, for
            each set of keys of a contrast.
        number_bytes: 4, or 8 in float64.

    Example:
        >>> counts = NetworkCounts(blocks=800, rest=100, whole=100, frozen=0)
        >>> sent_bytes(counts, processes=8).gradients  # 2 · 7/8 · 4,000 bytes
        7000.0
        >>> sent_bytes(counts, processes=8, sharded=True).parameters
        14700.0
    """
    check_at_least("processes", processes, 1)
    part = number_bytes * (processes - 1) / processes  # of each number, one way
    trained = counts.whole - counts.frozen
    # the sums of all prototypes and how many rows were summed
    centers = 2 * part * sum(size + 1 for size in center_sizes)
    keys = float(number_bytes * gathered * (processes - 1))
    if not sharded:
        gradients = 2 * part * (counts.blocks + counts.rest + trained)
        return SentBytes(gradients, 0.0, centers, keys)
    gathers = counts.blocks * (2 * student_passes + teacher_passes)
    gathers += counts.rest * (1 + (teacher_passes > 0))
    again = accumulate > 1 and student_passes > 1
    scatters = counts.blocks * (1 + again) + counts.rest
    return SentBytes(part * (scatters + 2 * trained), part * gathers * accumulate, centers, keys)
