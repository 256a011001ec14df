"""One pass of a frozen backbone over a set of images, and everything that is kept of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from local_distill._check import check_at_least
from local_distill.backbones import TimmBackbone
from local_distill.errors import ConfigError, DataError
from local_distill.structures import TokenGrid
from local_distill.training.evaluation.image_sets import EvaluationImages, StoredImages
from local_distill.training.evaluation.token_maps import token_labels
from local_distill.transforms.multi_crop import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["FrozenFeatures", "frozen_features"]


class FrozenFeatures(NamedTuple):
    """Features of a set of images, on the CPU in float32; n images.

    Attributes:
        global_token: (n, d).
        mean_of_tokens: (n, d), of the patch tokens.
        labels: (n,) int64; all 0 where the set has none.
        layers: by layer the global token (n, d_l); empty unless asked for.
        layer_means: by layer the mean of the patch tokens (n, d_l).
        tokens: (n, m, d) patch tokens, drawn ones or all; None unless asked for.
        token_labels: (n, m) int64 class at each of their centres; None without masks.
        masks: (n, h, w) uint8; None without.
        grid: of all tokens of an image.
        view_size: (height, width) that the backbone saw.
    """

    global_token: Tensor
    mean_of_tokens: Tensor
    labels: Tensor
    layers: tuple[Tensor, ...]
    layer_means: tuple[Tensor, ...]
    tokens: Tensor | None
    token_labels: Tensor | None
    masks: Tensor | None
    grid: TokenGrid
    view_size: tuple[int, int]


@torch.inference_mode()
def frozen_features(
    backbone: TimmBackbone,
    images: EvaluationImages | StoredImages,
    *,
    layers: bool = False,
    tokens: bool = False,
    most_tokens: int | None = None,
    batch_size: int = 128,
    workers: int = 0,
    device: torch.device | str = "cpu",
    seed: int = 0,
    description: str | None = None,
) -> FrozenFeatures:
    """Features of a set of images, from one forward pass each.

    Args:
        backbone: is put into evaluation mode and back; has to be on ``device``.
        images: in memory, or a folder.
        layers: keep every layer's global token and mean of the patch tokens.
        tokens: keep patch tokens.
        most_tokens: keep about so many patch tokens of the set, an equal number of each image
            drawn at random; None: all.
        batch_size: images at a time.
        workers: loader processes, of a folder.
        device: where to compute.
        seed: of the draw.
        description: beside a progress bar; None: no bar.

    Returns:
        `FrozenFeatures`.

    Raises:
        ConfigError: an empty set; ``layers`` of a backbone that cannot give them.
        DataError: features that are not finite, as those of a run that diverged.

    Example:
        >>> from local_distill.backbones import tiny_vit
        >>> from local_distill.training import SyntheticScenes
        >>> from local_distill.training.evaluation import draw_scenes
        >>> drawn = draw_scenes(SyntheticScenes(3, 32))
        >>> kept = frozen_features(tiny_vit(width=24), drawn, layers=True, tokens=True)
        >>> kept.tokens.shape, len(kept.layers)
        (torch.Size([3, 16, 24]), 3)
    """
    check_at_least("batch_size", batch_size, 1)
    count = len(images)
    if count == 0:
        raise ConfigError("`images` is empty: there is nothing to take features of")
    model = _with_layers(backbone) if layers else backbone
    was_training = backbone.training
    model.eval()
    bar = tqdm(
        total=count, desc=description, leave=False, dynamic_ncols=True, disable=description is None
    )
    parts: list[tuple[Tensor, ...]] = []
    layer_parts: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
    drawn: Tensor | None = None
    done = 0
    try:
        for pixels, labels, masks in _batches(images, batch_size, workers):
            view_size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
            grid = model.token_grid(view_size)
            out = model(_normalized(pixels, device))
            kept = [out.global_token, out.patch_tokens.mean(1)]
            if layers:
                if not (out.layers and out.patch_layers):
                    raise ConfigError(
                        f"`layers`: {type(backbone).__name__} gives no tokens of its layers; build "
                        "it with layers=True and patch_layers=True"
                    )
                means = tuple(part.mean(1).float().cpu() for part in out.patch_layers)
                layer_parts.append((tuple(part.float().cpu() for part in out.layers), means))
            classes = token_labels(masks, grid, view_size) if masks.numel() else masks
            if tokens:
                if drawn is None:
                    drawn = _draw(count, grid.num_tokens, most_tokens, seed)
                mine = drawn[done : done + len(pixels)]
                kept.append(out.patch_tokens.gather(1, _index(mine, out.patch_tokens)))
                classes = classes.gather(1, mine) if masks.numel() else classes
            # what is drawn alone leaves the device
            parts.append((*(part.float().cpu() for part in kept), labels, classes, masks))
            done += len(pixels)
            bar.update(len(pixels))
    finally:
        backbone.train(was_training)
        bar.close()
    whole = [torch.cat(column) for column in zip(*parts, strict=True)]
    global_token, means_of_tokens = whole[:2]
    labels, classes, masks = whole[-3:]
    if not all(bool(part.isfinite().all()) for part in (global_token, means_of_tokens)):
        raise DataError(
            "`backbone` gives features that are not finite: its weights have diverged, or its "
            "precision is too low for these images"
        )
    by_layer, means_by_layer = (
        tuple(map(torch.cat, zip(*column, strict=True)))
        for column in (zip(*layer_parts, strict=True) if layer_parts else ((), ()))
    )
    has_masks = masks.numel() > 0
    return FrozenFeatures(
        global_token,
        means_of_tokens,
        labels,
        by_layer,
        means_by_layer,
        whole[2] if tokens else None,
        classes.long() if has_masks else None,
        masks if has_masks else None,
        grid,
        view_size,
    )


def _with_layers(backbone: TimmBackbone) -> TimmBackbone:
    """The same model, giving its layers' tokens as well; it shares the weights."""
    if type(backbone) is not TimmBackbone:
        return backbone  # another class has to give them of itself
    return TimmBackbone(backbone.model, layers=True, patch_layers=True)


def _batches(
    images: EvaluationImages | StoredImages, batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    if isinstance(images, StoredImages):
        loader: DataLoader[Any] = DataLoader(images, batch_size=batch_size, num_workers=workers)
        yield from loader
        return
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        pixels = images.images[part]
        labels = torch.zeros(len(pixels)).long() if images.labels is None else images.labels[part]
        none = torch.empty(len(pixels), 0, dtype=torch.uint8)
        yield pixels, labels, none if images.masks is None else images.masks[part]


def _normalized(pixels: Tensor, device: torch.device | str) -> Tensor:
    mean, std = (
        torch.tensor(numbers, device=device)[:, None, None]
        for numbers in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (pixels.to(device).float() / 255 - mean) / std


def _draw(count: int, per_image: int, most: int | None, seed: int) -> Tensor:
    """(count, m) numbers of the tokens kept of each image, in order."""
    if most is None:
        return torch.arange(per_image).expand(count, -1)
    m = min(per_image, math.ceil(check_at_least("most_tokens", most, 1) / count))
    chance = torch.rand(count, per_image, generator=torch.Generator().manual_seed(seed))
    return chance.argsort(1)[:, :m].sort(1).values


def _index(chosen: Tensor, tokens: Tensor) -> Tensor:
    return chosen.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[-1])
