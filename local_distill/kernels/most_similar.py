"""The most similar teacher token of every student token, without a whole (b, s, t) table.

Works in blocks of images, and of student tokens where one image's table is too large. Within a
block all teacher views are made ready once, and every student view that meets them is multiplied
with them there: what is read often stays in the caches, and no prepared copy of a view exists. On a
GPU `triton_most_similar` does it under cosine, where it serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from local_distill._check import values_visible
from local_distill._precision import no_autocast
from local_distill.kernels.byte_budget import block_length
from local_distill.kernels.triton_switch import triton_serves

__all__ = [
    "Best",
    "Metric",
    "TeacherBlock",
    "best_of_table",
    "most_similar",
    "near_unit",
    "safe_norm",
    "score_table",
    "student_block",
    "teacher_block",
]

Metric = Literal["cosine", "l2"]
Pair = tuple[int, int]

# What a norm is taken for where its squares vanished or overflowed: in the middle of what it can
# then still be, so that a second norm, after the division by this one, does neither.
_NORM_BOUNDS = {torch.float32: (1e-30, 1e29), torch.float64: (1e-235, 1e231)}
# Between these a product of two features neither vanishes nor overflows as it is.
_PLAIN_NORMS = (1e-8, 1e8)
# Under l2, a student token this many times farther away than the teacher's tokens lie apart is
# equally far from all of them in any precision here.
_FAR = 1e18
# Copies of a student token's features that are alive at once: under l2 it is moved, clamped, and
# compared with the chosen teacher token.
_STUDENT_COPIES = {"cosine": 1, "l2": 6}


class Best(NamedTuple):
    """The best teacher token of each student token."""

    teacher_index: Tensor  # (b, s) int64
    cost: Tensor  # (b, s): 1 − cos or ‖f − g‖; +inf or NaN where there is none


class TeacherBlock(NamedTuple):
    """Teacher tokens of some images, ready to be multiplied with any student view.

    A table of scores is the product with ``features``, times ``column`` under cosine, plus
    ``column`` under l2, where that makes NaN of tokens that must not be chosen.
    """

    features: Tensor  # (n, t, d)
    column: Tensor  # (n, 1, t)
    places: Places | None  # l2 only
    sound: bool = False  # whether all tokens can be seen to be fit to be chosen


class Places(NamedTuple):
    """What l2 needs besides: distances are between places, not between directions."""

    raw: Tensor  # (n, t, d) as they came, in the dtype computed in
    center: Tensor  # (n, 1, d): is taken off the student's features as well
    scale: Tensor  # (n, 1, 1): they are then multiplied with it


def most_similar(
    students: Mapping[int, Tensor],
    teachers: Mapping[int, Tensor],
    teacher_valid: Mapping[int, Tensor | None],
    pairs: Sequence[Pair],
    *,
    metric: Metric,
    dtype: torch.dtype,
) -> dict[Pair, Best]:
    """Find the best teacher token for every pair of views.

    Args:
        students: (b, s, d) by view, of any floating dtype; converted a block at a time.
        teachers: (b, t, d) by view. b and d are the same for all views in ``pairs``, and no
            axis of these is empty.
        teacher_valid: (b, t) bool by teacher view, or None: which tokens may be chosen. Tokens
            that are not finite, or of zero norm under cosine, never are.
        pairs: (student view, teacher view), at least one.
        metric: ``"cosine"`` or ``"l2"``.
        dtype: float32 or float64, what is computed in.
    """
    if metric == "cosine" and dtype == torch.float32:
        given = [*(students[v] for v, _ in pairs), *(teachers[q] for _, q in pairs)]
        given += [one for one in (teacher_valid[q] for _, q in pairs) if one is not None]
        if triton_serves(*given):
            # Only now: it loads Triton.
            from local_distill.kernels.triton_most_similar import most_similar_by_tiles, tiles_serve

            if tiles_serve(students, teachers, pairs):
                return most_similar_by_tiles(students, teachers, teacher_valid, pairs)
    with no_autocast(students[pairs[0][0]]):
        return _most_similar(students, teachers, teacher_valid, pairs, metric, dtype)


def _most_similar(
    students: Mapping[int, Tensor],
    teachers: Mapping[int, Tensor],
    teacher_valid: Mapping[int, Tensor | None],
    pairs: Sequence[Pair],
    metric: Metric,
    dtype: torch.dtype,
) -> dict[Pair, Best]:
    partners: dict[int, list[int]] = {}
    for v, q in pairs:
        partners.setdefault(v, []).append(q)
    asked = sorted({q for _, q in pairs})
    like = students[pairs[0][0]]
    b, _, d = like.shape
    most_s = max(students[v].shape[1] for v in partners)
    counts = [teachers[q].shape[1] for q in asked]
    # Not of the features' dtype, as blocks of another shape may round otherwise; half-precision
    # features take a copy of one view's block besides.
    item = torch.finfo(dtype).bits // 8
    ready_bytes = item * d * sum(counts)
    token_bytes = item * (d * _STUDENT_COPIES[metric] + max(counts))
    images = min(b, block_length(ready_bytes + most_s * token_bytes, like.device))
    images = -(-b // -(-b // images))  # as many blocks, but all about as long
    tokens = min(most_s, block_length(images * token_bytes, like.device))
    # One set of buffers for all blocks spares mapping memory anew for each. vmap knows no `out=`, a
    # compiler plans its own buffers, and a GPU's allocator keeps what is freed.
    reuse = (images < b or tokens < most_s) and values_visible(
        *(students[v] for v in partners), *(teachers[q] for q in asked)
    )
    rooms: dict[int, Tensor] = {}
    table_room = student_room = None
    if reuse:
        table_room = like.new_empty(images * tokens * max(counts), dtype=dtype)
        if metric == "cosine":
            student_room = like.new_empty(images * tokens * d, dtype=dtype)
            rooms = {
                q: like.new_empty(images * t * d, dtype=dtype)
                for q, t in zip(asked, counts, strict=True)
            }
    found: dict[Pair, list[Best]] = {pair: [] for pair in pairs}
    for first in range(0, b, images):
        rows = slice(first, first + images)
        ready = {
            q: teacher_block(
                teachers[q][rows].to(dtype), _rows(teacher_valid[q], rows), metric, rooms.get(q)
            )
            for q in asked
        }
        for v, meets in partners.items():
            parts: dict[int, list[Best]] = {q: [] for q in meets}
            for start in range(0, students[v].shape[1], tokens):
                f = students[v][rows, start : start + tokens].to(dtype)
                # Under cosine the student's side is the same for all teacher views.
                side = near_unit(f, student_room) if metric == "cosine" else None
                for q in meets:
                    ours = side if side is not None else student_block(f, ready[q])
                    table = score_table(ours[0], ready[q], table_room)
                    parts[q].append(best_of_table(table, f, ours[1], ready[q]))
            for q in meets:
                found[v, q].append(_joined(parts[q], 1))
    return {pair: _joined(blocks, 0) for pair, blocks in found.items()}


def near_unit(features: Tensor, room: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Features (…, d) brought near norm 1, and their norm (…, 1) now.

    The norm is 0 or NaN for tokens without a direction: of zero norm, or not finite. Tokens are
    scaled by powers of two, which changes no bit of what is then compared. So where it can be seen
    for free that none needs it, none is.

    Args:
        features: float32 or float64.
        room: where given, memory that the result may take.
    """
    norm = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    if _are_plain(norm):
        return features, norm
    scaled = None if room is None else room[: features.numel()].view(features.shape)
    scaled = torch.mul(features, _power_of_two(_bounded(norm)).reciprocal_(), out=scaled)
    return scaled, torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)


