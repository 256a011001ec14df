"""The modules of a run, set up for its device and processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from lightning_fabric import Fabric
from torch import nn

from local_distill.backbones import TimmBackbone
from local_distill.errors import ConfigError, require_extra
from local_distill.teacher import EmaTeacher
from local_distill.training.backbone_loading import backbone_weights
from local_distill.training.methods.method import Method, Models
from local_distill.training.optimizer import build_optimizer
from local_distill.training.options import OptimOptions
from local_distill.training.sharding import device_mesh, shard
from local_distill.training.whole_batch_norm import whole_batch_norms

__all__ = ["RunModules", "backbone_of", "set_up"]


class RunModules(NamedTuple):
    """The modules of a run and what moves them.

    Attributes:
        network: what is trained, without wrappers; sharded in place under FSDP.
        wrapped: the same as Fabric knows it, for `Fabric.no_backward_sync`.
        models: what a method's step calls.
        optimizer: as Fabric set it up.
        scaler: of the loss in float16, or None.
        frozen: the parameters that stand still for ``optim.freeze_last``.
        dtype: of the parameters.
        whole: a copy of the backbone from before it was sharded, or None where it is not.
    """

    network: nn.Module
    wrapped: Any
    models: Models
    optimizer: torch.optim.Optimizer
    scaler: Any
    frozen: list[nn.Parameter]
    dtype: torch.dtype
    whole: TimmBackbone | None

    def backbone_to_use(self, state: Mapping[str, Any]) -> TimmBackbone:
        """The teacher's, or the student's; where they are sharded a whole one, on the CPU.

        Args:
            state: what `gather_state` gave on the first process, which alone may ask.
        """
        teacher = self.models.teacher
        if self.whole is None:
            return backbone_of(self.network if teacher is None else teacher.module)
        self.whole.load_state_dict(backbone_weights(state))
        return self.whole


def set_up(
    fabric: Fabric,
    method: Method,
    build_backbone: Callable[..., TimmBackbone],
    optim: OptimOptions,
    *,
    num_global: int,
    num_images: int,
    compile: bool = False,
) -> RunModules:
    """Build network, teacher, criterion and optimiser.

    Args:
        fabric: device, precision and processes.
        method: builds the network around the backbone.
        build_backbone: ``layers=`` → the backbone; the seed is set before.
        optim: the optimiser's settings.
        num_global: how many of the views are global.
        num_images: length of the data set.
        compile: run student and teacher through ``torch.compile``.
    """
    network, criterion = method.build(build_backbone(layers=method.wants_layers), num_images)
    network = whole_batch_norms(network, fabric.device)
    teacher = EmaTeacher(network) if method.has_teacher else None
    if teacher is not None:
        _without_dropout(teacher)
    if compile:  # in place: parameters keep their names
        for module in (network, *([] if teacher is None else [teacher.module])):
            module.compile()
    mesh = device_mesh(fabric)
    # One process alone draws pictures: it cannot ask the others for their shares.
    whole = None if mesh is None else copy.deepcopy(backbone_of(network))
    # Sharding replaces the parameters: the optimiser has to come after.
    student = fabric.setup_module(network)
    dtype = next(network.parameters()).dtype
    optimizer = build_optimizer(network, optim)
    set_up_optimizer = cast("torch.optim.Optimizer", fabric.setup_optimizers(optimizer))
    if teacher is not None:
        fabric.to_device(teacher.to(dtype))
        if mesh is not None:
            shard(teacher.module, mesh, trained=False)
    fabric.to_device(criterion.to(dtype) if dtype == torch.float64 else criterion)
    return RunModules(
        network,
        student,
        Models(_uncast(student), teacher, criterion, backbone_of(network), num_global),
        set_up_optimizer,
        getattr(fabric.strategy.precision, "scaler", None),
        method.frozen_at_first(network),
        dtype,
        None if whole is None else whole.to(dtype),
    )


def backbone_of(network: nn.Module) -> TimmBackbone:
    """The backbone inside of a method's network."""
    backbone = dict(network.named_children()).get("backbone")
    if not isinstance(backbone, TimmBackbone):
        raise ConfigError(
            "`method.build` must give a network with a TimmBackbone under the name `backbone`, got "
            f"{type(network).__name__} with {type(backbone).__name__}"
        )
    return backbone


def _without_dropout(teacher: nn.Module) -> None:
    """A teacher sees all there is, as in the published codes; its BatchNorms go on as in training.

    So dropout is taken out of it by hand, where `eval` would change both.
    """
    drop_path: Any = require_extra("timm.layers", "train").DropPath
    for module in teacher.modules():
        if isinstance(module, drop_path):
            module.drop_prob = 0.0
        elif isinstance(module, nn.Dropout):
            module.p = 0.0


def _uncast(student: Any) -> nn.Module:
    """What Fabric wraps: calling its wrapper would round what comes out to float32.

    That costs memory where tokens are in half precision, which the losses take as they are, and
    digits where they are in float64. The step runs within `Fabric.autocast` anyway.
    """
    module: nn.Module = student._forward_module
    return module
