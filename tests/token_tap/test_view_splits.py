"""Splitting is the inverse of what the wrappers of DINO's family do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from local_distill import ConfigError, ShapeError
from local_distill.view_splits import (
    split_class_and_patches,
    split_crop_groups,
    split_regions,
    split_views,
)

counts = st.integers(1, 4)
batches = st.integers(2, 5)


def numbers(*shape):
    return torch.randn(*shape, requires_grad=True)


@given(counts, batches, st.sampled_from([(3,), (5, 3), (3, 5, 7)]))
def test_views_come_back(v, b, rest):
    views = [numbers(b, *rest) for _ in range(v)]
    split = split_views(torch.cat(views), v)
    assert len(split) == v
    assert all(torch.equal(got, view) for got, view in zip(split, views, strict=True))
    split[-1].sum().backward()
    assert torch.equal(views[-1].grad, torch.ones_like(views[-1]))


@given(counts, batches, st.integers(1, 3), st.integers(1, 7))
def test_class_and_patches_come_back(v, b, p, n):
    views = [numbers(b, p + n, 3) for _ in range(v)]
    whole = torch.cat(views)
    for got, view in zip(
        split_class_and_patches(whole, v, num_prefix_tokens=p), views, strict=True
    ):
        assert torch.equal(got.class_token, view[:, 0])
        assert torch.equal(got.patch_tokens, view[:, p:])
        assert (got.register_tokens is None) == (p == 1)
        if p > 1:
            assert torch.equal(got.register_tokens, view[:, 1:p])
    for got, view in zip(
        split_class_and_patches((whole[:, 0], whole[:, p:]), v), views, strict=True
    ):
        assert torch.equal(got.class_token, view[:, 0])
        assert torch.equal(got.patch_tokens, view[:, p:])


@given(st.lists(st.tuples(counts, st.integers(1, 9)), min_size=1, max_size=3), batches)
def test_regions_come_back(sizes, b):
    # as EsViT: one forward a size, (v·b, n, c) flattened, and all sizes one behind the other
    views = [[numbers(b, n, 3) for _ in range(v)] for v, n in sizes]
    table = torch.cat([torch.cat(group).flatten(0, 1) for group in views])
    split = split_regions(table, [n for _, n in sizes], [v for v, _ in sizes])
    flat = [view for group in views for view in group]
    assert len(split) == len(flat)
    assert all(torch.equal(got, view) for got, view in zip(split, flat, strict=True))
    split[-1].sum().backward()
    assert flat[-1].grad is not None


@pytest.mark.parametrize("registers", [None, "x_norm_regtokens", "x_storage_tokens"])
def test_crop_groups_come_back(registers):
    b, views, outputs = 3, [], []
    for v, n in ((2, 15), (5, 4)):
        group = [(numbers(b, 6), numbers(b, n, 6), numbers(b, 4, 6)) for _ in range(v)]
        views += group
        keys = ("x_norm_clstoken", "x_norm_patchtokens", registers or "unused")
        outputs.append(dict(zip(keys, map(torch.cat, zip(*group, strict=True)), strict=True)))
    split = split_crop_groups(outputs, (2, 5))
    assert len(split) == 7
    for got, (cls, patches, regs) in zip(split, views, strict=True):
        assert torch.equal(got.class_token, cls)
        assert torch.equal(got.patch_tokens, patches)
        assert (got.register_tokens is None) == (registers is None)
        assert registers is None or torch.equal(got.register_tokens, regs)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: split_views(torch.zeros(7, 3), 2), "7 rows"),
        (lambda: split_class_and_patches(torch.zeros(4, 1, 3), 2), "none are left"),
        (lambda: split_class_and_patches((torch.zeros(4, 3), torch.zeros(6, 5, 3)), 2), "rows"),
        (lambda: split_regions(torch.zeros(61, 3), (9, 4), (2, 3)), "no multiple of the 30"),
        (lambda: split_regions(torch.zeros(60, 3), (9,), (2, 3)), "got 1 and 2"),
        (lambda: split_crop_groups({}, (2,)), "wrap one"),
        (lambda: split_crop_groups([{}], (2,)), "is_training=True"),
        (lambda: split_crop_groups([{}], (2, 8)), "2 counts"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(ShapeError, match=says):
        call()


def test_groups_of_different_batches_are_refused():
    def output(rows):
        return {
            "x_norm_clstoken": torch.zeros(rows, 2),
            "x_norm_patchtokens": torch.zeros(rows, 4, 2),
        }

    with pytest.raises(ShapeError, match="3 images in 4 views"):
        split_crop_groups([output(4), output(12)], (2, 4))


def test_a_count_must_be_a_count():
    with pytest.raises(ConfigError, match="views"):
        split_views(torch.zeros(4, 3), 0)
