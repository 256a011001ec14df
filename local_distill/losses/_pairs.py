"""The cross-entropy that the distillation losses share: over pairs of views, through matches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from local_distill._check import Axes, check_floating, values_visible
from local_distill._logits import Logits, multiplied_out, stand_in
from local_distill._precision import at_least_float32, widest
from local_distill.distributed import all_reduce_sum, world_size
from local_distill.errors import ConfigError, ShapeError
from local_distill.kernels.paired_cross_entropy import (
    AnsweredView,
    blockwise_cross_entropy,
    can_work_in_blocks,
)
from local_distill.losses._fused_pairs import can_fuse, fused_cross_entropy
from local_distill.structures import Matches, PrototypeLogits, Targets, TeacherTargets

Normalize = Literal["all", "matched", "image"]
Pair = tuple[int, int]


class Processes(NamedTuple):
    """Over which processes a loss is averaged; inactive in evaluation, where nothing is sent."""

    active: bool
    group: dist.ProcessGroup | None = None

    def sum(self, values: Tensor) -> Tensor:
        return all_reduce_sum(values, self.group) if self.active else values.detach()

    @property
    def size(self) -> int:
        return world_size(self.group) if self.active else 1

    def whole_batch(self, total: Tensor) -> Tensor:
        """The whole batch's value with this rank's share of its gradient.

        Times the number of processes, because data-parallel wrappers average gradients.
        """
        if self.size == 1:
            return total
        share = total * self.size
        return share + (self.sum(total) - share).detach()


def check_normalize(value: str) -> Normalize:
    """Return a known normalisation."""
    if value not in get_args(Normalize):
        raise ConfigError(
            f"`normalize` must be one of {', '.join(get_args(Normalize))}, got {value!r}"
        )
    known: Normalize = value  # type: ignore[assignment]
    return known


def check_loss_targets(targets: Targets) -> Targets:
    """Return what can turn teacher logits into distributions and learn from them."""
    if isinstance(targets, type):
        raise ConfigError(
            "`targets` must turn teacher logits into distributions, such as "
            f"Centering(num_prototypes), got the class {targets.__name__}; make one of it"
        )
    if not callable(targets) or not callable(getattr(targets, "update", None)):
        raise ConfigError(
            "`targets` must be called with teacher logits and have `update`, such as "
            f"Centering(num_prototypes), got {targets!r}"
        )
    return targets


def check_matches_of_pairs(
    matches: Mapping[Pair, Matches], students: int, teachers: int, *, theirs: str = "teacher"
) -> None:
    """Refuse what is no ``{(v, q): Matches}`` of views that are there.

    Args:
        matches: what was given, such as the `Matches` of one pair.
        students: number of student views.
        teachers: number of the other views.
        theirs: what messages call the other views.
    """
    if not isinstance(matches, Mapping):
        raise ShapeError(
            f"`matches` must be a dict {{(v, q): Matches}}, got {type(matches).__name__}; "
            f"match_views gives one; of student view v and {theirs} view q alone say "
            "{(v, q): matches}"
        )
    for pair, found in matches.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ShapeError(
                f"`matches` must have keys (student view, {theirs} view), got the key "
                f"{pair!r}; say {{(v, q): matches}}"
            )
        if not (0 <= pair[0] < students and 0 <= pair[1] < teachers):
            raise ShapeError(
                f"`matches` has the pair {pair} but there are {students} student and {teachers} "
                f"{theirs} views; keys are (student view, {theirs} view)"
            )
        if not isinstance(found, Matches):
            raise ShapeError(
                f"`matches[{pair}]` must be Matches(teacher_index, weight, cost), got "
                f"{type(found).__name__}"
            )


def check_pairs(
    student_logits: Sequence[Logits | None],
    teacher_logits: Sequence[Logits | None],
    matches: Mapping[Pair, Matches],
    *,
    names: tuple[str, str] = ("student_logits", "teacher_logits"),
    last_axis: str = "c",
) -> None:
    """Check all that the pairs name before anything is computed.

    Args:
        student_logits: per view (b, s, c) or `PrototypeLogits`, or None.
        teacher_logits: per view (b, t, c) or `PrototypeLogits`, or None.
        matches: its keys are the pairs.
        names: what messages call the two: features are checked alike.
        last_axis: what they call the last axis.
    """
    ours, theirs = names
    check_matches_of_pairs(matches, len(student_logits), len(teacher_logits))
    for pair, found in matches.items():
        v, q = pair
        axes = Axes()
        student, teacher = (
            axes.bind(name, stand_in(name, logits), f"b {tokens} {last_axis}")
            for name, logits, tokens in (
                (f"{ours}[{v}]", student_logits[v], "s"),
                (f"{theirs}[{q}]", teacher_logits[q], "t"),
            )
        )
        check_floating(f"{ours}[{v}]", student)
        check_floating(f"{theirs}[{q}]", teacher)
        axes.bind(f"matches[{pair}].weight", found.weight, "b s k")
        index = axes.bind(f"matches[{pair}].teacher_index", found.teacher_index, "b s k")
        check_index(f"matches[{pair}].teacher_index", index, f"{theirs}[{q}]", axes["t"])


def check_index(name: str, index: Tensor, of: str, tokens: int) -> None:
    """Refuse teacher indices of another type, and where it can be seen those out of range."""
    if index.dtype != torch.int64:
        raise ShapeError(f"`{name}` must be int64, got {index.dtype}; convert with .long()")
    if not values_visible(index) or not index.numel():
        return
    low, high = (int(end) for end in index.aminmax())
    if low < 0 or high >= tokens:
        raise ShapeError(
            f"`{name}` reaches {low if low < 0 else high} but `{of}` has {tokens} tokens, counted "
            "from 0: matches of other views or grids? A token without a match has weight 0"
        )


def paired_cross_entropy(
    student_logits: Sequence[Logits | None],
    targets: Mapping[int, TeacherTargets],
    matches: Mapping[Pair, Matches],
    *,
    student_temp: float,
    normalize: Normalize,
    processes: Processes,
) -> Tensor:
    """Mean over the pairs of each pair's normalised cross-entropy.

    For token i with p = Σ w·p_teacher, m = Σ w and z = (s_i - max s_i)/τ the cross-entropy is
    m·logsumexp(z) - p·z. The pairs' scales are folded into p and m, so a student view's logits are
    read once however many teacher views answer it.
    """
    scales = pair_scales(matches, normalize, processes)
    answers: dict[int, list[tuple[int, Matches, Tensor]]] = {}
    for v, q in matches:
        answers.setdefault(v, []).append((q, matches[v, q], scales[v, q]))
    given = {
        v: logits for v, logits in enumerate(student_logits) if logits is not None and v in answers
    }
    if not answers:
        total = graph_zero(student_logits)
    elif can_fuse(given, targets.values()):
        total = fused_cross_entropy(given, answers, targets, student_temp)
    else:
        views = [AnsweredView(multiplied_out(given[v]), found) for v, found in answers.items()]
        targets = {
            q: TeacherTargets(multiplied_out(target.logits), target.offset, target.temp)
            for q, target in targets.items()
        }
        if can_work_in_blocks(views):
            total = blockwise_cross_entropy(views, targets, student_temp)
        else:
            total = plain_cross_entropy(views, targets, student_temp)
    return processes.whole_batch(total)


def plain_cross_entropy(
    views: Sequence[AnsweredView], targets: Mapping[int, TeacherTargets], student_temp: float
) -> Tensor:
    """What `blockwise_cross_entropy` gives, in plain steps that a graph can hold."""
    probs = {q: target.probs() for q, target in targets.items()}
    parts = []
    for logits, answers in views:
        values = at_least_float32(logits)
        target = torch.zeros_like(values)
        mass = values.new_zeros(values.shape[:-1])
        for q, found, scale in answers:
            scale = scale.to(values.dtype)
            target = target + scale[:, None, None] * found.gather(probs[q])
            mass = mass + scale[:, None] * found.weight.to(values.dtype).sum(-1)
        z = (values - values.detach().amax(-1, keepdim=True)) / student_temp
        # Before the logsumexp, not after: 0 · NaN is NaN, in the gradient too.
        z = torch.where((mass == 0)[..., None], 0.0, z)
        parts.append((mass * z.logsumexp(-1) - (target * z).sum(-1)).sum())
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def pair_scales(
    matches: Mapping[Pair, Matches], normalize: Normalize, processes: Processes
) -> dict[Pair, Tensor]:
    """Per pair (b,): what each image's sum is multiplied with."""
    if not matches:
        return {}
    counts = []
    for found in matches.values():
        b, s, _ = found.weight.shape
        if normalize == "matched":
            counts.append(widest(found.weight).sum())
        else:
            counts.append(found.weight.new_tensor(float(b * s if normalize == "all" else b)))
    whole = processes.sum(torch.stack([widest(count) for count in counts]))
    scales: dict[Pair, Tensor] = {}
    for count, (pair, found) in zip(whole.unbind(), matches.items(), strict=True):
        scale = safe_inverse(count) / len(matches)
        if normalize == "image":
            scales[pair] = scale * safe_inverse(widest(found.weight).sum((1, 2)))
        else:
            scales[pair] = scale.expand(found.weight.shape[0])
    return scales


def safe_inverse(values: Tensor) -> Tensor:
    """1 / values, and 0 where there is nothing to divide by; NaN stays NaN, to be seen."""
    none = values == 0
    return torch.where(none, 0.0, 1.0 / torch.where(none, 1.0, values))


def graph_zero(student_logits: Sequence[Logits | None]) -> Tensor:
    """A zero that hangs on the student's graph, so that backward works and NaN stays out."""
    for logits in student_logits:
        if isinstance(logits, PrototypeLogits):
            return graph_zero([logits.features]) + graph_zero([logits.weight])
        if logits is not None:
            values = at_least_float32(logits)
            return torch.where(torch.zeros_like(values, dtype=torch.bool), values, 0.0).sum()
    return torch.zeros(())
