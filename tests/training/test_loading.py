from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from local_distill import ConfigError, MultiCrop
from local_distill.training import SyntheticScenes
from local_distill.training.loading import EpochSampler, SeededViews, view_loader


@given(
    st.integers(1, 40), st.integers(1, 5), st.integers(1, 3), st.integers(0, 30), st.integers(0, 9)
)
def test_the_sampler(length, batch_size, world_size, start, seed):
    whole = batch_size * world_size
    if length < whole:
        with pytest.raises(ConfigError, match="`batch_size`"):
            EpochSampler(length, batch_size, world_size=world_size)
        return
    steps = length // whole
    ranks = [
        list(islice(iter(EpochSampler(length, batch_size, seed=seed, rank=r,
                                      world_size=world_size)), 3 * steps * batch_size))
        for r in range(world_size)
    ]  # fmt: skip
    for epoch in range(3):
        seen = [
            index
            for own in ranks
            for number, index in own[epoch * steps * batch_size : (epoch + 1) * steps * batch_size]
            if number == epoch
        ]
        assert len(seen) == steps * whole
        assert len(set(seen)) == len(seen)  # nothing twice in an epoch, over all processes
        assert set(seen) <= set(range(length))
    later = EpochSampler(length, batch_size, seed=seed, start_step=start, world_size=world_size)
    wanted = EpochSampler(length, batch_size, seed=seed, world_size=world_size)
    skipped = list(islice(iter(wanted), (start + 2) * batch_size))[start * batch_size :]
    assert list(islice(iter(later), 2 * batch_size)) == skipped


def test_epochs_have_orders_of_their_own():
    both = list(islice(iter(EpochSampler(50, 1)), 100))
    assert [i for _, i in both[:50]] != [i for _, i in both[50:]]


def batches(workers, start, count):
    loader = view_loader(
        SyntheticScenes(10, 32),
        MultiCrop(global_size=16, local_size=8, local_count=1),
        batch_size=4,
        seed=3,
        start_step=start,
        workers=workers,
    )
    return list(islice(iter(loader), count))


def same(a, b):
    a, b = (torch.utils._pytree.tree_leaves(x) for x in (a, b))
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_gives_the_same_views(workers):
    whole = batches(0, 0, 5)
    assert same(batches(workers, 3, 2), whole[3:])
    assert not same(whole[0], whole[1])


def test_augmentations_differ_between_epochs_and_leave_the_generator_alone():
    views = SeededViews(
        SyntheticScenes(3, 32), MultiCrop(global_size=16, local_size=8, local_count=1), seed=0
    )
    before = torch.get_rng_state()
    one, two = views[0, 1], views[1, 1]
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, views[0, 1])
    assert not same(one, two)
