"""Tokens that a backbone does not get to see."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from local_distill.backbones import TimmBackbone
from local_distill.errors import ConfigError, ShapeError

__all__ = ["MaskedPatches"]

# How many patches a side a token may be merged from.
_MERGED = (2, 4, 8, 16)


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
            valid: (b, n) bool, True where a token is masked; of a Swin, its last stage's tokens.
        """

        def replace(module: nn.Module, given: Any, embedded: Tensor) -> Tensor:
            return torch.where(_spread(valid, embedded), self.token.to(embedded.dtype), embedded)

        handle = self._patch_embed[0].register_forward_hook(replace)
        try:
            yield
        finally:
            handle.remove()


def _spread(valid: Tensor, embedded: Tensor) -> Tensor:
    """The tokens' flags for the patches (b, n, 1) or (b, rows, cols, 1) that they are made of.

    A Swin's tokens are merged from 8 × 8 patches: where one is masked, so are all of its patches.
    """
    b, *axes, _ = embedded.shape
    if len(valid) == 0:  # an image stands in for an empty batch, see TimmBackbone
        return valid.new_zeros(())
    if valid.dim() == 2 and valid.shape[0] == b:
        if valid.shape[1] == math.prod(axes):
            return valid.reshape(b, *axes, 1)
        for merged in _MERGED if len(axes) == 2 else ():
            rows, cols = (-(-axis // merged) for axis in axes)  # an odd one is padded, then merged
            if rows * cols == valid.shape[1]:
                grid = valid.reshape(b, rows, cols)
                grid = grid.repeat_interleave(merged, 1).repeat_interleave(merged, 2)
                return grid[:, : axes[0], : axes[1], None]
    raise ShapeError(
        f"`valid` has shape {tuple(valid.shape)} but the patch embedding gives {b} images of "
        f"{' × '.join(map(str, axes))} patches: it must be ({b}, n) bool with one flag a token"
    )
