"""The backbone that a run trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from local_distill.backbones import TimmBackbone
from local_distill.errors import DataError
from local_distill.training.checkpoints import load_checkpoint
from local_distill.training.options import BackboneOptions

__all__ = ["backbone_weights", "load_backbone"]


def load_backbone(
    checkpoint: str | None,
    backbone: BackboneOptions = BackboneOptions(),
    seed: int = 0,
    *,
    layers: bool = False,
    patch_layers: bool = False,
) -> TimmBackbone:
    """The teacher's backbone out of a run (the network's where it has no teacher), or a fresh one.

    Args:
        checkpoint: a run's folder or a checkpoint's file; None: a fresh backbone.
        backbone: which, where there is no checkpoint.
        seed: of fresh weights.
        layers: it also gives the global token of every layer.
        patch_layers: it also gives their patch tokens.

    Raises:
        DataError: no such checkpoint, a damaged one, or one that does not say its backbone.

    Example:
        >>> load_backbone(None).embed_dim
        96
    """
    if checkpoint is None:
        torch.manual_seed(seed)
        return backbone.build(layers=layers, patch_layers=patch_layers)
    state = load_checkpoint(checkpoint)
    options = state["config"].get("backbone")
    if options is None:
        raise DataError(
            f"`checkpoint` {checkpoint!r} does not say which backbone it holds: it was written by a"
            " call from Python without `config`"
        )
    network = BackboneOptions(**{**options, "pretrained": False}).build(
        layers=layers, patch_layers=patch_layers
    )
    network.load_state_dict(backbone_weights(state))
    return network


def backbone_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of the backbone to use: the teacher's, or the network's where there is no teacher.

    Args:
        state: of a run, as a checkpoint holds it.

    Returns:
        By the names that `TimmBackbone` has for them; empty where there is no backbone.

    Example:
        >>> state = {"network": {"backbone.model.a": torch.ones(1), "head.b": 0}, "teacher": None}
        >>> backbone_weights(state)
        {'model.a': tensor([1.])}
    """
    part, prefix = "network", "backbone."
    if state.get("teacher") is not None:
        part, prefix = "teacher", "module.backbone."
    return {
        name.removeprefix(prefix): value
        for name, value in (state.get(part) or {}).items()
        if name.startswith(prefix)
    }
