"""A table of faults: what a loss makes of each kind of bad or extreme input.

The losses' rows of `fault_tables`. `LossSubject` says in a few lines what a loss is called with, so
that one table serves them all, and yours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from local_distill.testing.fault_tables import FaultResult
from local_distill.testing.loss_faults._cases import CASES
from local_distill.testing.loss_faults._subject import LossStep, LossSubject

# Each declares its cases; the table has them in this order.
# isort: off
from local_distill.testing.loss_faults import _numbers  # noqa: F401
from local_distill.testing.loss_faults import _bad_numbers  # noqa: F401
from local_distill.testing.loss_faults import _tokens  # noqa: F401
from local_distill.testing.loss_faults import _views  # noqa: F401
from local_distill.testing.loss_faults import _layout  # noqa: F401
from local_distill.testing.loss_faults import _state  # noqa: F401
from local_distill.testing.loss_faults import _compiling  # noqa: F401
# isort: on

__all__ = ["LossStep", "LossSubject", "loss_faults"]


def loss_faults(
    subject: LossSubject,
    *,
    groups: Iterable[str] | None = None,
    not_applicable: Mapping[str, str] | None = None,
) -> list[FaultResult]:
    """Try every fault on a loss.

    Args:
        subject: how the loss is made and called, see `LossSubject`.
        groups: only these groups of faults; ``"compile"`` takes longer than all the others.
        not_applicable: ``{fault: reason}`` of cases that are no fault for this loss.

    Returns:
        One `FaultResult` for each case. Sound losses have no ``"WRONG"``.

    Raises:
        ConfigError: a group or a fault that does not exist.

    Example:
        >>> from local_distill import Centering, GlobalDistillationLoss
        >>> subject = LossSubject(
        ...     make=lambda c: GlobalDistillationLoss(Centering(c)),
        ...     call=lambda loss, step: loss(step.student, step.teacher, teacher_temp=step.temp),
        ... )
        >>> results = loss_faults(subject, groups=["views"])
        >>> [f"{result.fault}: {result.outcome}" for result in results][-2:]
        ['teacher batch 1 against 2: refused', 'student c = 1 against c = 16: refused']
    """
    return CASES.run(subject, groups=groups, not_applicable=not_applicable)
