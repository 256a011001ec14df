"""Tokens that a backbone does not get to see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from local_distill.backbones import TimmBackbone
from local_distill.errors import ConfigError, ShapeError

__all__ = ["MaskedPatches"]


class MaskedPatches(nn.Module):
    """A learnt vector in place of the masked patches' embeddings, before positions are added.

    It stands behind the patch embedding of timm's ViTs and Swins, and does nothing but within
    `hide`.

    Args:
        backbone: of one of those families; its ``model.patch_embed`` is watched.

    Raises:
        ConfigError: a model without such a patch embedding.

    Example:
        >>> from local_distill.backbones import tiny_vit
        >>> backbone = tiny_vit()
        >>> masked = MaskedPatches(backbone)
        >>> views = torch.randn(2, 3, 24, 24)
        >>> everything = torch.ones(2, 9, dtype=torch.bool)
        >>> with masked.hide(everything):  # nothing of the image is left
        ...     tokens = backbone(views).patch_tokens
        >>> torch.allclose(tokens[0], tokens[1], atol=1e-6)
        True

    Source: "iBOT: Image BERT Pre-Training with Online Tokenizer" (ICLR 2022), section 3.
    """

    def __init__(self, backbone: TimmBackbone) -> None:
        super().__init__()
        embed: Any = getattr(backbone.model, "patch_embed", None)
        projection = getattr(embed, "proj", None)
        if not isinstance(embed, nn.Module) or not isinstance(projection, nn.Conv2d):
            raise ConfigError(
                f"`backbone`: {type(backbone.model).__name__} has no patch embedding whose tokens "
                "could be masked; take a ViT or a Swin"
            )
        # Two axes, as the class token has three: a token is no bias, weight decay is for it too.
        self.token = nn.Parameter(torch.zeros(1, projection.out_channels))
        self._patch_embed = [embed]  # in a list, so that it is not registered twice

    @contextmanager
    def hide(self, valid: Tensor) -> Iterator[None]:
        """Mask these tokens in passes of the backbone within.

        Args:
            valid: (b, n) bool, True where a token is masked.
        """

        def replace(module: nn.Module, given: Any, embedded: Tensor) -> Tensor:
            if len(valid) == 0:  # an image stands in for an empty batch, see TimmBackbone
                none = torch.zeros((), dtype=torch.bool, device=embedded.device)
                return torch.where(none, self.token.to(embedded.dtype), embedded)
            flags = valid.reshape(*_token_axes(embedded, valid), 1)
            return torch.where(flags, self.token.to(embedded.dtype), embedded)

        handle = self._patch_embed[0].register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()


def _token_axes(embedded: Tensor, valid: Tensor) -> tuple[int, ...]:
    axes = tuple(embedded.shape[:-1])  # (b, n) or (b, rows, cols)
    count = 1
    for axis in axes[1:]:
        count *= axis
    if valid.dim() != 2 or valid.shape != (axes[0], count):
        raise ShapeError(
            f"`valid` has shape {tuple(valid.shape)} but the patch embedding gives {axes[0]} images"
            f" of {count} tokens: it must be ({axes[0]}, {count}) bool"
        )
    return axes
