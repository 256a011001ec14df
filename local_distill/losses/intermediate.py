"""SDSSL: lower layers learn from the last layer of the other view."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from local_distill._check import Axes, check_at_least, check_floating, check_sequence, check_weight
from local_distill._precision import no_autocast
from local_distill.errors import ConfigError, ShapeError
from local_distill.losses._pairs import Pair
from local_distill.losses.pairwise_objective import PairwiseObjective
from local_distill.structures import Matches

__all__ = ["IntermediateDistillationLoss", "IntermediateTerms"]


class IntermediateTerms(NamedTuple):
    """A loss and what it is made of, all on the student's graph.

    Attributes:
        loss: last + ratio·intermediate + detached_weight·detached.
        last: the objective of the last layer.
        intermediate: the weighted mean of the objective over the lower layers; 0 without any.
        detached: its mean over the predictions of detached projections; 0 where none are given.
    """

    loss: Tensor
    last: Tensor
    intermediate: Tensor
    detached: Tensor


class IntermediateDistillationLoss(nn.Module):
    """SDSSL's loss: every layer learns from the teacher's last layer of the other views.

    .. math:: L = O(s^{last}, t) + ratio·mean_{l<last} w_l O(s^l, sg t) + depth·mean_l O(p^l, sg t)

    with O the objective over all views, s^l the student's l-th layer through its own projector and
    predictor, t the last layer of the teacher, sg stopped gradients, and p^l the prediction of
    layer l from its *detached* projection. The last term trains the predictors of the lower layers
    while the ratio is small; where there is no predictor (SimCLR) it is left out.

    Convention: layers come in order, the last one last. The targets never receive a gradient from
    the lower layers, nor from the detached predictions; whether they do from the last layer is the
    objective's affair (``detach_targets``): MoCo v3 and BYOL have a teacher, SimCLR has none and
    takes ``[view[-1] for view in student_layers]``. ``ratio`` comes from the caller:
    ``schedules.cosine(step, start=0.0, end=1.0, total=steps)``, as published with end 1 for MoCo v3
    and 0.8 for BYOL and SimCLR. With a process group: as `PairwiseObjective`.

    With matches the same is done for patch tokens, which the paper has not: lower layers' tokens
    learn from those tokens of the last layer that answer them. Tokens without a match take no part.

    Args:
        objective: a `MocoV3Objective`, `ByolObjective`, `SimclrObjective`, or any callable
            ``(student, targets) -> scalar`` over lists of views of one layer; with matches it is
            called with ``matches=`` too. `PairwiseObjective` is called once for several layers.
        depth: the number of layers, the last included.
        layer_weights: w_l ≥ 0 of the lower layers, brought to a mean of 1; None: all alike.
        detached_weight: what stands for depth before the last term; None: depth, as published.

    Raises:
        ConfigError: a depth below 1; weights that are negative, all 0 or not depth - 1 of them.

    Example:
        >>> from local_distill.losses.view_objectives import MocoV3Objective
        >>> loss = IntermediateDistillationLoss(MocoV3Objective(), depth=3)
        >>> student = [torch.randn(3, 4, 8), torch.randn(3, 4, 8)]  # two views, three layers
        >>> teacher = [torch.randn(4, 8), torch.randn(4, 8)]
        >>> terms = loss(student, teacher, ratio=0.5, detached_layers=student)
        >>> torch.allclose(terms.loss,
        ...                terms.last + 0.5 * terms.intermediate + 3 * terms.detached)
        True

    Source: "Self-Distilled Self-Supervised Representation Learning" (SDSSL, WACV 2023).

    Deviations from the authors' code: any depth, where theirs is written for 12; any number of
    views; patch tokens.
    """

    def __init__(
        self,
        objective: Callable[..., Tensor],
        *,
        depth: int,
        layer_weights: Sequence[float] | None = None,
        detached_weight: float | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.depth = check_at_least("depth", depth, 1)
        self.layer_weights = _normalized(layer_weights, depth - 1)
        weight = float(depth) if detached_weight is None else detached_weight
        self.detached_weight = check_weight("detached_weight", weight)

    def forward(
        self,
        student_layers: Sequence[Tensor | None],
        teacher_last: Sequence[Tensor | None],
        *,
        ratio: float,
        detached_layers: Sequence[Tensor | None] | None = None,
        matches: Mapping[Pair, Matches] | None = None,
    ) -> IntermediateTerms:
        """The loss of a step.

        Args:
            student_layers: per view (depth, b, d), with matches (depth, b, n_v, d): predictions,
                for SimCLR projections. With matches None for a view that none names.
            teacher_last: per view (b, d), with matches (b, t_q, d): projections.
            ratio: weight of the lower layers, at least 0.
            detached_layers: as ``student_layers``, predictions of detached projections.
            matches: ``{(v, q): Matches}`` of student and teacher views; None: whole views.

        Returns:
            `IntermediateTerms`.

        Raises:
            ShapeError: axes that do not fit, a number of layers that is not ``depth``.
            ConfigError: a ratio that is negative or not finite.
        """
        ratio = check_weight("ratio", ratio)
        check_sequence("teacher_last", teacher_last, "a tensor")
        self._check_layers("student_layers", student_layers, matches is not None)
        last = self._per_layer(_part(student_layers, slice(-1, None)), teacher_last, matches)[0]
        taught: list[Sequence[Tensor | None]] = [_part(student_layers, slice(0, -1))]
        if detached_layers is not None:
            self._check_layers("detached_layers", detached_layers, matches is not None)
            _check_same(student_layers, detached_layers)
            taught.append(detached_layers)
        intermediate = detached = torch.zeros_like(last.detach())
        if self.depth > 1 or detached_layers is not None:
            stopped = [view.detach() if isinstance(view, Tensor) else view for view in teacher_last]
            # Together: they have the same targets, to be gathered and gone through once.
            values = self._per_layer(_joined(taught), stopped, matches)
            if self.depth > 1:
                lower = values[: self.depth - 1].unbind()
                intermediate = sum(
                    (w * v for w, v in zip(self.layer_weights, lower, strict=True)), intermediate
                ) / (self.depth - 1)
            if detached_layers is not None:
                detached = values[self.depth - 1 :].mean()
        loss = last + ratio * intermediate + self.detached_weight * detached
        return IntermediateTerms(loss, last, intermediate, detached)

    def extra_repr(self) -> str:
        """The settings, for print."""
        return f"depth={self.depth}, detached_weight={self.detached_weight}"

    def _per_layer(
        self,
        layers: Sequence[Tensor | None],
        targets: Sequence[Tensor | None],
        matches: Mapping[Pair, Matches] | None,
    ) -> Tensor:
        extra: dict[str, Any] = {} if matches is None else {"matches": matches}
        if isinstance(self.objective, PairwiseObjective):
            return self.objective.per_layer(layers, targets, **extra)
        number = next(view.shape[0] for view in layers if view is not None)
        one_by_one = [
            self.objective([None if view is None else view[i] for view in layers], targets, **extra)
            for i in range(number)
        ]
        return torch.stack(one_by_one)

    def _check_layers(self, name: str, layers: Sequence[Tensor | None], tokens: bool) -> None:
        check_sequence(name, layers, "a tensor of layers")
        if all(view is None for view in layers):
            raise ShapeError(f"`{name}` has no view")
        axes = Axes()
        for v, view in enumerate(layers):
            if view is None and tokens:
                continue
            label = f"{name}[{v}]"
            check_floating(label, axes.bind(label, view, f"l b n{v} d" if tokens else "l b d"))
        if axes["l"] != self.depth:
            raise ShapeError(
                f"`{name}` has {axes['l']} layers but this loss was made for depth={self.depth}"
            )


def _part(layers: Sequence[Tensor | None], which: slice) -> list[Tensor | None]:
    return [None if view is None else view[which] for view in layers]


def _joined(parts: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """The layers of the parts behind each other, view by view."""
    if len(parts) == 1:
        return list(parts[0])
    views: list[Tensor | None] = []
    for own in zip(*parts, strict=True):
        given = [layers for layers in own if layers is not None]
        if not given:
            views.append(None)
            continue
        # Autocast to one half precision refuses to put tensors of the other one together.
        with no_autocast(given[0]):
            views.append(torch.cat(given))
    return views


def _check_same(
    student_layers: Sequence[Tensor | None], detached_layers: Sequence[Tensor | None]
) -> None:
    if len(student_layers) != len(detached_layers):
        raise ShapeError(
            f"`detached_layers` has {len(detached_layers)} views but `student_layers` has "
            f"{len(student_layers)}"
        )
    for v, (own, other) in enumerate(zip(student_layers, detached_layers, strict=True)):
        wanted = None if own is None else tuple(own.shape)
        got = None if other is None else tuple(other.shape)
        if wanted != got:
            raise ShapeError(
                f"`detached_layers[{v}]` must have the shape {wanted} of `student_layers[{v}]`, "
                f"got {got}"
            )


def _normalized(weights: Sequence[float] | None, layers: int) -> tuple[float, ...]:
    """The weights of the lower layers, brought to a mean of 1."""
    if weights is None:
        return (1.0,) * layers
    given = [check_weight("layer_weights", weight) for weight in weights]
    if len(given) != layers or (layers and sum(given) == 0):
        raise ConfigError(
            f"`layer_weights` must have one weight for each of the {layers} lower layers, not all "
            f"of them 0, got {weights!r}"
        )
    return tuple(weight * layers / sum(given) for weight in given)
