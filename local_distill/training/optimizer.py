"""The optimiser: its parameter groups, its schedules, clipping and the prototypes' freeze."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from local_distill.distributed import local_part
from local_distill.errors import ConfigError, require_extra
from local_distill.training.options import OptimOptions
from local_distill.training.progress import Progress

__all__ = ["build_optimizer", "clip_gradients", "set_schedules"]


def build_optimizer(network: nn.Module, optim: OptimOptions) -> torch.optim.Optimizer:
    """Timm's optimiser of that name over the parameters that are trained.

    Weight decay is for parameters of two and more axes: matrices, tokens, position embeddings and
    learnt prototype magnitudes, (c, 1); for biases and norms with ``decay_vectors`` alone. So it is
    in the published codes. With a layer decay the backbone's layers, as timm groups them, have a
    ``lr_scale`` each; heads have 1. DINOv2's code has the same but for the last norm: timm puts it
    with the last block, DINOv2 with the heads.

    Args:
        network: has a ``backbone``.
        optim: the settings.

    Raises:
        ConfigError: an optimiser that timm does not know, or arguments that it refuses.

    Example:
        >>> from local_distill.backbones import tiny_vit
        >>> network = nn.ModuleDict({"backbone": tiny_vit(), "head": nn.Linear(96, 8)})
        >>> optimizer = build_optimizer(network, OptimOptions(layer_decay=0.5))
        >>> sorted({group["lr_scale"] for group in optimizer.param_groups})
        [0.0625, 0.125, 0.25, 0.5, 1.0]
    """
    timm_optim = require_extra("timm.optim", "train")
    groups: list[dict[str, Any]] = []
    grouped: set[int] = set()
    model = _timm_model(network)
    if optim.layer_decay != 1.0 and model is not None:
        groups = timm_optim.param_groups_layer_decay(
            model, weight_decay=optim.weight_decay, layer_decay=optim.layer_decay
        )
        for group in groups:  # heads are one layer above what timm saw
            group["lr_scale"] *= optim.layer_decay
        grouped = {id(parameter) for group in groups for parameter in group["params"]}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in grouped]
    # torch's multi-tensor optimisers do not take sharded and whole parameters in one group.
    for kind in ([p for p in rest if _sharded(p)], [p for p in rest if not _sharded(p)]):
        groups += [
            {"params": [p for p in kind if p.dim() > 1], "weight_decay": optim.weight_decay},
            {"params": [p for p in kind if p.dim() <= 1], "weight_decay": 0.0},
        ]
    for group in groups:
        group.setdefault("lr_scale", 1.0)
        # Not whether weight_decay is 0: a schedule may start there.
        group["decays"] = optim.decay_vectors or all(p.dim() > 1 for p in group["params"])
    kept = [group for group in groups if group["params"]]
    try:
        optimizer: torch.optim.Optimizer = timm_optim.create_optimizer_v2(
            kept, opt=optim.name, lr=optim.lr, weight_decay=optim.weight_decay, **optim.kwargs
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"`optim`: timm's optimiser {optim.name!r} with {optim.kwargs}: {error or 'unknown'}; "
            "timm.optim.list_optimizers() gives the names"
        ) from error
    return optimizer


def set_schedules(
    optimizer: torch.optim.Optimizer, optim: OptimOptions, now: Progress, images: int
) -> dict[str, float]:
    """Give every group this step's learning rate and weight decay.

    Deviations from the authors' codes: DINO's, which GLSD, EsViT, SDSSL and iBOT use, reaches the
    peak one step before the warm-up ends and has it twice; here once. The difference is at most one
    part in as many as the warm-up has steps.

    Args:
        optimizer: made by `build_optimizer`.
        optim: the settings.
        now: the step.
        images: of all processes and micro-batches together in a step, for ``lr_batch``.

    Returns:
        The two numbers by name, to be logged.
    """
    peak = optim.lr if optim.lr_batch is None else optim.lr * images / optim.lr_batch
    lr = now.warmup_cosine(peak, optim.lr_end, warmup=optim.warmup)
    decay = now.cosine(optim.weight_decay, optim.weight_decay_end)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decays"]:
            group["weight_decay"] = decay
    return {"lr": lr, "weight_decay": decay}


def clip_gradients(
    fabric: Fabric,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    optim: OptimOptions,
    frozen: Iterable[nn.Parameter],
) -> Tensor:
    """Clip the gradient, and take it from parameters that stand still in this step.

    Args:
        fabric: knows the precision and the processes.
        network: as `Fabric.setup` gave it.
        optimizer: likewise.
        optim: ``clip`` and ``clip_each``.
        frozen: parameters that are not to move.

    Returns:
        The norm of the whole gradient before, 0-d.
    """
    whole = optim.clip if optim.clip and not optim.clip_each else math.inf
    norm = fabric.clip_gradients(network, optimizer, max_norm=whole, error_if_nonfinite=False)
    assert norm is not None  # Fabric's annotation allows for strategies that do not tell
    if optim.clip and optim.clip_each:
        for parameter in network.parameters():
            if parameter.grad is not None:
                nn.utils.clip_grad_norm_([parameter], optim.clip)
    for parameter in frozen:
        parameter.grad = None
    return norm


def _sharded(parameter: nn.Parameter) -> bool:
    return local_part(parameter) is not parameter


def _timm_model(network: nn.Module) -> nn.Module | None:
    backbone = dict(network.named_children()).get("backbone")
    model = getattr(backbone, "model", None)
    return model if isinstance(model, nn.Module) else None
