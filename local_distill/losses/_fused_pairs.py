"""The pairs of views of a step, brought to the one call of the fused prototype loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from local_distill._logits import Logits
from local_distill._precision import at_least_float32, no_autocast
from local_distill.kernels.prototype_cross_entropy import prototype_cross_entropy
from local_distill.structures import Matches, PrototypeLogits, TeacherTargets

# What one teacher view answers: its number, the matches, (b,) what each image's sum is times.
Answer = tuple[int, Matches, Tensor]


class _Network(NamedTuple):
    """What the views of one product have in common."""

    weight: Tensor
    bias: Tensor | None
    offset: Tensor | None = None
    temp: float = 1.0

    def is_also(self, other: _Network) -> bool:
        """Whether these are the very same tensors, and an equal temperature."""
        return (
            self.weight is other.weight
            and self.bias is other.bias
            and self.offset is other.offset
            and self.temp == other.temp
        )


def can_fuse(
    student_logits: Mapping[int, Logits], targets: Iterable[TeacherTargets]
) -> TypeGuard[Mapping[int, PrototypeLogits]]:
    """Whether all logits come as products, and none of them in a transform of functions."""
    given = [*student_logits.values(), *(target.logits for target in targets)]
    products = [logits for logits in given if isinstance(logits, PrototypeLogits)]
    return len(products) == len(given) and not any(
        _is_in_transform(part) for logits in products for part in (logits.features, logits.weight)
    )


def _is_in_transform(values: Tensor) -> bool:
    """Whether it is in one such as vmap, for which the operator has no rule."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(values)


def fused_cross_entropy(
    student_logits: Mapping[int, PrototypeLogits],
    answers: Mapping[int, Sequence[Answer]],
    targets: Mapping[int, TeacherTargets],
    student_temp: float,
) -> Tensor:
    """What `_pairs.plain_cross_entropy` gives, without a table of logits.

    Views with the same prototypes are worked on together; all of them, as a rule. The loss is a sum
    over pairs of views, so pairs of other prototypes are a call of their own.
    """
    groups = _groups(student_logits, answers, targets)
    with no_autocast(groups[0][0].weight):
        parts = [
            _of_networks(ours, theirs, pairs, student_logits, targets, student_temp)
            for ours, theirs, pairs in groups
        ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _groups(
    student_logits: Mapping[int, PrototypeLogits],
    answers: Mapping[int, Sequence[Answer]],
    targets: Mapping[int, TeacherTargets],
) -> list[tuple[_Network, _Network, list[tuple[int, Answer]]]]:
    groups: list[tuple[_Network, _Network, list[tuple[int, Answer]]]] = []
    for v, found in answers.items():
        ours = _Network(student_logits[v].weight, student_logits[v].bias)
        for answer in found:
            target = targets[answer[0]]
            logits = _products(target)
            theirs = _Network(logits.weight, logits.bias, target.offset, target.temp)
            for known_ours, known_theirs, pairs in groups:
                if known_ours.is_also(ours) and known_theirs.is_also(theirs):
                    pairs.append((v, answer))
                    break
            else:
                groups.append((ours, theirs, [(v, answer)]))
    return groups


def _of_networks(
    ours: _Network,
    theirs: _Network,
    pairs: Sequence[tuple[int, Answer]],
    student_logits: Mapping[int, PrototypeLogits],
    targets: Mapping[int, TeacherTargets],
    student_temp: float,
) -> Tensor:
    views = list(dict.fromkeys(v for v, _ in pairs))
    teacher_views = list(dict.fromkeys(answer[0] for _, answer in pairs))
    student = torch.cat([student_logits[v].features for v in views], 1)
    teacher = torch.cat([_products(targets[q]).features for q in teacher_views], 1)
    firsts, first = {}, 0
    for q in teacher_views:
        firsts[q] = first
        first += _products(targets[q]).features.shape[1]
    indices, shares = [], []
    for v in views:
        found = [answer for w, answer in pairs if w == v]
        indices.append(torch.cat([m.teacher_index + firsts[q] for q, m, _ in found], -1))
        shares.append(torch.cat([m.weight * scale[:, None, None] for _, m, scale in found], -1))
    most = max(index.shape[-1] for index in indices)
    index = torch.cat([_filled(one, most) for one in indices], 1)
    share = torch.cat([_filled(one, most) for one in shares], 1)
    student, student_weight = _with_bias(student, ours.weight, ours.bias)
    teacher, teacher_weight = _with_bias(teacher, theirs.weight, theirs.bias)
    # Numbers of a tensor, as one that changes from step to step would be another graph each time.
    one = at_least_float32(share.new_ones(()))
    return prototype_cross_entropy(
        student,
        student_weight,
        teacher,
        teacher_weight,
        theirs.offset,
        index,
        share,
        student_scale=one / student_temp,
        teacher_scale=one / theirs.temp,
    )


def _products(target: TeacherTargets) -> PrototypeLogits:
    assert isinstance(target.logits, PrototypeLogits)  # `can_fuse` has looked
    return target.logits


def _filled(values: Tensor, candidates: int) -> Tensor:
    """(b, s, k) with candidates of no weight behind, up to a number of them."""
    return torch.nn.functional.pad(values, (0, candidates - values.shape[-1]))


def _with_bias(features: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The bias as one more dimension, in which all features are 1."""
    if bias is None:
        return features, weight
    ones = features.new_ones(*features.shape[:-1], 1)
    return torch.cat((features, ones), -1), torch.cat((weight, bias[:, None].to(weight.dtype)), 1)
