"""What the view objectives compare: unit rows of the views, pair by pair, whole or through matches.

A whole view is a view of one token, answered by the one token of every other view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from local_distill._check import Axes, check_floating, check_sequence
from local_distill._precision import at_least_float32
from local_distill.errors import ShapeError
from local_distill.losses._pairs import Pair, check_index, check_matches_of_pairs
from local_distill.losses._unit_rows import unit_rows
from local_distill.matching.match_views import cross_view_pairs
from local_distill.structures import Matches

# (v, q): what answers view v's tokens in view q; (None, q): the tokens of view q as they are.
KeyName = tuple[int | None, int]


class ViewRows(NamedTuple):
    """Rows of length 1, all in one dtype; those that no pair looks at are 0.

    Attributes:
        student: view v → (l, b, s_v, d).
        mass: pair → (b, s_v), how much of each student token is answered; without gradient.
        answer: pair → the name of what its tokens are compared with.
        own: view v → the name of the targets' own tokens of that view; empty unless asked for.
        keys: name → (b, n, d).
    """

    student: dict[int, Tensor]
    mass: dict[Pair, Tensor]
    answer: dict[Pair, KeyName]
    own: dict[int, KeyName]
    keys: dict[KeyName, Tensor]


def view_rows(
    student: Sequence[Tensor | None],
    targets: Sequence[Tensor | None],
    matches: Mapping[Pair, Matches] | None,
    *,
    layered: bool,
    with_own: bool,
    detach_targets: bool,
) -> ViewRows:
    """Check the views and bring them to `ViewRows`.

    Args:
        student: per view (b, d), with matches (b, s_v, d); where ``layered``, with an axis of
            layers before. None for a view that no match names.
        targets: per view (b, d), with matches (b, t_q, d).
        matches: by (student view, target view); None: whole views, all pairs of different ones.
        layered: whether the student's views have an axis of layers.
        with_own: also take up the targets' own tokens of each student view, where there are any.
        detach_targets: whether the targets receive no gradient.
    """
    check_sequence("student", student, "a tensor")
    check_sequence("targets", targets, "a tensor")
    if detach_targets:
        targets = [view.detach() if isinstance(view, Tensor) else view for view in targets]
    if matches is None:
        return _whole_views(student, targets, layered=layered, with_own=with_own)
    return _matched_views(student, targets, matches, layered=layered, with_own=with_own)


def _whole_views(
    student: Sequence[Tensor | None],
    targets: Sequence[Tensor | None],
    *,
    layered: bool,
    with_own: bool,
) -> ViewRows:
    axes = Axes()
    own_layers = []
    for v, view in enumerate(student):
        bound = _bind(axes, f"student[{v}]", view, "l b d" if layered else "b d")
        own_layers.append(bound if layered else bound[None])
    bound_targets = [_bind(axes, f"targets[{q}]", view, "b d") for q, view in enumerate(targets)]
    pairs = cross_view_pairs(len(student), len(targets))
    if not pairs:
        raise ShapeError(
            f"{len(student)} student and {len(targets)} target views make no pair of different "
            "views; give two views"
        )
    dtype = _common_dtype([*own_layers, *bound_targets])
    ones = own_layers[0].new_ones((axes["b"], 1), dtype=dtype)
    return ViewRows(
        {v: unit_rows(view[:, :, None]).to(dtype) for v, view in enumerate(own_layers)},
        dict.fromkeys(pairs, ones),
        {(v, q): (None, q) for v, q in pairs},
        {v: (None, v) for v in range(min(len(student), len(targets)))} if with_own else {},
        {(None, q): unit_rows(view[:, None]).to(dtype) for q, view in enumerate(bound_targets)},
    )


def _matched_views(
    student: Sequence[Tensor | None],
    targets: Sequence[Tensor | None],
    matches: Mapping[Pair, Matches],
    *,
    layered: bool,
    with_own: bool,
) -> ViewRows:
    check_matches_of_pairs(matches, len(student), len(targets), theirs="target")
    axes = Axes()
    own_layers: dict[int, Tensor] = {}
    bound_targets: dict[int, Tensor] = {}
    for pair, found in matches.items():
        v, q = pair
        names = f"l b s{v} d" if layered else f"b s{v} d"
        bound = _bind(axes, f"student[{v}]", student[v], names)
        own_layers[v] = bound if layered else bound[None]
        bound_targets[q] = _bind(axes, f"targets[{q}]", targets[q], f"b t{q} d")
        axes.bind(f"matches[{pair}].weight", found.weight, f"b s{v} k{v},{q}")
        label = f"matches[{pair}].teacher_index"
        index = axes.bind(label, found.teacher_index, f"b s{v} k{v},{q}")
        check_index(label, index, f"targets[{q}]", axes[f"t{q}"])
    own: dict[int, KeyName] = {}
    for v in own_layers if with_own else ():
        if v < len(targets) and targets[v] is not None:
            bound_targets[v] = _bind(axes, f"targets[{v}]", targets[v], f"b s{v} d")
            own[v] = (None, v)
    dtype = _common_dtype([*own_layers.values(), *bound_targets.values()])
    mass = {pair: found.weight.sum(-1).detach().to(dtype) for pair, found in matches.items()}
    seen: dict[int, Tensor] = {}
    for (v, _), amount in mass.items():
        # != and not >: a weight of NaN is to be seen in the loss
        seen[v] = seen[v] | (amount != 0) if v in seen else amount != 0
    keys: dict[KeyName, Tensor] = {
        (v, q): unit_rows(found.gather(bound_targets[q]), bound_targets[q].dtype).to(dtype)
        for (v, q), found in matches.items()
    }
    # Before the division, not after: 0 · NaN is NaN, in the gradient too.
    for v, name in own.items():
        keys[name] = unit_rows(torch.where(seen[v][..., None], bound_targets[v], 0.0)).to(dtype)
    return ViewRows(
        {
            v: unit_rows(torch.where(seen[v][..., None], view, 0.0)).to(dtype)
            for v, view in own_layers.items()
        },
        mass,
        {pair: pair for pair in matches},
        own,
        keys,
    )


def _bind(axes: Axes, name: str, value: object, names: str) -> Tensor:
    bound = check_floating(name, axes.bind(name, value, names))
    if bound.shape[-1] == 0:
        raise ShapeError(f"`{name}` has features of dimension 0: shape {tuple(bound.shape)}")
    return bound


def _common_dtype(values: Sequence[Tensor]) -> torch.dtype:
    wide = any(at_least_float32(value[..., :0]).dtype == torch.float64 for value in values)
    return torch.float64 if wide else torch.float32


def nothing_to_compare(student: Sequence[Tensor | None], *, layered: bool) -> Tensor:
    """(l,) zeros that hang on the student's graph, so that backward works and NaN stays out."""
    for view in student:
        if view is not None:
            values = at_least_float32(view if layered else view[None])
            return torch.where(torch.zeros_like(values, dtype=torch.bool), values, 0.0).sum(
                tuple(range(1, values.dim()))
            )
    return torch.zeros(1)
