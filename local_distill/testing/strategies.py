"""Hypothesis strategies of the package's structures; they shrink to small, plain examples."""

from __future__ import annotations

import math
from typing import Literal

import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from local_distill.errors import ConfigError
from local_distill.geometry import from_box, from_matrix, wide_centers, wide_diagonals
from local_distill.structures import CropGeometry, Matches, TokenGrid, Tokens

__all__ = ["ViewKind", "crop_geometries", "matches", "token_grids", "tokens", "view_pairs"]

ViewKind = Literal["crop", "turn", "similar", "warp"]
_KINDS = ("crop", "turn", "similar", "warp")
# Parts of a pixel and of a turn that keep two views from coming to lie token on token, or token on
# cell edge, as soon as the numbers drawn are plain. One row a side: left, top, right, bottom.
_FRACTIONS = ((0.13, 0.37, -0.29, -0.41), (0.71, 0.59, -0.47, -0.17))
_TURNS = (0.13, 0.29)
# By how many cells the nearest token has to be nearer than the second nearest: far more than the
# rounding of a float32 geometry moves a token by.
_MARGIN = 1e-4


@st.composite
def token_grids(
    draw: DrawFn, view_size: tuple[int, int], max_side: int = 7, *, tiling: bool | None = None
) -> TokenGrid:
    """Grids of a view of ``view_size`` (height, width): tiling ones, and those of convolutions.

    Args:
        draw: given by hypothesis.
        view_size: (height, width) of the view in pixels.
        max_side: most rows and most columns.
        tiling: True: only grids whose cells tile the view; False: only those that do not.

    Example:
        >>> from hypothesis import find
        >>> find(token_grids((32, 48), tiling=True), lambda grid: grid.cols > 1)
        TokenGrid(rows=1, cols=2, stride=(24.0, 32.0), offset=(12.0, 16.0))
    """
    rows, cols = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    grid = TokenGrid.tiling(rows, cols, view_size)
    if tiling is True or (tiling is None and not draw(st.booleans())):
        return grid
    # as a ResNet's, whose first token is centred on the first pixel
    return grid._replace(offset=(0.5, 0.5))


@st.composite
def crop_geometries(
    draw: DrawFn,
    batch: int,
    view_size: tuple[int, int],
    source_size: tuple[int, int],
    *,
    kind: ViewKind = "crop",
    padding: float = 0.0,
    side: Literal[0, 1] | None = None,
) -> CropGeometry:
    """Views of ``batch`` images of one size.

    Args:
        draw: given by hypothesis.
        batch: number of images.
        view_size: (height, width) in pixels.
        source_size: (height, width) in pixels.
        kind: ``"crop"``: axis-aligned crops, flipped or not; ``"turn"``: quarter turns as well;
            ``"similar"``: any turn and scale about a point inside, of square pixels; ``"warp"``: a
            crop with a turn and a perspective.
        padding: how far crops may reach out of the source, in pixels.
        side: 0 or 1: crops of whole pixels and some hundredths, other ones for either side, so that
            the tokens of two views seldom lie half-way between each other. None: any numbers.

    Example:
        >>> from hypothesis import find
        >>> find(crop_geometries(1, (8, 8), (16, 16)), lambda geometry: True).matrix
        tensor([[[0.1250, 0.0000, 0.0000],
                 [0.0000, 0.1250, 0.0000],
                 [0.0000, 0.0000, 1.0000]]])
    """
    if kind not in _KINDS:
        raise ConfigError(f"`kind` must be one of {_KINDS}, got {kind!r}")
    if kind == "similar":
        matrices = [_similar(draw, view_size, source_size, side) for _ in range(batch)]
        return from_matrix(torch.stack(matrices), view_size, source_size)
    boxes, flips = [], []
    for _ in range(batch):
        boxes.append(_box(draw, source_size, padding, side))
        flips.append((draw(st.booleans()), draw(st.booleans())))
    geometry = from_box(
        torch.tensor(boxes, dtype=torch.float32).reshape(batch, 4),
        view_size,
        source_size,
        hflip=torch.tensor([flip[0] for flip in flips], dtype=torch.bool),
        vflip=torch.tensor([flip[1] for flip in flips], dtype=torch.bool),
    )
    if kind == "crop":
        return geometry
    motions = torch.stack([_motion(draw, kind, view_size) for _ in range(batch)])
    return from_matrix(geometry.matrix @ motions, geometry.view_size, geometry.source_size)


