"""The reference training loop: read it in ten minutes, copy what you need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from local_distill.backbones import TimmBackbone
from local_distill.structures import CropGeometry
from local_distill.training.accumulating import accumulating
from local_distill.training.checkpoint_manifest import file_name
from local_distill.training.checkpoints import CheckpointStore
from local_distill.training.data.worker_failures import named_worker_failures
from local_distill.training.dead_ranks import watch_processes
from local_distill.training.loading import mix_seeds
from local_distill.training.methods.method import Method
from local_distill.training.metrics import RunLog, step_values
from local_distill.training.optimizer import clip_gradients, set_schedules
from local_distill.training.options import OptimOptions, TeacherOptions
from local_distill.training.processes import agree, launch
from local_distill.training.run_plan import check_run, plan_run
from local_distill.training.run_setup import set_up
from local_distill.training.run_state import gather_state, restore_state
from local_distill.training.spoilt_steps import SpoiltSteps
from local_distill.training.stop_signal import stop_signal

__all__ = ["TrainResult", "train"]


class TrainResult(NamedTuple):
    """What a run leaves.

    Attributes:
        network: the one to use: the teacher's, or the student's where there is no teacher.
        checkpoint: the file of the last checkpoint.
        step: steps done.
        interrupted: whether Ctrl-C or a termination signal ended it early.
    """

    network: nn.Module
    checkpoint: Path
    step: int
    interrupted: bool


def train(
    images: Dataset[tuple[Any, int]],
    views: Callable[[Any], tuple[Sequence[Tensor], Sequence[CropGeometry]]],
    method: Method,
    build_backbone: Callable[..., TimmBackbone],
    *,
    num_global: int,
    output: Path,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 32,
    accumulate: int = 1,
    drop_last: bool = True,
    optim: OptimOptions,
    teacher: TeacherOptions,
    seed: int = 0,
    workers: int = 0,
    log_every: int = 10,
    save_every: int = 200,
    keep: int = 3,
    resume: bool = False,
    compile: bool = False,
    draw: Callable[[int, TimmBackbone], object] | None = None,
    config: dict[str, Any] | None = None,
    fabric: Fabric | None = None,
) -> TrainResult:
    """Train a network by self-distillation.

    Args:
        images: gives (image, label); labels are not looked at.
        views: image → (views, geometries), such as `MultiCrop`.
        method: network, loss and step.
        build_backbone: makes the backbone, after the seed is set; called with ``layers=``.
        num_global: how many of the views the teacher sees; they come first.
        output: folder of the run.
        steps: optimiser steps of the whole run; give either these or ``epochs``.
        epochs: passes over the images; durations of schedules are then in epochs too.
        batch_size: images per micro-batch and process.
        accumulate: micro-batches per step.
        drop_last: leave out an epoch's last images where they do not fill a micro-batch.
        optim: the optimiser and its schedules.
        teacher: how slowly the teacher follows.
        seed: of weights, order and augmentations.
        workers: loader processes.
        log_every: steps between two lines of metrics.
        save_every: steps between two checkpoints; the last step is saved in any case.
        keep: so many checkpoints are kept.
        resume: go on from the last good checkpoint, where there is one.
        compile: run the networks through ``torch.compile``.
        draw: called with every checkpoint's step and the backbone to use, on the first process.
        config: JSON-able settings, kept in the checkpoint and compared on resume.
        fabric: device, precision and processes; None: automatic, one process.

    Returns:
        `TrainResult`.

    Raises:
        CheckpointWriteError: a full disk; what was saved before is as it was.
        ConfigError: settings that cannot work, an ``output`` that already holds a run, a resume
            with other settings; all before any work is done.
        DataError: a loader's worker died, or too many images cannot be read.
        KeyboardInterrupt: stopped, and a loader's worker ended before the step could be.
        LocalDistillError: the gradient stayed non-finite for 50 steps in a row.
    """
    fabric = fabric or Fabric(devices=1)
    launch(fabric)
    store = CheckpointStore(output / "checkpoints", keep=keep)
    saved = check_run(store, resume, config or {})
    fabric.seed_everything(seed, workers=False, verbose=False)
    num_images = len(images)  # type: ignore[arg-type]
    run = set_up(
        fabric, method, build_backbone, optim, num_global=num_global, num_images=num_images,
        compile=compile,
    )  # fmt: skip
    models, optimizer = run.models, run.optimizer
    # The networks are alike on all processes; what dropout leaves out is not.
    torch.manual_seed(mix_seeds(seed, fabric.global_rank))
    if saved is not None:
        restore_state(saved, run.network, models.teacher, models.criterion, optimizer, run.scaler)
    start = 0 if saved is None else int(saved["step"])
    plan = plan_run(
        images, views, method, models, fabric, seed=seed, start=start, steps=steps, epochs=epochs,
        batch_size=batch_size, accumulate=accumulate, drop_last=drop_last, workers=workers,
        log_every=log_every, save_every=save_every,
    )  # fmt: skip
    used = run.network if models.teacher is None else models.teacher.module
    batches = plan.batches(run.dtype)
    checkpoint, step = store.folder / file_name(start), start
    with (
        RunLog(output, total=plan.steps, start=start, enabled=fabric.is_global_zero) as log,
        stop_signal() as stop,
        watch_processes(fabric),
        named_worker_failures(stop),
    ):
        spoilt = SpoiltSteps(output, log.say)
        for step in range(start + 1, plan.steps + 1):
            now = plan.progress(step)
            rates = set_schedules(optimizer, optim, now, plan.images_per_step)
            for micro in range(1, accumulate + 1):
                more = micro < accumulate
                with (
                    fabric.no_backward_sync(run.wrapped, enabled=more),
                    accumulating(models.criterion, more),
                ):
                    with fabric.autocast():
                        terms = method.step(models, next(batches), now)
                    fabric.backward(terms.loss / accumulate)
            frozen = run.frozen if now.within(optim.freeze_last) else ()
            norm = clip_gradients(fabric, models.student, optimizer, optim, frozen)
            momentum = now.cosine(teacher.momentum, teacher.momentum_end)
            # Losses are reduced over the processes, so that all of them skip, or none does.
            finite = bool(torch.isfinite(norm))
            if finite or run.scaler is not None:  # a scaler skips by itself, and learns from it
                optimizer.step()
            optimizer.zero_grad()
            if finite and models.teacher is not None:
                models.teacher.update(run.network, momentum)
            spoilt.count(step, finite=finite)

            log.advance()
            ends = agree(fabric, stop.asked) or step == plan.steps
            if step % log_every == 0 or ends:
                told = {
                    **rates,
                    "teacher_momentum": momentum,
                    "gradient_norm": float(norm),
                    "skipped_steps": float(spoilt.total),
                }
                log.write(step, step_values(terms, now, told))
            if step % save_every == 0 or ends:
                state = gather_state(
                    run.network, models.teacher, models.criterion, optimizer, run.scaler
                )
                checkpoint = store.folder / file_name(step)
                if fabric.is_global_zero:
                    store.save(step, {"step": step, "config": config or {}, **state})
                    if draw is not None:
                        draw(step, run.backbone_to_use(state))
            if ends and step < plan.steps:
                log.say(f"stopped after step {step}; saved {checkpoint}, go on with --resume true")
                break
    return TrainResult(used, checkpoint, step, step < plan.steps)
