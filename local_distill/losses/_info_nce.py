"""InfoNCE over the rows of all processes: each row against its answer, among the answers of all."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from local_distill.distributed import (
    all_gather_rows,
    all_gather_with_gradient,
    process_rank,
    row_counts,
)
from local_distill.kernels.log_normalizer import log_normalizer
from local_distill.losses._pairs import Pair, Processes
from local_distill.losses._view_rows import KeyName, ViewRows

# The image of a key that no row is kept from seeing.
_ANY = -1


def info_nce(
    rows: ViewRows, temp: float, processes: Processes, *, lost_gradient: bool = False
) -> dict[Pair, Tensor]:
    """Per pair (l, b, s): -log of the softmax over cosine / temp that falls on a row's own answer.

    The softmax runs over the answers to the pair's rows in the whole batch, and where the rows have
    ``own`` targets over those of the student's view too, but for those of the same image. Rows and
    keys that are not answered, of mass 0, take no part.

    Args:
        rows: see `ViewRows`.
        temp: τ.
        processes: over which the keys are gathered.
        lost_gradient: let no gradient flow back to the keys of other processes.
    """
    keys, mass, start = _gathered(rows, processes, lost_gradient)
    losses = {}
    for pair in rows.mass:
        student, name = rows.student[pair[0]], rows.answer[pair]
        layers, b, s, d = student.shape
        images = keys[name].shape[0]
        seen, valid = keys[name].reshape(images * s, d), (mass[pair] != 0).flatten()
        image = own_image = None
        if pair[0] in rows.own:
            seen = torch.cat((seen, keys[rows.own[pair[0]]].reshape(images * s, d)))
            numbers = torch.arange(images, device=seen.device)[:, None].expand(images, s)
            image = torch.cat((torch.full_like(valid, _ANY, dtype=torch.int64), numbers.flatten()))
            valid = torch.cat((valid, valid))
            own_image = torch.arange(start, start + b, device=seen.device)[:, None].expand(b, s)
            own_image = own_image.reshape(-1).repeat(layers)
        normalizer = log_normalizer(
            student.reshape(layers * b * s, d),
            seen,
            temp,
            valid=valid,
            row_image=own_image,
            key_image=image,
        )
        agreement = (student * rows.keys[name]).sum(-1) / temp
        losses[pair] = normalizer.reshape(layers, b, s) - agreement
    return losses


def _gathered(
    rows: ViewRows, processes: Processes, lost_gradient: bool
) -> tuple[dict[KeyName, Tensor], dict[Pair, Tensor], int]:
    """Keys and masses of the whole batch, and how many images lie on earlier ranks."""
    if processes.size == 1:
        return rows.keys, rows.mass, 0
    parts: list[Tensor] = [*rows.keys.values(), *rows.mass.values()]
    # In one table, so that there is one collective: b is all that differs between the ranks.
    flat = torch.cat([part.flatten(1) for part in parts], 1)
    group = processes.group
    counts = row_counts(flat, group)
    start = sum(counts[: process_rank(group)])
    if lost_gradient:
        whole = all_gather_rows(flat, group, counts=counts)
        whole = torch.cat((whole[:start], flat, whole[start + flat.shape[0] :]))
    else:
        whole = all_gather_with_gradient(flat, group, counts=counts)
    columns = torch.split(whole, [math.prod(part.shape[1:]) for part in parts], 1)
    tables = [
        column.reshape(whole.shape[0], *part.shape[1:])
        for column, part in zip(columns, parts, strict=True)
    ]
    keys = dict(zip(rows.keys, tables[: len(rows.keys)], strict=True))
    return keys, dict(zip(rows.mass, tables[len(rows.keys) :], strict=True)), start