@st.composite
def tokens(
    draw: DrawFn,
    batch: int = 2,
    *,
    source_size: tuple[int, int] | None = None,
    kind: ViewKind = "crop",
    padding: float = 0.0,
    max_side: int = 7,
    dim: int | None = None,
    side: Literal[0, 1] | None = None,
) -> Tokens:
    """One view's tokens, with geometry, and with features where ``dim`` is given.

    Features are drawn by a seed, from a normal distribution, and have two decimals.

    Args:
        draw: given by hypothesis.
        batch: number of images.
        source_size: (height, width); drawn by default.
        kind: see `crop_geometries`.
        padding: see `crop_geometries`.
        max_side: most rows and columns of the grid.
        dim: number of features; None: ``Tokens.features`` is None.
        side: see `crop_geometries`.

    Example:
        >>> from hypothesis import find
        >>> find(tokens(dim=3), lambda view: view.grid.rows == 2).features.shape
        torch.Size([2, 2, 3])
    """
    if source_size is None:
        source_size = (draw(st.integers(9, 211)), draw(st.integers(9, 211)))
    view_size = (draw(st.integers(8, 97)), draw(st.integers(8, 97)))
    grid = draw(token_grids(view_size, max_side))
    geometry = draw(
        crop_geometries(batch, view_size, source_size, kind=kind, padding=padding, side=side)
    )
    features = None
    if dim is not None:
        features = drawn_features(draw, (batch, grid.num_tokens, dim), side or 0)
    return Tokens(features, geometry, grid)


@st.composite
def view_pairs(
    draw: DrawFn,
    kind: ViewKind = "crop",
    *,
    padding: float = 0.0,
    max_side: int = 7,
    dim: int | None = None,
    general_position: bool = False,
) -> tuple[Tokens, Tokens]:
    """Student and teacher tokens of the same two or three images.

    Args:
        draw: given by hypothesis.
        kind: see `crop_geometries`.
        padding: see `crop_geometries`.
        max_side: most rows and columns of a grid.
        dim: number of features; None: none.
        general_position: of each token of either view, one token of the other is the nearest by
            1e-4 cells and more, so that rounding cannot change which.

    Example:
        >>> from hypothesis import find
        >>> student, teacher = find(view_pairs(dim=3), lambda pair: pair[0].num_tokens > 3)
        >>> student.geometry.source_size.equal(teacher.geometry.source_size)
        True
    """
    batch = draw(st.integers(2, 3))
    source = (draw(st.integers(9, 211)), draw(st.integers(9, 211)))
    if kind == "similar":
        source = (400, 500)  # room for any turn inside

    def view(side: Literal[0, 1]) -> SearchStrategy[Tokens]:
        return tokens(
            batch,
            source_size=source,
            kind=kind,
            padding=padding,
            max_side=max_side,
            dim=dim,
            side=side if general_position else None,
        )

    student, teacher = draw(view(0)), draw(view(1))
    if general_position:
        assume(_nearest_is_clear(student, teacher) and _nearest_is_clear(teacher, student))
    return student, teacher


@st.composite
def matches(
    draw: DrawFn,
    batch: int,
    student_tokens: int,
    teacher_tokens: int,
    candidates: int | None = None,
) -> Matches:
    """Matches of any number of candidates, soft or hard, with tokens that have none.

    Args:
        draw: given by hypothesis.
        batch: b.
        student_tokens: s.
        teacher_tokens: t, at least 1.
        candidates: k; drawn by default.

    Example:
        >>> from hypothesis import find
        >>> find(matches(2, 3, 4), lambda found: bool(found.matched.all())).weight.shape[:2]
        torch.Size([2, 3])
    """
    k = draw(st.integers(1, 6)) if candidates is None else candidates
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    b, s = batch, student_tokens

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float32)

    index = torch.randint(0, teacher_tokens, (b, s, k), generator=generator)
    weight = uniform(b, s, k)
    weight = weight / weight.sum(-1, keepdim=True).clamp_min(1e-6) * uniform(b, s, 1)
    weight = weight * (uniform(b, s, 1) > 0.3)
    cost = torch.where((weight > 0).any(-1), uniform(b, s), torch.inf)
    return Matches(index, weight, cost)


