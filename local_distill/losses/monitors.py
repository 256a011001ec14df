"""Whether the teacher is collapsing, in a few numbers that any loop can log."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from local_distill._check import Axes, check_floating, check_sequence
from local_distill._logits import no_rows, stand_in
from local_distill._precision import at_least_float32, widest
from local_distill.errors import ShapeError
from local_distill.matching._unit_features import unit_features
from local_distill.structures import TeacherTargets
from local_distill.targets._logits import check_valid, check_views, row_blocks

__all__ = ["DistillationMonitors", "distillation_monitors", "feature_std"]

# Tables of a block's size that are alive at once: scores, probabilities, their entropies' terms.
_TABLES = 4


class DistillationMonitors(NamedTuple):
    """0-d tensors; `feature_std` is None where no features were given.

    Attributes:
        teacher_entropy: mean over the tokens of their distribution's entropy, in nats. log c: all
            is uniform (collapse by too little sharpening); 0: every token is sure of one prototype.
        teacher_kl: mean over the tokens of KL(p_i || uniform) = log c - entropy, in nats; towards
            0 the teacher says nothing.
        marginal_entropy: entropy of the tokens' mean distribution, in nats. log c: the prototypes
            are used evenly; 0: one prototype has won (collapse by too little centering).
        information: marginal less teacher entropy, the mean of KL(p_i || mean p), in nats: what a
            token's distribution tells of the token. 0 in every collapse to a constant.
        prototype_usage: share of the prototypes that are the largest of at least one token.
        effective_usage: exp(marginal entropy) / c: 1 where all prototypes have the same mass, 1/c
            where one has all of it.
        feature_std: √d times the standard deviation over the tokens of the features of length 1,
            mean over the d dimensions: about 1 where they spread over the sphere, 0 where all are
            the same.

    Example:
        >>> numbers = DistillationMonitors(*(torch.tensor(float(i)) for i in range(6)))
        >>> numbers.as_dict("collapse/")["collapse/marginal_entropy"]
        tensor(2.)
    """

    teacher_entropy: Tensor
    teacher_kl: Tensor
    marginal_entropy: Tensor
    information: Tensor
    prototype_usage: Tensor
    effective_usage: Tensor
    feature_std: Tensor | None = None

    def as_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """{prefix + name: number} of those that are there, for a logger."""
        return {
            prefix + name: value
            for name, value in zip(self._fields, self, strict=True)
            if value is not None
        }


@torch.no_grad()
def distillation_monitors(
    teacher_targets: Sequence[TeacherTargets],
    features: Sequence[Tensor] | None = None,
    valid: Sequence[Tensor | None] | None = None,
) -> DistillationMonitors:
    r"""The numbers by which collapse is seen, of one step.

    .. math:: H = \text{mean}_i\, H(p_i), \quad KL = \log c - H, \quad \bar p = \text{mean}_i\, p_i

    .. math:: \text{usage} = |\{\text{argmax}_j\, p_{ij}\}| / c, \quad
        \text{effective usage} = e^{H(\bar p)} / c

    .. math:: \text{feature std} = \sqrt d\; \text{mean}_k\, \text{std}_i(x_{ik} / \|x_i\|)

    with i over the tokens of all images of all views of this process.

    Convention: a token whose distribution is not finite does not count, nor a feature that is not
    finite or of zero norm. Where nothing counts a number is 0. The standard deviation is that of
    the tokens at hand (over n, not n - 1). Nothing is sent to other processes: average what they
    log. How many prototypes can be used at all is limited by the tokens: with fewer tokens than
    prototypes, usage stays below 1 in the best of runs.

    Args:
        teacher_targets: per teacher view, as `Centering` gives them: logits (b, c) or (b, t, c).
        features: per view (b, d) or (b, n, d), such as the teacher's before its head; of any views.
        valid: per view (b,) or (b, t) bool, or None: tokens that count. Where it is given the
            features have to be of the same views and tokens.

    Returns:
        `DistillationMonitors` of 0-d tensors without gradient, in at least float32; nothing waits
        for the device until one of them is read.

    Raises:
        ShapeError: no view, axes that differ, ``valid`` that does not fit.

    Example:
        >>> from local_distill import Centering
        >>> logits = [torch.tensor([[20.0, 0.0, 0.0], [0.0, 20.0, 0.0]])]  # two of three are used
        >>> targets = Centering(num_prototypes=3)(logits, teacher_temp=0.1)
        >>> distillation_monitors(targets, [torch.eye(2)]).as_dict()
        {'teacher_entropy': tensor(0.),
         'teacher_kl': tensor(1.0986),
         'marginal_entropy': tensor(0.6931),
         'information': tensor(0.6931),
         'prototype_usage': tensor(0.6667),
         'effective_usage': tensor(0.6667),
         'feature_std': tensor(0.7071)}

    Source: entropy and KL as in DINO (ICCV 2021), figure 7; the features' deviation as in
    "Exploring Simple Siamese Representation Learning" (SimSiam, CVPR 2021), figure 2.

    Deviations from the papers: DINO's figure shows the KL between teacher and student, which is 0
    in either collapse; here it is that to the uniform distribution. SimSiam's deviation is times √d
    here, so that it means the same at every dimension.
    """
    c = _check_targets(teacher_targets, valid)
    entropy, mean, used = _spread(teacher_targets, valid, c)
    most = math.log(c)
    some = mean.sum() > 0
    entropy = entropy.clamp(0.0, most)
    marginal = torch.special.entr(mean).sum().clamp(0.0, most)
    dtype = _common_dtype([no_rows(target.logits) for target in teacher_targets])
    return DistillationMonitors(
        teacher_entropy=entropy.to(dtype),
        teacher_kl=torch.where(some, most - entropy, 0.0).to(dtype),
        marginal_entropy=marginal.to(dtype),
        information=(marginal - entropy).clamp_min(0.0).to(dtype),
        prototype_usage=used.to(dtype).mean(),
        effective_usage=torch.where(some, marginal.exp() / c, 0.0).to(dtype),
        feature_std=None if features is None else feature_std(features, valid),
    )


def _check_targets(
    teacher_targets: Sequence[TeacherTargets], valid: Sequence[Tensor | None] | None
) -> int:
    # A single one is a tuple, and so a sequence of other things.
    if isinstance(teacher_targets, TeacherTargets):
        raise ShapeError(
            "`teacher_targets` must be a list with one entry per view, got one TeacherTargets; "
            "wrap it as [teacher_targets]"
        )
    check_sequence("teacher_targets", teacher_targets, "a TeacherTargets")
    if not teacher_targets:
        raise ShapeError("`teacher_targets` is empty: give the targets of at least one view")
    check_views("valid", valid, "teacher_targets", len(teacher_targets))
    for view, target in enumerate(teacher_targets):
        if not isinstance(target, TeacherTargets):
            raise ShapeError(
                f"`teacher_targets[{view}]` must be a TeacherTargets, got {type(target).__name__}; "
                "targets such as Centering make it of logits"
            )
    logits = [
        stand_in(f"teacher_targets[{view}].logits", target.logits)
        for view, target in enumerate(teacher_targets)
    ]
    c = _check_rows("teacher_targets[{}].logits", logits, "c", "t", valid)
    if c == 0:
        raise ShapeError("axis `c` is 0 in `teacher_targets[0].logits`: there is no prototype")
    return c


def _check_rows(
    label: str,
    values: Sequence[object],
    last: str,
    tokens: str,
    valid: Sequence[Tensor | None] | None,
) -> int:
    """The last axis's size, after its being the same in all views is checked."""
    axes = Axes()
    for view, part in enumerate(values):
        name = label.format(view)
        local = isinstance(part, Tensor) and part.dim() == 3
        # Images and tokens are counted view by view: only the last axis is common.
        wanted = f"b{view} {tokens}{view} {last}" if local else f"b{view} {last}"
        bound = check_floating(name, axes.bind(name, part, wanted))
        if valid is not None:
            check_valid(f"valid[{view}]", valid[view], name, bound)
    return axes[last]


