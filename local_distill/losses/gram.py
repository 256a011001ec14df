"""Gram anchoring: patches keep the similarities among themselves that an old teacher saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from local_distill._check import Axes, check_floating, check_sequence
from local_distill._precision import at_least_float32, no_autocast
from local_distill.errors import ConfigError, ShapeError
from local_distill.losses._batch_statistics import all_reduce_sum_with_gradient
from local_distill.losses._pairs import Pair, Processes, check_index, check_matches_of_pairs
from local_distill.losses._unit_rows import unit_directions
from local_distill.structures import Matches

__all__ = ["GramAnchoringLoss", "gram_anchoring_loss"]

Scope = Literal["image", "batch"]
Negatives = Literal["keep", "clip", "clip_teacher"]

# What the tables of similarities may take together; above it they are worked out in blocks of rows,
# and once more in the backward pass.
_TABLE_BYTES = 512 * 2**20
# The student's, the teacher's, their difference and a gradient.
_TABLES = 4


class _Patches(NamedTuple):
    """Patches that belong together, brought to the student's grid; rows without a match are 0."""

    student: Tensor  # (b, n, d)
    teacher: Tensor  # (b, n, e), without gradient
    valid: Tensor  # (b, n)


def gram_anchoring_loss(
    student: Tensor,
    teacher: Tensor,
    matches: Matches | None = None,
    *,
    scope: Scope = "image",
    normalize: bool = True,
    negatives: Negatives = "keep",
) -> Tensor:
    """Mean squared difference between the student's and the teacher's Gram matrix, for one view.

    .. math:: L = Σ_{ij} (x_i·x_j - y_i·y_j)² / N

    with x and y of length 1, and i, j over all patches of one image, for all images; N is the
    number of terms.

    Convention: the teacher (an earlier state of the network) receives no gradient. Its features may
    have another number of channels. Patches without a match take no part, on either side.

    Args:
        student: (b, s, d) patch features.
        teacher: (b, t, e) patch features.
        matches: which teacher patches answer each of the student's, where their grids differ; their
            weighted mean is taken before it is brought to length 1. None: patch i answers patch i.
        scope: ``"image"``; ``"batch"``: i, j over the patches of all images together.
        normalize: whether features are brought to length 1.
        negatives: ``"keep"``; ``"clip"``: negative similarities count as 0 on both sides;
            ``"clip_teacher"``: as 0 where the teacher's is negative, so that the student's may lie
            below it.

    Returns:
        A scalar in at least float32; 0 where nothing counts. Takes four tables of b·s² (or (b·s)²)
        numbers, in blocks of rows where that is over 512 MiB. No collectives.

    Raises:
        ShapeError: axes that do not fit, grids that differ without matches.
        ConfigError: an unknown scope or an unknown way with negatives.

    Example:
        >>> student = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
        >>> teacher = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
        >>> gram_anchoring_loss(student, teacher)  # two of four similarities are 0 instead of 1
        tensor(0.5000)

    Source: "DINOv3" (arXiv 2508.10104), its Gram objective, there the sum over i, j; the mean as in
    the published code.

    Deviations from the authors' code: its ``remove_only_teacher_neg`` sets the teacher's negative
    similarities to 0 before it asks where both are negative, so that the student's are never
    clipped; ``"clip_teacher"`` asks first. float64 stays float64. Patches of zero norm get no
    gradient.
    """
    _check_settings(scope, negatives)
    patches = _on_one_grid("student", student, "teacher", teacher, "matches", matches)
    return _gram_loss([patches], scope, normalize, negatives, Processes(active=False))


