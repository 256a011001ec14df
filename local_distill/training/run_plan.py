"""What is checked and worked out before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from local_distill._check import check_at_least, check_positive
from local_distill.errors import ConfigError
from local_distill.structures import CropGeometry
from local_distill.training.checkpoints import CheckpointStore, check_same_config
from local_distill.training.loading import EpochBatches, ViewBatch, mix_seeds, view_loader
from local_distill.training.methods.method import Method, Models
from local_distill.training.methods.two_sides import view_sizes
from local_distill.training.progress import Progress

__all__ = ["RunPlan", "check_run", "plan_run"]

# Settings that may differ between a run and its resumption: they change nothing that is learned.
_FREE = frozenset(
    (
        "accelerator",
        "compile",
        "config",
        "devices",
        "keep",
        "log_every",
        "most_bad",
        "num_nodes",
        "output",
        "pictures",
        "process_timeout",
        "resume",
        "save_every",
        "strategy",
        "workers",
    )
)


class RunPlan(NamedTuple):
    """How long a run is and what it is fed with.

    Attributes:
        loader: of `ViewBatch`; endless, or one epoch at a time.
        end_epoch: called between two of those.
        fabric: moves batches to the device.
        steps: of the whole run.
        steps_per_epoch: may be a fraction, where micro-batches do not divide an epoch.
        in_epochs: whether durations are in epochs.
        images_per_step: of all processes and micro-batches together.
    """

    loader: DataLoader[Any]
    end_epoch: Callable[[], None]
    fabric: Fabric
    steps: int
    steps_per_epoch: float
    in_epochs: bool
    images_per_step: int

    def progress(self, step: int) -> Progress:
        """The place of step ``step``, counted from 1."""
        return Progress(
            step - 1,
            self.steps,
            self.steps_per_epoch if self.in_epochs else 1.0,
            (step - 1) / self.steps_per_epoch,
        )

    def batches(self, dtype: torch.dtype) -> Iterator[ViewBatch]:
        """The micro-batches of this process on its device; views in the parameters' dtype."""
        sampler = self.loader.batch_sampler
        assert isinstance(sampler, EpochBatches)
        if sampler.start_step and sampler.start_step % sampler.steps_per_epoch == 0:
            self.end_epoch()  # saved after an epoch's last step, before it was ended
        while True:
            for batch in self.loader:
                moved = self.fabric.to_device(batch)
                # Geometry stays in the precision that it has.
                yield moved._replace(views=[view.to(dtype) for view in moved.views])
            self.end_epoch()


def check_run(
    store: CheckpointStore, resume: bool, config: dict[str, Any]
) -> dict[str, Any] | None:
    """What to go on from, or None for a new run.

    Raises:
        ConfigError: a folder that already holds a run, or a resume with other settings.
        DataError: no checkpoint of the run can be read.
    """
    if not resume:
        if store.steps():
            raise ConfigError(
                f"`output` {str(store.folder.parent)!r} already holds a run; pass --resume true to "
                "go on with it, or another folder"
            )
        return None
    saved = store.load()
    if saved is None:
        return None
    check_same_config(saved.state["config"], config, _FREE)
    return saved.state


def plan_run(
    images: Dataset[tuple[Any, int]],
    views: Callable[[Any], tuple[Sequence[Tensor], Sequence[CropGeometry]]],
    method: Method,
    models: Models,
    fabric: Fabric,
    *,
    seed: int,
    start: int,
    steps: int | None,
    epochs: float | None,
    batch_size: int,
    accumulate: int,
    drop_last: bool,
    workers: int,
    log_every: int,
    save_every: int,
) -> RunPlan:
    """Work out the length of a run and open its loader; the arguments are `train`'s.

    Raises:
        ConfigError: numbers below 1, not exactly one of ``steps`` and ``epochs``, fewer images than
            a step needs.
    """
    for name, value in (
        ("accumulate", accumulate),
        ("log_every", log_every),
        ("save_every", save_every),
    ):
        check_at_least(name, value, 1)
    if (steps is None) == (epochs is None):
        raise ConfigError(f"give either `steps` or `epochs`, got steps={steps}, epochs={epochs}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix_seeds(seed))
        sizes = view_sizes(views(images[0][0])[0])

    def _draw_partners(epoch: int, order: Tensor) -> Tensor:
        return method.draw_partners(models.criterion, order, mix_seeds(seed, epoch, 1))

    loader = view_loader(
        images,
        views,
        batch_size=batch_size,
        seed=seed,
        start_step=start * accumulate,
        workers=workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        drop_last=drop_last,
        pin_memory=fabric.device.type == "cuda",
        extras=method.extras(models.backbone, sizes, models.num_global),
        partners=_draw_partners if method.has_partners else None,
    )
    assert isinstance(loader.batch_sampler, EpochBatches)
    per_epoch = loader.batch_sampler.steps_per_epoch / accumulate
    if epochs is not None:
        steps = max(1, round(check_positive("epochs", epochs) * per_epoch))
    assert steps is not None
    return RunPlan(
        loader,
        lambda: method.end_epoch(models.criterion) if method.has_partners else None,
        fabric,
        check_at_least("steps", steps, 1),
        per_epoch,
        epochs is not None,
        batch_size * accumulate * fabric.world_size,
    )
