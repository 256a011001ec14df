"""Constrained boxes: what they promise, on boxes, on geometry and on pixels; what they leave be."""

import itertools
import math
from collections import Counter

import pytest
import torch
from helpers.views import (
    PLAIN,
    assert_a_seeded_loader_repeats,
    assert_views_do_not_depend_on_the_workers,
    photograph,
)
from hypothesis import given
from hypothesis import strategies as st

from local_distill import ConfigError, MultiCrop
from local_distill.transforms import multi_crop
from local_distill.transforms.constraints import BoxConstraints, constrain_boxes, shared_pixels
from local_distill.transforms.crop_boxes import CropBox

SMALL = {"global_size": 16, "local_size": 8}


def shown_box(geometry):
    """(x0, y0, x1, y1) in the source, from the matrix alone."""
    height, width = geometry.view_size.tolist()
    corners = torch.tensor([[0.0, 0, 1], [width, height, 1]], dtype=torch.float64)
    (x0, y0, _), (x1, y1, _) = (corners @ geometry.matrix.double().T).tolist()
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


def shares(a, b):
    """What boxes a and b share, as a part of a's area, and of the smaller one's."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, width) * max(0.0, height)
    own, other = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / own, shared / min(own, other)


def ranges(low, high):
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(lambda ends: sorted(ends))


@st.composite
def settings(draw):
    every = draw(st.booleans())
    global_scale = draw(ranges(0.05, 1.0))
    local_scale = draw(ranges(0.001, 1.0))
    overlap = draw(st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(0, 1)))
    together = draw(st.floats(0.01 if every else 0, 1))
    if overlap * local_scale[0] > global_scale[1]:
        overlap = 0.0
    return {
        "global_count": draw(st.integers(1, 4)),
        "local_count": draw(st.integers(0, 3)),
        "global_scale": global_scale,
        "local_scale": local_scale,
        "ratio": draw(ranges(0.2, 5)),
        "min_overlap": overlap,
        "overlap_with": "all" if every else "any",
        "min_global_overlap": together,
        "max_retries": draw(st.integers(0, 6)),
    }


@given(
    settings=settings(),
    source=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    seed=st.integers(0, 2**31),
)
def test_the_promise_holds_on_the_geometry(settings, source, seed):
    multi_crop = MultiCrop(global_size=3, local_size=2, vflip_p=0.5, **PLAIN, **settings)
    torch.manual_seed(seed)
    _, geometries = multi_crop(torch.zeros(3, *source, dtype=torch.uint8))
    boxes = [shown_box(geometry) for geometry in geometries]
    first, rest = boxes[: multi_crop.num_global], boxes[multi_crop.num_global :]
    for a, b in itertools.combinations(first, 2):
        assert shares(a, b)[1] >= settings["min_global_overlap"] - 1e-4
    for box in rest:
        parts = [shares(box, other)[0] for other in first]
        part = min(parts) if settings["overlap_with"] == "all" else max(parts)
        assert part >= settings["min_overlap"] - 1e-4
    for x0, y0, x1, y1 in boxes:
        assert -1e-4 <= x0 <= x1 - 0.99
        assert -1e-4 <= y0 <= y1 - 0.99
        assert x1 <= source[1] + 1e-4
        assert y1 <= source[0] + 1e-4


@given(
    settings=settings(),
    source=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    seed=st.integers(0, 2**31),
)
def test_what_a_constraint_changes_and_in_how_many_attempts(settings, source, seed):
    free = {**settings, "min_overlap": 0.0, "overlap_with": "any", "min_global_overlap": 0.0}
    torch.manual_seed(seed)
    loose = MultiCrop(**SMALL, **free).draw_boxes(source)
    assert loose.attempts == [1] * len(loose.boxes)
    assert not any(loose.repaired)
    torch.manual_seed(seed)
    tight = MultiCrop(**SMALL, **settings).draw_boxes(source)
    most = 1 + settings["max_retries"]
    for before, after, attempts, repaired in zip(loose.boxes, *tight, strict=True):
        assert 1 <= attempts <= most
        assert (after.hflip, after.vflip) == (before.hflip, before.vflip)
        if not repaired:
            assert (after.height, after.width) == (before.height, before.width)
        if attempts == 1 and not repaired:
            assert after == before
        assert after.height <= before.height
        assert after.width <= before.width


def test_a_box_that_was_good_stays_and_so_do_all_colours():
    constraint = {"min_overlap": 0.6, "overlap_with": "all", "min_global_overlap": 0.3}
    common = {"global_size": 24, "local_size": 16, "local_count": 6}
    kept = moved = 0
    for seed in range(10):
        torch.manual_seed(seed)
        views, geometries = MultiCrop(**common)(photograph())
        after_loose = torch.rand(1)
        torch.manual_seed(seed)
        tight_views, tight = MultiCrop(**common, **constraint, max_retries=0)(photograph())
        assert torch.equal(torch.rand(1), after_loose)  # no retries, no further numbers
        torch.manual_seed(seed)
        retried_views, retried = MultiCrop(**common, **constraint)(photograph())
        for others, found in ((tight_views, tight), (retried_views, retried)):
            for view, other, a, b in zip(views, others, geometries, found, strict=True):
                same = torch.equal(a.matrix, b.matrix)
                kept, moved = kept + same, moved + (not same)
                assert torch.equal(view, other) == same
    assert kept > 20
    assert moved > 20


def test_the_promise_holds_on_the_pixels():
    # the channels show x and y of the source: a local view inside shows none that no global does
    height, width = 120, 150
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    image = torch.stack((x / width, y / height, torch.ones_like(x)))
    common = {"global_count": 1, "local_count": 6, "global_scale": (0.1, 0.3), **PLAIN}
    loose = MultiCrop(global_size=64, local_size=32, **common)
    inside = MultiCrop(global_size=64, local_size=32, local_inside=True, **common)
    outside = 0
    for seed in range(20):
        for crop in (inside, loose):
            torch.manual_seed(seed)
            (first, *rest), _ = crop(image)
            for view in rest:
                shows_more = bool(
                    (view.amin((1, 2)) < first.amin((1, 2)) - 0.01).any()
                    or (view.amax((1, 2)) > first.amax((1, 2)) + 0.01).any()
                )
                if crop is inside:
                    assert not shows_more
                else:
                    outside += shows_more
    assert outside > 60  # so that the test can fail


def good_places(box, others, source, constraints):
    """Every (top, left) that meets the constraint, by looking at each."""
    places = []
    for top in range(source[0] - box.height + 1):
        for left in range(source[1] - box.width + 1):
            parts = [
                sum(
                    other.top <= row < other.top + other.height
                    and other.left <= col < other.left + other.width
                    for row in range(top, top + box.height)
                    for col in range(left, left + box.width)
                )
                / (box.height * box.width)
                for other in others
            ]
            part = min(parts) if constraints.overlap_with == "all" else max(parts)
            if part >= constraints.min_overlap:
                places.append((top, left))
    return places


@pytest.mark.parametrize("overlap_with", ["any", "all"])
@pytest.mark.parametrize("min_overlap", [0.3, 0.5, 1.0])
def test_places_are_uniform_over_all_the_good_ones(overlap_with, min_overlap):
    source, box = (9, 11), CropBox(0, 0, 3, 4)
    others = [CropBox(1, 1, 6, 5), CropBox(3, 2, 5, 8)]
    constraints = BoxConstraints(min_overlap, overlap_with, 0.0, 60)
    wanted = good_places(box, others, source, constraints)
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(200 * len(wanted), 122, generator=generator, dtype=torch.float64).tolist()
    counts = Counter()
    for first, second, *draws in rows:
        start = box._replace(top=int(first * 7), left=int(second * 8))  # anywhere in the source
        drawn = constrain_boxes([*others, start], 2, source, constraints, iter(draws))
        assert not drawn.repaired[2]
        counts[drawn.boxes[2].top, drawn.boxes[2].left] += 1
    assert sorted(counts) == sorted(wanted)
    # chi-square of n − 1 degrees: mean n − 1, standard deviation √(2n − 2)
    chi = sum((count - 200) ** 2 / 200 for count in counts.values())
    free = len(wanted) - 1
    assert chi < free + 5 * math.sqrt(2 * free)


class Counted:
    """Draws that count how many were taken."""

    def __init__(self, value):
        self.value, self.taken = value, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.taken += 1
        return self.value


@pytest.mark.parametrize("max_retries", [0, 1, 7])
def test_the_attempts_are_bounded_exactly(max_retries):
    # an L of good places: the corner that these draws name over and over is not one of them
    others = [CropBox(0, 0, 4, 20), CropBox(0, 0, 20, 4)]
    constraints = BoxConstraints(1.0, "any", 0.0, max_retries)
    draws = Counted(0.9999)
    drawn = constrain_boxes([*others, CropBox(17, 17, 3, 3)], 2, (20, 20), constraints, draws)
    assert drawn.attempts == [1, 1, 1 + max_retries]
    assert draws.taken == 2 * max_retries
    assert drawn.repaired == [False, False, True]
    assert max(shared_pixels(drawn.boxes[2], other) for other in others) == 9
    assert constraints.extra_draws(2, 1) == 2 * max_retries


def test_a_good_attempt_is_the_last():
    constraints = BoxConstraints(1.0, "any", 0.0, 7)
    draws = Counted(0.5)
    boxes = [CropBox(0, 0, 10, 10), CropBox(15, 15, 4, 4)]
    drawn = constrain_boxes(boxes, 1, (20, 20), constraints, draws)
    assert drawn == ([boxes[0], CropBox(3, 3, 4, 4)], [1, 2], [False, False])
    assert draws.taken == 2


def test_no_retries_where_no_place_is_good():
    # the local view is larger than the global one: only shrinking helps
    constraints = BoxConstraints(0.9, "any", 0.0, 7)
    draws = Counted(0.5)
    boxes = [CropBox(8, 2, 6, 6), CropBox(0, 0, 18, 12, hflip=True)]
    drawn = constrain_boxes(boxes, 1, (20, 20), constraints, draws)
    assert draws.taken == 0
    assert drawn.attempts == [1, 1]
    assert drawn.repaired == [False, True]
    box = drawn.boxes[1]
    assert box.hflip
    assert shared_pixels(*drawn.boxes) >= 0.9 * box.height * box.width
    assert abs(box.height / box.width - 18 / 12) < 0.25
    assert box.height * box.width > 20  # no smaller than needed: 24 lie wholly inside


def test_a_repair_moves_no_further_than_it_has_to():
    boxes = [CropBox(0, 0, 40, 40), CropBox(60, 4, 16, 16)]
    for share, top in ((0.25, 36), (0.5, 32), (1.0, 24)):
        drawn = constrain_boxes(boxes, 1, (90, 40), BoxConstraints(share, max_retries=0), iter([]))
        box = drawn.boxes[1]
        assert (box.left, box.height, box.width) == (4, 16, 16)
        assert top - 36 / 16 <= box.top <= top  # a sixteenth of the way, at most


def test_repairs_are_rare_where_constraints_are_mild():
    torch.manual_seed(0)
    crop = MultiCrop(min_overlap=0.5, overlap_with="all", min_global_overlap=0.5)
    drawn = [crop.draw_boxes((375, 500)) for _ in range(300)]
    repaired = sum(sum(image.repaired) for image in drawn)
    attempts = [tries for image in drawn for tries in image.attempts]
    assert repaired <= 3
    assert 1 < sum(attempts) / len(attempts) < 2


def test_sizes_keep_their_distribution():
    # published codes draw the size again too, which favours small views
    free, inside = (
        MultiCrop(global_count=1, global_scale=(0.5, 0.5), ratio=(1, 1), **extra)
        for extra in ({}, {"local_inside": True})
    )
    for seed in range(20):
        drawn = []
        for crop in (free, inside):
            torch.manual_seed(seed)
            drawn.append([box[2:4] for box in crop.draw_boxes((300, 300)).boxes])
        assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"min_overlap": 1.5}, "min_overlap.*1.5"),
        ({"min_overlap": -0.1}, "min_overlap"),
        ({"min_overlap": math.nan}, "min_overlap"),
        ({"min_global_overlap": 2}, "min_global_overlap"),
        ({"max_retries": -1}, "max_retries"),
        ({"max_retries": 1.5}, "max_retries"),
        ({"overlap_with": "both", "min_overlap": 0.1}, "overlap_with.*'both'"),
        ({"overlap_with": "all", "min_overlap": 0.1}, "overlap_with='all'.*min_global_overlap"),
        (
            {"local_inside": True, "local_scale": (0.5, 0.6), "global_scale": (0.3, 0.4)},
            r"scale \(0.5, 0.6\).*at most 0.4",
        ),
        (
            {"min_overlap": 0.9, "local_scale": (0.5, 0.6), "global_scale": (0.3, 0.4)},
            "0.9 of its area",
        ),
    ],
)
def test_constraints_that_cannot_be(setting, message):
    with pytest.raises(ConfigError, match=message):
        MultiCrop(**setting)


def test_constraints_that_only_just_can_be():
    MultiCrop(min_overlap=0.8, local_scale=(0.5, 0.6), global_scale=(0.3, 0.4))
    MultiCrop(overlap_with="all", min_overlap=0.1, global_count=1)
    MultiCrop(overlap_with="all", min_overlap=0.1, local_count=0)
    assert "min_overlap=0.25" in repr(MultiCrop(min_overlap=0.25))
    assert "min_overlap" not in repr(MultiCrop())


@pytest.mark.parametrize("size", [0, (8, 0), (8, 8, 8), 2.5, None])
def test_boxes_need_a_size(size):
    with pytest.raises(ConfigError, match="source_size"):
        MultiCrop().draw_boxes(size)


CONSTRAINED = {
    **SMALL,
    "local_count": 3,
    "min_overlap": 0.8,
    "overlap_with": "all",
    "min_global_overlap": 0.5,
}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_seeded_loader_makes_the_same_views_again(workers):
    assert_a_seeded_loader_repeats(MultiCrop(**CONSTRAINED), workers)


def test_seeded_by_index_the_views_do_not_depend_on_the_workers():
    assert_views_do_not_depend_on_the_workers(MultiCrop(**CONSTRAINED))


def test_global_views_share_a_part_of_the_smaller_one():
    # a large view around a small one shows all of it, whichever is drawn first
    small, large = CropBox(5, 6, 4, 4), CropBox(2, 2, 15, 12)
    whole = BoxConstraints(min_global_overlap=1.0)
    for boxes in ([small, large], [large, small]):
        drawn = constrain_boxes(boxes, 2, (20, 20), whole, iter([]))
        assert drawn == (boxes, [1, 1], [False, False])


def test_a_repair_shrinks_only_where_sliding_is_not_enough():
    # wider than the global view, but 5 / 6 of it fit in
    boxes = [CropBox(0, 0, 20, 20), CropBox(30, 16, 10, 24)]
    for share, kept in ((0.5, True), (0.8, True), (0.9, False)):
        drawn = constrain_boxes(boxes, 1, (40, 40), BoxConstraints(share, max_retries=0), iter([]))
        box = drawn.boxes[1]
        assert ((box.height, box.width) == (10, 24)) == kept
        assert shared_pixels(*drawn.boxes) >= share * box.height * box.width
    draws = Counted(0.5)  # 0.9 of it would be 21.6 columns of 20: nowhere to look for
    boxes[0] = CropBox(5, 10, 20, 20)
    constraints = BoxConstraints(0.9, max_retries=3)
    assert constrain_boxes(boxes, 1, (60, 60), constraints, draws).repaired[1]
    assert draws.taken == 0


def test_the_best_attempt_is_the_one_repaired():
    # half of the box has to be shared; the attempts share 49 % and 25 %, the first place nothing
    boxes = [CropBox(0, 0, 40, 40), CropBox(60, 5, 10, 10)]
    draws = iter([33.5 / 36, 33.5 / 36, 35.5 / 36, 35.5 / 36])
    constraints = BoxConstraints(0.5, max_retries=2)
    drawn = constrain_boxes(boxes, 1, (90, 90), constraints, draws)
    assert drawn.attempts == [1, 3]
    assert drawn.repaired == [False, True]
    assert drawn.boxes[1] == CropBox(32, 32, 10, 10)


def test_retries_have_numbers_of_their_own(monkeypatch):
    handed = []

    def watch(*arguments):
        handed.extend(arguments[-1])
        return constrain_boxes(*arguments[:-1], iter(handed))

    monkeypatch.setattr(multi_crop, "constrain_boxes", watch)
    torch.manual_seed(0)
    MultiCrop(**CONSTRAINED).draw_boxes((40, 50))
    after = torch.rand(1)
    torch.manual_seed(0)
    numbers = torch.rand(5 * 40 + 4 * 2 * 20, dtype=torch.float64)  # one call, the views' own first
    assert handed == numbers[5 * 40 :].tolist()
    assert torch.equal(torch.rand(1), after)
