"""Cross-entropy through matches in blocks, with the gradient worked out on the way.

The plain form (`losses._pairs`) holds targets, scores and what autograd keeps of both, for every
token of every view. Here logsumexps come first, a number a token. After them the prototypes are
independent of each other: a block of them is worked on at a time, teacher, targets, loss and, as
the loss is one number, the gradient too. What stays is the gradient alone, which the student's
logits need anyway. On a GPU `triton_cross_entropy` does the same a row at a time, where it serves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from local_distill._precision import no_autocast, widest
from local_distill.kernels.byte_budget import block_length, slices
from local_distill.kernels.differentiable_once import differentiable_once
from local_distill.kernels.exponential import exp_
from local_distill.kernels.triton_switch import triton_serves
from local_distill.structures import Matches, TeacherTargets

__all__ = ["AnsweredView", "blockwise_cross_entropy", "can_work_in_blocks"]

# Fewer prototypes a block would be slow: rows of memory shorter than a page. Fewer images, then.
_LEAST_PROTOTYPES = 512
# Tables of (tokens, prototypes) that are alive for a student view while a block is worked on.
_TABLES = 3
# Above so many candidates a token, answers are a product of matrices.
_FEW_CANDIDATES = 8


class AnsweredView(NamedTuple):
    """A student view and the matches that bring it the teacher's answers.

    Attributes:
        logits: (b, s, c).
        answers: of each teacher view that answers: its number, the matches, and (b,) what each
            image's sum is multiplied with.
    """

    logits: Tensor
    answers: Sequence[tuple[int, Matches, Tensor]]


def can_work_in_blocks(views: Sequence[AnsweredView]) -> bool:
    """Whether loops over blocks serve: not in a graph being traced nor under vmap, one batch."""
    return (
        not torch.compiler.is_compiling()
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(v.logits) for v in views)
        and len({view.logits.shape[0] for view in views}) == 1
    )


def blockwise_cross_entropy(
    views: Sequence[AnsweredView], targets: Mapping[int, TeacherTargets], student_temp: float
) -> Tensor:
    """The sum over all student tokens of -Σ_c p·log softmax(s / τ), p as the matches weigh it.

    Differentiable once, in the views' logits.

    Args:
        views: at least one.
        targets: by number of the teacher view.
        student_temp: τ.
    """
    learning = torch.is_grad_enabled()
    total: Tensor = _Blockwise.apply(
        views, targets, student_temp, learning, *[view.logits for view in views]
    )
    return total


class _Blockwise(torch.autograd.Function):
    """Hands the gradient over to the first backward; a second one works it out again."""

    @staticmethod
    def forward(
        ctx: Any,
        views: Sequence[AnsweredView],
        targets: Mapping[int, TeacherTargets],
        student_temp: float,
        learning: bool,
        *logits: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*logits)
        ctx.parts = [view.answers for view in views], targets, student_temp
        ctx.on_gpu = _kernels_serve(views, targets)
        # Half precision waits for the factor that backward brings: loss scaling is there to keep
        # small gradients, and they would be lost before it comes. Not so in bfloat16, which has the
        # range of float32; a GPU, that memory holds up, then reads all of it once.
        keeping = (torch.bfloat16,) if ctx.on_gpu else ()
        early = learning and any(ctx.needs_input_grad)
        early = early and all(one.itemsize >= 4 or one.dtype in keeping for one in logits)
        ctx.gradients = [torch.empty_like(one) for one in logits] if early else None
        return _form(ctx.on_gpu)(views, targets, student_temp, ctx.gradients, None)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        logits: tuple[Tensor, ...] = ctx.saved_tensors
        gradients: list[Tensor] | None = ctx.gradients
        ctx.gradients = None
        if gradients is not None:
            for gradient in gradients:
                _scale(gradient, factor, ctx.on_gpu)
        else:
            answers, targets, student_temp = ctx.parts
            views = [AnsweredView(*part) for part in zip(logits, answers, strict=True)]
            gradients = [torch.empty_like(one) for one in logits]
            _form(ctx.on_gpu)(views, targets, student_temp, gradients, factor)
        return None, None, None, None, *gradients


# Takes views, targets, student_temp, gradients to be written, and what to multiply them with.
_Form = Callable[
    [
        Sequence[AnsweredView],
        Mapping[int, TeacherTargets],
        float,
        Sequence[Tensor] | None,
        Tensor | None,
    ],
    Tensor,
]


def _kernels_serve(views: Sequence[AnsweredView], targets: Mapping[int, TeacherTargets]) -> bool:
    """Whether the Triton kernels may run, and take these views."""
    tensors = [view.logits for view in views]
    for _, answers in views:
        for q, (index, weight, _), scale in answers:
            tensors += [_table(targets[q]), index, weight, scale]
    tensors += [target.offset for target in targets.values() if target.offset is not None]
    if not triton_serves(*tensors):
        return False
    from local_distill.kernels.triton_cross_entropy import rows_serve  # loads Triton

    return rows_serve(views, targets)


def _form(on_gpu: bool) -> _Form:
    if not on_gpu:
        return _walk
    from local_distill.kernels.triton_cross_entropy import cross_entropy_by_rows

    return cross_entropy_by_rows


def _scale(gradient: Tensor, factor: Tensor, on_gpu: bool) -> None:
    if not on_gpu:
        gradient.mul_(factor)
        return
    from local_distill.kernels.triton_rows import scale_in_place

    scale_in_place(gradient, factor.float())


class _Normalizer(NamedTuple):
    """Of each row of scores what a softmax needs: exp(scores - peak) / sum."""

    peak: Tensor  # (n, 1)
    log_sum: Tensor  # (n, 1)


class _Answer(NamedTuple):
    """What one teacher view brings: few candidates a token, or a table of weights."""

    view: int
    candidates: list[tuple[Tensor, Tensor]]  # each (n,) row of the teacher's table; (n, 1) weight
    table: Tensor | None  # (images, s, t)


class _Student(NamedTuple):
    """Some images of a student view; n tokens of all of them in a row."""

    logits: Tensor  # (n, c)
    normalizer: _Normalizer  # of (s - max s) / τ, the peak that of s
    mass: Tensor  # (n, 1)
    answers: list[_Answer]
    gradient: Tensor | None  # (images, s, c) to be written


class _Teacher(NamedTuple):
    """Some images of a teacher view; n tokens of all of them in a row."""

    targets: TeacherTargets  # of logits (n, c)
    normalizer: _Normalizer  # of t / τ_t + offset

    def probs(self, columns: slice, dtype: torch.dtype) -> Tensor:
        """(n + 1, columns); the last row is zero, for candidates of no weight."""
        _, offset, temp = self.targets
        logits = _table(self.targets)[:, columns].to(dtype)
        table = logits.new_zeros(logits.shape[0] + 1, logits.shape[1])
        scores = torch.div(logits, temp, out=table[:-1])
        if offset is not None:
            scores += offset[columns].to(dtype)
        exp_(scores.sub_(self.normalizer.peak).sub_(self.normalizer.log_sum))
        return table


def _walk(
    views: Sequence[AnsweredView],
    targets: Mapping[int, TeacherTargets],
    student_temp: float,
    gradients: Sequence[Tensor] | None,
    factor: Tensor | None,
) -> Tensor:
    """The loss; the gradients, times ``factor``, are written into what is given for them."""
    used = sorted({q for view in views for q, _, _ in view.answers})
    logits = [view.logits for view in views] + [_table(targets[q]) for q in used]
    dtype = functools.reduce(torch.promote_types, (one.dtype for one in logits), torch.float32)
    b, _, c = views[0].logits.shape
    like = views[0].logits.new_empty((), dtype=dtype)
    total = widest(torch.zeros_like(like))  # rounded once at the end, not once a block
    tokens = {q: _table(targets[q]).shape[1] for q in used}
    rows = sum(tokens.values())
    rows += _TABLES * max(view.logits.shape[1] for view in views)
    column_bytes = rows * like.element_size()
    written = gradients if gradients is not None else [None] * len(views)
    for images in _blocks(b, column_bytes * min(c, _LEAST_PROTOTYPES), like.device):
        teachers = {q: _teacher(targets[q], images, dtype) for q in used}
        students = [
            _student(view, images, student_temp, dtype, tokens, gradient)
            for view, gradient in zip(views, written, strict=True)
        ]
        for columns in _blocks(c, column_bytes * (images.stop - images.start), like.device):
            probs = {q: teacher.probs(columns, dtype) for q, teacher in teachers.items()}
            for student in students:
                total = total - _of_block(student, probs, columns, student_temp, factor)
    return total.to(dtype)


def _of_block(
    student: _Student,
    probs: Mapping[int, Tensor],
    columns: slice,
    student_temp: float,
    factor: Tensor | None,
) -> Tensor:
    """Σ p·log softmax over a block of prototypes, and its part of the gradient."""
    peak, log_sum = student.normalizer
    scores = torch.sub(student.logits[:, columns], peak).div_(student_temp).sub_(log_sum)
    # Before the product and the exponential, not after: 0 · NaN is NaN.
    scores.masked_fill_(student.mass == 0, 0.0)
    target = _target(student, probs)
    gain = torch.dot(target.flatten(), scores.flatten())
    if student.gradient is not None:
        slope = exp_(scores).mul_(student.mass / student_temp).sub_(target, alpha=1 / student_temp)
        if factor is not None:
            slope.mul_(factor)
        place = student.gradient[..., columns]
        place.copy_(slope.view(place.shape))
    return gain


def _target(student: _Student, probs: Mapping[int, Tensor]) -> Tensor:
    """(n, columns) what the teacher says of the student's tokens."""
    target: Tensor | None = None
    for q, candidates, table in student.answers:
        if table is not None:
            values = probs[q][:-1].reshape(table.shape[0], table.shape[2], -1)
            # A teacher token that nobody reads may hold NaN.
            values = values.masked_fill(~(table > 0).any(1)[..., None], 0.0)
            with no_autocast(table):
                part = (table @ values).flatten(0, 1)
            target = part if target is None else target.add_(part)
        for row, weight in candidates:
            part = probs[q].index_select(0, row)
            target = part.mul_(weight) if target is None else target.addcmul_(part, weight)
    assert target is not None  # a view without answers is none of the views
    return target


