"""Matches made by hand, and matches as plain lists."""

import torch

from local_distill import Matches
from local_distill.matching._results import dense_matches


def soft(b, s, t, seed=0, zeros=0.5):
    """Dense matches, as soft matchers give them: the index is expanded."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.rand(b, s, t, generator=g) * (torch.rand(b, s, t, generator=g) > zeros) / t
    return dense_matches(weight, torch.rand(b, s, generator=g))


def candidates(matches):
    """[b][s] of {teacher token: weight}, and of the heaviest candidate or None."""
    tables, heaviest = [], []
    for indices, weights in zip(
        matches.teacher_index.tolist(), matches.weight.double().tolist(), strict=True
    ):
        rows, tops = [], []
        for index, weight in zip(indices, weights, strict=True):
            table, top, most = {}, None, 0.0
            for j, w in zip(index, weight, strict=True):
                if w > 0:
                    table[j] = table.get(j, 0.0) + w
                if w > most:
                    top, most = j, w
            rows.append(table)
            tops.append(top)
        tables.append(rows)
        heaviest.append(tops)
    return tables, heaviest


def hard(index, weight=None):
    index = torch.tensor(index)
    weight = torch.ones(index.shape) if weight is None else torch.tensor(weight)
    cost = torch.where(weight > 0, 0.0, torch.inf)
    return Matches(index[..., None], weight[..., None], cost)
