"""What the trainer asks of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from local_distill.backbones import TimmBackbone
from local_distill.structures import Matches, TeacherTargets
from local_distill.teacher import EmaTeacher
from local_distill.training.loading import ViewBatch
from local_distill.training.progress import Progress

__all__ = ["Method", "Models", "StepTerms"]


class Models(NamedTuple):
    """The modules of a run.

    Attributes:
        student: the network as Fabric wrapped it; call it.
        teacher: its slow copy, or None where the method has none; call it.
        criterion: the loss, with its state.
        backbone: the student's, for ``token_grid``.
        num_global: how many of the views are global; they come first.
    """

    student: Any
    teacher: EmaTeacher | None
    criterion: nn.Module
    backbone: TimmBackbone
    num_global: int


class StepTerms(NamedTuple):
    """What a step has to say.

    Attributes:
        loss: call ``backward`` on it.
        values: its parts by name, to be logged.
        matches: what was matched, to be logged.
        targets: the teacher's distributions of whole views, from which collapse is seen.
        features: the teacher's global tokens, likewise.
    """

    loss: Tensor
    values: Mapping[str, Tensor | float]
    matches: Mapping[tuple[int, int], Matches] = {}
    targets: Sequence[TeacherTargets] = ()
    features: Sequence[Tensor] = ()


class Method(ABC):
    """A published method: the network around a backbone, the loss, and a step of both.

    Settings alone are held here; what is trained is in what `build` gives. Your own method is a
    subclass, named on the command line by its import path.

    Attributes:
        has_teacher: whether a slow copy of the network is kept.
        wants_layers: whether the backbone has to give every layer's global token.
        has_partners: whether every view but the first shows another image, see `draw_partners`.
    """

    has_teacher: bool = True
    wants_layers: bool = False
    has_partners: bool = False

    @abstractmethod
    def build(self, backbone: TimmBackbone, num_images: int) -> tuple[nn.Module, nn.Module]:
        """The network, with all that is trained, and the criterion, with all other state.

        Args:
            backbone: to be put into the network under the name ``backbone``.
            num_images: length of the data set.
        """

    @abstractmethod
    def step(self, models: Models, batch: ViewBatch, now: Progress) -> StepTerms:
        """Run student, teacher and criterion on a batch.

        Args:
            models: the modules.
            batch: the views and where they lie.
            now: for what changes over the run.
        """

    def extras(
        self, backbone: TimmBackbone, sizes: Sequence[tuple[int, int]], num_global: int
    ) -> Callable[[Sequence[Tensor]], dict[str, Any]] | None:
        """What has to be drawn for each image besides its views, in the loader's workers.

        Args:
            backbone: for ``token_grid``; the result is sent to workers and should not hold it.
            sizes: (height, width) of every view in pixels.
            num_global: how many of the views are global.
        """
        return None

    def frozen_at_first(self, network: nn.Module) -> list[nn.Parameter]:
        """The parameters that stand still for ``optim.freeze_last``."""
        find = getattr(network, "prototypes", None)
        return [] if find is None else find()

    def draw_partners(self, criterion: nn.Module, images: Tensor, seed: int) -> Tensor:
        """Which images the other views of these images show in an epoch; asked as it begins.

        Args:
            criterion: of `build`; its state is that after the epoch before.
            images: (n,) int64.
            seed: of the draw, the same on every process.
        """
        return images

    def end_epoch(self, criterion: nn.Module) -> None:
        """Called between two epochs of a method with partners."""
        return
