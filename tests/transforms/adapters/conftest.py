"""Ramps through a real library: what each view pixel shows, against what the geometry predicts."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from helpers.ramps import planes
from torch import Tensor

from local_distill import CropGeometry, to_source


class Agreement(NamedTuple):
    error: float  # largest distance in x or y, in source pixels
    pixels: int  # how many were compared


def ramps(height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(3, h, w): the x and the y of every pixel's centre, and ones: padding spoils them."""
    return torch.stack(planes(height, width)).to(dtype)


def agreement(view: Tensor, geometry: CropGeometry, margin: float | None = None) -> Agreement:
    """How far one transformed image of ramps is from one unbatched geometry.

    Only pixels that show the source alone: neither padding nor anything nearer to a border than
    ``margin`` view pixels, as resampling clamps its filter there, which bends a ramp.
    """
    assert geometry.view_size.tolist() == list(view.shape[-2:])
    height, width = view.shape[-2:]
    centers = ramps(height, width)[:2].reshape(2, -1).T
    wide = geometry._replace(matrix=geometry.matrix.double())
    predicted = to_source(wide, centers).T.reshape(2, height, width)
    if margin is None:
        inverse = torch.linalg.inv(wide.matrix)
        margin = float(torch.linalg.svdvals(inverse[:2, :2] / inverse[2, 2]).max()) + 1
    reach = math.ceil(margin)
    spoiled = ((view[2].double() - 1).abs() > 1e-4).double()[None, None]
    spoiled = torch.nn.functional.pad(spoiled, (reach,) * 4, value=1.0)
    spoiled = torch.nn.functional.max_pool2d(spoiled, 2 * reach + 1, stride=1)[0, 0]
    rows, columns = geometry.source_size.tolist()
    inside = (predicted[0] > 1) & (predicted[0] < columns - 1)
    inside &= (predicted[1] > 1) & (predicted[1] < rows - 1)
    compared = (spoiled == 0) & inside
    if not compared.any():
        return Agreement(0.0, 0)
    off = (view[:2].double() - predicted).abs().amax(0)[compared]
    return Agreement(float(off.max()), int(compared.sum()))


@pytest.fixture(scope="session", name="ramps")
def ramps_fixture():
    return ramps


@pytest.fixture(scope="session", name="agreement")
def agreement_fixture():
    return agreement
