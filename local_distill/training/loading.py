"""From images to batches of views, the same for any number of workers and after a resume."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from local_distill._check import check_at_least
from local_distill.errors import ConfigError

__all__ = ["EpochSampler", "SeededViews", "view_loader"]


class EpochSampler(Sampler[tuple[int, int]]):
    """Shuffled (epoch, index) pairs of one process, from a step on; endless.

    Every epoch has its own order, made from the seed, and is cut to whole batches of all
    processes. Starting at step n gives just what a run from step 0 would get from there on.

    Args:
        length: number of images.
        batch_size: images per step and process.
        seed: of the order.
        start_step: the first step to give.
        rank: this process.
        world_size: number of processes.

    Raises:
        ConfigError: fewer images than one step needs.

    Example:
        >>> from itertools import islice
        >>> whole = list(islice(EpochSampler(5, 2, seed=0), 8))
        >>> whole[4:] == list(islice(EpochSampler(5, 2, seed=0, start_step=2), 4))
        True
        >>> [epoch for epoch, _ in whole]
        [0, 0, 0, 0, 1, 1, 1, 1]
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int = 0,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_at_least("batch_size", batch_size, 1)
        self.steps_per_epoch = length // (batch_size * world_size)
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"`batch_size` is {batch_size} on each of {world_size} processes but there are "
                f"{length} images: lower it to at most {max(1, length // world_size)}"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start_step, self.rank, self.world_size = start_step, rank, world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, skip = divmod(self.start_step, self.steps_per_epoch)
        whole = self.batch_size * self.world_size
        while True:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
            order = torch.randperm(self.length, generator=generator)
            for step in range(skip, self.steps_per_epoch):
                own = order[step * whole : (step + 1) * whole][self.rank :: self.world_size]
                yield from ((epoch, index) for index in own.tolist())
            epoch, skip = epoch + 1, 0


class SeededViews(Dataset[tuple[Any, Any]]):
    """Views of a data set's images whose randomness is a function of (seed, epoch, index) alone.

    Args:
        images: gives (image, label).
        views: image → (views, geometries), such as `MultiCrop`.
        seed: of the augmentations.
    """

    def __init__(
        self, images: Dataset[tuple[Any, int]], views: Callable[[Any], Any], *, seed: int = 0
    ) -> None:
        self.images, self.views, self.seed = images, views, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any]:
        epoch, index = key
        image, _ = self.images[index]
        # fork_rng: without workers this is the process whose generator the model draws from
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_mix(self.seed, epoch, index))
            views, geometries = self.views(image)
        return views, geometries


def view_loader(
    images: Dataset[tuple[Any, int]],
    views: Callable[[Any], Any],
    *,
    batch_size: int,
    seed: int = 0,
    start_step: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> DataLoader[Any]:
    """An endless loader of (views, geometries), one batch per step of one process."""
    sampler = EpochSampler(
        len(images),  # type: ignore[arg-type]
        batch_size,
        seed=seed,
        start_step=start_step,
        rank=rank,
        world_size=world_size,
    )
    return DataLoader(
        SeededViews(images, views, seed=seed),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        # Workers draw nothing from the global generator, so that a resume leaves it where it was.
        generator=torch.Generator().manual_seed(seed),
    )


def _start_worker(_: int) -> None:
    # The main process ends the run and with it the workers: Ctrl-C reaches them as well.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else it would inherit the main one's handler
    torch.set_num_threads(1)  # as many workers as cores: more threads would only get in the way


def _mix(*numbers: int) -> int:
    """One seed from several numbers; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
