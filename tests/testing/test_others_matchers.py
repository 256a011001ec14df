"""The kit on others' matching code: kornia's descriptor matchers, Lightly's nearest neighbours.

The wrappers bring tokens to the library's arguments and its answer to `Matches`. They mend nothing:
what the library does not do is a property that fails, here by name and with the reason.
"""

import hypothesis
import pytest
import torch
from hypothesis import Phase

from local_distill import Matches, SimilarityMatcher, Tokens, token_centers
from local_distill.testing import PropertyFailed, check_matcher, matcher_test

kornia_feature = pytest.importorskip("kornia.feature")
lightly_utils = pytest.importorskip("lightly.models.utils")
lightly_grid = pytest.importorskip("lightly.transforms.random_crop_and_flip_with_grid")

MAX_EXAMPLES = 6


@pytest.fixture(autouse=True, scope="module")
def _without_shrinking():
    """What fails here is known to; looking for the smallest example of it would take minutes."""
    hypothesis.settings.register_profile(
        "without shrinking", phases=[Phase.explicit, Phase.generate]
    )
    hypothesis.settings.load_profile("without shrinking")
    yield
    hypothesis.settings.load_profile("local_distill")


class Kornia:
    """kornia's DescriptorMatcher, which knows no batch: image by image."""

    def __init__(self, mode):
        self.match = kornia_feature.DescriptorMatcher(mode)

    def __call__(self, student, teacher):
        f, g = student.features, teacher.features
        (b, s, _), k = f.shape, min(1, g.shape[1])
        images = [self.match(one, other) for one, other in zip(f, g, strict=True)]
        parts = [hard(pairs[:, 0], pairs[:, 1], dists[:, 0], s) for dists, pairs in images]
        if b == 0:
            return Matches(f.new_zeros(0, s, k).long(), f.new_zeros(0, s, k), f.new_zeros(0, s))
        index, weight, cost = (torch.stack(part) for part in zip(*parts, strict=True))
        return Matches(index[..., None][..., :k], weight[..., None][..., :k], cost)

    def __repr__(self):
        return f"kornia's {self.match.match_mode}"


class Lightly:
    """Lightly's nearest_neighbors, as its VICRegL loss calls it.

    It returns features, not indices: indices given as features come back as indices.
    """

    def __init__(self, num_matches, by):
        self.num_matches, self.by = num_matches, by

    def __call__(self, student, teacher):
        ours, theirs = (self.maps(view) for view in (student, teacher))
        b, s, _ = ours.shape
        t = theirs.shape[1]
        distances = torch.cdist(ours, theirs)
        rows, columns = lightly_utils.nearest_neighbors(
            torch.arange(s, device=ours.device).expand(b, -1)[..., None],
            torch.arange(t, device=ours.device).expand(b, -1)[..., None],
            distances,
            self.num_matches,
        )
        rows, columns = rows[..., 0], columns[..., 0]
        chosen = columns[..., None]
        cost = distances.gather(1, rows[..., None].expand(-1, -1, t)).gather(2, chosen)[..., 0]
        index, weight, cost = hard(rows, columns, cost, s)
        return Matches(index[..., None], weight[..., None], cost)

    def maps(self, view):
        return view.features if self.by == "features" else token_centers(view.geometry, view.grid)

    def __repr__(self):
        return f"lightly's nearest_neighbors by {self.by}, num_matches={self.num_matches}"


class LightlyGrid(Lightly):
    """The same by the places that Lightly's own crop gives, of the crop and flips that we had.

    Its grids are square, so columns and rows are taken from one each.
    """

    def __init__(self):
        super().__init__(-1, "its own grid")

    def maps(self, view):
        return torch.stack([self.grid(view, image) for image in range(len(view.geometry.matrix))])

    def grid(self, view, image):
        matrix, view_size, source_size = (part[image].tolist() for part in view.geometry)
        spans, flips = [], []
        for axis, size in ((1, view_size[0]), (0, view_size[1])):
            ends = sorted((matrix[axis][2], matrix[axis][2] + matrix[axis][axis] * size))
            spans.append((ends[0], ends[1] - ends[0]))
            flips.append(matrix[axis][axis] < 0)
        (top, height), (left, width) = spans
        location = lightly_grid.Location(top, left, height, width, *source_size, *flips[::-1])
        rows, cols = (
            lightly_grid.RandomResizedCropAndFlip(grid_size=n).location_to_NxN_grid(location)
            for n in view.grid[:2]
        )
        return torch.cartesian_prod(rows[:, 0, 1], cols[0, :, 0]).flip(-1)


def hard(rows, columns, cost, s):
    """Pairs (…, m) of a student and a teacher token as index, weight and cost (…, s)."""
    shape = (*rows.shape[:-1], s)
    return (
        rows.new_zeros(shape).scatter(-1, rows, columns),
        cost.new_zeros(shape).scatter(-1, rows, torch.ones_like(cost)),
        cost.new_full(shape, torch.inf).scatter(-1, rows, cost),
    )


def all_of(names, reason):
    return dict.fromkeys(names.split(), reason)


