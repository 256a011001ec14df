"""Images whose pixels say where they come from, sent through a tracked pipeline.

A ramp's value is its own source position, so a view's pixel shows which position it was made from.
"""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from torch import nn

from local_distill import to_source
from local_distill.transforms import geometry_kernels, track

KINDS = ("exact", "affine", "perspective", "resize")


class SpoilRing(nn.Module):
    """Sets the outermost pixels to NaN.

    Resampling clamps its filter at the border, which bends a ramp there. With this before it, every
    view pixel whose filter reaches the border is NaN and takes no part in the comparison.
    """

    def forward(self, image):
        if isinstance(image, PIL.Image.Image):
            array = np.array(image)
            array[[0, -1]] = np.nan
            array[:, [0, -1]] = np.nan
            return PIL.Image.fromarray(array)
        image = image.clone()
        image[..., [0, -1], :] = torch.nan
        image[..., :, [0, -1]] = torch.nan
        return image


def planes(height, width):
    """The x and the y of every pixel's centre, and ones: all that padding spoils is not one."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return [x + 0.5, y + 0.5, torch.ones(height, width)]


def pixels(view):
    """(h, w) float64 of a view with one channel."""
    view = view if isinstance(view, torch.Tensor) else torch.from_numpy(np.array(view))
    return view.double().reshape(view.shape[-2:])


def predicted_centers(geometry):
    """(h, w, 2) source position (x, y) of every view pixel's centre."""
    height, width = geometry.view_size.tolist()
    centers = torch.stack(planes(height, width)[:2], -1).reshape(-1, 2)
    return to_source(geometry, centers).reshape(height, width, 2)


class Step(NamedTuple):
    """One transform as it was recorded: what came before it, and output → input."""

    before: torch.Tensor
    matrix: torch.Tensor

    @property
    def kind(self):
        """Which of `KINDS` the matrix shows."""
        m = self.matrix
        if bool((m[2, :2] != 0).any()):
            return "perspective"
        turns = ([[1, 0], [0, 1]], [[0, 1], [1, 0]])
        if m[:2, :2].abs().tolist() in turns and bool((m[:2, 2] % 1 == 0).all()):
            return "exact"
        return "resize" if bool((m[0, 1] == 0) & (m[1, 0] == 0)) else "affine"


@contextmanager
def recorded_steps():
    """The `Step`s that geometries go through within it."""
    steps, append = [], geometry_kernels.append_step

    def record(geometry, step, view):
        before = torch.tensor(geometry.tolist()[:9], dtype=torch.float64).view(3, 3)
        steps.append(Step(before, torch.tensor(step, dtype=torch.float64).view(3, 3)))
        return append(geometry, step, view)

    geometry_kernels.append_step = record
    try:
        yield steps
    finally:
        geometry_kernels.append_step = append


class Shown(NamedTuple):
    """What a pipeline did to a ramp, per clean pixel of the view.

    Clean pixels show the source alone: no padding, no spoiled border.
    """

    shown: torch.Tensor  # (n, 2) source position (x, y) that the value says
    predicted: torch.Tensor  # (n, 2) source position that the geometry says
    points: torch.Tensor  # (n, 2) pixel centres in the view
    steps: list  # what the geometry went through
    geometry: object
    clean: torch.Tensor  # (h, w) bool

    @property
    def error(self):
        """(n, 2) in source px."""
        return self.shown - self.predicted


def send_ramp(pipeline, height, width, *, pil, seed, dtype=torch.float64):
    """Send both ramps and the plane of ones through a pipeline under one seed."""
    tracked = track(pipeline, trust=[SpoilRing])
    outputs = []
    for plane in planes(height, width):
        image = plane.to(dtype)[None]
        if pil:
            image = PIL.Image.fromarray(plane.numpy().astype(np.float32))
        torch.manual_seed(seed)
        with recorded_steps() as steps:
            view, geometry = tracked(image)
        outputs.append(pixels(view))
    x, y, ones = outputs
    assert tuple(geometry.view_size.tolist()) == tuple(ones.shape)
    assert tuple(geometry.source_size.tolist()) == (height, width)
    clean = (ones - 1).abs() < 1e-6  # False for NaN
    flat = clean.reshape(-1)
    predicted = predicted_centers(geometry).double().reshape(-1, 2)[flat]
    points = torch.stack(planes(*ones.shape)[:2], -1).reshape(-1, 2).double()[flat]
    return Shown(
        torch.stack((x, y), -1).reshape(-1, 2)[flat], predicted, points, steps, geometry, clean
    )


def _divided(matrix, points):
    """Apply a homography of either sign: a part of one need not have the whole one's."""
    lifted = torch.cat((points, torch.ones_like(points[:, :1])), -1) @ matrix.T
    return lifted[:, :2] / lifted[:, 2:]


def error_bounds(shown, per_step):
    """(n, 2) what the recorded steps may add up to, in source px.

    A step that errs by ``per_step[kind]`` px of *its input* errs in the source by that times the
    stretch of what came before it. Where that was a perspective, the positions that the step
    interpolates between do not lie on a line any more: half the curvature times the filter's
    variance comes on top (doubled, as the curvature changes within the filter).
    """
    bound = torch.full_like(shown.predicted, per_step["exact"])
    for index, step in enumerate(shown.steps):
        if step.kind == "exact":
            continue
        after = torch.eye(3, dtype=torch.float64)
        for later in shown.steps[index:]:
            after = after @ later.matrix
        at = _divided(after, shown.points)  # in the step's input
        move = 0.25
        east, south = at.new_tensor([move, 0.0]), at.new_tensor([0.0, move])
        here = _divided(step.before, at)
        sides = [_divided(step.before, at + way) for way in (east, -east, south, -south)]
        stretch = ((sides[0] - sides[1]).abs() + (sides[2] - sides[3]).abs()) / (2 * move)
        bound = bound + per_step[step.kind] * stretch
        for axis in (0, 1):
            bend = (sides[2 * axis] + sides[2 * axis + 1] - 2 * here).abs() / move**2
            # a triangle as wide as the coarser grid has a variance of a sixth; bilinear, ≤ 1/4
            span = max(1.0, float(step.matrix[axis, axis])) if step.kind == "resize" else 1.0
            bound = bound + bend * (span**2 / 6 + 0.25)
    return bound