def _are_plain(norm: Tensor) -> bool:
    """Whether all norms can be seen to be such that products need no care."""
    if not values_visible(norm) or norm.numel() == 0:
        return False
    least, most = norm.aminmax()  # NaN where there is one
    return bool(least > _PLAIN_NORMS[0]) and bool(most < _PLAIN_NORMS[1])


def _power_of_two(values: Tensor) -> Tensor:
    """The next power of two above each positive number."""
    exponent = torch.frexp(values).exponent
    return torch.ldexp(torch.ones_like(values), exponent)


def teacher_block(
    g: Tensor, valid: Tensor | None, metric: Metric, room: Tensor | None = None
) -> TeacherBlock:
    """Make teacher tokens (n, t, d) ready.

    Args:
        g: float32 or float64.
        valid: (n, t) which tokens may be chosen, or None for all that are sound.
        metric: ``"cosine"`` or ``"l2"``.
        room: where given, memory for the features under cosine.
    """
    if metric == "cosine":
        scaled, norm = near_unit(g, room)
        # Where the norm is 0 or infinite this is infinite or 0, and what it is multiplied with is 0
        # or not finite: NaN.
        column = norm.reciprocal()
        sound = scaled is g  # nothing had to be scaled
        if valid is not None and not (sound and bool(valid.all())):
            column = torch.where(valid[..., None], column, torch.nan)
            sound = False
        return TeacherBlock(scaled, column.mT, None, sound)
    good = _is_finite(g)
    if valid is not None:
        good = good & valid[..., None]
    # A common centre changes no distance and takes away most of the cancellation in
    # ‖g‖² − 2 f·g, which is ‖f − g‖² but for a constant of the row.
    count = good.sum(1, keepdim=True).clamp_min(1)
    center = (torch.where(good, g, 0.0) / count).sum(1, keepdim=True)
    moved = torch.where(good, g - center, 0.0)
    # The largest distance from the centre becomes 1, so that no square overflows.
    least, most = _NORM_BOUNDS[g.dtype]
    scale = safe_norm(moved).amax(1, keepdim=True).clamp(least, most).reciprocal()
    moved = moved * scale
    square = moved.square().sum(-1, keepdim=True)
    column = torch.where(good, -0.5 * square, torch.nan).mT
    return TeacherBlock(moved, column, Places(g, center, scale))


