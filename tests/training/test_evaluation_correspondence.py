"""Correspondence across views: known features, a planted mistake, the level of chance."""

import math

import pytest
import torch
from torch import nn

from local_distill import ConfigError, DataError, NearestMatcher, TokenGrid
from local_distill.backbones import BackboneOutput
from local_distill.training import SyntheticScenes
from local_distill.training.evaluation import (
    correspondence_errors,
    correspondence_views,
    draw_view_pairs,
    summarise_errors,
)
from local_distill.transforms import MultiCrop

SIDE = 64


class Ramps(torch.utils.data.Dataset):
    """Images whose red says x and whose green says y."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        line = (torch.arange(SIDE) + 0.5) / SIDE
        return torch.stack((line.expand(SIDE, SIDE), line[:, None].expand(SIDE, SIDE),
                            torch.zeros(SIDE, SIDE))), 0  # fmt: skip


class Places(nn.Module):
    """Tokens that tell their place in the source, read off the ramps at their centre."""

    def forward(self, images):
        cells = nn.functional.avg_pool2d(images[:, :2], 8)
        x, y = (cells * math.pi / 2).flatten(2).unbind(1)
        tokens = torch.stack((x.cos(), x.sin(), y.cos(), y.sin()), -1)
        return BackboneOutput(tokens.mean(1), tokens)

    def token_grid(self, view_size):
        return TokenGrid.tiling(view_size[0] // 8, view_size[1] // 8, view_size)


class Noise(Places):
    def forward(self, images):
        out = super().forward(images)
        tokens = torch.randn(*out.patch_tokens.shape[:2], 16)
        return BackboneOutput(tokens.mean(1), tokens)


class Constant(Places):
    def forward(self, images):
        tokens = torch.ones_like(super().forward(images).patch_tokens)
        return BackboneOutput(tokens.mean(1), tokens)


def plain_views(**settings):
    return MultiCrop(
        global_size=48, local_count=0, global_scale=(0.4, 1.0), color_jitter=None, grayscale_p=0.0,
        blur_p=(0.0, 0.0, 0.0), solarize_p=0.0, normalize=None, **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pairs():
    return draw_view_pairs(Ramps(), plain_views(hflip_p=0.5, vflip_p=0.3))


def test_features_that_tell_the_place_find_it_under_flips(pairs):
    flips = (
        pairs.student_geometry.matrix[:, 0, 0].sign()
        * pairs.teacher_geometry.matrix[:, 0, 0].sign()
    )
    assert 4 <= int((flips < 0).sum()) <= 20  # views mirrored against each other are among them
    found = summarise_errors(correspondence_errors(Places(), pairs).features)
    assert found["median"] < 0.3
    assert found["mean"] < 0.3
    assert found["within_0.5"] > 0.97
    assert found["within_1"] > 0.99


def test_features_of_the_grid_not_mirrored_are_seen_to_be_wrong(pairs):
    right = correspondence_errors(Places(), pairs).features
    # pixels mirrored once more, and the geometry not told of it
    mirrored = pairs._replace(student=pairs.student.flip(-1))
    wrong = correspondence_errors(Places(), mirrored).features
    assert wrong.shape == right.shape
    assert wrong.median() > 1
    assert summarise_errors(wrong)["within_0.5"] < 0.4


def test_the_geometric_matcher_has_the_least_error(pairs):
    best = correspondence_errors(Noise(), pairs, matcher=NearestMatcher(0.5)).features
    assert best.max() < 0.5
    assert (best <= correspondence_errors(Places(), pairs).features + 1e-5).all()


def test_chance_is_what_noise_reaches_and_what_counting_says(pairs):
    torch.manual_seed(0)
    errors = correspondence_errors(Noise(), pairs, batch_size=7)
    noise, chance = summarise_errors(errors.features), summarise_errors(errors.chance)
    for name in ("mean", "within_1", "within_2"):
        assert noise[name] == pytest.approx(chance[name], abs=0.12)
    # all pairs of tokens, one by one
    student, teacher, counted = all_places(pairs)
    exact = []
    for b, i in counted.nonzero().tolist():
        (x, y, cell), others = student[b][i], teacher[b]
        exact += [math.hypot(x - u, y - v) / max(cell, other) for u, v, other in others]
    assert chance["mean"] == pytest.approx(sum(exact) / len(exact), abs=0.1)
    assert len(errors.chance) == int(counted.sum())
    same = []
    for b, i in counted.nonzero().tolist():
        (x, y, cell), (u, v, other) = student[b][i], teacher[b][i]
        same.append(math.hypot(x - u, y - v) / max(cell, other))
    torch.testing.assert_close(
        errors.same_place, torch.tensor(same, dtype=errors.same_place.dtype), rtol=1e-4, atol=1e-5
    )


def all_places(pairs):
    """By image and token (x, y, cell diagonal) in the source; which student tokens count."""
    sides = []
    for geometry in (pairs.student_geometry, pairs.teacher_geometry):
        side = []
        for matrix in geometry.matrix.double():
            rows = []
            for r in range(6):
                for c in range(6):
                    point = matrix @ torch.tensor([8 * c + 4, 8 * r + 4, 1.0], dtype=torch.float64)
                    cell = 8 * math.hypot(float(matrix[0, 0]), float(matrix[1, 1]))
                    rows.append((float(point[0]), float(point[1]), cell))
            side.append(rows)
        sides.append(side)
    student, teacher = sides
    counted = torch.zeros(len(student), 36, dtype=torch.bool)
    for b in range(len(student)):
        for i, (x, y, cell) in enumerate(student[b]):
            distance, other = min((math.hypot(x - u, y - v), d) for u, v, d in teacher[b])
            counted[b, i] = distance / max(cell, other) < 0.5
    return student, teacher, counted


def test_features_that_are_all_alike_do_no_better_than_chance(pairs):
    errors = correspondence_errors(Constant(), pairs)
    assert summarise_errors(errors.features)["within_1"] < 0.3


def test_pairs_are_the_same_for_a_seed_and_leave_the_generator_alone():
    before = torch.random.get_rng_state()
    one, again, other = (
        draw_view_pairs(SyntheticScenes(5, 32), correspondence_views(24), count=3, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(one.student) == 3
    assert torch.equal(one.student, again.student)
    assert not torch.equal(one.student, other.student)
    assert not torch.equal(one.student, one.teacher)
    first = correspondence_errors(Places(), one, seed=4)
    torch.testing.assert_close(first.chance, correspondence_errors(Places(), one, seed=4).chance)


def test_the_summary_by_hand():
    found = summarise_errors(torch.tensor([math.inf, 0.2, 1.4, 0.6]), radii=[1])
    assert found == {
        "median": pytest.approx(1.0),
        "mean": pytest.approx(2.2 / 3),
        "within_1": 0.5,
    }
    assert summarise_errors(torch.tensor([math.inf]))["median"] == math.inf
    with pytest.raises(DataError, match="`errors` is empty"):
        summarise_errors(torch.zeros(0))


def test_views_and_features_that_cannot_be_are_refused(pairs):
    scenes = SyntheticScenes(2, 32)
    with pytest.raises(ConfigError, match="two global views of one size"):
        draw_view_pairs(scenes, MultiCrop(global_count=1))
    with pytest.raises(ConfigError, match="`images` is empty"):
        draw_view_pairs(SyntheticScenes(0, 32), correspondence_views(24))
    with pytest.raises(ConfigError, match="`count`"):
        draw_view_pairs(scenes, correspondence_views(24), count=0)

    class Diverged(Places):
        def forward(self, images):
            out = super().forward(images)
            return out._replace(patch_tokens=out.patch_tokens * math.nan)

    model = Diverged().train()
    with pytest.raises(DataError, match="not finite"):
        correspondence_errors(model, pairs)
    assert model.training
    apart = pairs._replace(
        teacher_geometry=pairs.teacher_geometry._replace(
            matrix=pairs.teacher_geometry.matrix
            + torch.tensor([[0, 0, 500.0], [0, 0, 500], [0, 0, 0]])
        )
    )
    with pytest.raises(DataError, match="do not overlap"):
        correspondence_errors(Places(), apart)
