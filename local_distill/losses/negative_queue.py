"""The keys of past batches that a contrastive loss holds against the student."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import Axes, check_at_least, check_floating
from local_distill._precision import undo_half_precision
from local_distill.distributed import all_gather_rows
from local_distill.errors import ShapeError
from local_distill.losses._unit_rows import unit_rows

__all__ = ["NegativeQueue"]


class NegativeQueue(nn.Module):
    """A ring of the latest keys, each of length 1: MoCo's queue.

    .. math:: keys_{(p + i) mod r} ← k_i / |k_i|, p ← (p + n) mod r

    Convention: it starts empty and fills up; ``valid`` tells which rows hold a key. `update` alone
    changes it: call it after use, so that no image meets itself. A key that is not finite or of
    zero norm never enters: it takes no place and pushes none out, without a host sync, and is
    counted in ``skipped``. The state stays float32 under ``half()``.

    Args:
        num_keys: r, how many keys are kept; the oldest go first. DenseCL and MoCo: 65,536. Need not
            be a multiple of the batch.
        dim: d. The queue takes 4·r·d bytes.
        process_group: the processes whose keys it takes in; None: all of them.

    Raises:
        ConfigError: a size below 1.

    Example:
        >>> queue = NegativeQueue(num_keys=3, dim=2)
        >>> queue.update(torch.tensor([[3.0, 4.0], [0.0, torch.nan]]))
        >>> queue.keys[queue.valid], int(queue.skipped)
        (tensor([[0.6000, 0.8000]]), 1)
        >>> queue.update(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-2.0, 0.0]]))  # the first goes
        >>> queue.keys
        tensor([[-1.,  0.],
                [ 1.,  0.],
                [ 0.,  1.]])

    Source: "Momentum Contrast for Unsupervised Visual Representation Learning" (MoCo, CVPR 2020),
    section 3.2.

    Deviations from the authors' code: theirs starts with random directions, which the student is
    held against until they are gone: ``queue.update(torch.randn(num_keys, dim))`` does so here;
    its length has to be a multiple of the batch of all processes; NaN enters it for good. The
    position is not read back, so nothing waits for the device.
    """

    keys: Tensor
    position: Tensor
    count: Tensor
    skipped: Tensor

    def __init__(
        self,
        num_keys: int = 65_536,
        dim: int = 128,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.num_keys = check_at_least("num_keys", num_keys, 1)
        self.dim = check_at_least("dim", dim, 1)
        self.process_group = process_group
        self.register_buffer("keys", torch.zeros(num_keys, dim))
        # Where the next key goes, how many there are, how many were refused.
        for name in ("position", "count", "skipped"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    @property
    def valid(self) -> Tensor:
        """(num_keys,) bool: the rows that hold a key."""
        return torch.arange(self.num_keys, device=self.keys.device) < self.count

    @torch.no_grad()
    def update(self, keys: Tensor) -> None:
        """Take the keys of all processes in, in the order of ranks, in place of the oldest.

        Of more keys than the queue holds the last are kept.

        Args:
            keys: (n, d) of any length and any floating-point type; n may differ between processes.

        Raises:
            ShapeError: another d than the queue's, or whole numbers.
        """
        check_floating("keys", Axes().bind("keys", keys, "n d"))
        if keys.shape[1] != self.dim:
            raise ShapeError(
                f"axis `d` is {keys.shape[1]} in `keys` (shape {tuple(keys.shape)}) but this queue "
                f"was made for dim={self.dim}"
            )
        # In the state's dtype before it is looked at: 1e300 is infinite there.
        rows = all_gather_rows(keys.to(self.keys.dtype), self.process_group)
        rows = unit_rows(rows)
        good = (rows != 0).any(-1) & rows.isfinite().all(-1)
        self.skipped.add_((~good).sum())
        # The good ones last and in their order, so that a slice takes the latest of them. Those
        # before them write back what is there: how many they are is not known without a sync.
        rows = rows[good.to(torch.uint8).argsort(stable=True)][-self.num_keys :]
        place = torch.arange(rows.shape[0], device=rows.device)
        entering = good.sum().clamp(max=self.num_keys)
        place = place - rows.shape[0] + entering
        slot = (self.position + place) % self.num_keys
        self.keys.index_copy_(0, slot, torch.where((place >= 0)[:, None], rows, self.keys[slot]))
        self.position.add_(entering).remainder_(self.num_keys)
        self.count.add_(entering).clamp_(max=self.num_keys)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"num_keys={self.num_keys}, dim={self.dim}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NegativeQueue:
        # half() and to(bfloat16) change the network around the queue, not the queue.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        undo_half_precision(self, before)
        return self
