"""`most_similar` under cosine in two launches, and no table of scores in memory.

The first brings all tokens near norm 1, by powers of two, and lays them image by image into one
table. The second multiplies a tile of student tokens with tile after tile of teacher tokens and
keeps the best: what leaves the chip is an index and a cost a token.

Bytes moved by formula, for n tokens of d features in all: n·d read and written once, then read once
more a pair that a view is in, mostly from the cache. Nothing here was timed on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from local_distill.kernels._triton_language import jit, tl
from local_distill.kernels.most_similar import Best
from local_distill.kernels.row_tables import Rows
from local_distill.kernels.triton_switch import launching_on

__all__ = ["most_similar_by_tiles", "tiles_serve"]

Pair = tuple[int, int]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Tokens and features that a tile takes.
_TOKENS, _FEATURES = 64, 64
# Tokens that one program makes ready.
_READY = 8
# Rows of the table are so many numbers, or a multiple: read in pieces of 16 bytes.
_ALIGNED = 16
# Programs along the second and the third axis of a launch.
_MOST = 65535


def tiles_serve(
    students: Mapping[int, Tensor], teachers: Mapping[int, Tensor], pairs: Sequence[Pair]
) -> bool:
    """Whether the kernels take these: all features of one dtype of at most 32 bits.

    Args:
        students: (b, s, d) by view.
        teachers: (b, t, d) by view.
        pairs: (student view, teacher view), at least one.
    """
    dtypes = {students[v].dtype for v, _ in pairs} | {teachers[q].dtype for _, q in pairs}
    few = max(students[pairs[0][0]].shape[0], len(pairs)) <= _MOST
    return few and len(dtypes) == 1 and dtypes <= set(_DTYPES)


def most_similar_by_tiles(
    students: Mapping[int, Tensor],
    teachers: Mapping[int, Tensor],
    teacher_valid: Mapping[int, Tensor | None],
    pairs: Sequence[Pair],
) -> dict[Pair, Best]:
    """Find the best teacher token for every pair of views under cosine, computed in float32.

    Args:
        students: (b, s, d) by view, as `tiles_serve` takes them; no axis is empty.
        teachers: (b, t, d) by view.
        teacher_valid: (b, t) bool by teacher view, or None: which tokens may be chosen.
        pairs: (student view, teacher view), at least one.
    """
    ours, theirs = (sorted({pair[side] for pair in pairs}) for side in (0, 1))
    views = [students[v] for v in ours] + [teachers[q] for q in theirs]
    views = [one.detach() if one.stride(2) == 1 else one.detach().contiguous() for one in views]
    b, _, d = views[0].shape
    counts = [one.shape[1] for one in views]
    starts = [sum(counts[:number]) for number in range(len(counts))]
    valid = [None] * len(ours) + [teacher_valid[q] for q in theirs]
    table, norm = _ready(Rows.of(views), _joined_valid(valid, views))
    numbers, first = [], 0
    for v, q in pairs:
        our, their = ours.index(v), len(ours) + theirs.index(q)
        numbers.append((starts[our], counts[our], starts[their], counts[their], first))
        first += counts[our]
    index = torch.empty(b * first, dtype=torch.int64, device=table.device)
    cost = torch.empty(b * first, dtype=torch.float32, device=table.device)
    tiles = -(-max(counts[: len(ours)]) // _TOKENS)
    with launching_on(table):
        _best_kernel[tiles, b, len(pairs)](
            table,
            norm,
            _numbers_on(tuple(numbers), table.device),
            index,
            cost,
            sum(counts),
            table.shape[1],
            # Products of float32 are not to be rounded as those of TF32 are.
            PRECISION="ieee" if table.dtype == torch.float32 else "tf32",
            TOKENS=_TOKENS,
            FEATURES=min(_FEATURES, 1 << (d - 1).bit_length()) if d > _ALIGNED else _ALIGNED,
            num_warps=4,
            enable_fp_fusion=True,
        )
    found = {}
    for (v, q), (_, s, _, _, place) in zip(pairs, numbers, strict=True):
        mine = slice(b * place, b * (place + s))
        found[v, q] = Best(index[mine].view(b, s), cost[mine].view(b, s))
    return found


@jit
def _ready_kernel(
    base: tl.tensor,
    starts: tl.tensor,
    valid: tl.tensor,
    table: tl.tensor,
    norms: tl.tensor,
    count: tl.tensor,
    features: tl.tensor,
    width: tl.tensor,
    HAS_VALID: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Copies tokens near norm 1, and what their norm is then: 0 or NaN for those unfit."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < count
    start = tl.multiple_of(tl.load(starts + row, mask=there, other=0), ALIGNED)
    largest = tl.zeros((ROWS,), tl.float32)
    sound = there
    if HAS_VALID:
        sound = there & (tl.load(valid + row, mask=there, other=0) != 0)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        wanted = there[:, None] & (column < features)[None, :]
        value = tl.load(base + start[:, None] + column[None, :], mask=wanted, other=0.0)
        size = tl.abs(value.to(tl.float32))
        # Comparisons are false for NaN.
        sound = sound & (tl.sum((size < float("inf")).to(tl.int32), 1) == BLOCK)
        largest = tl.maximum(largest, tl.max(tl.where(size < float("inf"), size, 0.0), 1))
    # 2⁻ᵉ of the largest number's exponent e, read off its bits: the product rounds nothing, and
    # squares neither vanish nor overflow.
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    square = tl.zeros((ROWS,), tl.float32)
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        wanted = (there & sound)[:, None] & (column < features)[None, :]
        value = tl.load(base + start[:, None] + column[None, :], mask=wanted, other=0.0)
        scaled = value.to(tl.float32) * scale[:, None]
        square += tl.sum(scaled * scaled, 1)
        place = table + row[:, None] * width + column[None, :]
        kept = there[:, None] & (column < width)[None, :]
        tl.store(place, scaled.to(table.dtype.element_ty), mask=kept)
    norm = tl.where(sound, tl.sqrt(square), float("nan"))
    tl.store(norms + row, norm, mask=there)


@jit
def _best_kernel(
    table: tl.tensor,
    norms: tl.tensor,
    pairs: tl.tensor,
    indices: tl.tensor,
    costs: tl.tensor,
    per_image: tl.tensor,
    width: tl.tensor,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
) -> None:
    """One tile of the student tokens of one image and pair a program."""
    numbers = pairs + tl.program_id(2) * 5
    first_student, s = tl.load(numbers), tl.load(numbers + 1).to(tl.int32)
    first_teacher, t = tl.load(numbers + 2), tl.load(numbers + 3).to(tl.int32)
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    if tl.program_id(0) * TOKENS < s:
        row = image * per_image + first_student + i
        best = tl.full((TOKENS,), float("-inf"), tl.float32)
        index = tl.zeros((TOKENS,), tl.int32)
        for start in range(0, t, TOKENS):
            j = start + tl.arange(0, TOKENS)
            column = image * per_image + first_teacher + j
            score = tl.zeros((TOKENS, TOKENS), tl.float32)
            for first in range(0, width, FEATURES):
                feature = first + tl.arange(0, FEATURES)
                inside = feature < width
                place = row[:, None] * width + feature[None, :]
                f = tl.load(table + place, mask=(i < s)[:, None] & inside[None, :], other=0.0)
                place = column[None, :] * width + feature[:, None]
                g = tl.load(table + place, mask=(j < t)[None, :] & inside[:, None], other=0.0)
                score = tl.dot(f, g, score, input_precision=PRECISION)
            norm = tl.load(norms + column, mask=j < t, other=0.0)
            # False for NaN: those tokens are not to be chosen.
            score = tl.where((norm > 0.0)[None, :], score * (1.0 / norm)[None, :], float("-inf"))
            # The lowest index of several, here and among the tiles.
            top, place = tl.max(score, 1, return_indices=True)
            better = top > best
            best = tl.where(better, top, best)
            index = tl.where(better, start + place, index)
        norm = tl.load(norms + row, mask=i < s, other=0.0)
        cost = tl.maximum(1.0 - best / norm, 0.0)
        cost = tl.where((norm > 0.0) & (best > float("-inf")), cost, float("inf"))
        place = tl.load(numbers + 4) * tl.num_programs(1) + image * s + i
        tl.store(indices + place, index.to(tl.int64), mask=i < s)
        tl.store(costs + place, cost, mask=i < s)


def _ready(rows: Rows, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens (n, d) near norm 1, padded with zeros, and their norms (n,) now."""
    n = rows.start.shape[0]
    width = -(-rows.length // _ALIGNED) * _ALIGNED
    table = rows.base.new_empty(n, width)
    norm = torch.empty(n, dtype=torch.float32, device=table.device)
    with launching_on(table):
        _ready_kernel[-(-n // _READY),](
            rows.base,
            rows.start,
            norm if valid is None else valid,
            table,
            norm,
            n,
            rows.length,
            width,
            HAS_VALID=valid is not None,
            ALIGNED=rows.alignment,
            ROWS=_READY,
            BLOCK=min(512, 1 << (width - 1).bit_length()),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return table, norm


def _joined_valid(valid: Sequence[Tensor | None], views: Sequence[Tensor]) -> Tensor | None:
    """(n,) in the order of the table, or None where all tokens may take part."""
    if all(one is None for one in valid):
        return None
    each = [
        view.new_ones(view.shape[:2], dtype=torch.bool) if one is None else one
        for one, view in zip(valid, views, strict=True)
    ]
    return torch.cat(each, 1).flatten().to(torch.int8)


@functools.lru_cache(maxsize=64)  # a training has the same few lists of views at every step
def _numbers_on(numbers: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """By way of the CPU and not blocking: the host need not wait for the device to take them."""
    return torch.tensor(numbers, device="cpu").to(device, non_blocking=True)