def student_block(f: Tensor, teacher: TeacherBlock) -> tuple[Tensor, Tensor]:
    """Student tokens (n, s, d) as they meet this teacher, and (n, s, 1): 0 or NaN if unsound."""
    if teacher.places is None:
        return near_unit(f)
    moved = ((f - teacher.places.center) * teacher.places.scale).clamp(-_FAR, _FAR)
    return moved, _is_finite(f).to(f.dtype)


def score_table(features: Tensor, teacher: TeacherBlock, room: Tensor | None = None) -> Tensor:
    """Scores (n, s, t) of student against teacher tokens: −inf where either must not be matched.

    Under cosine cos·‖features‖, under l2 −‖f − g‖²/2 but for a constant of the row and the scale.
    To be called without autocast, which would round the products.

    Args:
        features: (n, s, d), the first of what `near_unit` or `student_block` gave.
        teacher: what they meet.
        room: where given, memory for the table.
    """
    n, s, _ = features.shape
    t = teacher.features.shape[1]
    out = None if room is None else room[: n * s * t].view(n, s, t)
    table = torch.bmm(features, teacher.features.mT, out=out)
    join = torch.mul if teacher.places is None else torch.add
    table = join(table, teacher.column, out=out)
    # Of a NaN in the student's features comes a row of NaN, which has no norm either.
    return table if teacher.sound else table.nan_to_num_(-torch.inf, torch.inf, -torch.inf)


def best_of_table(table: Tensor, f: Tensor, norm: Tensor, teacher: TeacherBlock) -> Best:
    """The best of each row of a table, the lowest index where several are, and what it costs.

    Args:
        table: (n, s, t) of `score_table`; −inf where there is no candidate.
        f: (n, s, d) the student's features as they came.
        norm: (n, s, 1), the second of what `near_unit` or `student_block` gave.
        teacher: whom the table is with.
    """
    score, index = table.max(-1)
    norm = norm[..., 0]
    if teacher.places is None:
        # NaN for a student token without a direction, +inf where there was no candidate.
        return Best(index, (1 - score / norm).clamp_min_(0.0))
    chosen = teacher.places.raw.gather(1, index[..., None].expand(-1, -1, f.shape[2]))
    cost = safe_norm(f - chosen)[..., 0]
    good = (norm > 0) & (score > -torch.inf)
    return Best(index, torch.where(good, cost, torch.inf))


def safe_norm(features: Tensor) -> Tensor:
    """(…, 1) norms whose squares neither vanish nor overflow on the way."""
    rough = _rough_norm(features)
    scaled = features * rough.reciprocal()
    norm: Tensor = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True) * rough
    return norm


def _rough_norm(features: Tensor) -> Tensor:
    """Norms (…, 1), held within bounds where their squares vanish or overflow; never 0 or inf."""
    return _bounded(torch.linalg.vector_norm(features, dim=-1, keepdim=True))


def _bounded(norm: Tensor) -> Tensor:
    least, most = _NORM_BOUNDS[norm.dtype]
    return norm.clamp(least, most)


def _is_finite(features: Tensor) -> Tensor:
    """(…, 1) whether all of a token is finite, without a copy of it."""
    ends = features.amax(-1, keepdim=True), features.amin(-1, keepdim=True)
    return ends[0].isfinite() & ends[1].isfinite()


def _rows(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


def _joined(blocks: list[Best], axis: int) -> Best:
    if len(blocks) == 1:
        return blocks[0]
    return Best(
        torch.cat([block.teacher_index for block in blocks], axis),
        torch.cat([block.cost for block in blocks], axis),
    )
