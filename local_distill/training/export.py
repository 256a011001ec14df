"""The trained backbone as a file that timm loads."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from local_distill.backbones import _ANY_SIZE, tiny_vit
from local_distill.errors import ConfigError, DataError, require_extra
from local_distill.training.backbone_loading import backbone_weights
from local_distill.training.checkpoint_files import CheckpointWriteError, put, write_aside
from local_distill.training.checkpoints import load_checkpoint

__all__ = ["export_backbone"]

# TimmBackbone's own arguments, which timm does not know.
_OURS = ("layers", "patch_layers")


def export_backbone(checkpoint: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write the backbone of a run as safetensors that ``timm.create_model`` loads.

    It is the teacher's, or the network's in a method without a teacher; without heads. The file's
    metadata says how to load it: ``timm_name``, ``timm_kwargs`` (JSON), ``step``, and ``load``, a
    line of Python. ``tiny_vit`` is told as timm's ``vit_tiny_patch16_224`` with other sizes.

    Args:
        checkpoint: a file, or a run's folder, as for `load_checkpoint`.
        target: the file to write, ``.safetensors``; it appears whole or not at all.

    Returns:
        The file.

    Raises:
        ConfigError: ``target`` does not end in ``.safetensors``, by which timm knows the format.
        DataError: no good checkpoint there, or one without a backbone.
        CheckpointWriteError: a full disk, a folder that cannot be written to.
        MissingExtraError: timm or safetensors is not installed.

    Example:
        >>> import safetensors, tempfile, timm
        >>> from local_distill.training.checkpoints import CheckpointStore
        >>> weights = {f"backbone.{k}": v for k, v in tiny_vit(width=12).state_dict().items()}
        >>> state = {"config": {"backbone": {"name": "tiny_vit", "kwargs": {"width": 12}}},
        ...          "network": weights, "teacher": None}
        >>> with tempfile.TemporaryDirectory() as run:
        ...     _ = CheckpointStore(f"{run}/checkpoints").save(5, state)
        ...     file = export_backbone(run, f"{run}/backbone.safetensors")
        ...     with safetensors.safe_open(file, "pt") as opened:
        ...         told = opened.metadata()
        ...     kwargs = json.loads(told["timm_kwargs"])
        ...     model = timm.create_model(told["timm_name"], checkpoint_path=str(file), **kwargs)
        >>> told["timm_name"], kwargs["embed_dim"], model.patch_embed.proj.weight.shape
        ('vit_tiny_patch16_224', 12, torch.Size([12, 3, 8, 8]))
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise ConfigError(
            f"`target` {str(target)!r} must end in .safetensors: timm tells the format by that"
        )
    safetensors: Any = require_extra("safetensors.torch", "train")
    state = load_checkpoint(checkpoint)
    weights = _backbone_weights(state, checkpoint)
    name, kwargs = _timm_model(state, checkpoint)
    arguments = "".join(f", {key}={value!r}" for key, value in kwargs.items())
    metadata = {
        "format": "pt",
        "timm_name": name,
        "timm_kwargs": json.dumps(kwargs),
        "step": str(state.get("step", "")),
        "load": f"timm.create_model({name!r}, checkpoint_path={target.name!r}{arguments})",
    }
    written: bytes = safetensors.save(weights, metadata)
    aside = target.with_name(f".{target.name}.tmp")
    try:
        write_aside(aside, lambda stream: stream.write(written))
        put(aside, target)
    except OSError as error:
        raise CheckpointWriteError(error, target, len(written)) from error
    return target


def _backbone_weights(
    state: dict[str, Any], checkpoint: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """The bare timm model's names; each tensor its own memory, as safetensors wants it."""
    prefix = "model."
    weights = {
        name.removeprefix(prefix): tensor.detach().clone().contiguous()
        for name, tensor in backbone_weights(state).items()
        if name.startswith(prefix)
    }
    if not weights:
        part = "network" if state.get("teacher") is None else "teacher"
        prefix = {"network": "backbone.model.", "teacher": "module.backbone.model."}[part]
        raise DataError(
            f"`checkpoint` {str(checkpoint)!r} has no backbone: wanted names that start with "
            f"{prefix!r} in its {part!r}, got {sorted(state.get(part) or {})[:3]}"
        )
    return weights


def _timm_model(
    state: dict[str, Any], checkpoint: str | os.PathLike[str]
) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which timm builds the model that TimmBackbone held."""
    timm: Any = require_extra("timm", "train")
    try:
        backbone = state["config"]["backbone"]
        name, given = str(backbone["name"]), dict(backbone.get("kwargs") or {})
    except (KeyError, TypeError) as error:
        raise DataError(
            f"`checkpoint` {str(checkpoint)!r} does not say which backbone it holds: no {error} in "
            "its config"
        ) from error
    if name == "tiny_vit":
        sizes = inspect.signature(tiny_vit).bind(**given)
        sizes.apply_defaults()
        given = dict(sizes.arguments)
        given["embed_dim"] = given.pop("width")
        name = "vit_tiny_patch16_224"
    kwargs: dict[str, Any] = {"num_classes": 0}
    base = name.partition(".")[0]
    if ":" not in name and timm.is_model(base):
        kwargs |= _ANY_SIZE.get(timm.model_entrypoint(base).__module__.rpartition(".")[2], {})
    kwargs |= {key: value for key, value in given.items() if key not in _OURS}
    return name, kwargs
