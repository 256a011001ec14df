"""What hypothesis draws: geometries, grids, matches."""

import math

import torch
from hypothesis import strategies as st

from local_distill import CropGeometry, Matches, TokenGrid, Tokens, from_box, from_matrix


@st.composite
def grids(draw, most=7, view_size=None):
    """A grid whose cells tile the view, or one of a backbone that does not."""
    rows, cols = draw(st.integers(1, most)), draw(st.integers(1, most))
    height, width = view_size or (draw(st.integers(8, 97)), draw(st.integers(8, 97)))
    grid = TokenGrid.tiling(rows, cols, (height, width))
    if draw(st.booleans()):
        grid = grid._replace(offset=(0.5, 0.5))  # as a ResNet's
    return grid, (height, width)


def crops(draw, b, view_size, source_size, *, padding=0.0):
    """b random crops with random flips, as one batched geometry."""
    height, width = source_size
    boxes, flips = [], []
    for _ in range(b):
        w = draw(st.floats(1.0, width))
        h = draw(st.floats(1.0, height))
        x = draw(st.floats(-padding, width - w + padding))
        y = draw(st.floats(-padding, height - h + padding))
        boxes.append([x, y, x + w, y + h])
        flips.append((draw(st.booleans()), draw(st.booleans())))
    return from_box(
        torch.tensor(boxes),
        view_size,
        source_size,
        hflip=torch.tensor([f[0] for f in flips]),
        vflip=torch.tensor([f[1] for f in flips]),
    )


@st.composite
def view_pairs(draw, kind="crop", padding=0.0):
    """Student and teacher `Tokens` of the same b > 1 images.

    kind: "crop" (with flips), "turn" (quarter turns), "similar" (any turn), "warp" (perspective).
    """
    b = draw(st.integers(2, 3))
    source = (draw(st.integers(9, 211)), draw(st.integers(9, 211)))
    sides = []
    for _ in range(2):
        grid, view = draw(grids())
        geometry = crops(draw, b, view, source, padding=padding)
        if kind != "crop":
            geometry = from_matrix(
                geometry.matrix @ _extra(draw, kind, view), geometry.view_size, geometry.source_size
            )
        sides.append(Tokens(None, geometry, grid))
    return sides


def _extra(draw, kind, view):
    """A motion of the view about its middle."""
    height, width = view
    if kind == "turn":
        angle = draw(st.integers(0, 3)) * math.pi / 2
    elif kind == "similar":
        angle = draw(st.floats(0, 2 * math.pi))
    else:
        angle = draw(st.floats(-0.5, 0.5))
    c, s = math.cos(angle), math.sin(angle)
    if kind == "turn":
        c, s = round(c), round(s)
    # A turn inside an anisotropic crop would shear: undo the crop's own aspect is not needed for
    # quarter turns, and the other kinds are used with square pixels or with the search.
    motion = torch.tensor([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float32)
    if kind == "warp":
        motion[2, 0] = draw(st.floats(-0.3, 0.3)) / width
        motion[2, 1] = draw(st.floats(-0.3, 0.3)) / height
    there = torch.eye(3)
    there[0, 2], there[1, 2] = -width / 2, -height / 2
    back = torch.eye(3)
    back[0, 2], back[1, 2] = width / 2, height / 2
    return back @ motion @ there


@st.composite
def similar_pairs(draw):
    """Views whose pixels are square in the source, turned by any angle, all inside the source."""
    b = draw(st.integers(2, 3))
    source = (400, 500)
    sides = []
    for _ in range(2):
        grid, view = draw(grids())
        matrices = []
        for _ in range(b):
            scale = draw(st.floats(0.2, 1.2))
            angle = draw(st.floats(0, 2 * math.pi))
            sign = draw(st.sampled_from([-1.0, 1.0]))
            c, s = scale * math.cos(angle), scale * math.sin(angle)
            x, y = draw(st.floats(180, 320)), draw(st.floats(180, 220))
            matrix = torch.tensor([[c * sign, -s, 0.0], [s * sign, c, 0.0], [0.0, 0.0, 1.0]])
            middle = torch.tensor([view[1] / 2, view[0] / 2, 1.0])
            matrix[:2, 2] = torch.tensor([x, y]) - (matrix @ middle)[:2]
            matrices.append(matrix)
        sides.append(Tokens(None, from_matrix(torch.stack(matrices), view, source), grid))
    return sides


@st.composite
def matches_for(draw, b, s, t, k=None):
    """Random `Matches`, soft or hard, with tokens without a match."""
    k = draw(st.integers(1, 6)) if k is None else k
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, t, (b, s, k), generator=g)
    weight = torch.rand(b, s, k, generator=g)
    weight = weight / weight.sum(-1, keepdim=True) * torch.rand(b, s, 1, generator=g)
    weight = weight * (torch.rand(b, s, 1, generator=g) > 0.3)
    cost = torch.where((weight > 0).any(-1), torch.rand(b, s, generator=g), torch.inf)
    return Matches(index, weight, cost)


def random_geometry(b=2, view_size=(24, 40), source_size=(50, 70), seed=0) -> CropGeometry:
    """b random crops without hypothesis."""
    g = torch.Generator().manual_seed(seed)
    height, width = source_size
    low = torch.rand(b, 2, generator=g) * torch.tensor([width / 2, height / 2])
    high = low + 4 + torch.rand(b, 2, generator=g) * (torch.tensor([width, height]) - low - 4)
    flips = torch.rand(2, b, generator=g) > 0.5
    return from_box(
        torch.cat((low, high), 1), view_size, source_size, hflip=flips[0], vflip=flips[1]
    )
