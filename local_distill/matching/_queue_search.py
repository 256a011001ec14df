"""The two searches of cross-image matching: out into the queue, and back to the batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from local_distill._precision import no_autocast
from local_distill.kernels import block_length
from local_distill.matching._unit_features import unit_features


def nearest_rows(
    x: Tensor, rows: Tensor, allowed: Tensor, *, normalize: bool
) -> tuple[Tensor, Tensor]:
    """The most similar row for each object, in blocks of rows.

    Args:
        x: (b, n, d) objects of length 1.
        rows: (r, d), in the queue's dtype.
        allowed: (b, r) bool: which rows an image's objects may take.
        normalize: whether rows count as of length 1.

    Returns:
        (b, n) index of the best row, the lowest of equals, and (b, n) bool: whether there is one.
    """
    b, n, d = x.shape
    best = torch.full_like(x[..., 0], -torch.inf)
    index = torch.zeros((b, n), dtype=torch.int64, device=x.device)
    # the scores and a masked copy of them; the rows, as they are and of length 1
    block = block_length((2 * b * n + 3 * d) * x.element_size(), x.device)
    for start in range(0, rows.shape[0], block):
        part = rows[start : start + block].to(x.dtype)
        if normalize:
            part = unit_features(part)[0]
        with no_autocast(x):
            scores = x @ part.mT
        scores = torch.where(allowed[:, None, start : start + block], scores, -torch.inf)
        value, place = scores.max(-1)
        better = value > best
        best = torch.where(better, value, best)
        index = torch.where(better, place + start, index)
    return index, best > -torch.inf


def leads_home(
    back: Tensor, y: Tensor, y_valid: Tensor, cycle: Literal["batch", "image"]
) -> Tensor:
    """(b, n) whether the object most similar to ``back`` i is object i.

    Args:
        back: (b, n, d) of length 1.
        y: (b, n, d) the objects, of length 1.
        y_valid: (b, n) bool: which of them may be found.
        cycle: among all objects of the ``"batch"``, or of their own ``"image"``.
    """
    b, n, d = y.shape
    if cycle == "batch":
        back, y, y_valid = back.reshape(1, b * n, d), y.reshape(1, b * n, d), y_valid.reshape(1, -1)
    m = y.shape[1]
    block = block_length(2 * y.shape[0] * m * y.element_size(), y.device)
    nearest = []
    for start in range(0, m, block):
        with no_autocast(y):
            scores = back[:, start : start + block] @ y.mT
        nearest.append(torch.where(y_valid[:, None], scores, -torch.inf).argmax(-1))
    home = torch.cat(nearest, 1) == torch.arange(m, device=y.device)
    return home.reshape(b, n)
