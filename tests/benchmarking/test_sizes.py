"""The steps that are measured are steps that people train."""

import pytest
import torch

from local_distill.benchmarking.sizes import SIZES, SOURCE, Size, check_sizes, named_size, step
from local_distill.errors import ConfigError


@pytest.mark.parametrize("name", SIZES)
def test_patches_of_both_kinds_of_view_are_equally_large(name):
    size = SIZES[name]
    assert size.global_pixels // size.global_side == size.local_pixels // size.local_side


def test_a_step_is_dinos():
    made = step(Size(4, 2, 8), 3)
    assert [view.num_tokens for view in made.student] == [16] * 2 + [4] * 8
    assert len(made.pairs) == 18
    assert all(v != q for v, q in made.pairs)
    for own, others in zip(made.teacher, made.student, strict=False):
        assert own.geometry is others.geometry
        assert not torch.equal(own.features, others.features)


def test_views_lie_within_the_source_and_some_are_mirrored():
    made = step(Size(4, 2, 8), 40)
    mirrored = 0
    for view in made.student:
        matrix = view.geometry.matrix
        side = view.geometry.view_size[0, 0]
        corners = torch.tensor([[0.0, 0, 1], [side, side, 1]]) @ matrix.mT
        points = corners[..., :2] / corners[..., 2:]
        assert points.min() >= -1e-3
        assert (points <= torch.tensor([SOURCE[1], SOURCE[0]]) + 1e-3).all()
        mirrored += int((matrix[:, 0, 0] < 0).sum())
    assert 100 < mirrored < 300  # of 400


def test_features_alone_and_places_alone():
    made = step(Size(4, 2, 8), 2, dtype=torch.bfloat16)
    assert made.student[0].features.dtype == torch.bfloat16
    assert made.student[0].geometry.matrix.dtype == torch.float32
    assert made.without_features().student[3].features is None
    assert made.without_features().student[3].geometry is made.student[3].geometry
    assert made.without_geometry().student[3].geometry is None
    assert made.without_geometry().student[3].features is made.student[3].features


def test_the_same_step_each_time():
    one, other = (step(Size(4, 2, 8), 2) for _ in range(2))
    assert torch.equal(one.student[5].features, other.student[5].features)
    assert torch.equal(one.student[5].geometry.matrix, other.student[5].geometry.matrix)


def test_an_unknown_size_is_refused():
    with pytest.raises(ConfigError, match=r"no size 'S16'; there are Swin, S/16, S/8, L/14"):
        check_sizes(["Swin", "S16"])


@pytest.mark.parametrize("name", ["48+20/8:192", "48+24/0:192", "48/8:192", "48+24/8"])
def test_a_size_of_ones_own_must_fit(name):
    with pytest.raises(ConfigError, match="size"):
        named_size(name)
    assert check_sizes(["56+28/14:32"]) == ("56+28/14:32",)
    assert named_size("56+28/14:32") == Size(4, 2, 32, 56, 28)
