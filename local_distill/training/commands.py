"""What ``local-distill train`` and ``show`` do; each is a plain function as well."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from local_distill.errors import ConfigError, DataError
from local_distill.training.backbone_loading import load_backbone
from local_distill.training.checkpoints import CheckpointStore
from local_distill.training.data.decoding import decode_image
from local_distill.training.data.open_images import open_images
from local_distill.training.demo_method import demo_method
from local_distill.training.match_picture import match_picture
from local_distill.training.methods.method import Method
from local_distill.training.options import (
    BackboneOptions,
    OptimOptions,
    SceneOptions,
    TeacherOptions,
)
from local_distill.training.processes import Precision, Strategy, launch, make_fabric
from local_distill.training.run_pictures import RunPictures
from local_distill.training.scenes import SyntheticScenes
from local_distill.training.trainer import TrainResult
from local_distill.training.trainer import train as run_training
from local_distill.training.views import DemoCrop
from local_distill.transforms.multi_crop import MultiCrop

__all__ = ["show", "train", "write_config"]


def train(
    data: str = "scenes",
    output: str = "runs/train",
    method: Method | None = None,
    views: MultiCrop | None = None,
    backbone: BackboneOptions = BackboneOptions(),
    scenes: SceneOptions = SceneOptions(),
    optim: OptimOptions = OptimOptions(),
    teacher: TeacherOptions = TeacherOptions(momentum=0.97),
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 32,
    accumulate: int = 1,
    drop_last: bool = True,
    seed: int = 0,
    workers: int = 2,
    most_bad: float = 0.1,
    log_every: int = 10,
    save_every: int = 200,
    keep: int = 3,
    pictures: bool = True,
    resume: bool = False,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: Strategy = "auto",
    precision: Precision = "32-true",
    compile: bool = False,
    process_timeout: float = 1800.0,
    config: dict[str, Any] | None = None,
) -> TrainResult:
    """Train a backbone by any of the methods, on any images.

    Args:
        data: "scenes" for the built-in ones; an image folder (flat, class folders, nested); a list
            of files (.txt, .csv, .jsonl); hf:NAME for a Hugging Face data set; .tar shards.
        output: folder of the run: settings, metrics, checkpoints, pictures.
        method: what is learnt: Adasim, Cribo, Croc, Densecl, Dino, Esvit, Glsd, Ibot, Pixpro,
            SdsslByol, SdsslMoco, SdsslSimclr, Vicregl, with the published sizes, or a class of
            your own by its import path; null: Glsd with the small heads of the demo.
        views: what makes the views; any subclass of MultiCrop by its import path.
        backbone: the network.
        scenes: the built-in scenes.
        optim: the optimiser and its schedules; durations are in epochs where the run is.
        teacher: how slowly the teacher follows.
        steps: optimiser steps of the whole run; 800 where neither these nor epochs are given.
        epochs: passes over the images, instead of steps.
        batch_size: images per micro-batch and process.
        accumulate: micro-batches per step.
        drop_last: leave out an epoch's last images where they do not fill a micro-batch.
        seed: of the weights, the order and the augmentations.
        workers: loader processes.
        most_bad: the run stops where a larger share of the images cannot be read.
        log_every: steps between two lines of metrics.
        save_every: steps between two checkpoints.
        keep: so many checkpoints are kept.
        pictures: draw matches and tokens of a few images with every checkpoint.
        resume: go on from the last good checkpoint in output, with the same settings.
        accelerator: cpu, gpu, auto, ... as Fabric has them.
        devices: number of processes on each machine, one device each.
        num_nodes: number of machines.
        strategy: ddp, or fsdp to shard the network.
        precision: 32-true, bf16-mixed, 16-mixed (GPU) or 64-true.
        compile: run the networks through torch.compile.
        process_timeout: seconds after which a process that waits for another one gives up.
        config: kept in the checkpoint; the command line passes its own settings.

    Returns:
        `TrainResult`.
    """
    views = DemoCrop() if views is None else views
    steps = 800 if steps is None and epochs is None else steps
    folder = Path(output)
    report = folder / "bad_images.jsonl"
    images = open_images(data, scenes=scenes, report=report, most_bad=most_bad)
    fabric = make_fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=precision,
        timeout=process_timeout,
    )
    launch(fabric)
    if config is not None and fabric.is_global_zero:
        write_config(folder, config)
    result = run_training(
        images,
        views,
        demo_method() if method is None else method,
        backbone.build,
        num_global=views.num_global,
        output=folder,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        drop_last=drop_last,
        optim=optim,
        teacher=teacher,
        seed=seed,
        workers=workers,
        log_every=log_every,
        save_every=save_every,
        keep=keep,
        resume=resume,
        compile=compile,
        draw=RunPictures(folder, images, views, seed=seed).draw if pictures else None,
        config=config,
        fabric=fabric,
    )
    if fabric.is_global_zero:
        if report.exists():
            print(f"some images could not be read, see {report}", file=sys.stderr)
        print(f"step {result.step}: {result.checkpoint}")
    return result


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Put the settings into ``config.yaml``, which ``train --config`` takes.

    Those of a run that has begun stay as they are.
    """
    path = folder / "config.yaml"
    if not CheckpointStore(folder / "checkpoints").steps():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


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
        checkpoint: a run, or a checkpoint of it, whose features are compared; null: the backbone's.
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
    drawn, geometries = views(source)
    figure = match_picture(
        network,
        source,
        drawn,
        geometries,
        views.num_global,
        normalize=views.normalize,
        max_distance=max_distance,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(target), dpi=110)
    print(target)
    return target


def _one_image(path: str) -> Any:
    try:
        return decode_image(path)
    except FileNotFoundError as error:
        raise DataError(f"`image`: there is no file {path!r}") from error
    except Exception as error:  # decoders raise anything on bad bytes
        raise DataError(f"`image` {path!r} cannot be read: {error}") from error
