"""What ``local-distill train``, ``knn`` and ``show`` do; each is a plain function as well."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning_fabric import Fabric
from torch.utils.data import Dataset

from local_distill._check import check_at_least
from local_distill.backbones import TimmBackbone
from local_distill.errors import ConfigError, DataError
from local_distill.matching import NearestMatcher, SimilarityMatcher, match_views
from local_distill.structures import Matcher, Matches, Tokens
from local_distill.training.checkpoints import load_checkpoint
from local_distill.training.evaluation import extract_features, knn_accuracy
from local_distill.training.images import ImageFiles, decode_image
from local_distill.training.network import DistillationNetwork
from local_distill.training.options import (
    BackboneOptions,
    HeadOptions,
    LossOptions,
    OptimOptions,
    SceneOptions,
)
from local_distill.training.scenes import SyntheticScenes
from local_distill.training.trainer import TrainResult
from local_distill.training.trainer import train as run_training
from local_distill.training.views import DemoCrop, eval_transform
from local_distill.transforms.multi_crop import MultiCrop
from local_distill.viz import denormalize, match_figure

__all__ = ["knn", "load_backbone", "open_images", "show", "train"]

# The scenes that features are tested on, never trained on.
_TEST_SEED = 1


def train(
    data: str = "scenes",
    output: str = "runs/train",
    views: MultiCrop | None = None,
    matcher: Callable[[Tokens, Tokens], Matches] | None = None,
    scenes: SceneOptions = SceneOptions(),
    backbone: BackboneOptions = BackboneOptions(),
    head: HeadOptions = HeadOptions(),
    loss: LossOptions = LossOptions(),
    optim: OptimOptions = OptimOptions(),
    steps: int = 800,
    batch_size: int = 32,
    seed: int = 0,
    workers: int = 2,
    log_every: int = 10,
    save_every: int = 200,
    resume: bool = False,
    accelerator: str = "auto",
    devices: int = 1,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    config: dict[str, Any] | None = None,
) -> TrainResult:
    """Train a backbone by global and local self-distillation.

    Args:
        data: "scenes" for the built-in ones, or an image folder (with class folders, or flat).
        output: folder of the run: checkpoint, metrics.jsonl, TensorBoard's files.
        views: what makes the views; any subclass of MultiCrop by its import path.
        matcher: pairs the patch tokens; by import path, null for no local loss.
        scenes: the built-in scenes.
        backbone: the network.
        head: the projection heads.
        loss: temperatures, weights, the teacher's pace.
        optim: learning rate, weight decay, clipping.
        steps: optimiser steps of the whole run.
        batch_size: images per step and process.
        seed: of the weights, the order and the augmentations.
        workers: loader processes.
        log_every: steps between two lines of metrics.
        save_every: steps between two checkpoints.
        resume: go on from the checkpoint in output, with the same settings.
        accelerator: cpu, gpu, auto, ... as Fabric has them.
        devices: number of processes, one device each.
        precision: 32-true or bf16-mixed.
        config: kept in the checkpoint; the command line passes its own settings.

    Returns:
        `TrainResult`.
    """
    views = DemoCrop() if views is None else views
    folder = Path(output)
    report = folder / "bad_images.jsonl"
    images = open_images(data, scenes, report=report)
    folder.mkdir(parents=True, exist_ok=True)
    fabric = Fabric(accelerator=accelerator, devices=devices, precision=precision)
    fabric.launch()

    def build() -> DistillationNetwork:
        return DistillationNetwork(
            backbone.build(),
            num_prototypes=head.num_prototypes,
            local=matcher is not None,
            hidden_dim=head.hidden_dim,
            bottleneck_dim=head.bottleneck_dim,
        )

    result = run_training(
        images,
        build,
        views,
        cast("Matcher | None", matcher),
        num_global=views.num_global,
        output=folder,
        steps=steps,
        batch_size=batch_size,
        head=head,
        loss=loss,
        optim=optim,
        seed=seed,
        workers=workers,
        log_every=log_every,
        save_every=save_every,
        resume=resume,
        config=config,
        fabric=fabric,
    )
    if fabric.is_global_zero:
        if report.exists():
            bad = {json.loads(line)["path"] for line in report.read_text().splitlines()}
            print(f"{len(bad)} unreadable file(s) were skipped, see {report}", file=sys.stderr)
        print(f"step {result.step}: {result.checkpoint}")
    return result


def knn(
    checkpoint: str | None = None,
    backbone: BackboneOptions = BackboneOptions(),
    train_data: str = "scenes",
    test_data: str = "scenes",
    scenes: SceneOptions = SceneOptions(),
    train_count: int = 2000,
    test_count: int = 1000,
    size: int = 64,
    k: int = 20,
    temp: float = 0.07,
    workers: int = 0,
    seed: int = 0,
) -> dict[str, float]:
    """Weighted k-NN accuracy on frozen features: no training, so it shows the features.

    Args:
        checkpoint: of `train`; null: the backbone with random (or pretrained) weights.
        backbone: the network where there is no checkpoint.
        train_data: "scenes", or an image folder with class folders, whose images vote.
        test_data: "scenes" (held out), or an image folder with the same class folders.
        scenes: the built-in scenes.
        train_count: at most so many images vote.
        test_count: at most so many are tested.
        size: images are resized and cropped to this side in pixels.
        k: number of neighbours.
        temp: temperature of their weights.
        workers: loader processes.
        seed: of the random weights.

    Returns:
        Accuracy in [0, 1] with the global token and with the mean of the patch tokens.
    """
    check_at_least("train_count", train_count, 1)
    check_at_least("test_count", test_count, 1)
    if (train_data == "scenes") != (test_data == "scenes"):
        raise ConfigError("`train_data` and `test_data` must both be folders, or both scenes")
    network = load_backbone(checkpoint, backbone, seed)
    voters = _labelled(train_data, scenes, train_count)
    tested = _labelled(
        test_data, SceneOptions(test_count, scenes.size, scenes.seed + _TEST_SEED), test_count
    )
    if voters.classes != tested.classes:
        raise DataError(
            f"`train_data` has the classes {voters.classes} but `test_data` has {tested.classes}"
        )
    transform = eval_transform(size)
    parts = [
        extract_features(network, images, transform, workers=workers, description=name)
        for name, images in (("voters", voters), ("tested", tested))
    ]
    result = {
        name: knn_accuracy(parts[0][i], parts[0][2], parts[1][i], parts[1][2], k=k, temp=temp)
        for i, name in enumerate(("global_token", "mean_of_tokens"))
    }
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))
    return result


def show(
    image: str,
    output: str = "matches.png",
    views: MultiCrop | None = None,
    checkpoint: str | None = None,
    backbone: BackboneOptions = BackboneOptions(),
    max_distance: float | None = 0.5,
    seed: int = 0,
) -> Path:
    """Write a picture of an image's views and of their matches, geometric beside similarity.

    Args:
        image: an image file, or "scenes" for a built-in scene.
        output: the PNG to write.
        views: what makes the views; any subclass of MultiCrop by its import path.
        checkpoint: of `train`, whose features are compared; null: the backbone's.
        backbone: the network where there is no checkpoint.
        max_distance: limit of the geometric match in larger cell diagonals; null: none.
        seed: of the views, of the scene, and of random weights.

    Returns:
        The file written.
    """
    views = DemoCrop() if views is None else views
    target = Path(output)
    if target.suffix.lower() != ".png":
        raise ConfigError(f"`output` must end in .png, got {output!r}")
    source = SyntheticScenes(1, seed=seed)[0][0] if image == "scenes" else _one_image(image)
    network = load_backbone(checkpoint, backbone, seed).eval()
    torch.manual_seed(seed)
    pictures, geometries = views(source)
    tokens = []
    for picture, geometry in zip(pictures, geometries, strict=True):
        with torch.inference_mode():
            features = network(picture[None]).patch_tokens
        grid = network.token_grid((int(picture.shape[-2]), int(picture.shape[-1])))
        batched = type(geometry)(*(part[None] for part in geometry))
        tokens.append(Tokens(features, batched, grid))
    teacher = tokens[: views.num_global]
    matchers: dict[str, Matcher] = {
        "geometric": NearestMatcher(max_distance),
        "similarity": SimilarityMatcher(),
    }
    named = {name: match_views(matcher, tokens, teacher) for name, matcher in matchers.items()}
    plain = list(pictures)
    if views.normalize is not None:
        plain = [denormalize(picture, *views.normalize) for picture in plain]
    figure = match_figure(
        source,
        plain,
        geometries,
        [token.grid for token in tokens if token.grid is not None],
        named,
        cost_labels={"geometric": "distance / cell diagonal", "similarity": "1 − cosine"},
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(target), dpi=110)
    print(target)
    return target


def open_images(
    data: str, scenes: SceneOptions, *, report: Path | None = None
) -> Dataset[tuple[Any, int]]:
    """The built-in scenes or an image folder."""
    if data == "scenes":
        return SyntheticScenes(scenes.count, scenes.size, seed=scenes.seed)
    return ImageFiles(data, report=report)


def load_backbone(checkpoint: str | None, backbone: BackboneOptions, seed: int = 0) -> TimmBackbone:
    """The teacher's backbone out of a checkpoint, or a fresh one."""
    if checkpoint is None:
        torch.manual_seed(seed)
        return backbone.build()
    state = load_checkpoint(checkpoint)
    options = state["config"].get("backbone")
    if options is None:
        raise DataError(
            f"`checkpoint` {checkpoint!r} does not say which backbone it holds: it was written by a"
            " call from Python without `config`"
        )
    network = BackboneOptions(**{**options, "pretrained": False}).build()
    prefix = "module.backbone."
    weights = {
        name.removeprefix(prefix): value
        for name, value in state["teacher"].items()
        if name.startswith(prefix)
    }
    network.load_state_dict(weights)
    return network


def _labelled(data: str, scenes: SceneOptions, count: int) -> Any:
    images = open_images(data, scenes)
    if isinstance(images, SyntheticScenes):
        return SyntheticScenes(min(count, scenes.count), scenes.size, seed=scenes.seed)
    assert isinstance(images, ImageFiles)
    if not images.classes:
        raise DataError(
            f"{data!r} is a flat folder: k-NN needs one folder per class in it, with the images"
        )
    if len(images) > count:  # an even share of every class
        step = len(images) / count
        chosen = [int(i * step) for i in range(count)]
        images.paths = [images.paths[i] for i in chosen]
        images.targets = [images.targets[i] for i in chosen]
    return images


def _one_image(path: str) -> Any:
    try:
        return decode_image(path)
    except FileNotFoundError as error:
        raise DataError(f"`image`: there is no file {path!r}") from error
    except Exception as error:  # decoders raise anything on bad bytes
        raise DataError(f"`image` {path!r} cannot be read: {error}") from error
