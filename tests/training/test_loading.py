from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from local_distill import ConfigError, MultiCrop
from local_distill.training import SyntheticScenes
from local_distill.training.loading import EpochBatches, SampleKey, SeededViews, view_loader

VIEWS = MultiCrop(global_size=16, local_size=8, local_count=1)


@given(
    st.integers(1, 40), st.integers(1, 5), st.integers(1, 3), st.integers(0, 30),
    st.integers(0, 9), st.booleans(),
)  # fmt: skip
def test_the_batches(length, batch_size, world_size, start, seed, drop_last):
    whole = batch_size * world_size
    settings = {"seed": seed, "world_size": world_size, "drop_last": drop_last}
    if drop_last and length < whole:
        with pytest.raises(ConfigError, match="`batch_size`"):
            EpochBatches(length, batch_size, world_size=world_size)
        return
    steps = length // whole if drop_last else -(-length // whole)
    ranks = [
        list(islice(iter(EpochBatches(length, batch_size, rank=rank, **settings)), 3 * steps))
        for rank in range(world_size)
    ]
    for epoch in range(3):
        seen = [
            key.image
            for own in ranks
            for keys in own[epoch * steps : (epoch + 1) * steps]
            for key in keys
            if key.counts
        ]
        assert len(seen) == (steps * whole if drop_last else length)
        assert len(set(seen)) == len(seen)  # nothing twice in an epoch, over all processes
        assert set(seen) <= set(range(length))
    sizes = [[sum(key.counts for key in keys) for keys in own] for own in ranks]
    for together in zip(*sizes, strict=True):
        assert max(together) - min(together) <= 1
        assert max(together) <= batch_size
    # an empty share still has an image to know the shapes by
    assert all(keys for own in ranks for keys in own)
    later = EpochBatches(length, batch_size, start_step=start, **settings)
    wanted = EpochBatches(length, batch_size, **settings)
    assert list(islice(iter(later), 2)) == list(islice(iter(wanted), start + 2))[start:]


@given(st.integers(6, 30), st.integers(0, 5), st.booleans())
def test_any_number_of_processes_sees_the_same_steps(length, seed, drop_last):
    def steps(batch_size, world_size):
        ranks = [
            islice(iter(EpochBatches(length, batch_size, seed=seed, rank=rank,
                                     world_size=world_size, drop_last=drop_last)), 5)
            for rank in range(world_size)
        ]  # fmt: skip
        return [{key.image for keys in each for key in keys if key.counts}
                for each in zip(*ranks, strict=True)]  # fmt: skip

    assert steps(6, 1) == steps(3, 2) == steps(2, 3) == steps(1, 6)


def test_epochs_have_orders_of_their_own():
    both = list(islice(iter(EpochBatches(50, 50)), 2))
    assert [key.image for key in both[0]] != [key.image for key in both[1]]


def batches(workers, start, count, **settings):
    loader = view_loader(SyntheticScenes(10, 32), VIEWS, batch_size=4, seed=3, start_step=start,
                         workers=workers, **settings)  # fmt: skip
    return list(islice(iter(loader), count))


def same(a, b):
    a, b = (torch.utils._pytree.tree_leaves(x) for x in (a, b))
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_loader_gives_the_same_views(workers):
    whole = batches(0, 0, 5)
    assert same(batches(workers, 3, 2), whole[3:])
    assert not same(whole[0], whole[1])


def test_an_empty_share_has_the_shapes_of_the_others():
    # 10 images, 3 on each of three processes: the second step is one image
    loaders = [
        view_loader(SyntheticScenes(10, 32), VIEWS, batch_size=3, rank=rank, world_size=3,
                    drop_last=False)
        for rank in range(3)
    ]  # fmt: skip
    last = [list(islice(iter(loader), 2))[1] for loader in loaders]
    assert [len(batch.views[0]) for batch in last] == [1, 0, 0]
    assert last[2].views[2].shape == (0, 3, 8, 8)
    assert last[2].geometries[0].matrix.shape == (0, 3, 3)
    assert last[2].images.shape == (0,)


def test_augmentations_differ_between_epochs_and_leave_the_generator_alone():
    views = SeededViews(SyntheticScenes(3, 32), VIEWS, seed=0)
    before = torch.get_rng_state()
    one, two = views[SampleKey(0, 1)], views[SampleKey(1, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one[0], views[SampleKey(0, 1)][0])
    assert not same(one[0].views, two[0].views)
    assert one[0].images == two[0].images == 1


class Flat(Dataset):
    """Images of one colour each, so that a view tells which image it shows."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.full((3, 20, 20), index / 10), 0


def test_partners_are_shown_by_all_views_but_the_first():
    plain = MultiCrop(global_size=8, local_size=4, local_count=1, normalize=None, color_jitter=None,
                      grayscale_p=0.0, blur_p=(0.0, 0.0, 0.0), solarize_p=0.0)  # fmt: skip
    asked = []

    def partners(epoch, order):
        asked.append(epoch)
        return (order + 1) % 4

    loader = view_loader(Flat(), plain, batch_size=2, partners=partners)
    for epoch in range(2):
        for batch in loader:
            first, *others = [view.mean((1, 2, 3)) * 10 for view in batch.views]
            torch.testing.assert_close(first, batch.images.float(), rtol=0, atol=1e-4)
            for other in others:
                torch.testing.assert_close(
                    other, ((batch.images + 1) % 4).float(), rtol=0, atol=1e-4
                )
        assert asked == list(range(epoch + 1))  # one epoch at a time
