"""A user's code on the core, as mypy and pyright read it: what comes out has a type."""

from collections.abc import Sequence
from typing import assert_type

import torch
from torch import Tensor

import local_distill as ld


def views_of(boxes: Tensor) -> list[ld.Tokens]:
    """Two views of the same crops, without features."""
    grid = ld.TokenGrid.tiling(14, 14, view_size=(224, 224))
    assert_type(grid, ld.TokenGrid)
    assert_type(grid.num_tokens, int)
    crop = ld.from_box(boxes, view_size=(224, 224), source_size=(480, 640))
    assert_type(crop, ld.CropGeometry)
    assert_type(crop.matrix, Tensor)
    assert_type(crop.to("cpu"), ld.CropGeometry)
    assert_type(ld.token_centers(crop, grid), Tensor)
    return [ld.Tokens(None, crop, grid), ld.Tokens(geometry=crop, grid=grid)]


def matched(matcher: ld.Matcher, views: Sequence[ld.Tokens]) -> dict[tuple[int, int], ld.Matches]:
    """Any matcher will do, ours or one's own."""
    matches = ld.match_views(matcher, views, views)
    assert_type(matches, dict[tuple[int, int], ld.Matches])
    assert_type(matches[0, 1].matched, Tensor)
    assert_type(matches[0, 1].compact(3), tuple[Tensor, ld.Matches])
    assert_type(matcher(views[0], views[1]), ld.Matches)
    return matches


class FirstToken:
    """A matcher of one's own: a class with the right call."""

    def __call__(self, student: ld.Tokens, teacher: ld.Tokens) -> ld.Matches:
        """Every student token gets the teacher's first."""
        matches = ld.nearest_matches(student, teacher, max_distance=None)
        return matches._replace(teacher_index=torch.zeros_like(matches.teacher_index))


def loss_of(views: Sequence[ld.Tokens], logits: Sequence[Tensor]) -> Tensor:
    """One pair by the function, all pairs by the Module."""
    own: ld.Matcher = FirstToken()
    matches = matched(own, views)
    targets = ld.TeacherTargets(logits[0], None, 0.04)
    one = ld.local_distillation_loss(logits[1], targets, matches[1, 0], normalize="image")
    assert_type(one, Tensor)
    module = ld.LocalDistillationLoss(ld.Centering(8))
    every = module.forward(logits, logits, matches, teacher_temp=0.04)
    assert_type(every, Tensor)
    return one + every


def test_it_runs() -> None:
    """The code that is type-checked is code that works."""
    views = views_of(torch.tensor([[0.0, 0, 400, 400], [100, 50, 500, 450]]))
    loss = loss_of(views, [torch.randn(2, 196, 8) for _ in views])
    assert loss.isfinite()
    for matcher in (ld.NearestMatcher(), ld.Mutual(ld.BilinearMatcher())):
        assert sorted(matched(matcher, views)) == [(0, 1), (1, 0)]