class GramAnchoringLoss(nn.Module):
    """`gram_anchoring_loss` over the views of a step.

    Convention: views are averaged; with ``scope="batch"`` the patches of all views make one Gram
    matrix, as published, and so does each process by itself. Every rank returns the whole batch's
    value with its share's gradient, and assumes that gradients are averaged, as DDP does. In
    evaluation and under ``no_grad`` nothing is sent.

    Args:
        scope: ``"image"`` or ``"batch"``, see `gram_anchoring_loss`.
        normalize: whether features are brought to length 1.
        negatives: ``"keep"``, ``"clip"`` or ``"clip_teacher"``.
        process_group: the processes over which gradients are averaged; None: all.

    Raises:
        ConfigError: an unknown scope or an unknown way with negatives.

    Example:
        >>> loss = GramAnchoringLoss()
        >>> views = [torch.randn(2, 9, 4), torch.randn(2, 6, 4)]
        >>> loss(views, views)
        tensor(0.)

    Source: "DINOv3" (arXiv 2508.10104). Its 7B model: scope "image", negatives kept, the global
    views alone, weight up to 2, after one million steps, against an earlier teacher at twice the
    resolution whose features were resized by bicubic interpolation.

    Deviations from the authors' code: its settings default to ``scope="batch"``, its class to
    ``negatives="clip"``, its published run to what is the default here. Any views and grids,
    through `Matches`, where its resizing wants squares. See also `gram_anchoring_loss`.
    """

    def __init__(
        self,
        *,
        scope: Scope = "image",
        normalize: bool = True,
        negatives: Negatives = "keep",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        _check_settings(scope, negatives)
        self.scope: Scope = scope
        self.normalize = bool(normalize)
        self.negatives: Negatives = negatives
        self.process_group = process_group

    def forward(
        self,
        student: Sequence[Tensor | None],
        teacher: Sequence[Tensor | None],
        matches: Mapping[Pair, Matches] | None = None,
    ) -> Tensor:
        """The loss of a step.

        Args:
            student: per view (b, s_v, d); None for a view that takes no part.
            teacher: per view (b, t_q, e); likewise.
            matches: ``{(v, q): Matches}``; its keys are the pairs. None: each of the teacher's
                views with the student's of the same number, on the same grid.

        Returns:
            A scalar in at least float32.

        Raises:
            ShapeError: see `gram_anchoring_loss`; a pair of views that are not there.
        """
        check_sequence("student", student, "a tensor of features")
        check_sequence("teacher", teacher, "a tensor of features")
        if matches is None:
            pairs: list[Pair] = [(q, q) for q, view in enumerate(teacher) if view is not None]
        else:
            check_matches_of_pairs(matches, len(student), len(teacher))
            pairs = list(matches)
        patches = []
        for v, q in pairs:
            if v >= len(student):
                raise ShapeError(
                    f"pair {(v, q)} names a view that is not there: there are {len(student)} "
                    f"student and {len(teacher)} teacher views"
                )
            found = None if matches is None else matches[v, q]
            patches.append(
                _on_one_grid(
                    f"student[{v}]",
                    student[v],
                    f"teacher[{q}]",
                    teacher[q],
                    f"matches[{(v, q)}]",
                    found,
                )
            )
        if not patches:
            return _zero(student)
        processes = Processes(self.training and torch.is_grad_enabled(), self.process_group)
        return _gram_loss(patches, self.scope, self.normalize, self.negatives, processes)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"scope={self.scope!r}, normalize={self.normalize}, negatives={self.negatives!r}"


def _check_settings(scope: str, negatives: str) -> None:
    for name, value, known in (
        ("scope", scope, get_args(Scope)),
        ("negatives", negatives, get_args(Negatives)),
    ):
        if value not in known:
            raise ConfigError(f"`{name}` must be one of {', '.join(known)}, got {value!r}")


def _on_one_grid(
    student_name: str,
    student: Tensor | None,
    teacher_name: str,
    teacher: Tensor | None,
    matches_name: str,
    matches: Matches | None,
) -> _Patches:
    axes = Axes()
    x = at_least_float32(check_floating(student_name, axes.bind(student_name, student, "b s d")))
    tokens = "b s e" if matches is None else "b t e"
    y = check_floating(teacher_name, axes.bind(teacher_name, teacher, tokens)).detach()
    if matches is None:
        return _Patches(x, at_least_float32(y), x.new_ones(x.shape[:2], dtype=torch.bool))
    axes.bind(f"{matches_name}.weight", matches.weight, "b s k")
    index = axes.bind(f"{matches_name}.teacher_index", matches.teacher_index, "b s k")
    check_index(f"{matches_name}.teacher_index", index, teacher_name, axes["t"])
    answer = matches.gather(y)
    mass = matches.weight.to(answer.dtype).sum(-1)
    valid = mass > 0
    answer = answer / torch.where(valid, mass, 1.0)[..., None]
    # 0 · NaN is NaN, in the gradient too
    return _Patches(torch.where(valid[..., None], x, 0.0), answer, valid)


def _gram_loss(
    patches: list[_Patches],
    scope: Scope,
    normalize: bool,
    negatives: Negatives,
    processes: Processes,
) -> Tensor:
    if normalize:
        patches = [
            _Patches(unit_directions(part.student)[0], unit_directions(part.teacher)[0], part.valid)
            for part in patches
        ]
    if scope == "batch":
        flat = [[side.flatten(0, 1) for side in part] for part in patches]
        patches = [_Patches(*(torch.cat(sides)[None] for sides in zip(*flat, strict=True)))]
    losses = []
    for part in patches:
        total = _squared_differences(part.student, part.teacher, negatives)
        # Rows without a match are 0 on both sides: they add nothing, and are not counted.
        count = processes.sum(part.valid.sum(1).to(total.dtype).square().sum())
        total = all_reduce_sum_with_gradient(total, processes)
        losses.append(total / torch.where(count > 0, count, 1.0))
    return torch.stack(losses).mean()


def _squared_differences(student: Tensor, teacher: Tensor, negatives: Negatives) -> Tensor:
    """Σ over images and pairs of patches, in blocks of rows where the tables are large."""
    b, n, _ = student.shape
    rows = max(1, _TABLE_BYTES // max(1, _TABLES * b * n * student.element_size()))
    if rows >= n:
        return _block(student, teacher, student, teacher, negatives)
    total = student.new_zeros(())
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        total = total + checkpoint(
            _block, student[:, part], teacher[:, part], student, teacher, negatives,
            use_reentrant=False,
        )  # fmt: skip
    return total


def _block(
    student_rows: Tensor,
    teacher_rows: Tensor,
    student: Tensor,
    teacher: Tensor,
    negatives: Negatives,
) -> Tensor:
    with no_autocast(student):
        ours = student_rows @ student.mT
        theirs = teacher_rows @ teacher.mT
    if negatives == "clip":
        ours, theirs = ours.clamp_min(0.0), theirs.clamp_min(0.0)
    elif negatives == "clip_teacher":
        ours = torch.where((theirs < 0) & (ours < 0), 0.0, ours)
        theirs = theirs.clamp_min(0.0)
    return (ours - theirs).square().sum()


def _zero(student: Sequence[Tensor | None]) -> Tensor:
    """A zero that hangs on the student's graph, so that backward works and NaN stays out."""
    for view in student:
        if view is not None:
            values = at_least_float32(view)
            return torch.where(torch.zeros_like(values, dtype=torch.bool), values, 0.0).sum()
    return torch.zeros(())
