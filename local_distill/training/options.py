"""The settings of a run; every field is a flag of the command line and a key of its YAML file."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from local_distill._check import check_at_least, check_fraction, check_positive
from local_distill.backbones import TimmBackbone, tiny_vit
from local_distill.errors import ConfigError

__all__ = ["BackboneOptions", "HeadOptions", "LossOptions", "OptimOptions", "SceneOptions"]


@dataclasses.dataclass(frozen=True)
class BackboneOptions:
    """Which network is trained.

    Args:
        name: a timm model name such as "vit_small_patch16_224", or "tiny_vit" for the demo's.
        pretrained: start from timm's weights for that name, which downloads them.
        kwargs: further arguments for timm.create_model, or for tiny_vit.
    """

    name: str = "tiny_vit"
    pretrained: bool = False
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self) -> TimmBackbone:
        """The backbone, with fresh weights unless ``pretrained``."""
        if self.name != "tiny_vit":
            return TimmBackbone(self.name, pretrained=self.pretrained, **self.kwargs)
        if self.pretrained:
            raise ConfigError("`backbone.pretrained`: there are no weights for tiny_vit")
        try:
            return tiny_vit(**self.kwargs)
        except TypeError as error:
            raise ConfigError(f"`backbone.kwargs` {self.kwargs}: {error}") from error


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """The two projection heads.

    Args:
        num_prototypes: of each head.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: dimension before the prototypes.
    """

    num_prototypes: int = 256
    hidden_dim: int = 256
    bottleneck_dim: int = 64


@dataclasses.dataclass(frozen=True)
class LossOptions:
    """Temperatures, weights and the teacher's pace.

    Args:
        student_temp: temperature of the student.
        teacher_temp: temperature of the teacher after its warm-up.
        teacher_temp_start: temperature of the teacher at step 0.
        teacher_temp_warmup: steps from the one to the other.
        center_momentum: momentum of the centers.
        teacher_momentum: EMA momentum at step 0; it rises to 1 along a cosine.
        global_weight: weight of the global loss.
        local_weight: weight of the local loss; without a matcher there is none.
    """

    student_temp: float = 0.1
    teacher_temp: float = 0.04
    teacher_temp_start: float = 0.04
    teacher_temp_warmup: int = 0
    center_momentum: float = 0.9
    teacher_momentum: float = 0.97
    global_weight: float = 0.5
    local_weight: float = 0.5

    def __post_init__(self) -> None:
        for name in ("student_temp", "teacher_temp", "teacher_temp_start"):
            check_positive(f"loss.{name}", getattr(self, name))
        check_at_least("loss.teacher_temp_warmup", self.teacher_temp_warmup, 0)
        check_fraction("loss.teacher_momentum", self.teacher_momentum)


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """AdamW with a warm-up and a cosine.

    Args:
        lr: peak learning rate.
        lr_end: learning rate at the last step.
        warmup: steps of the warm-up.
        weight_decay: at step 0; biases and norms have none.
        weight_decay_end: at the last step, reached along a cosine.
        clip: largest norm of the gradient; 0: no clipping.
    """

    lr: float = 2e-3
    lr_end: float = 1e-5
    warmup: int = 80
    weight_decay: float = 0.04
    weight_decay_end: float = 0.04
    clip: float = 3.0

    def __post_init__(self) -> None:
        check_positive("optim.lr", self.lr)
        check_at_least("optim.warmup", self.warmup, 0)
        for name in ("lr_end", "weight_decay", "weight_decay_end", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"`optim.{name}` must be a finite number of at least 0, got {value!r}"
                )


@dataclasses.dataclass(frozen=True)
class SceneOptions:
    """The built-in scenes, used where no image folder is given.

    Args:
        count: number of scenes.
        size: side in pixels.
        seed: which scenes.
    """

    count: int = 4000
    size: int = 64
    seed: int = 0
