"""The keys of a vision transformer's last attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from local_distill.backbones import TimmBackbone
from local_distill.errors import ConfigError

__all__ = ["AttentionKeys"]


class AttentionKeys(nn.Module):
    """Watches the last block of a timm ViT with a class token.

    Args:
        backbone: its ``model.blocks[-1].attn.qkv`` is watched.

    Raises:
        ConfigError: a model without such a block, or without a class token.

    Example:
        >>> import torch
        >>> from local_distill.backbones import tiny_vit
        >>> backbone = tiny_vit(width=24, num_heads=3)
        >>> keys = AttentionKeys(backbone)
        >>> with keys.watch() as seen:
        ...     _ = backbone(torch.zeros(2, 3, 24, 24))
        >>> [part.shape for part in keys.split(seen[-1])]
        [torch.Size([2, 3, 9, 8]), torch.Size([2, 3, 8])]
    """

    def __init__(self, backbone: TimmBackbone) -> None:
        super().__init__()
        model: Any = backbone.model
        blocks = getattr(model, "blocks", None)
        attention: Any = None if blocks is None else getattr(blocks[-1], "attn", None)
        qkv = getattr(attention, "qkv", None)
        if not isinstance(qkv, nn.Linear) or getattr(model, "cls_token", None) is None:
            raise ConfigError(
                f"`backbone`: {type(model).__name__} has no last block with attn.qkv and a class "
                "token, whose keys this method clusters; take a ViT such as vit_small_patch16_224"
            )
        self.num_heads = int(attention.num_heads)
        self.prefix = int(model.num_prefix_tokens)
        self._qkv = [qkv]  # in a list, so that it is not registered twice

    @contextmanager
    def watch(self) -> Iterator[list[Tensor]]:
        """Collect what the layer says in the passes within, for `split`."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, given: Any, out: Tensor) -> None:
            seen.append(out)

        handle = self._qkv[0].register_forward_hook(keep)
        try:
            yield seen
        finally:
            handle.remove()

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """(b, tokens, 3·h·e) → keys of patches (b, h, n, e) and of the class token (b, h, e)."""
        b, tokens, _ = qkv.shape
        keys = qkv.reshape(b, tokens, 3, self.num_heads, -1)[:, :, 1].transpose(1, 2)
        return keys[:, :, self.prefix :], keys[:, :, 0]