PLACES = "by design: the distance between features, for which the origin is a place like any other"
UNCHECKED = "no check of its own: the error comes from inside torch and is no ValueError"
FEATURES = (
    all_of("zero_student_tokens_are_unmatched zero_teacher_tokens_capture_nothing", PLACES)
    | {"features_may_be_scaled": "by design: the distance between features, which are not scaled"}
    | all_of(
        "infinite_student_tokens_are_unmatched infinite_teacher_tokens_capture_nothing",
        "features are not checked: where all distances are infinite, a first one is the least",
    )
    | all_of(
        "student_tokens_outside_the_source_are_unmatched "
        "teacher_tokens_outside_the_source_capture_nothing",
        "features alone: it cannot know which tokens lie in padding",
    )
    | all_of("missing_inputs_are_refused features_of_other_widths_are_refused", UNCHECKED)
    | {"no_gradient_flows": "the distance is returned with its gradient"}
)
NAN_IS_LEAST = "features are not checked: a NaN distance wins torch.min"
KORNIA = (
    FEATURES
    | all_of("nan_student_tokens_are_unmatched nan_teacher_tokens_capture_nothing", NAN_IS_LEAST)
    | all_of(
        "weights_and_costs_are_at_least_float32 half_precision_features_match_as_float32",
        "as documented, the distance comes back rounded to the descriptors' dtype",
    )
)
NOBODYS_NEAREST = f"{NAN_IS_LEAST}, then in every row or column, and the other tokens lose theirs"
KORNIA_MUTUAL = (
    KORNIA
    | all_of(
        "bad_student_tokens_leave_others_alone bad_teacher_tokens_leave_others_alone",
        NOBODYS_NEAREST,
    )
    | {"vmap_works": "the mutual pairs are taken out by a boolean mask, of a size that varies"}
)
# What nearest_neighbors does itself, whichever distances it is given
LIGHTLY = {
    "batches_that_differ_are_refused": f"torch.cdist broadcasts the one image; then {UNCHECKED}",
    "a_teacher_without_tokens_is_served": "topk(k=1) needs one teacher token",
    "no_gradient_flows": "the distance keeps its gradient, and nothing detaches it",
}
UNORDERED = "torch.topk promises no order of equal distances"
LIGHTLY_FEATURES = (
    FEATURES
    | LIGHTLY
    | all_of(
        "nan_student_tokens_are_unmatched nan_teacher_tokens_capture_nothing",
        "features are not checked: where all distances are NaN, topk takes one all the same",
    )
    | all_of(
        "weights_and_costs_are_at_least_float32 half_precision_features_match_as_float32",
        "torch.cdist has no bfloat16 on the CPU, and nothing converts",
    )
    | {"ties_go_to_the_lowest_index": UNORDERED}
)
LIGHTLY_PLACES = LIGHTLY | {
    **all_of(
        "student_tokens_outside_the_source_are_unmatched "
        "teacher_tokens_outside_the_source_capture_nothing",
        "it is given places alone, not the size of the source",
    ),
    "views_of_other_sources_are_refused": "it is given places alone, not the size of the source",
    "the_source_may_be_enlarged": "the distance counts in pixels, not in cells",
    "views_far_apart_do_not_match": "it knows no limit: the nearest is a match however far",
    "ties_of_places_go_to_the_lowest_index": UNORDERED,
}

test_kornia_nn = matcher_test(Kornia("nn"), xfail=KORNIA, max_examples=MAX_EXAMPLES)
test_kornia_mnn = matcher_test(Kornia("mnn"), xfail=KORNIA_MUTUAL, max_examples=MAX_EXAMPLES)
test_lightly = matcher_test(
    Lightly(-1, "features"), xfail=LIGHTLY_FEATURES, max_examples=MAX_EXAMPLES
)
test_lightly_vicregl = matcher_test(
    Lightly(4, "features"), xfail=LIGHTLY_FEATURES, max_examples=MAX_EXAMPLES
)
test_lightly_places = matcher_test(
    Lightly(-1, "places"), xfail=LIGHTLY_PLACES, max_examples=MAX_EXAMPLES
)


PLACED_RIGHT = "the_heaviest_answer_lies_where_the_token_does"


@pytest.mark.xfail(
    strict=True,
    raises=PropertyFailed,
    reason="its n centres span the whole width, not n - 1 cells: the last lies a cell too far",
)
def test_lightlys_grid_places_tokens_where_they_are():
    check_matcher(LightlyGrid(), properties=[PLACED_RIGHT], max_examples=MAX_EXAMPLES)


def test_flips_do_not_show_that_lightlys_grid_steps_too_far():
    names = [
        "a_view_matches_itself",
        "the_student_view_may_be_flipped",
        "the_teacher_view_may_be_flipped",
        "the_source_may_be_shifted",
    ]
    assert check_matcher(LightlyGrid(), properties=names, max_examples=MAX_EXAMPLES) == names


@pytest.mark.parametrize("matcher", [Kornia("nn"), Lightly(-1, "features")])
def test_the_wrappers_match_as_the_libraries_do(matcher):
    """Where nothing is amiss they agree with the package: what fails is not the wrapper's."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (Tokens(torch.randn(3, n, 8, generator=generator)) for n in (11, 7))
    found, wanted = matcher(student, teacher), SimilarityMatcher("l2")(student, teacher)
    assert torch.equal(found.teacher_index, wanted.teacher_index)
    assert torch.equal(found.weight, wanted.weight)
    torch.testing.assert_close(found.cost, wanted.cost)


def test_vicregl_keeps_the_matches_of_least_distance():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (Tokens(torch.randn(3, n, 8, generator=generator)) for n in (11, 7))
    found, every = (Lightly(n, "features")(student, teacher) for n in (4, -1))
    assert found.matched.sum(1).tolist() == [4, 4, 4]
    torch.testing.assert_close(found.compact(4)[1].cost, every.compact(4)[1].cost)
