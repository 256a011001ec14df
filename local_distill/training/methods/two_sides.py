"""Both networks on a batch, as the losses take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from local_distill._logits import Logits
from local_distill.structures import TeacherTargets, ViewOutput
from local_distill.training.loading import ViewBatch
from local_distill.training.methods.method import Models
from local_distill.training.network import NetworkOutput, view_outputs

__all__ = ["global_targets", "join_sides", "two_sides", "unwrapped", "view_sizes"]


def two_sides(
    models: Models, batch: ViewBatch, valid: Sequence[Tensor | None] | None = None
) -> tuple[list[ViewOutput], list[ViewOutput], list[Tensor]]:
    """The student on all views, the teacher on the global ones.

    Args:
        models: the modules.
        batch: the views.
        valid: per view which tokens are masked before the student, or None.

    Returns:
        One `ViewOutput` per student view and per teacher view, and the teacher's global tokens.
    """
    assert models.teacher is not None
    students: list[NetworkOutput] = models.student(batch.views, valid)
    teachers: list[NetworkOutput] = models.teacher(batch.views[: models.num_global], teacher=True)
    student, teacher = join_sides(models, batch, students, teachers)
    return student, teacher, [view.global_token for view in teachers]


def join_sides(
    models: Models,
    batch: ViewBatch,
    students: Sequence[NetworkOutput],
    teachers: Sequence[NetworkOutput],
    *,
    learned: bool = False,
) -> tuple[list[ViewOutput], list[ViewOutput]]:
    """What both networks said, with where the views lie; ``learned`` as in `view_outputs`."""
    sizes = view_sizes(batch.views)
    geometries, backbone = batch.geometries, models.backbone
    return (
        view_outputs(students, geometries, sizes, backbone, learned=learned),
        view_outputs(teachers, geometries, sizes, backbone, learned=learned),
    )


def unwrapped(student: Any) -> Any:
    """The network itself, for its parts: DistributedDataParallel has it under ``module``."""
    return getattr(student, "module", student)


def view_sizes(views: Sequence[Tensor]) -> list[tuple[int, int]]:
    """(height, width) of every view."""
    return [(int(view.shape[-2]), int(view.shape[-1])) for view in views]


@torch.no_grad()
def global_targets(
    models: Models, logits: Sequence[Logits | None], teacher_temp: float
) -> list[TeacherTargets]:
    """The teacher's distributions of whole views, not yet worked out, before the center moves."""
    criterion: Any = models.criterion
    found: list[TeacherTargets] = criterion.global_loss.targets(
        [view for view in logits if view is not None], teacher_temp=teacher_temp
    )
    return found