def _student(
    view: AnsweredView,
    images: slice,
    student_temp: float,
    dtype: torch.dtype,
    tokens: Mapping[int, int],
    gradient: Tensor | None,
) -> _Student:
    logits = view.logits[images].flatten(0, 1)
    peak = logits.amax(-1, keepdim=True).to(dtype)
    n, c = logits.shape
    log_sum = peak.new_empty(n, 1)
    for rows in _blocks(n, _TABLES * c * peak.element_size(), logits.device):
        scores = torch.sub(logits[rows], peak[rows]).div_(student_temp)
        log_sum[rows] = exp_(scores).sum(-1, keepdim=True).log_()
    mass = torch.zeros_like(peak)
    answers = []
    for q, matches, scale in view.answers:
        weight = scale[images, None, None].to(dtype) * matches.weight[images].to(dtype)
        mass += weight.sum(-1).reshape(-1, 1)
        answers.append(_answer(q, matches.teacher_index[images], weight, tokens[q]))
    written = None if gradient is None else gradient[images]
    return _Student(logits, _Normalizer(peak, log_sum), mass, answers, written)


def _answer(q: int, index: Tensor, weight: Tensor, tokens: int) -> _Answer:
    """Teacher view q, of so many tokens, for (images, s, k) candidates."""
    images, s, k = index.shape
    if k == 0 or k > _FEW_CANDIDATES:
        table = weight.new_zeros(images, s, tokens)
        return _Answer(q, [], table.scatter_add_(2, index, weight))
    first = tokens * torch.arange(images, device=index.device)[:, None, None]
    rows = torch.where(weight > 0, index + first, images * tokens).flatten(0, 1)
    weights = weight.flatten(0, 1)[..., None]
    return _Answer(q, list(zip(rows.unbind(1), weights.unbind(1), strict=True)), None)


def _teacher(targets: TeacherTargets, images: slice, dtype: torch.dtype) -> _Teacher:
    logits = _table(targets)[images].detach().flatten(0, 1)
    n, c = logits.shape
    peak = torch.empty((n, 1), dtype=dtype, device=logits.device)
    log_sum = torch.empty_like(peak)
    for rows in _blocks(n, _TABLES * c * peak.element_size(), logits.device):
        scores = logits[rows].to(dtype) / targets.temp
        if targets.offset is not None:
            scores += targets.offset.to(dtype)
        peak[rows] = scores.amax(-1, keepdim=True)
        log_sum[rows] = exp_(scores.sub_(peak[rows])).sum(-1, keepdim=True).log_()
    return _Teacher(targets._replace(logits=logits), _Normalizer(peak, log_sum))


def _table(targets: TeacherTargets) -> Tensor:
    assert isinstance(targets.logits, Tensor)  # products have a kernel of their own
    return targets.logits


def _blocks(length: int, bytes_each: int, device: torch.device) -> Iterator[slice]:
    return slices(length, block_length(bytes_each, device))
