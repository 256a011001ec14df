"""The reference training loop: read it in ten minutes, copy what you need."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset

from local_distill import schedules
from local_distill._check import check_at_least
from local_distill.errors import ConfigError, LocalDistillError
from local_distill.losses import (
    GlobalDistillationLoss,
    GlobalLocalDistillationLoss,
    LocalDistillationLoss,
)
from local_distill.structures import CropGeometry, Matcher, Matches
from local_distill.targets import Centering
from local_distill.teacher import EmaTeacher
from local_distill.training.checkpoints import (
    check_same_config,
    load_checkpoint,
    save_checkpoint,
)
from local_distill.training.loading import view_loader
from local_distill.training.metrics import RunLog, match_coverage, mean_entropy
from local_distill.training.network import DistillationNetwork, NetworkOutput, view_outputs
from local_distill.training.options import HeadOptions, LossOptions, OptimOptions

__all__ = ["TrainResult", "train"]

# Settings that may differ between a run and its resumption: they change nothing that is learned.
_FREE = frozenset({"output", "resume", "workers", "log_every", "save_every", "devices", "config"})
# So many steps without a finite gradient in a row, and the run is stopped: it would not recover.
_MOST_SKIPPED = 50


class TrainResult(NamedTuple):
    """What a run leaves.

    Attributes:
        network: the teacher's network, which is the one to use.
        checkpoint: the file of the last checkpoint.
        step: steps done.
        interrupted: whether Ctrl-C or a termination signal ended it early.
    """

    network: DistillationNetwork
    checkpoint: Path
    step: int
    interrupted: bool


class _StepTerms(NamedTuple):
    loss: Tensor
    values: dict[str, Tensor]
    matches: dict[tuple[int, int], Matches]


def train(
    images: Dataset[tuple[Any, int]],
    build_network: Callable[[], DistillationNetwork],
    views: Callable[[Any], tuple[Sequence[Tensor], Sequence[CropGeometry]]],
    matcher: Matcher | None,
    *,
    num_global: int,
    output: Path,
    steps: int = 800,
    batch_size: int = 32,
    head: HeadOptions,
    loss: LossOptions,
    optim: OptimOptions,
    seed: int = 0,
    workers: int = 0,
    log_every: int = 10,
    save_every: int = 200,
    resume: bool = False,
    config: dict[str, Any] | None = None,
    fabric: Fabric | None = None,
) -> TrainResult:
    """Train a network by self-distillation.

    Args:
        images: gives (image, label); labels are not looked at.
        build_network: makes the network, after the seed is set.
        views: image → (views, geometries), such as `MultiCrop`.
        matcher: pairs the patch tokens; None: no local loss.
        num_global: how many of the views the teacher sees; they come first.
        output: folder of the run: ``last.ckpt``, ``metrics.jsonl``, TensorBoard's files.
        steps: optimiser steps of the whole run.
        batch_size: images per step and process.
        head: settings of the heads, for the centers' size.
        loss: temperatures, weights, teacher momentum.
        optim: learning rate, weight decay, clipping.
        seed: of weights, order and augmentations.
        workers: loader processes.
        log_every: steps between two lines of metrics.
        save_every: steps between two checkpoints; the last step is saved in any case.
        resume: go on from ``output/last.ckpt``.
        config: JSON-able settings, kept in the checkpoint and compared on resume.
        fabric: device, precision and processes; None: automatic, one process.

    Returns:
        `TrainResult`.

    Raises:
        ConfigError: settings that cannot work, an ``output`` that already holds a run, a resume
            with other settings; all before any work is done.
        LocalDistillError: the gradient stayed non-finite for 50 steps in a row.
    """
    for name, value in (("steps", steps), ("log_every", log_every), ("save_every", save_every)):
        check_at_least(name, value, 1)
    checkpoint_path = output / "last.ckpt"
    if checkpoint_path.exists() and not resume:
        raise ConfigError(
            f"`output` {str(output)!r} already holds a run; pass --resume true to go on with it, or"
            " another folder"
        )
    saved = load_checkpoint(checkpoint_path) if resume else None
    if saved is not None:
        check_same_config(saved["config"], config or {}, _FREE)
    start = 0 if saved is None else int(saved["step"])
    fabric = fabric or Fabric(devices=1)
    fabric.seed_everything(seed, workers=False, verbose=False)

    network = build_network()
    criterion = _criterion(matcher, head, loss)
    optimizer = torch.optim.AdamW(_parameter_groups(network), lr=optim.lr)
    student, optimizer = fabric.setup(network, optimizer)
    teacher = EmaTeacher(network)
    fabric.to_device(teacher)
    fabric.to_device(criterion)
    if saved is not None:
        network.load_state_dict(saved["network"])
        teacher.load_state_dict(saved["teacher"])
        criterion.load_state_dict(saved["criterion"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
    loader = view_loader(
        images,
        views,
        batch_size=batch_size,
        seed=seed,
        start_step=start,
        workers=workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        pin_memory=fabric.device.type == "cuda",
    )

    def save(step: int) -> None:
        if fabric.is_global_zero:
            state = {
                "step": step,
                "config": config or {},
                "network": network.state_dict(),
                "teacher": teacher.state_dict(),
                "criterion": criterion.state_dict(),
                "optimizer": optimizer.state_dict(),
                "rng": torch.get_rng_state(),
            }
            save_checkpoint(checkpoint_path, state)

    step, skipped = start, 0
    log = RunLog(output, total=steps, start=start, enabled=fabric.is_global_zero)
    with log, _stop_signal() as stop:
        for step, batch in zip(range(start + 1, steps + 1), loader, strict=False):
            batch_views, geometries = fabric.to_device(batch)
            lr = _set_schedules(optimizer, optim, step - 1, steps)
            teacher_temp = schedules.linear(
                step - 1,
                start=loss.teacher_temp_start,
                end=loss.teacher_temp,
                total=loss.teacher_temp_warmup,
            )
            student_out = student(batch_views)
            with fabric.autocast():
                teacher_out = teacher(batch_views[:num_global])
            terms = _step_loss(
                criterion, student_out, teacher_out, batch_views, geometries, network, teacher_temp
            )
            fabric.backward(terms.loss)
            norm = fabric.clip_gradients(
                student, optimizer, max_norm=optim.clip or math.inf, error_if_nonfinite=False
            )
            assert norm is not None  # Fabric's annotation allows for strategies that do not tell
            # The loss is reduced over the processes, so that all of them skip, or none does.
            if bool(torch.isfinite(norm)):
                optimizer.step()
                momentum = schedules.cosine(
                    step - 1, start=loss.teacher_momentum, end=1.0, total=steps
                )
                teacher.update(network, momentum)
                skipped = 0
            else:
                skipped += 1
                log.say(f"step {step}: the gradient is not finite, skipped")
                if skipped == _MOST_SKIPPED:
                    raise LocalDistillError(
                        f"the gradient was not finite for {skipped} steps in a row, up to step "
                        f"{step}; `output` {str(output)!r} holds the last good checkpoint: lower "
                        "optim.lr, or look at the data"
                    )
            optimizer.zero_grad()

            log.advance()
            if step % log_every == 0 or step == steps:
                _log(log, step, terms, teacher_out, criterion, teacher_temp, lr, norm)
            if step % save_every == 0 or step == steps or stop.asked:
                save(step)
            if stop.asked:
                log.say(f"stopped after step {step}; saved {checkpoint_path}, go on with --resume")
                break
    trained = teacher.module
    assert isinstance(trained, DistillationNetwork)
    return TrainResult(trained, checkpoint_path, step, stop.asked and step < steps)


def _criterion(matcher: Matcher | None, head: HeadOptions, loss: LossOptions) -> nn.Module:
    def targets() -> Centering:
        return Centering(head.num_prototypes, loss.center_momentum)

    whole = GlobalDistillationLoss(targets(), student_temp=loss.student_temp)
    if matcher is None:
        return whole
    return GlobalLocalDistillationLoss(
        whole,
        LocalDistillationLoss(targets(), student_temp=loss.student_temp),
        matcher,
        global_weight=loss.global_weight,
        local_weight=loss.local_weight,
    )


def _step_loss(
    criterion: nn.Module,
    student_out: list[NetworkOutput],
    teacher_out: list[NetworkOutput],
    views: Sequence[Tensor],
    geometries: Sequence[CropGeometry],
    network: DistillationNetwork,
    teacher_temp: float,
) -> _StepTerms:
    if isinstance(criterion, GlobalLocalDistillationLoss):
        terms = criterion(
            view_outputs(student_out, views, geometries, network.backbone),
            view_outputs(teacher_out, views, geometries, network.backbone),
            teacher_temp=teacher_temp,
        )
        parts = {"global_loss": terms.global_loss, "local_loss": terms.local_loss}
        return _StepTerms(terms.loss, parts, terms.matches)
    whole = criterion(
        [out.global_logits for out in student_out],
        [out.global_logits for out in teacher_out],
        teacher_temp=teacher_temp,
    )
    return _StepTerms(whole, {"global_loss": whole}, {})


def _log(
    log: RunLog,
    step: int,
    terms: _StepTerms,
    teacher_out: list[NetworkOutput],
    criterion: nn.Module,
    teacher_temp: float,
    lr: float,
    norm: Tensor,
) -> None:
    whole = criterion
    if isinstance(criterion, GlobalLocalDistillationLoss):
        whole = criterion.global_loss
    assert isinstance(whole, GlobalDistillationLoss)
    with torch.no_grad():
        logits = [out.global_logits for out in teacher_out]
        probs = [target.probs() for target in whole.targets(logits, teacher_temp=teacher_temp)]
        values = {name: float(value) for name, value in terms.values.items()}
        entropy = mean_entropy(torch.cat(probs))
    shown = {"loss": float(terms.loss.detach()), **values}
    if terms.matches:
        shown["coverage"] = match_coverage(terms.matches)
    shown["teacher_entropy"] = entropy
    more = {"lr": lr, "teacher_temp": teacher_temp, "gradient_norm": float(norm)}
    short = {"global_loss": "global", "local_loss": "local", "teacher_entropy": "entropy"}
    log.write(step, {**shown, **more}, {short.get(name, name): v for name, v in shown.items()})


def _parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices only: on biases, norms and prototype magnitudes it does harm."""
    trained = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "decays": True},
        {"params": [p for p in trained if p.dim() <= 1], "decays": False, "weight_decay": 0.0},
    ]


def _set_schedules(
    optimizer: torch.optim.Optimizer, optim: OptimOptions, step: int, steps: int
) -> float:
    lr = schedules.warmup_cosine(
        step, peak=optim.lr, end=optim.lr_end, warmup=min(optim.warmup, steps), total=steps
    )
    decay = schedules.cosine(
        step, start=optim.weight_decay, end=optim.weight_decay_end, total=steps
    )
    for group in optimizer.param_groups:
        group["lr"] = lr
        if group["decays"]:
            group["weight_decay"] = decay
    return lr


class _Stop:
    asked = False


@contextmanager
def _stop_signal() -> Iterator[_Stop]:
    """Ctrl-C and SIGTERM end the run at the end of a step; a second one ends it at once."""
    stop = _Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        for name, handler in before.items():
            signal.signal(name, handler)

    try:
        before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread (a notebook's worker): signals are not ours there
        before = {}
    try:
        yield stop
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
