"""What losses on features share: their checks, and one value for all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from local_distill._check import Axes, check_floating, check_sequence
from local_distill.errors import ShapeError
from local_distill.losses._pairs import Pair, Processes, check_index
from local_distill.structures import Matches


def check_feature_pairs(
    student: Sequence[Tensor | None],
    teacher: Sequence[Tensor | None],
    matches: Mapping[Pair, Matches],
) -> None:
    """Check all that the pairs name before anything is computed."""
    check_sequence("student", student, "a tensor of features")
    check_sequence("teacher", teacher, "a tensor of features")
    for pair, found in matches.items():
        v, q = pair
        if not (0 <= v < len(student) and 0 <= q < len(teacher)):
            raise ShapeError(
                f"`matches` has the pair {pair} but there are {len(student)} student and "
                f"{len(teacher)} teacher views; keys are (student view, teacher view)"
            )
        axes = Axes()
        for name, value, shape in (
            (f"student[{v}]", student[v], "b s d"),
            (f"teacher[{q}]", teacher[q], "b t d"),
        ):
            check_floating(name, axes.bind(name, value, shape))
        axes.bind(f"matches[{pair}].weight", found.weight, "b s k")
        index = axes.bind(f"matches[{pair}].teacher_index", found.teacher_index, "b s k")
        check_index(f"matches[{pair}].teacher_index", index, f"teacher[{q}]", axes["t"])


def whole_batch(total: Tensor, processes: Processes) -> Tensor:
    """The whole batch's value with this rank's share of its gradient.

    Times the number of processes, because data-parallel wrappers average gradients.
    """
    if processes.size == 1:
        return total
    share = total * processes.size
    return share + (processes.sum(total) - share).detach()
