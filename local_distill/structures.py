"""The structures that pass between the parts: NamedTuples of tensors, so that all are pytrees."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from local_distill._check import Axes, check_at_least, check_positive, check_two_numbers
from local_distill._precision import at_least_float32, no_autocast
from local_distill.errors import ShapeError

__all__ = [
    "CropGeometry",
    "Matcher",
    "Matches",
    "PrototypeLogits",
    "Targets",
    "TeacherTargets",
    "TokenGrid",
    "Tokens",
    "ViewOutput",
]

# Above this many candidates a token, `Matches.gather` multiplies with a dense (s, t) table instead
# of gathering k copies of the values: k·s·d bytes would be more than the table and its product.
_SPARSE_CANDIDATES = 4


class CropGeometry(NamedTuple):
    """Where a view's pixels lie in its source image.

    Convention: coordinates are continuous pixels, x right, y down; pixel i spans [i, i + 1] and its
    centre is i + 0.5. ``matrix`` maps a homogeneous view point (x, y, 1) to a source point.
    Build one with `from_box`, `from_matrix` or a tracking transform, which check it.

    Attributes:
        matrix: (…, 3, 3) float32 or float64 homography, view pixel → source pixel.
        view_size: (…, 2) int32, (height, width) of the view in pixels.
        source_size: (…, 2) int32, (height, width) of the source image in pixels.

    Example:
        >>> from local_distill import from_box
        >>> crop = from_box((8, 4, 24, 12), view_size=(16, 32), source_size=(20, 30))
        >>> crop.matrix  # 16 source pixels wide, shown 32 pixels wide
        tensor([[0.5000, 0.0000, 8.0000],
                [0.0000, 0.5000, 4.0000],
                [0.0000, 0.0000, 1.0000]])
    """

    matrix: Tensor
    view_size: Tensor
    source_size: Tensor

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> CropGeometry:
        """The same geometry on another device; the dtype stays, as rounding would move tokens."""
        return CropGeometry(*(part.to(device, non_blocking=non_blocking) for part in self))


class TokenGrid(NamedTuple):
    """How a backbone's tokens lie over a view: token (r, c) is centred at offset + stride·(c, r).

    Convention: ``stride`` and ``offset`` are (x, y) in view pixels; tokens are row-major.

    Attributes:
        rows: number of token rows.
        cols: number of token columns.
        stride: (x, y) distance of neighbouring token centres, view pixels.
        offset: (x, y) centre of token (0, 0), view pixels.

    Example:
        >>> TokenGrid.tiling(2, 4, view_size=(32, 64))
        TokenGrid(rows=2, cols=4, stride=(16.0, 16.0), offset=(8.0, 8.0))
    """

    rows: int
    cols: int
    stride: tuple[float, float]
    offset: tuple[float, float]

    @classmethod
    def tiling(cls, rows: int, cols: int, view_size: tuple[int, int]) -> TokenGrid:
        """The grid whose cells tile a view of ``view_size`` (height, width) without a rest.

        The cells are stretched until they do. A ViT whose patch does not divide the view leaves the
        rest over and has another grid (patches of 14 px in a view of 48: 3 × 3 tokens, stride 14,
        6 px left over): ask the backbone's ``token_grid(view_size)`` or `measure_token_grid` there.

        Raises:
            ShapeError: a view size that is no pair.
            ConfigError: rows, columns or a side below 1.
        """
        check_at_least("rows", rows, 1)
        check_at_least("cols", cols, 1)
        check_two_numbers("view_size", view_size, "(height, width)")
        height, width = (check_positive("view_size", float(side)) for side in view_size)
        stride = (width / cols, height / rows)
        return cls(rows, cols, stride, (stride[0] / 2, stride[1] / 2))

    @property
    def num_tokens(self) -> int:
        """Rows × columns."""
        return self.rows * self.cols


class Tokens(NamedTuple):
    """The tokens of one view, as matchers take them.

    Attributes:
        features: (b, n, d), or None where only geometry is used.
        geometry: the view's `CropGeometry`, batched, or None where only features are used.
        grid: the view's `TokenGrid`, or None where only features are used.

    Example:
        >>> Tokens(torch.zeros(2, 6, 8), None, None).num_tokens
        6
    """

    features: Tensor | None = None
    geometry: CropGeometry | None = None
    grid: TokenGrid | None = None

    @property
    def num_tokens(self) -> int:
        """The number n of tokens of one image."""
        if self.features is not None:
            return int(self.features.shape[1])
        if self.grid is not None:
            return self.grid.num_tokens
        raise ShapeError("`Tokens` has neither `features` nor a `grid`: give at least one of them")


class Matches(NamedTuple):
    """Which teacher tokens answer each student token, and how well.

    Attributes:
        teacher_index: (b, s, k) int64 in [0, t); may be an expanded tensor.
        weight: (b, s, k), ≥ 0, sum over k ≤ 1; 0 means no match.
        cost: (b, s), cost of the student token's match in the matcher's unit, lower is better,
            +inf where there is none.

    Example:
        >>> matches = Matches.identity(torch.tensor([[True, False], [True, True]]))
        >>> matches.matched
        tensor([[ True, False],
                [ True,  True]])
        >>> matches.gather(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))[..., 0]
        tensor([[1., 0.],
                [3., 4.]])
    """

    teacher_index: Tensor
    weight: Tensor
    cost: Tensor

    @classmethod
    def identity(cls, valid: Tensor) -> Matches:
        """Token i answers token i where ``valid`` (b, n) says so: iBOT's masks, pooled clusters."""
        valid = Axes().bind("valid", valid, "b n")
        index = torch.arange(valid.shape[1], device=valid.device)
        weight = valid.to(torch.float32)
        cost = torch.where(valid.bool(), 0.0, torch.inf)
        return cls(index.expand(valid.shape)[..., None], weight[..., None], cost)

    @property
    def mass(self) -> Tensor:
        """(b, s) sum of the weights over the candidates."""
        return self.weight.sum(-1)

    @property
    def matched(self) -> Tensor:
        """(b, s) bool: the student token has a match."""
        return (self.weight > 0).any(-1)

    def gather(self, values: Tensor) -> Tensor:
        """Bring teacher values to the student tokens: (b, t, d) → (b, s, d), Σ_k weight·value.

        Differentiable in ``values``. A teacher row that no match refers to is never read, so NaN
        in it stays there. Computed in at least float32.
        """
        axes = Axes()
        axes.bind("matches.weight", self.weight, "b s k")
        axes.bind("matches.teacher_index", self.teacher_index, "b s k")
        values = at_least_float32(axes.bind("values", values, "b t d"))
        weight = self.weight.to(values.dtype)
        if axes["k"] > _SPARSE_CANDIDATES:
            return self._gather_dense(values, weight)
        total = values.new_zeros(axes["b"], axes["s"], axes["d"])
        for candidate in range(axes["k"]):
            index = self.teacher_index[..., candidate, None].expand(-1, -1, axes["d"])
            part = weight[..., candidate, None]
            # where, not only a product: 0 · NaN is NaN
            taken = torch.where(part > 0, values.gather(1, index), 0.0)
            total = total + part * taken
        return total

    def _gather_dense(self, values: Tensor, weight: Tensor) -> Tensor:
        b, s, _ = weight.shape
        table = weight.new_zeros(b, s, values.shape[1])
        table = table.scatter_add(2, self.teacher_index, weight)
        read = (table > 0).any(1)
        with no_autocast(values):
            return table @ torch.where(read[..., None], values, 0.0)

    def compact(self, n: int) -> tuple[Tensor, Matches]:
        """Keep each image's n student tokens of least cost.

        Returns:
            The student indices (b, n), in order of cost (ties: lower index first), and the matches
            of those tokens. Tokens without a match come last and stay without one.
        """
        s = self.cost.shape[1]
        if not 0 <= n <= s:
            raise ShapeError(f"`n` must lie in [0, s] = [0, {s}], got {n}")
        student_index = self.cost.argsort(dim=1, stable=True)[:, :n]
        rows = student_index[..., None].expand(-1, -1, self.weight.shape[2])
        kept = Matches(
            self.teacher_index.gather(1, rows),
            self.weight.gather(1, rows),
            self.cost.gather(1, student_index),
        )
        return student_index, kept