def _spread(
    teacher_targets: Sequence[TeacherTargets], valid: Sequence[Tensor | None] | None, c: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean entropy, mean distribution (c,), and which prototypes are some token's largest (c,)."""
    like = widest(no_rows(teacher_targets[0].logits).new_zeros(()))
    total, entropy, count = like.new_zeros(c), like, like
    # Tokens that do not count name a prototype of their own.
    used = torch.zeros(c + 1, dtype=torch.bool, device=like.device)
    for view, target in enumerate(teacher_targets):
        keep = None if valid is None else valid[view]
        for rows, counted in row_blocks(target.logits, keep, tables=_TABLES):
            probs = TeacherTargets(rows, target.offset, target.temp).probs()
            good = probs.isfinite().all(-1)
            if counted is not None:
                good = good & counted
            probs = torch.where(good[:, None], probs, 0.0)
            # Sums over many blocks, in the widest type; within a block there are few rows.
            entropy = entropy + widest(torch.special.entr(probs).sum(-1)).sum()
            total = total + widest(probs.sum(0))
            count = count + good.sum()
            used = used.scatter(0, torch.where(good, probs.argmax(-1), c), True)
    count = count.clamp_min(1.0)
    return entropy / count, total / count, used[:c]


@torch.no_grad()
def feature_std(features: Sequence[Tensor], valid: Sequence[Tensor | None] | None = None) -> Tensor:
    """How far features spread over the sphere, 0-d: see `DistillationMonitors`.

    Args:
        features: per view (b, d) or (b, n, d).
        valid: per view (b,) or (b, n) bool, or None: which of them count.

    Raises:
        ShapeError: no view, axes that differ, ``valid`` that does not fit.

    Example:
        >>> feature_std([torch.eye(2)]), feature_std([torch.ones(3, 2)])
        (tensor(0.7071), tensor(0.))
    """
    check_sequence("features", features, "a tensor of features")
    if not features:
        raise ShapeError("`features` is empty: give those of at least one view, or None")
    check_views("valid", valid, "features", len(features))
    d = _check_rows("features[{}]", features, "d", "n", valid)
    units, kept = [], []
    dtype = _common_dtype(features)
    for view, part in enumerate(features):
        unit, good = unit_features(part.to(dtype))
        keep = None if valid is None else valid[view]
        good = good if keep is None else good & keep
        units.append(unit.reshape(-1, d))
        kept.append(good.reshape(-1, 1))
    x, keep = torch.cat(units), torch.cat(kept)
    count = keep.sum().clamp_min(1)
    mean = torch.where(keep, x, 0.0).sum(0) / count
    # The mean is taken away before the square: near collapse all of a square would be the mean's.
    spread = torch.where(keep, x - mean, 0.0).square().sum(0) / count
    return spread.sqrt().sum() / math.sqrt(max(1, d))


def _common_dtype(values: Sequence[Tensor]) -> torch.dtype:
    dtype = torch.float32
    for part in values:
        dtype = torch.promote_types(dtype, at_least_float32(part.new_empty(0)).dtype)
    return dtype