def drawn_features(draw: DrawFn, shape: tuple[int, int, int], side: int) -> Tensor:
    """(b, n, d) from a normal distribution by a seed, of two decimals."""
    # two seeds for one number: the smallest example is no view paired with itself
    generator = torch.Generator().manual_seed(2 * draw(st.integers(0, 2**15)) + side)
    features = torch.randn(shape, generator=generator, dtype=torch.float32)
    return (features * 100).round() / 100


def _box(
    draw: DrawFn, source_size: tuple[int, int], padding: float, side: int | None
) -> list[float]:
    height, width = source_size
    if side is None:
        w, h = draw(st.floats(1.0, width)), draw(st.floats(1.0, height))
        x = draw(st.floats(-padding, width - w + padding))
        y = draw(st.floats(-padding, height - h + padding))
        return [x, y, x + w, y + h]
    # at least a third of the source, so that two views mostly have something in common
    columns = draw(st.integers(max(4, width // 3), width))
    rows = draw(st.integers(max(4, height // 3), height))
    left = draw(st.integers(-int(padding), width - columns + int(padding)))
    top = draw(st.integers(-int(padding), height - rows + int(padding)))
    corners = (left, top, left + columns, top + rows)
    return [corner + part for corner, part in zip(corners, _FRACTIONS[side], strict=True)]


def _motion(draw: DrawFn, kind: ViewKind, view_size: tuple[int, int]) -> Tensor:
    """A motion of the view's pixels about its middle."""
    height, width = view_size
    if kind == "turn":
        quarter = draw(st.integers(0, 3))
        c, s = (1.0, 0.0, -1.0, 0.0)[quarter], (0.0, 1.0, 0.0, -1.0)[quarter]
    else:
        angle = draw(st.floats(-0.5, 0.5))
        c, s = math.cos(angle), math.sin(angle)
    motion = _float32([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    if kind == "warp":
        motion[2, 0] = draw(st.floats(-0.3, 0.3)) / width
        motion[2, 1] = draw(st.floats(-0.3, 0.3)) / height
    there = _float32([[1.0, 0.0, -width / 2], [0.0, 1.0, -height / 2], [0.0, 0.0, 1.0]])
    back = _float32([[1.0, 0.0, width / 2], [0.0, 1.0, height / 2], [0.0, 0.0, 1.0]])
    return back @ motion @ there


def _similar(
    draw: DrawFn, view_size: tuple[int, int], source_size: tuple[int, int], side: int | None
) -> Tensor:
    """A turned, scaled, maybe mirrored view whose middle lies about the middle of the source."""
    # the smallest source in use has room for the largest view at this scale, whatever its turn
    scale = draw(st.floats(0.2, 1.2))
    angle = draw(st.floats(0, 2 * math.pi))
    mirror = draw(st.sampled_from([1.0, -1.0]))
    height, width = source_size
    x = width / 2 + draw(st.floats(-0.14, 0.14)) * width
    y = height / 2 + draw(st.floats(-0.05, 0.05)) * height
    if side is not None:
        angle, x, y = angle + _TURNS[side], x + _FRACTIONS[side][0], y + _FRACTIONS[side][1]
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    matrix = _float32([[c * mirror, -s, 0.0], [s * mirror, c, 0.0], [0.0, 0.0, 1.0]])
    middle = _float32([view_size[1] / 2, view_size[0] / 2, 1.0])
    matrix[:2, 2] = _float32([x, y]) - (matrix @ middle)[:2]
    return matrix


def _float32(numbers: list[float] | list[list[float]]) -> Tensor:
    """Whatever torch's default dtype is: the same example everywhere."""
    return torch.tensor(numbers, dtype=torch.float32)


def _nearest_is_clear(one: Tokens, other: Tokens) -> bool:
    """Whether each of one's tokens has a nearest of the other's, not two nearly as near."""
    points, diagonals = [], []
    for tokens in (one, other):
        assert tokens.geometry is not None
        assert tokens.grid is not None
        points.append(wide_centers(tokens.geometry, tokens.grid))
        diagonals.append(wide_diagonals(tokens.geometry, tokens.grid))
    if points[1].shape[1] < 2:
        return True
    distance = (points[0][:, :, None] - points[1][:, None]).square().sum(-1).sqrt()
    nearest, second = distance.topk(2, largest=False).values.unbind(-1)
    return bool((second - nearest > _MARGIN * diagonals[1].amin(1, keepdim=True)).all())
