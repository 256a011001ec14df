"""`paired_cross_entropy` on rows of logits, in two launches, however many views there are.

The first takes the normalisers of the teacher rows that are read. The second works on the student's
rows, image by image, so that rows which one teacher row answers come near each other in time: loss
and gradient, the teacher's probabilities worked out on the way. No table is made but the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from local_distill.kernels.paired_cross_entropy import AnsweredView
from local_distill.kernels.row_tables import Rows
from local_distill.kernels.triton_rows import answered_rows, row_norms
from local_distill.structures import TeacherTargets

__all__ = ["cross_entropy_by_rows", "rows_serve"]

# Above so many candidates a token, in all its answers, a product of matrices reads less.
_FEW_CANDIDATES = 8
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def rows_serve(views: Sequence[AnsweredView], targets: Mapping[int, TeacherTargets]) -> bool:
    """Whether the kernels take these: few candidates, rows in one piece, one dtype a side.

    Args:
        views: at least one, of one batch size.
        targets: by number of the teacher view, with tables of logits.
    """
    ours = [view.logits for view in views]
    used = _used(views)
    theirs = [_table(targets[q]) for q in used]
    offsets = [targets[q].offset for q in used]
    most = max(sum(found.weight.shape[2] for _, found, _ in view.answers) for view in views)
    return (
        0 < most <= _FEW_CANDIDATES
        and min(one.numel() for one in ours + theirs) > 0
        and all(_of_one_dtype(side) for side in (ours, theirs))
        and all(one.stride(2) == 1 and _gradient_stride(one) == 1 for one in ours)
        and len({targets[q].temp for q in used}) == 1
        and (all(one is None for one in offsets) or _of_one_dtype(offsets))
    )


def cross_entropy_by_rows(
    views: Sequence[AnsweredView],
    targets: Mapping[int, TeacherTargets],
    student_temp: float,
    gradients: Sequence[Tensor] | None,
    factor: Tensor | None,
) -> Tensor:
    """The loss, float32; the gradients, times ``factor``, are written into what is given for them.

    Args:
        views: as `rows_serve` takes them.
        targets: likewise.
        student_temp: τ.
        gradients: like the views' logits, their last axis in one piece; or None.
        factor: a scalar, or None.
    """
    used = _used(views)
    theirs = [_table(targets[q]).detach() for q in used]
    theirs = [one if one.stride(2) == 1 else one.contiguous() for one in theirs]
    first, tokens = {}, 0
    for q, table in zip(used, theirs, strict=True):
        first[q] = tokens
        tokens += table.shape[1]
    teacher = Rows.of(theirs)
    rows = teacher.start.shape[0]
    number, share = _candidates(views, first, tokens)
    read = share.new_zeros(rows + 1, dtype=torch.bool)
    read.index_fill_(0, torch.where(share != 0, number, rows).flatten(), True)
    offset = None
    if targets[used[0]].offset is not None:
        each = zip(used, theirs, strict=True)
        offset = Rows.of([_offset(targets[q]).expand(table.shape) for q, table in each])
    temp = targets[used[0]].temp
    losses = answered_rows(
        Rows.of([view.logits for view in views]),
        student_temp,
        teacher,
        row_norms(teacher, temp, offset, read[:rows]),
        temp,
        offset,
        number,
        share,
        None if gradients is None else Rows.of(list(gradients)),
        None if factor is None else factor.float(),
    )
    return losses.sum(dtype=torch.float64).float()  # rounded once


def _candidates(
    views: Sequence[AnsweredView], first: Mapping[int, int], tokens: int
) -> tuple[Tensor, Tensor]:
    """Of all student rows, (n, k) which teacher rows answer, and with what weight.

    Args:
        views: their rows come image by image, as those of `Rows`.
        first: of each teacher view, where its tokens start among those of one image.
        tokens: how many teacher tokens an image has.
    """
    numbers, shares = [], []
    for view in views:
        images = torch.arange(view.logits.shape[0], device=view.logits.device)
        starts = images[:, None, None] * tokens
        numbers.append(
            torch.cat([m.teacher_index + starts + first[q] for q, m, _ in view.answers], 2)
        )
        weights = [scale[:, None, None].float() * m.weight.float() for _, m, scale in view.answers]
        shares.append(torch.cat(weights, 2))
    most = max(share.shape[2] for share in shares)
    # Padded with candidates of no weight.
    both = [
        torch.cat([torch.nn.functional.pad(one, (0, most - one.shape[2])) for one in side], 1)
        for side in (numbers, shares)
    ]
    number, share = (one.flatten(0, 1) for one in both)
    return number, share


def _used(views: Sequence[AnsweredView]) -> list[int]:
    return sorted({q for view in views for q, _, _ in view.answers})


def _table(targets: TeacherTargets) -> Tensor:
    assert isinstance(targets.logits, Tensor)  # products have a kernel of their own
    return targets.logits


def _offset(targets: TeacherTargets) -> Tensor:
    assert targets.offset is not None  # all have one, or none has
    offset = targets.offset.detach()
    return offset if offset.stride(0) == 1 else offset.contiguous()


def _gradient_stride(logits: Tensor) -> int:
    """Of the last axis of what `torch.empty_like` would make, without making it."""
    return torch.empty_like(logits, device="meta").stride(2)


def _of_one_dtype(tensors: Sequence[Tensor | None]) -> bool:
    dtypes = {None if one is None else one.dtype for one in tensors}
    return len(dtypes) == 1 and dtypes <= set(_DTYPES)
