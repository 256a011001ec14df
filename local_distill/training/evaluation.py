"""How good the features are: weighted k-NN on frozen features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from local_distill._check import check_at_least, check_positive
from local_distill.backbones import TimmBackbone
from local_distill.errors import ConfigError, ShapeError
from local_distill.geometry import grid_points
from local_distill.training.scenes import SyntheticScenes

__all__ = ["extract_features", "knn_accuracy", "scene_tokens"]


def knn_accuracy(
    train_features: Tensor,
    train_labels: Sequence[int] | Tensor,
    test_features: Tensor,
    test_labels: Sequence[int] | Tensor,
    *,
    k: int = 20,
    temp: float = 0.07,
) -> float:
    """Top-1 accuracy of a weighted k-nearest-neighbour vote: no training, so it shows the features.

    Each of the k nearest by cosine votes for its label with exp(cos / temp).

    Args:
        train_features: (n, d), those that vote.
        train_labels: (n,).
        test_features: (m, d).
        test_labels: (m,).
        k: neighbours; at most n.
        temp: temperature of the weights, above 0.

    Returns:
        Share of the test samples that are right, in [0, 1].

    Raises:
        ShapeError: features that are not (n, d), of other dimensions, or labels of other lengths.
        ConfigError: k below 1, a temperature not above 0.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> knn_accuracy(features, [0, 0, 1], torch.tensor([[2.0, 0.1], [0.1, 3.0]]), [0, 1], k=1)
        1.0

    Source: "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018);
    DINO (ICCV 2021).
    """
    from sklearn.neighbors import KNeighborsClassifier

    for name, features, labels in (
        ("train_features", train_features, train_labels),
        ("test_features", test_features, test_labels),
    ):
        if features.dim() != 2 or features.shape[0] != len(labels) or features.shape[0] == 0:
            raise ShapeError(
                f"`{name}` must be (n, d) with n ≥ 1 labels, got {tuple(features.shape)} and "
                f"{len(labels)} labels"
            )
    if train_features.shape[1] != test_features.shape[1]:
        raise ShapeError(
            f"axis `d` is {train_features.shape[1]} in `train_features` but "
            f"{test_features.shape[1]} in `test_features`"
        )
    check_positive("temp", temp)
    neighbours = min(check_at_least("k", k, 1), len(train_features))

    def weights(distances: NDArray[np.float64]) -> NDArray[np.float64]:
        closest = distances.min(axis=1, keepdims=True)  # a common factor: no vote underflows
        result: NDArray[np.float64] = np.exp((closest - distances) / temp)
        return result

    vote = KNeighborsClassifier(neighbours, weights=weights, metric="cosine", algorithm="brute")
    vote.fit(train_features.float().numpy(), np.asarray(train_labels))
    return float(vote.score(test_features.float().numpy(), np.asarray(test_labels)))


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
        points = grid_points(backbone.token_grid(view_size), batch.device, torch.float64)
        # a view pixel's place in the mask, which may be of another size
        scale = torch.tensor([masks.shape[2] / view_size[1], masks.shape[1] / view_size[0]])
        x, y = (points * scale).long().unbind(-1)
        labels.append(masks[:, y, x].flatten())
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
