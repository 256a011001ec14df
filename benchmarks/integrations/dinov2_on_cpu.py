"""Runs DINOv2's ``train.py`` on the CPU: what `cuda_on_cpu` does, and what stands in for xformers,
FSDP and ImageNet.

    torchrun -m benchmarks.integrations.dinov2_on_cpu RECORD SCENES SCRIPT ARGUMENTS...

None of it is part of the integration. In FSDP's place the networks stay whole and their gradients
are averaged over the processes when they are clipped; the attention over views of several sizes is
torch's, one size after the other.
"""

from __future__ import annotations

import contextlib
import functools
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.integrations.cuda_on_cpu import finish, take_the_cpu

__all__ = ["BlockDiagonalMask"]


class BlockDiagonalMask:
    """Several batches of sequences in one row, each sequence seeing itself alone."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._batch_sizes = [1] * len(self.lengths)

    @classmethod
    def from_seqlens(cls, seqlens: Sequence[int]) -> BlockDiagonalMask:
        """One sequence after the other."""
        return cls(seqlens)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """The batches (b, n, ...) as one row, and how to part them again."""
        mask = cls([part.shape[1] for part in tensors for _ in range(part.shape[0])])
        mask._batch_sizes = [part.shape[0] for part in tensors]
        return mask, torch.cat([part.reshape(1, -1, *part.shape[2:]) for part in tensors], 1)

    def split(self, row: Tensor) -> list[Tensor]:
        """The batches that a row (1, n, ...) was made of."""
        firsts = [sum(self._batch_sizes[:place]) for place in range(len(self._batch_sizes) + 1)]
        ends = [sum(self.lengths[:first]) for first in firsts]
        return [
            row[0, start:end].unflatten(0, (size, -1))
            for size, (start, end) in zip(self._batch_sizes, pairwise(ends), strict=True)
        ]


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None) -> Tensor:
    """(b, n, heads, d), or one row of batches."""
    if attn_bias is None:
        swapped = [part.transpose(1, 2) for part in (q, k, v)]
        return nn.functional.scaled_dot_product_attention(*swapped).transpose(1, 2)
    parts = zip(*(attn_bias.split(part) for part in (q, k, v)), strict=True)
    return torch.cat([_attention(*part).flatten(0, 1)[None] for part in parts], 1)


def _not_here(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("stochastic depth over nested batches is xformers' own; set drop_path to 0")


def _put_in_xformers() -> None:
    ops = types.ModuleType("xformers.ops")
    ops.fmha = types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)
    ops.memory_efficient_attention, ops.unbind = _attention, torch.unbind
    ops.index_select_cat = ops.scaled_index_add = _not_here
    sys.modules["xformers"], sys.modules["xformers.ops"] = types.ModuleType("xformers"), ops


def _kept_whole(module: nn.Module) -> nn.Module:
    """The module itself, with what their code asks of FSDP's wrapper."""
    module.params, module._streams = list(module.parameters()), None
    for value in [*module.parameters(), *module.buffers()]:
        dist.broadcast(value.data, 0)  # the processes' seeds differ; FSDP's sync_module_states

    def clip(limit: float) -> Tensor:
        for parameter in module.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        return nn.utils.clip_grad_norm_(module.parameters(), limit)

    module.clip_grad_norm_ = clip
    return module


def _put_in_parts(scenes: str) -> tuple[dict[str, list[float]], list[nn.Module]]:
    import dinov2.data
    import dinov2.fsdp
    import dinov2.models.vision_transformer as vits
    from torchvision.datasets import ImageFolder

    dinov2.fsdp.get_fsdp_wrapper = lambda *args, **kwargs: _kept_whole
    dinov2.fsdp.get_fsdp_modules = lambda module: [module]
    dinov2.fsdp.reshard_fsdp_model = lambda module: None
    dinov2.fsdp.FSDP = types.SimpleNamespace(state_dict_type=lambda *args: contextlib.nullcontext())
    dinov2.data.make_dataset = lambda *, dataset_str, transform, target_transform: ImageFolder(
        scenes, transform, target_transform
    )
    # Smaller than any of theirs.
    block = functools.partial(vits.Block, attn_class=vits.MemEffAttention)
    vits.vit_nano = functools.partial(
        vits.DinoVisionTransformer, embed_dim=96, depth=4, num_heads=3, block_fn=block
    )
    import dinov2.train.ssl_meta_arch as architecture

    terms: dict[str, list[float]] = {}
    models: list[nn.Module] = []
    step: Callable[..., dict[str, Tensor]] = architecture.SSLMetaArch.forward_backward

    def recorded(self: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        models[:] = [self]
        found = step(self, *args, **kwargs)
        for name, value in found.items():
            terms.setdefault(name, []).append(float(value.detach()))
        return found

    architecture.SSLMetaArch.forward_backward = recorded
    return terms, models


def main() -> None:
    """Run the script as if it had been called itself."""
    record, scenes, script, *arguments = sys.argv[1:]
    take_the_cpu()
    _put_in_xformers()
    terms, models = _put_in_parts(scenes)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    finish(Path(record), terms, models)


if __name__ == "__main__":
    main()
