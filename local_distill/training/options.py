"""The settings of a run; every field is a flag of the command line and a key of its YAML file."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from local_distill._check import check_at_least, check_fraction, check_positive
from local_distill.backbones import TimmBackbone, tiny_vit
from local_distill.errors import ConfigError

__all__ = [
    "BackboneOptions",
    "HeadOptions",
    "OptimOptions",
    "SceneOptions",
    "TeacherOptions",
    "TemperatureOptions",
]


@dataclasses.dataclass(frozen=True)
class BackboneOptions:
    """Which network is trained.

    Args:
        name: a timm model name such as "vit_small_patch16_224", or "tiny_vit" for the demo's.
        pretrained: start from timm's weights for that name, which downloads them.
        kwargs: further arguments for timm.create_model, or for tiny_vit.
        frozen: parameters that keep the weights they start with, by the beginnings of their names
            in the timm model: [patch_embed, pos_embed] in MoCo v3 and SDSSL.
    """

    name: str = "tiny_vit"
    pretrained: bool = False
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    frozen: list[str] = dataclasses.field(default_factory=list)

    def build(self, *, layers: bool = False, patch_layers: bool = False) -> TimmBackbone:
        """The backbone, with fresh weights unless ``pretrained``.

        Args:
            layers: it also gives the global token of every layer.
            patch_layers: it also gives their patch tokens.

        Raises:
            ConfigError: a name, arguments or ``frozen`` parameters that are not there.
        """
        backbone = self._build(layers=layers, patch_layers=patch_layers)
        for start in self.frozen:
            found = [p for name, p in backbone.model.named_parameters() if name.startswith(start)]
            if not found:
                raise ConfigError(
                    f"`backbone.frozen`: no parameter's name in {self.name!r} starts with "
                    f"{start!r}; they are named {[n for n, _ in backbone.model.named_parameters()]}"
                )
            for parameter in found:
                parameter.requires_grad_(False)
        return backbone

    def _build(self, *, layers: bool, patch_layers: bool) -> TimmBackbone:
        if self.name != "tiny_vit":
            return TimmBackbone(
                self.name,
                pretrained=self.pretrained,
                layers=layers,
                patch_layers=patch_layers,
                **self.kwargs,
            )
        if self.pretrained:
            raise ConfigError("`backbone.pretrained`: there are no weights for tiny_vit")
        try:
            return tiny_vit(**self.kwargs, layers=layers, patch_layers=patch_layers)
        except TypeError as error:
            raise ConfigError(f"`backbone.kwargs` {self.kwargs}: {error}") from error


@dataclasses.dataclass(frozen=True)
class HeadOptions:
    """A projection head with prototypes, see `ProjectionHead`; the defaults are DINO's.

    Args:
        num_prototypes: c.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: dimension before the prototypes.
        num_layers: linear layers before the prototypes.
        batch_norm: BatchNorm in the hidden layers.
        frozen_magnitude: keep the norm of the prototypes at 1.
    """

    num_prototypes: int = 65_536
    hidden_dim: int = 2_048
    bottleneck_dim: int = 256
    num_layers: int = 3
    batch_norm: bool = False
    frozen_magnitude: bool = True


@dataclasses.dataclass(frozen=True)
class TemperatureOptions:
    """Temperatures of student and teacher.

    Args:
        student: of the student.
        teacher: of the teacher after its warm-up.
        teacher_start: of the teacher at step 0.
        teacher_warmup: how long it takes from the one to the other, linearly: in epochs where the
            run is given in epochs, else in steps.
        whole_epochs: the warm-up goes by whole epochs, of which the last one has the end's value,
            as in the published codes; else step by step. In a run given in steps there are no
            epochs to go by, and the last step of the warm-up has the end's value.
    """

    student: float = 0.1
    teacher: float = 0.04
    teacher_start: float = 0.04
    teacher_warmup: float = 0.0
    whole_epochs: bool = False

    def __post_init__(self) -> None:
        for name in ("student", "teacher", "teacher_start"):
            check_positive(f"temps.{name}", getattr(self, name))
        _check_amount("temps.teacher_warmup", self.teacher_warmup)


@dataclasses.dataclass(frozen=True)
class TeacherOptions:
    """How slowly the teacher follows, where a method has one.

    Args:
        momentum: EMA momentum at step 0.
        momentum_end: EMA momentum at the end, reached along a cosine.
    """

    momentum: float = 0.996
    momentum_end: float = 1.0

    def __post_init__(self) -> None:
        check_fraction("teacher.momentum", self.momentum)
        check_fraction("teacher.momentum_end", self.momentum_end)


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """The optimiser and its schedules. Durations are in epochs where the run is, else in steps.

    Args:
        name: any optimiser that timm knows: adamw, sgd, lars, lamb, ...
        kwargs: further arguments for it, such as betas or momentum.
        lr: peak learning rate, reached at the end of the warm-up.
        lr_batch: lr is meant for so many images a step and scaled to the real number; null: not
            scaled. 256 in most papers.
        lr_end: learning rate at the end, reached along a cosine; not scaled.
        warmup: duration of the warm-up.
        weight_decay: at step 0; biases and norms have none.
        weight_decay_end: at the end, reached along a cosine.
        decay_vectors: biases and norms decay as well, as in DenseCL's code.
        layer_decay: factor of the learning rate from each layer of the backbone to the one before.
        clip: largest norm of the gradient; 0: no clipping.
        clip_each: clip every parameter's gradient by itself, as DINO's code does.
        freeze_last: for so long the prototypes stand still.
    """

    name: str = "adamw"
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    lr: float = 2e-3
    lr_batch: int | None = None
    lr_end: float = 1e-5
    warmup: float = 80
    weight_decay: float = 0.04
    weight_decay_end: float = 0.04
    decay_vectors: bool = False
    layer_decay: float = 1.0
    clip: float = 3.0
    clip_each: bool = False
    freeze_last: float = 0

    def __post_init__(self) -> None:
        check_positive("optim.lr", self.lr)
        if self.lr_batch is not None:
            check_at_least("optim.lr_batch", self.lr_batch, 1)
        check_positive("optim.layer_decay", self.layer_decay)
        for name in (
            "lr_end",
            "warmup",
            "weight_decay",
            "weight_decay_end",
            "clip",
            "freeze_last",
        ):
            _check_amount(f"optim.{name}", getattr(self, name))


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


def _check_amount(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"`{name}` must be a finite number of at least 0, got {value!r}")
