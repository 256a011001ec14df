"""Frozen features of images, and of scenes' tokens, for a k-NN vote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from local_distill.backbones import TimmBackbone
from local_distill.errors import ConfigError
from local_distill.training.evaluation.token_maps import token_labels
from local_distill.training.scenes import SyntheticScenes

__all__ = ["extract_features", "scene_tokens"]


@torch.inference_mode()
def extract_features(
    backbone: TimmBackbone,
    images: Dataset[tuple[Any, int]],
    transform: Callable[[Any], Tensor],
    *,
    batch_size: int = 128,
    workers: int = 0,
    device: torch.device | str = "cpu",
    description: str = "features",
) -> tuple[Tensor, Tensor, Tensor]:
    """Frozen features of a data set, with a progress bar.

    Args:
        backbone: is put into evaluation mode and back.
        images: gives (PIL image, label).
        transform: PIL image → (3, h, w), the same size for all.
        batch_size: images at a time.
        workers: loader processes.
        device: where to compute.
        description: beside the progress bar.

    Returns:
        Global tokens (n, d), means of the patch tokens (n, d) and labels (n,), on the CPU.

    Raises:
        ConfigError: an empty data set.
    """
    if len(images) == 0:  # type: ignore[arg-type]
        raise ConfigError("`images` is empty: there is nothing to take features of")
    loader: DataLoader[Any] = DataLoader(
        _Transformed(images, transform), batch_size=batch_size, num_workers=workers
    )
    was_training = backbone.training
    backbone.eval()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch, labels in tqdm(loader, desc=description, leave=False, dynamic_ncols=True):
        out = backbone(batch.to(device))
        means = out.patch_tokens.mean(1)
        parts.append((out.global_token.float().cpu(), means.float().cpu(), labels))
    backbone.train(was_training)
    whole, means, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return whole, means, labels


@torch.inference_mode()
def scene_tokens(
    backbone: TimmBackbone,
    scenes: SyntheticScenes,
    transform: Callable[[Any], Tensor],
    *,
    most: int = 10_000,
    batch_size: int = 128,
    seed: int = 0,
    description: str = "tokens",
) -> tuple[Tensor, Tensor]:
    """Patch tokens of scenes with the class at each token's centre: dense features to be tested.

    Args:
        backbone: is put into evaluation mode and back.
        scenes: give the class masks.
        transform: PIL image → (3, h, w), without a crop, so that the masks fit.
        most: at most so many tokens, drawn at random.
        batch_size: images at a time.
        seed: of the draw.
        description: beside the progress bar.

    Returns:
        Features (n, d) and labels (n,): 0 is background, else 1 + class.
    """
    from torchvision.transforms.v2.functional import to_pil_image

    was_training = backbone.training
    backbone.eval()
    features, labels = [], []
    for start in tqdm(
        range(0, len(scenes), batch_size), desc=description, leave=False, dynamic_ncols=True
    ):
        numbers = range(start, min(start + batch_size, len(scenes)))
        drawn = [scenes.scene(i) for i in numbers]
        batch = torch.stack([transform(to_pil_image(scene.image)) for scene in drawn])
        masks = torch.stack([scene.class_mask for scene in drawn])
        features.append(backbone(batch).patch_tokens.flatten(0, 1))
        view_size = (int(batch.shape[-2]), int(batch.shape[-1]))
        labels.append(token_labels(masks, backbone.token_grid(view_size), view_size).flatten())
    backbone.train(was_training)
    chosen = torch.randperm(sum(map(len, labels)), generator=torch.Generator().manual_seed(seed))[
        :most
    ]
    return torch.cat(features)[chosen].float(), torch.cat(labels)[chosen]


class _Transformed(Dataset[tuple[Tensor, int]]):
    def __init__(
        self, images: Dataset[tuple[Any, int]], transform: Callable[[Any], Tensor]
    ) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), label