class PrototypeLogits(NamedTuple):
    """Prototype scores not yet multiplied out: features @ weight.T + bias.

    Losses and targets take it where they take logits, and then never hold the table of all tokens
    and all prototypes, which is most of a step's memory. `ProjectionHead.prototype_logits` makes
    them. Views whose ``weight`` is one and the same tensor are worked on together, so take it once
    for all views: of a parametrized layer (weight norm) every look at it is a new tensor.

    Attributes:
        features: (…, d) what the prototype layer takes.
        weight: (c, d) of that layer.
        bias: (c,), or None.

    Example:
        >>> scores = PrototypeLogits(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0, 3]]))
        >>> scores.logits()
        tensor([[1., 6.]])
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def logits(self) -> Tensor:
        """(…, c) multiplied out, in at least float32 whatever autocast says; differentiable."""
        features, weight = at_least_float32(self.features), at_least_float32(self.weight)
        dtype = torch.promote_types(features.dtype, weight.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        with no_autocast(features):
            return torch.nn.functional.linear(features.to(dtype), weight.to(dtype), bias)


class ViewOutput(NamedTuple):
    """What one network says of one view; any part may be None where a loss does not need it.

    Attributes:
        global_logits: (b, c) prototype scores of the whole view; a tensor or `PrototypeLogits`.
        token_logits: (b, n, c) prototype scores of its tokens; likewise.
        tokens: the `Tokens` that a matcher compares. Put together outside the network's forward,
            so that no precision plugin rounds the geometry.
    """

    global_logits: Tensor | PrototypeLogits | None = None
    token_logits: Tensor | PrototypeLogits | None = None
    tokens: Tokens | None = None


class TeacherTargets(NamedTuple):
    """A teacher distribution not yet worked out: probs = softmax(logits / temp + offset).

    Attributes:
        logits: (b, c) or (b, t, c) teacher logits, without gradient; or as `PrototypeLogits`.
        offset: (c,) or None, added after the division by the temperature.
        temp: the teacher temperature.

    Example:
        >>> TeacherTargets(torch.tensor([[0.0, 0.0]]), torch.tensor([0.0, 1.0]), 0.1).probs()
        tensor([[0.2689, 0.7311]])
    """

    logits: Tensor | PrototypeLogits
    offset: Tensor | None
    temp: float

    def probs(self) -> Tensor:
        """The distribution, in at least float32, with the shape of ``logits``."""
        logits = self.logits.logits() if isinstance(self.logits, PrototypeLogits) else self.logits
        scores = at_least_float32(logits) / self.temp
        if self.offset is not None:
            scores = scores + self.offset.to(scores.dtype)
        return scores.softmax(-1)


@runtime_checkable
class Matcher(Protocol):
    """Any callable from the student's and the teacher's tokens to `Matches`."""

    def __call__(self, student: Tokens, teacher: Tokens) -> Matches:
        """Match the tokens of one student view to those of one teacher view."""
        ...


class Targets(Protocol):
    """What turns teacher logits into teacher distributions, and learns from them."""

    def __call__(
        self,
        teacher_logits: Sequence[Tensor | PrototypeLogits],
        *,
        teacher_temp: float,
        valid: Sequence[Tensor | None] | None = None,
    ) -> list[TeacherTargets]:
        """The targets of all teacher views jointly; changes no state."""
        ...

    def update(
        self,
        teacher_logits: Sequence[Tensor | PrototypeLogits],
        valid: Sequence[Tensor | None] | None = None,
    ) -> None:
        """Take the logits into the state; nothing else does."""
        ...

    def accumulate(self, enabled: bool = True) -> AbstractContextManager[None]:
        """Within it, `update` only sums; the first update outside applies one step."""
        ...


torch.serialization.add_safe_globals(
    [CropGeometry, TokenGrid, Tokens, Matches, PrototypeLogits, ViewOutput, TeacherTargets]
)
