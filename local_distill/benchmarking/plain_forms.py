"""The plain references: what one writes down at first, and published codes have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from local_distill.benchmarking.sizes import Step
from local_distill.structures import Matches, Tokens

__all__ = [
    "cdist_distances",
    "match_by_table",
    "plain_centers",
    "plain_distances",
    "plain_global_loss",
    "plain_koleo_loss",
    "plain_local_loss",
    "plain_similarities",
    "plain_vicreg_loss",
]

Pair = tuple[int, int]
Table = Callable[[Tokens, Tokens], Tensor]  # (b, s, t) costs of two views' tokens


def match_by_table(table: Table, step: Step) -> dict[Pair, tuple[Tensor, Tensor]]:
    """Cost (b, s) and index (b, s) of the least in each row of a table, pair by pair."""
    found = {}
    for v, q in step.pairs:
        cost, index = table(step.student[v], step.teacher[q]).min(-1)
        found[v, q] = (cost, index)
    return found


def plain_centers(view: Tokens) -> Tensor:
    """(b, n, 2) where the centres of the tokens lie in the source, px."""
    grid, geometry = view.grid, view.geometry
    assert grid is not None
    assert geometry is not None
    matrix = geometry.matrix
    numbers = [torch.arange(n, device=matrix.device) for n in (grid.cols, grid.rows)]
    x, y = (grid.offset[axis] + grid.stride[axis] * numbers[axis] for axis in (0, 1))
    x, y = x.expand(grid.rows, -1), y[:, None].expand(-1, grid.cols)
    points = torch.stack((x, y, torch.ones_like(x)), -1).reshape(-1, 3).to(matrix.dtype)
    lifted = points @ matrix.mT
    return lifted[..., :2] / lifted[..., 2:]


def plain_distances(student: Tokens, teacher: Tokens) -> Tensor:
    """Squared distances of all centres, through a table (b, s, t, 2) of differences."""
    s, t = plain_centers(student), plain_centers(teacher)
    return (s[:, :, None] - t[:, None]).square().sum(-1)


def cdist_distances(student: Tokens, teacher: Tokens) -> Tensor:
    """Distances of all centres by `torch.cdist`, not by its inexact form with a product."""
    return torch.cdist(
        plain_centers(student), plain_centers(teacher), compute_mode="donot_use_mm_for_euclid_dist"
    )


def plain_similarities(student: Tokens, teacher: Tokens) -> Tensor:
    """1 − cosine of all tokens' features; both views are normalised for each pair."""
    assert student.features is not None
    assert teacher.features is not None
    f, g = (F.normalize(view, dim=-1) for view in (student.features, teacher.features))
    return 1 - torch.bmm(f, g.mT)


def plain_local_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    matches: Mapping[Pair, Matches],
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """One softmax a teacher view; one ``log_softmax`` and one gather a pair; hard matches."""
    probs = [(logits / teacher_temp).softmax(-1) for logits in teacher]
    total = student[0].new_zeros(())
    for (v, q), found in matches.items():
        index = found.teacher_index.expand(-1, -1, probs[q].shape[-1])
        target = probs[q].gather(1, index)
        cross = -(target * (student[v] / student_temp).log_softmax(-1)).sum(-1)
        weight = found.weight[..., 0]
        total = total + (cross * weight).sum() / weight.sum()
    return total / len(matches)


def plain_global_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    pairs: Sequence[Pair],
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """One softmax a teacher view, one ``log_softmax`` a pair."""
    probs = [(logits / teacher_temp).softmax(-1) for logits in teacher]
    terms = [
        -(probs[q] * (student[v] / student_temp).log_softmax(-1)).sum(-1).mean() for v, q in pairs
    ]
    return torch.stack(terms).mean()


def plain_koleo_loss(features: Tensor, eps: float = 1e-8) -> Tensor:
    """Normalise, multiply, largest other, log of the distance to it."""
    rows = F.normalize(_wide(features), dim=-1)
    with torch.no_grad():
        nearest = (rows @ rows.T).fill_diagonal_(-torch.inf).argmax(1)
    distance = F.pairwise_distance(rows, rows[nearest], eps=eps)
    return -(distance + eps).log().mean()


def plain_vicreg_loss(views: Sequence[Tensor]) -> Tensor:
    """25 · mean squared difference + 25 · mean hinge + sum of squared covariances / d."""
    first, second = wide = [_wide(view) for view in views]
    total = 25 * F.mse_loss(first, second)
    for view in wide:
        count, d = view.shape
        centred = view - view.mean(0)
        total = total + 12.5 * F.relu(1 - (view.var(0) + 1e-4).sqrt()).mean()
        covariance = centred.T @ centred / (count - 1)
        total = total + (covariance.square().sum() - covariance.diagonal().square().sum()) / d
    return total


def _wide(values: Tensor) -> Tensor:
    """Half precision as float32, as autocast would have it: its squares overflow."""
    return values.float() if values.itemsize < 4 else values
