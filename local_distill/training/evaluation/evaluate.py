"""What ``local-distill eval`` does: from a checkpoint or a timm name to a table, JSON and plots."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from local_distill._check import check_at_least
from local_distill.errors import ConfigError, DataError, require_extra
from local_distill.training.backbone_loading import load_backbone
from local_distill.training.evaluation.correspondence import correspondence_views, draw_view_pairs
from local_distill.training.evaluation.eval_plots import plot_correspondence, plot_layers
from local_distill.training.evaluation.eval_results import (
    evaluation_record,
    evaluation_table,
    write_json,
)
from local_distill.training.evaluation.image_sets import (
    EvaluationImages,
    StoredImages,
    draw_scenes,
)
from local_distill.training.evaluation.tasks import (
    LABELLED,
    MASKED,
    TASKS,
    Evaluation,
    Task,
    evaluate_backbone,
)
from local_distill.training.options import BackboneOptions, SceneOptions
from local_distill.training.scenes import SyntheticScenes
from local_distill.transforms.multi_crop import MultiCrop

__all__ = ["evaluate"]

# The scenes that features are tested on, never trained on.
_TEST_SEED = 1


def evaluate(
    checkpoint: str | None = None,
    backbone: BackboneOptions = BackboneOptions(),
    tasks: list[Task] | None = None,
    train_data: str = "scenes",
    test_data: str = "scenes",
    scenes: SceneOptions = SceneOptions(),
    train_count: int = 2000,
    test_count: int = 1000,
    size: int = 64,
    k: int = 20,
    temp: float = 0.07,
    most_tokens: int = 10_000,
    views: MultiCrop | None = None,
    pair_count: int = 200,
    output: str | None = None,
    name: str | None = None,
    batch_size: int = 128,
    workers: int = 0,
    seed: int = 0,
    accelerator: str = "auto",
) -> Evaluation:
    """Test frozen features: k-NN, linear, by layer, of patch tokens, across views.

    Prints a table, and writes NAME.json, NAME-layers.png and NAME-correspondence.png. A live model
    is tested by `evaluate_backbone`.

    Args:
        checkpoint: a run's folder, whose newest checkpoint is taken, or a checkpoint's file; null:
            the backbone with random (or pretrained) weights.
        backbone: the network where there is no checkpoint.
        tasks: some of knn, linear, layers, dense, segmentation, correspondence; null: all that the
            data can serve.
        train_data: "scenes", or a folder whose images vote and are learned from: class folders, or
            images/ beside masks/ with class ids as PNG (255 is ignored).
        test_data: "scenes" (held out), or a folder of the same kind with the same classes.
        scenes: the built-in scenes.
        train_count: at most so many images vote.
        test_count: at most so many are tested.
        size: images are resized and cropped to this side in pixels.
        k: number of neighbours.
        temp: temperature of their weights.
        most_tokens: about so many patch tokens of the voting images vote and are learned from.
        views: what makes the two views for correspondence; null: mild ones of the given size.
        pair_count: at most so many test images are seen in two views.
        output: folder for the results; null: RUN/eval, or runs/eval without a checkpoint.
        name: of the result's files; null: after the test data and the checkpoint.
        batch_size: images at a time.
        workers: loader processes.
        seed: of random weights, draws and splits.
        accelerator: cpu, gpu, auto, ... as Fabric has them.

    Returns:
        `Evaluation`.
    """
    check_at_least("train_count", train_count, 1)
    check_at_least("test_count", test_count, 1)
    check_at_least("pair_count", pair_count, 1)
    if (train_data == "scenes") != (test_data == "scenes"):
        raise ConfigError("`train_data` and `test_data` must both be folders, or both scenes")
    target = _target(checkpoint, output, name, test_data)
    settings: dict[str, Any] = {
        "checkpoint": checkpoint,
        "backbone": dataclasses.asdict(backbone) if checkpoint is None else None,
        "train_data": train_data,
        "test_data": test_data,
        "scenes": dataclasses.asdict(scenes),
        "train_count": train_count,
        "test_count": test_count,
        "size": size,
        "k": k,
        "temp": temp,
        "most_tokens": most_tokens,
        "pair_count": pair_count,
        "seed": seed,
    }
    device = _device(accelerator)
    network = load_backbone(checkpoint, backbone, seed)
    sets = _open(train_data, test_data, scenes, (train_count, test_count), size)
    chosen = _served(sets) if tasks is None else list(dict.fromkeys(tasks))
    pairs = None
    if "correspondence" in chosen:
        views = correspondence_views(size) if views is None else views
        settings["views"] = repr(views)
        pairs = draw_view_pairs(
            sets.pictures,
            views,
            count=pair_count,
            seed=seed,
            description="drawing views",
        )
    found = evaluate_backbone(
        network,
        sets.train,
        sets.test,
        pairs,
        tasks=chosen,
        k=k,
        temp=temp,
        most_tokens=most_tokens,
        batch_size=batch_size,
        workers=workers,
        device=device,
        seed=seed,
        progress=True,
    )
    settings["tasks"] = chosen
    write_json(evaluation_record(found, settings), target.with_name(target.name + ".json"))
    written = [".json"]
    if found.layers:
        written.append("-layers.png")
        level = found.numbers["layers/majority"]
        plot_layers(found.layers, target.with_name(target.name + written[-1]), majority=level)
    if found.errors is not None:
        written.append("-correspondence.png")
        plot_correspondence(found.errors, target.with_name(target.name + written[-1]))
    print(evaluation_table(found))
    print("\n".join(str(target.with_name(target.name + ending)) for ending in written))
    return found


class _Sets(NamedTuple):
    train: EvaluationImages | StoredImages
    test: EvaluationImages | StoredImages
    pictures: Dataset[tuple[Any, int]]


def _open(
    train_data: str, test_data: str, scenes: SceneOptions, counts: tuple[int, int], size: int
) -> _Sets:
    if train_data != "scenes":
        test = StoredImages(test_data, size, count=counts[1])
        return _Sets(StoredImages(train_data, size, count=counts[0]), test, test.pictures)
    voters = SyntheticScenes(min(counts[0], scenes.count), scenes.size, seed=scenes.seed)
    tested = SyntheticScenes(counts[1], scenes.size, seed=scenes.seed + _TEST_SEED)
    drawn = [
        draw_scenes(part, size, description=f"drawing {name}")
        for name, part in (("voters", voters), ("tested", tested))
    ]
    return _Sets(drawn[0], drawn[1], tested)


def _served(sets: _Sets) -> list[Task]:
    """The tasks that the data can serve."""
    labelled = bool(sets.train.classes and sets.test.classes)
    masked = sets.train.has_masks and sets.test.has_masks
    if not (labelled or masked):
        raise DataError(
            "`train_data` or `test_data` has neither classes nor masks, it is a flat folder: give "
            "one folder per class, or images/ beside masks/; or ask for --tasks "
            "'[\"correspondence\"]' alone, which needs neither"
        )
    return [
        task
        for task in TASKS
        if (labelled or task not in LABELLED) and (masked or task not in MASKED)
    ]


def _device(accelerator: str) -> torch.device:
    fabric = require_extra("lightning_fabric", "train")
    try:
        device: torch.device = fabric.Fabric(accelerator=accelerator, devices=1).device
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"`accelerator` is {accelerator!r}: {error}") from error
    return device


def _target(checkpoint: str | None, output: str | None, name: str | None, test_data: str) -> Path:
    """The results' path without an ending."""
    path = None if checkpoint is None else Path(checkpoint)
    run = path
    if path is not None and not path.is_dir():
        run = path.parent
    if run is not None and run.name == "checkpoints":
        run = run.parent
    folder = Path(output) if output is not None else (run or Path("runs")) / "eval"
    if name is None:
        data = Path(test_data).resolve()
        plain = data.name if data.is_dir() else data.stem
        name = "scenes" if test_data == "scenes" else plain
        if path is not None and not path.is_dir():
            name += f"-{path.stem}"
    elif Path(name).name != name:
        raise ConfigError(f"`name` must be a plain file name, got {name!r}; folders go in `output`")
    return folder / name
