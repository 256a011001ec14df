"""Cross-entropies, token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from local_distill.errors import ConfigError
from local_distill.structures import Matches

__all__ = ["local_loss", "log_softmax", "normalized_loss", "softmax", "token_cross_entropies"]

Table = list[list[float]]


def softmax(row: Sequence[float]) -> list[float]:
    """Softmax of a few numbers.

    Example:
        >>> softmax([0.0, 0.0])
        [0.5, 0.5]
    """
    top = max(row)
    parts = [math.exp(value - top) for value in row]
    total = sum(parts)
    return [part / total for part in parts]


def log_softmax(row: Sequence[float]) -> list[float]:
    """Logarithm of the softmax of a few numbers.

    Example:
        >>> [round(value, 4) for value in log_softmax([0.0, 0.0])]
        [-0.6931, -0.6931]
    """
    top = max(row)
    norm = top + math.log(sum(math.exp(value - top) for value in row))
    return [value - norm for value in row]


def token_cross_entropies(
    student_logits: Tensor,
    teacher_logits: Tensor,
    teacher_index: Tensor,
    weight: Tensor,
    center: Sequence[float],
    student_temp: float,
    teacher_temp: float,
) -> tuple[Table, Table]:
    """Each student token's cross-entropy with the teacher tokens that answer it.

    .. math:: L_i = -Σ_k w_{ik} Σ_c P_{j(i,k)c} log softmax(s_i/τ)_c, P = softmax((t - center)/τ_t)

    Args:
        student_logits: (b, s, c).
        teacher_logits: (b, t, c).
        teacher_index: (b, s, k).
        weight: (b, s, k); where it is 0 the teacher token is not looked at.
        center: c numbers, subtracted from the teacher's logits.
        student_temp: τ.
        teacher_temp: τ_t.

    Returns:
        [image][student token] of L_i, and of the mass Σ_k w_ik.

    Example:
        >>> import torch
        >>> one, flat = torch.zeros(1, 1, 1).long(), torch.zeros(1, 1, 2)
        >>> losses, masses = token_cross_entropies(
        ...     flat, torch.tensor([[[9.0, 0.0]]]), one, torch.ones(1, 1, 1), [0.0, 0.0], 0.1, 0.04)
        >>> round(losses[0][0], 4), masses
        (0.6931, [[1.0]])
    """
    losses, masses = [], []
    for image in range(student_logits.shape[0]):
        row_losses, row_masses = [], []
        for i in range(student_logits.shape[1]):
            logs = log_softmax([float(v) / student_temp for v in student_logits[image, i]])
            total = mass = 0.0
            candidates = zip(
                teacher_index[image, i].tolist(), weight[image, i].tolist(), strict=True
            )
            for j, w in candidates:
                if w == 0:
                    continue
                probs = softmax(
                    [
                        (float(v) - float(c)) / teacher_temp
                        for v, c in zip(teacher_logits[image, j], center, strict=True)
                    ]
                )
                total -= w * sum(p * q for p, q in zip(probs, logs, strict=True))
                mass += w
            row_losses.append(total)
            row_masses.append(mass)
        losses.append(row_losses)
        masses.append(row_masses)
    return losses, masses


def normalized_loss(losses: Table, masses: Table, normalize: str) -> float:
    """One pair's loss from its tokens'.

    Args:
        losses: [image][token], from `token_cross_entropies`.
        masses: likewise.
        normalize: ``"all"``: over all tokens; ``"matched"``: over the whole mass; ``"image"``: each
            image over its mass, then over all images. Without mass it is 0.

    Example:
        >>> losses, masses = [[2.0, 0.0], [1.0, 3.0]], [[1.0, 0.0], [1.0, 1.0]]
        >>> [normalized_loss(losses, masses, kind) for kind in ("all", "matched", "image")]
        [1.5, 2.0, 2.0]
    """
    images = len(losses)
    if normalize == "all":
        tokens = sum(len(row) for row in losses)
        return sum(map(sum, losses)) / tokens if tokens else 0.0
    if normalize == "matched":
        mass = sum(map(sum, masses))
        return sum(map(sum, losses)) / mass if mass > 0 else 0.0
    if normalize != "image":
        raise ConfigError(f'`normalize` must be "all", "matched" or "image", got {normalize!r}')
    total = 0.0
    for row, row_masses in zip(losses, masses, strict=True):
        total += sum(row) / sum(row_masses) if sum(row_masses) > 0 else 0.0
    return total / images if images else 0.0


def local_loss(
    student_logits: Sequence[Tensor | None],
    teacher_logits: Sequence[Tensor | None],
    matches: Mapping[tuple[int, int], Matches],
    *,
    center: Sequence[float],
    student_temp: float,
    teacher_temp: float,
    normalize: str = "matched",
) -> float:
    """A step's local distillation loss: the mean over the pairs of views.

    Args:
        student_logits: per view (b, s, c), or None.
        teacher_logits: per view (b, t, c), or None.
        matches: ``{(student view, teacher view): Matches}``.
        center: c numbers, subtracted from the teacher's logits.
        student_temp: τ.
        teacher_temp: τ_t.
        normalize: see `normalized_loss`.

    Example:
        >>> import torch
        >>> matches = Matches.identity(torch.ones(2, 3, dtype=torch.bool))
        >>> flat = torch.zeros(2, 3, 4)
        >>> round(local_loss([flat], [flat], {(0, 0): matches}, center=[0.0] * 4,
        ...                  student_temp=0.1, teacher_temp=0.04), 4)  # ln 4
        1.3863
    """
    total = 0.0
    for (v, q), found in matches.items():
        student, teacher = student_logits[v], teacher_logits[q]
        if student is None or teacher is None:
            raise ConfigError(f"`matches` has the pair {(v, q)}, one of whose views is None")
        tables = token_cross_entropies(
            student, teacher, found.teacher_index, found.weight, center, student_temp, teacher_temp
        )
        total += normalized_loss(*tables, normalize)
    return total / len(matches) if matches else 0.0
