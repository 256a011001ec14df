"""Consistency of propagated tokens with the teacher's: PixPro."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import Axes, check_at_least, check_floating, check_positive
from local_distill._finite_sequential import FiniteSequential
from local_distill._precision import at_least_float32, no_autocast
from local_distill.errors import ShapeError
from local_distill.losses._matched_features import check_feature_pairs
from local_distill.losses._pairs import (
    Normalize,
    Pair,
    Processes,
    check_normalize,
    graph_zero,
    pair_scales,
)
from local_distill.losses._unit_rows import unit_rows
from local_distill.structures import Matches

__all__ = ["PixelConsistencyLoss", "PixelPropagation", "pixel_consistency_loss"]


class PixelPropagation(nn.Module):
    """Smooths a view's tokens: each becomes a sum of all that are similar to it.

    .. math:: y_i = Σ_j max(cos(x_i, x_j), 0)^γ · g(x_j) / |g(x_j)|

    with g of ``num_layers`` linear layers, BatchNorm and ReLU between them. It stands between the
    student's projector and the loss; the teacher has none. A batch that would leave a running
    statistic of g not finite leaves all of them as they were, without a host sync;
    ``transform.skipped`` counts it.

    Args:
        dim: d, the features' dimension, and that of every layer of g.
        gamma: γ, above 0; a sharper similarity the larger it is.
        num_layers: linear layers of g; 0: g(x) = x.
        normalize_values: divide g(x_j) by its length, as the published code does. False: as the
            paper's equation reads, so that longer tokens weigh more.

    Raises:
        ConfigError: a dimension below 1, a negative number of layers, γ not above 0.

    Example:
        >>> propagate = PixelPropagation(dim=2, num_layers=0)
        >>> propagate(torch.tensor([[[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]]))
        tensor([[[ 1.3536,  0.3536],
                 [ 1.2071,  0.7071],
                 [-1.0000,  0.0000]]])

    Source: "Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual
    Representation Learning" (PixPro, CVPR 2021), equations 3 and 4; γ = 2 and one layer are its
    best settings.

    Deviations from the authors' code: for γ below 1 it adds 1e-6 to all similarities, so that those
    of 0 have a gradient that is finite; here these count 0 and have a gradient of 0.
    """

    def __init__(
        self,
        dim: int,
        *,
        gamma: float = 2.0,
        num_layers: int = 1,
        normalize_values: bool = True,
    ) -> None:
        super().__init__()
        self.dim = check_at_least("dim", dim, 1)
        self.gamma = check_positive("gamma", gamma)
        self.num_layers = check_at_least("num_layers", num_layers, 0)
        self.normalize_values = bool(normalize_values)
        layers: list[nn.Module] = []
        for layer in range(num_layers):
            if layer:
                layers += [nn.BatchNorm1d(dim), nn.ReLU()]
            layers.append(nn.Linear(dim, dim))
        # A NaN must not stay in BatchNorm's statistics.
        self.transform = FiniteSequential(*layers) if num_layers > 1 else nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """The propagated tokens.

        Args:
            features: (b, n, d), of one view.

        Returns:
            (b, n, d) in at least float32.

        Raises:
            ShapeError: other axes, or another d than that of this module.
        """
        check_floating("features", Axes().bind("features", features, "b n d"))
        if features.shape[2] != self.dim:
            raise ShapeError(
                f"axis `d` is {features.shape[2]} in `features` (shape {tuple(features.shape)}) but"
                f" this module was made for dim={self.dim}"
            )
        # BatchNorm's statistics are over the tokens of all images.
        values = self.transform(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        values = unit_rows(values) if self.normalize_values else at_least_float32(values)
        units = unit_rows(features)
        with no_autocast(units):
            # relu's gradient is 0 where it is 0, whatever comes back: for γ < 1 that is infinite.
            weight = (units @ units.mT).relu() ** self.gamma
            return weight @ values

    def extra_repr(self) -> str:
        """The settings, for print."""
        return (
            f"dim={self.dim}, gamma={self.gamma}, num_layers={self.num_layers}, "
            f"normalize_values={self.normalize_values}"
        )


def pixel_consistency_loss(
    student: Tensor, teacher: Tensor, matches: Matches, *, normalize: Normalize = "image"
) -> Tensor:
    """Minus the cosine between student tokens and the teacher tokens that answer them, for a pair.

    .. math:: L = -Σ_{ij} w_ij cos(y_i, x'_j) / N

    with N by ``normalize``. Pairs of tokens weigh w_ij, not tokens: `RadiusMatcher` weighs all
    its pairs 1/t, which cancels in Σ w·cos / Σ w, so that with ``"image"`` this is the plain mean
    over all pairs of an image that lie within the radius, then over the images: PixPro's.

    Args:
        student: (b, s, d) features, such as those of `PixelPropagation`.
        teacher: (b, t, d) features, of any length; they receive no gradient.
        matches: for this pair of views.
        normalize: ``"all"``: N = b·s; ``"matched"``: N = Σ w; ``"image"``: each image by its own
            mass, then the mean over the images. Where there is no mass the loss is 0.

    Returns:
        A scalar between -1 and 1 in at least float32, differentiable in ``student``. No
        collectives.

    Raises:
        ShapeError: axes that do not fit; matches that point beyond the teacher's tokens.
        ConfigError: an unknown normalisation.

    Example:
        >>> student = torch.tensor([[[3.0, 0.0], [0.0, 0.1]]])
        >>> teacher = torch.tensor([[[1.0, 0.0], [0.0, -5.0]]])
        >>> index = torch.tensor([[[0, 1], [0, 1]]])
        >>> weight = torch.tensor([[[0.5, 0.5], [0.5, 0.0]]])  # cosines 1, 0 and 0
        >>> pixel_consistency_loss(student, teacher, Matches(index, weight, torch.zeros(1, 2)))
        tensor(-0.3333)

    Source: PixPro (CVPR 2021), equation 5.
    """
    check_feature_pairs([student], [teacher], {(0, 0): matches})
    return _paired_cosines(
        [student],
        [teacher],
        {(0, 0): matches},
        check_normalize(normalize),
        Processes(active=False),
    )


class PixelConsistencyLoss(nn.Module):
    """`pixel_consistency_loss` over all pairs of views of a step.

    Convention: pairs are averaged; a pair without a match gives 0. PixPro names both ways between
    two views: ``matches`` with the keys (0, 1) and (1, 0). With one token a view and
    `Matches.identity` this is BYOL's loss up to 2 - 2·cos, PixPro's instance term. With a process
    group the loss returns the whole batch's value on every rank, with this rank's share of the
    gradient, and assumes that gradients are averaged over processes, as DDP does; in evaluation and
    under ``no_grad`` nothing is sent.

    Args:
        normalize: see `pixel_consistency_loss`; ``"image"`` is PixPro's.
        process_group: the processes over which gradients are averaged; None: all.

    Raises:
        ConfigError: an unknown normalisation.

    Example:
        >>> propagate, loss = PixelPropagation(dim=4), PixelConsistencyLoss()
        >>> views = [torch.randn(2, 9, 4), torch.randn(2, 6, 4)]
        >>> weight = torch.rand(2, 9, 6)
        >>> index = torch.arange(6).expand(2, 9, 6)
        >>> matches = {(0, 1): Matches(index, weight, torch.zeros(2, 9))}
        >>> loss([propagate(view) for view in views], views, matches).shape
        torch.Size([])

    Source: "Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual
    Representation Learning" (PixPro, CVPR 2021), equation 5.

    Deviations from the authors' code: the paper adds the two ways between a pair of views, its code
    doubles that sum; here they are averaged, so theirs is 2 and 4 times as large. It divides by the
    number of pairs + 1e-6. The teacher's grid may differ from the student's.
    """

    def __init__(
        self,
        *,
        normalize: Normalize = "image",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.normalize = check_normalize(normalize)
        self.process_group = process_group

    def forward(
        self,
        student: Sequence[Tensor | None],
        teacher: Sequence[Tensor | None],
        matches: Mapping[Pair, Matches],
    ) -> Tensor:
        """The loss of a step.

        Args:
            student: per view (b, s_v, d) features; None for a view that no pair names.
            teacher: per view (b, t_q, d) features; None for a view that no pair names.
            matches: ``{(v, q): Matches}``; its keys are the pairs.

        Returns:
            A scalar in at least float32.

        Raises:
            ShapeError: see `pixel_consistency_loss`; the message names the view.
        """
        check_feature_pairs(student, teacher, matches)
        learning = self.training and torch.is_grad_enabled()
        processes = Processes(learning, self.process_group)
        return _paired_cosines(student, teacher, matches, self.normalize, processes)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"normalize={self.normalize!r}"


def _paired_cosines(
    student: Sequence[Tensor | None],
    teacher: Sequence[Tensor | None],
    matches: Mapping[Pair, Matches],
    normalize: Normalize,
    processes: Processes,
) -> Tensor:
    """Mean over the pairs of each pair's normalised -Σ w·cos.

    The cosine is linear in the teacher's unit vectors, so their weighted sum answers for them all:
    the table of pairs of tokens is not needed, and a student view is read once.
    """
    scales = pair_scales(matches, normalize, processes)
    total: Tensor | None = None
    for v, features in enumerate(student):
        own = [pair for pair in matches if pair[0] == v]
        if features is None or not own:
            continue
        values = at_least_float32(features)
        target = torch.zeros_like(values)
        mass = values.new_zeros(values.shape[:-1])
        for pair in own:
            scale = scales[pair].to(values.dtype)
            target = target + scale[:, None, None] * _answers(teacher[pair[1]], matches[pair])
            mass = mass + matches[pair].weight.sum(-1).to(values.dtype)
        # Before it is brought to length 1, not after: 0 · NaN is NaN, in the gradient too.
        values = torch.where((mass == 0)[..., None], 0.0, values)
        part = -(unit_rows(values) * target).sum()
        total = part if total is None else total + part
    if total is None:
        total = graph_zero(student)
    return processes.whole_batch(total)


@torch.no_grad()
def _answers(teacher: Tensor | None, matches: Matches) -> Tensor:
    """(b, s, d): the weighted sum of the teacher's unit vectors for each student token."""
    assert teacher is not None  # checked with the pairs
    return matches.gather(unit_rows(teacher.detach()))
