"""From images to batches of views, the same for any number of workers and after a resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from local_distill._check import check_at_least
from local_distill.errors import ConfigError
from local_distill.structures import CropGeometry
from local_distill.training.stop_signal import leave_stopping_to_the_parent

__all__ = ["EpochBatches", "SampleKey", "SeededViews", "ViewBatch", "mix_seeds", "view_loader"]


class SampleKey(NamedTuple):
    """Which image in which epoch.

    Attributes:
        epoch: from 0.
        image: its number.
        counts: False for the stand-in of an empty share.
        partner: the image that all views but the first show, or None: the same.
    """

    epoch: int
    image: int
    counts: bool = True
    partner: int | None = None


class ViewBatch(NamedTuple):
    """What one process gets for one step.

    Attributes:
        views: per view (b, 3, h, w).
        geometries: per view, batched.
        images: (b,) int64, which images these are.
        extras: what the method draws for every image, such as masks; batched.
    """

    views: list[Tensor]
    geometries: list[CropGeometry]
    images: Tensor
    extras: dict[str, Any]


class EpochBatches(Sampler[list[SampleKey]]):
    """The images of one process, step by step, from a step on; endless.

    Every epoch has its own order, made from the seed. Each process gets a row of a step's images,
    so that together they are the same, and in the same order, for any number of processes with the
    same ``batch_size · world_size``. Starting at step n gives just what a run from step 0 would get
    from there on.

    Args:
        length: number of images.
        batch_size: images per step and process.
        seed: of the order.
        start_step: the first step to give.
        rank: this process.
        world_size: number of processes.
        drop_last: leave out an epoch's last images where they do not fill a step; otherwise they
            are a smaller step, of which some processes may have less than others, or nothing: then
            they get one image that does not count, so that they still know the shapes.
        partners: (epoch, images) → the images that their other views show. It is asked as an epoch
            begins, and iterating then ends with every epoch, to go on with the next one.

    Raises:
        ConfigError: fewer images than one step needs.

    Example:
        >>> from itertools import islice
        >>> whole = list(islice(EpochBatches(5, 2, seed=0), 4))
        >>> whole[2:] == list(islice(EpochBatches(5, 2, seed=0, start_step=2), 2))
        True
        >>> [[key.epoch for key in keys] for keys in whole]
        [[0, 0], [0, 0], [1, 1], [1, 1]]
        >>> [len(keys) for keys in islice(EpochBatches(5, 2, drop_last=False), 4)]
        [2, 2, 1, 2]
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
        drop_last: bool = True,
        partners: Callable[[int, Tensor], Tensor] | None = None,
    ) -> None:
        check_at_least("batch_size", batch_size, 1)
        whole = batch_size * world_size
        self.steps_per_epoch = length // whole if drop_last else -(-length // whole)
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"`batch_size` is {batch_size} on each of {world_size} processes but there are "
                f"{length} images: lower it to at most {max(1, length // world_size)}"
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start_step, self.rank, self.world_size = start_step, rank, world_size
        self.partners = partners

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch, skip = divmod(self.start_step, self.steps_per_epoch)
        while True:
            yield from self._epoch(epoch, skip)
            epoch, skip = epoch + 1, 0
            if self.partners is not None:
                self.start_step = epoch * self.steps_per_epoch
                return

    def _epoch(self, epoch: int, skip: int) -> Iterator[list[SampleKey]]:
        whole = self.batch_size * self.world_size
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, epoch))
        order = torch.randperm(self.length, generator=generator)
        partners = [None] * self.length
        if self.partners is not None:
            partners = self.partners(epoch, order).tolist()
        pairs = list(zip(order.tolist(), partners, strict=True))
        for step in range(skip, self.steps_per_epoch):
            shown = pairs[step * whole : (step + 1) * whole]
            own = _share(shown, self.rank, self.world_size)
            yield [
                SampleKey(epoch, image, bool(own), partner) for image, partner in own or shown[:1]
            ]


class SeededViews(Dataset[tuple[Any, bool]]):
    """Views of a data set's images whose randomness is a function of (seed, epoch, index) alone.

    Args:
        images: gives (image, label).
        views: image → (views, geometries), such as `MultiCrop`.
        seed: of the augmentations.
        extras: one image's views → more that a method needs, drawn after the views.
    """

    def __init__(
        self,
        images: Dataset[tuple[Any, int]],
        views: Callable[[Any], Any],
        *,
        seed: int = 0,
        extras: Callable[[Sequence[Tensor]], dict[str, Any]] | None = None,
    ) -> None:
        self.images, self.views, self.seed, self.extras = images, views, seed, extras

    def __getitem__(self, key: SampleKey) -> tuple[Any, bool]:
        image, _ = self.images[key.image]
        other = None
        if key.partner is not None and key.partner != key.image:
            other, _ = self.images[key.partner]
        # fork_rng: without workers this is the process whose generator the model draws from
        with torch.random.fork_rng(devices=[]):
            # the CPU's generator alone: torch.manual_seed would draw the GPU's anew, and is slower
            torch.default_generator.manual_seed(mix_seeds(self.seed, key.epoch, key.image))
            views, geometries = self.views(image)
            if other is not None:
                more_views, more_geometries = self.views(other)
                views = [views[0], *more_views[1:]]
                geometries = [geometries[0], *more_geometries[1:]]
            extras = {} if self.extras is None else self.extras(views)
        return ViewBatch(views, geometries, torch.tensor(key.image), extras), key.counts


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
    drop_last: bool = True,
    pin_memory: bool = False,
    extras: Callable[[Sequence[Tensor]], dict[str, Any]] | None = None,
    partners: Callable[[int, Tensor], Tensor] | None = None,
) -> DataLoader[Any]:
    """An endless loader of `ViewBatch`, one per step of one process; see `EpochBatches`."""
    batches = EpochBatches(
        len(images),  # type: ignore[arg-type]
        batch_size,
        seed=seed,
        start_step=start_step,
        rank=rank,
        world_size=world_size,
        drop_last=drop_last,
        partners=partners,
    )
    return DataLoader(
        SeededViews(images, views, seed=seed, extras=extras),
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=_start_worker,
        # Workers draw nothing from the global generator, so that a resume leaves it where it was.
        generator=torch.Generator().manual_seed(seed),
    )


def mix_seeds(*numbers: int) -> int:
    """One seed from several numbers; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _share(images: list[Any], rank: int, world_size: int) -> list[Any]:
    """A row of them, so that what is gathered from all processes is in the order of one."""
    each, more = divmod(len(images), world_size)
    start = rank * each + min(rank, more)
    return images[start : start + each + (rank < more)]


def _collate(samples: list[tuple[Any, bool]]) -> Any:
    batch = default_collate([sample for sample, _ in samples])
    return batch if samples[0][1] else _without_rows(batch)


def _without_rows(batch: Any) -> Any:
    """An empty share, of the right shapes."""
    return tree_map_only(Tensor, lambda rows: rows[:0], batch)


def _start_worker(_: int) -> None:
    leave_stopping_to_the_parent()
    torch.set_num_threads(1)  # as many workers as cores: more threads would only get in the way
