"""Right matchers in the fewest lines, without blocks or lattices: the kit finds them sound."""

import torch
from torch import nn

from local_distill._geometric_inputs import geometric_inputs
from local_distill._precision import no_autocast
from local_distill.geometry import inside, wide_centers, wide_diagonals
from local_distill.matching._inputs import feature_inputs
from local_distill.matching._results import hard_matches, no_matches
from local_distill.matching._unit_features import unit_features


class PlainNearest(nn.Module):
    """The teacher token whose centre is nearest in the source, from the table of all distances.

    max_distance: in larger cell diagonals. last: ties go to the last, which is wrong.
    """

    def __init__(self, max_distance=0.5, last=False):
        super().__init__()
        self.max_distance, self.last = max_distance, last

    def forward(self, student, teacher):
        distance, cells = distance_tables(student, teacher)
        b, s, t = distance.shape
        if s * t == 0:
            return no_matches(b, s, min(t, 1), student.geometry.matrix.detach())
        index = t - 1 - distance.flip(2).argmin(2) if self.last else distance.argmin(2)
        cost = (distance / cells).gather(2, index[..., None])[..., 0]
        return hard_matches(index, cost < self.max_distance, cost.to(student.geometry.matrix.dtype))


class PlainGated(nn.Module):
    """The teacher token of largest cosine, among those nearer than ``radius`` in the source."""

    def __init__(self, radius=1.0):
        super().__init__()
        self.radius = radius

    def forward(self, student, teacher):
        (f, _), (g, _) = feature_inputs(student, teacher)
        distance, cells = distance_tables(student, teacher)
        b, s, t = distance.shape
        if s * t == 0:
            return no_matches(b, s, min(t, 1), f)
        (f, f_good), (g, g_good) = unit_features(f), unit_features(g)
        near = (distance / cells < self.radius) & f_good[:, :, None] & g_good[:, None]
        with no_autocast(f):
            cost = torch.where(near, 1 - f @ g.mT, torch.inf)
        best = cost.min(2)
        return hard_matches(best.indices, best.values < torch.inf, best.values)


def distance_tables(student, teacher):
    """(b, s, t) float64: distances in source pixels, +inf for tokens outside; the larger cell."""
    s_geometry, s_grid, t_geometry, t_grid = geometric_inputs(student, teacher)
    ours, theirs = (
        (wide_centers(geometry, grid).detach(), wide_diagonals(geometry, grid).detach())
        for geometry, grid in ((s_geometry, s_grid), (t_geometry, t_grid))
    )
    apart = (ours[0][:, :, None] - theirs[0][:, None]).square().sum(-1).sqrt()
    size = s_geometry.source_size
    allowed = inside(ours[0], size)[:, :, None] & inside(theirs[0], size)[:, None]
    return torch.where(allowed, apart, torch.inf), torch.maximum(
        ours[1][:, :, None], theirs[1][:, None]
    )
