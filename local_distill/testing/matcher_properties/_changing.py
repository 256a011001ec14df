"""Tokens changed in ways whose effect on a match is known."""

from __future__ import annotations

import torch
from torch import Tensor

from local_distill.structures import CropGeometry, TokenGrid, Tokens
from local_distill.testing.properties import ensure


def parts(tokens: Tokens) -> tuple[Tensor, CropGeometry, TokenGrid]:
    """Features, geometry and grid of an example's tokens, which always have all three."""
    features, geometry, grid = tokens
    ensure(
        features is not None and geometry is not None and grid is not None,
        "an example needs features, geometry and grid",
    )
    assert features is not None
    assert geometry is not None
    assert grid is not None
    return features, geometry, grid


def with_features(tokens: Tokens, features: Tensor | None) -> Tokens:
    return tokens._replace(features=features)


def with_matrix(tokens: Tokens, matrix: Tensor) -> Tokens:
    _, geometry, _ = parts(tokens)
    return tokens._replace(geometry=geometry._replace(matrix=matrix))


def images(tokens: Tokens, which: list[int]) -> Tokens:
    """These images of the batch, in this order."""
    features, geometry, grid = parts(tokens)
    return Tokens(features[which], CropGeometry(*(part[which] for part in geometry)), grid)


def map_source(tokens: Tokens, motion: Tensor, source_size: Tensor) -> Tokens:
    """The same views of a source that was moved: ``motion`` maps old to new source pixels."""
    _, geometry, _ = parts(tokens)
    matrix = (motion.double() @ geometry.matrix.double()).to(geometry.matrix.dtype)
    return tokens._replace(geometry=CropGeometry(matrix, geometry.view_size, source_size))


def source_sizes(tokens: Tokens) -> Tensor:
    """(b, 2) height and width of the sources."""
    return parts(tokens)[1].source_size


def view_mirrored(tokens: Tokens) -> tuple[Tokens, Tensor]:
    """The view flipped left to right, and (n,) which old token each new one is."""
    features, geometry, grid = parts(tokens)
    width = float(geometry.view_size[0, 1]) if geometry.view_size.shape[0] else 1.0
    flip = torch.tensor([[-1.0, 0.0, width], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    matrix = (geometry.matrix.double() @ flip.double()).to(geometry.matrix.dtype)
    first = width - grid.offset[0] - grid.stride[0] * (grid.cols - 1)
    order = torch.arange(grid.num_tokens).reshape(grid.rows, grid.cols).flip(1).reshape(-1)
    mirrored = Tokens(
        features[:, order],
        geometry._replace(matrix=matrix),
        grid._replace(offset=(first, grid.offset[1])),
    )
    return mirrored, order


def view_transposed(tokens: Tokens) -> tuple[Tokens, Tensor]:
    """The view with x and y exchanged, and (n,) which old token each new one is."""
    features, geometry, grid = parts(tokens)
    swap = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    order = torch.arange(grid.num_tokens).reshape(grid.rows, grid.cols).T.reshape(-1)
    transposed = Tokens(
        features[:, order],
        CropGeometry(
            geometry.matrix @ swap.to(geometry.matrix.dtype),
            geometry.view_size.flip(-1),
            geometry.source_size,
        ),
        TokenGrid(grid.cols, grid.rows, grid.stride[::-1], grid.offset[::-1]),
    )
    return transposed, order


def view_enlarged(tokens: Tokens, factor: int) -> Tokens:
    """The same view shown with more pixels, under a network of as much larger strides."""
    features, geometry, grid = parts(tokens)
    shrink = torch.tensor([1.0 / factor, 1.0 / factor, 1.0], dtype=geometry.matrix.dtype)
    stride = (grid.stride[0] * factor, grid.stride[1] * factor)
    offset = (grid.offset[0] * factor, grid.offset[1] * factor)
    return Tokens(
        features,
        CropGeometry(geometry.matrix * shrink, geometry.view_size * factor, geometry.source_size),
        TokenGrid(grid.rows, grid.cols, stride, offset),
    )


def inside_source(tokens: Tokens) -> Tensor:
    """(b, n) bool: the token's centre lies in the source by more than rounding."""
    return _reach(tokens) > 1e-3


def outside_source(tokens: Tokens) -> Tensor:
    """(b, n) bool: the token's centre lies out of the source by more than rounding."""
    return _reach(tokens) < -1e-3


def _reach(tokens: Tokens) -> Tensor:
    """(b, n) how many pixels inside the source the centre lies, negative outside.

    Written out here on purpose: a fault in the package's geometry must not hide itself.
    """
    _, geometry, grid = parts(tokens)
    places = [
        [grid.offset[0] + grid.stride[0] * col, grid.offset[1] + grid.stride[1] * row, 1.0]
        for row in range(grid.rows)
        for col in range(grid.cols)
    ]
    view = torch.tensor(places, dtype=torch.float64).reshape(-1, 3)
    source = view @ geometry.matrix.double().mT
    x, y = source[..., 0] / source[..., 2], source[..., 1] / source[..., 2]
    height, width = geometry.source_size.double()[:, None].unbind(-1)
    return torch.stack((x, width - x, y, height - y)).amin(0)
