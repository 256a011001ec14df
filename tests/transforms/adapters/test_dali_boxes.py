"""Anchors and extents as DALI hands them over, through `from_box`, against torchvision's pixels.

DALI itself is no dependency of the tests: what it does is done by torchvision here.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as F

from local_distill import CropGeometry, from_box

EXACT = 2e-3  # source px
FILTER = 0.1  # source px: an antialiasing filter is not quite centred

sides = st.integers(24, 60)


@given(
    height=sides,
    width=sides,
    view_size=st.tuples(st.integers(20, 90), st.integers(20, 90)),
    seed=st.integers(0, 2**31),
)
def test_a_batch_of_anchors_agrees_with_its_pixels(
    height, width, view_size, seed, ramps, agreement
):
    torch.manual_seed(seed)
    extent = torch.stack([torch.randint(12, side + 1, (3,)) for side in (height, width)], -1)
    room = torch.tensor([height, width]) - extent + 1
    anchor = (torch.rand(3, 2) * room).long()
    mirror, upside_down = torch.rand(2, 3) < 0.5
    corners = torch.cat([anchor.flip(-1), (anchor + extent).flip(-1)], -1)  # (y, x) to (x, y)
    geometry = from_box(
        corners.float(), view_size, (height, width), hflip=mirror, vflip=upside_down
    )
    for i in range(3):
        crop = F.crop(ramps(height, width), *anchor[i].tolist(), *extent[i].tolist())
        view = F.resize(crop, list(view_size), antialias=True)
        view = F.horizontal_flip(view) if mirror[i] else view
        view = F.vertical_flip(view) if upside_down[i] else view
        larger = bool((extent[i] <= torch.tensor(view_size)).all())
        found = agreement(view, CropGeometry(*(field[i] for field in geometry)))
        assert found.error < (EXACT if larger else FILTER)
