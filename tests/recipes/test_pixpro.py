"""The recipe `pixpro` against the authors' code, and what any loop may do with it."""

import copy

import pytest
import torch
from helpers.check_recipe import (
    VIEW_COUNTS,
    check_all_pairs,
    check_compiles,
    check_teacher_is_still,
)
from helpers.recipe_views import CROPS, SIDES, SOURCE, gradient_numbers, leaves, placed, views, wave
from hypothesis import given
from hypothesis import strategies as st

from local_distill import (
    ConfigError,
    GeometryError,
    RadiusMatcher,
    ShapeError,
    TokenGrid,
    Tokens,
    from_box,
    from_matrix,
)
from local_distill.recipes import pixpro

# Loss, then the gradient's numbers (global and token features of the two views, weight and bias of
# the propagation), of zdaxie/PixPro's featprop and regression_loss in float64. "code": the boxes in
# the coordinates that its transforms give; "paper": in source pixels; "instance": these, and its
# instance term with weight 1.
GOLDEN = {
    "code": (
        -0.3719966167848404,
        [0.0, -0.0648371332499, 0.0, 0.0787010903198, -0.0962237659692, 0.0159311074613],
    ),
    "paper": (
        -0.3205065957216878,
        [0.0, -0.0667461597599, 0.0, 0.0753194914686, -0.107426501482, 0.0337050322215],
    ),
    "instance": (
        -0.09408078922874785,
        [0.246787953808, -0.0667461597599, -0.266493782364, 0.0753194914686, -0.107426501482,
         0.0337050322215],
    ),
}  # fmt: skip
SETTINGS = {"code": {"legacy": True}, "paper": {}, "instance": {"instance_weight": 1.0}}


def recipe(**settings):
    loss = pixpro(6, **settings).double()
    with torch.no_grad():
        loss.propagation.transform[0].weight.copy_(wave(6, 6, phase=7.0))
        loss.propagation.transform[0].bias.copy_(wave(6, phase=8.0))
    return loss


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_loss_and_gradient_are_those_of_the_published_code(name):
    loss = recipe(**SETTINGS[name])
    student = views(2, 6, grad=True, offset=1.5)
    terms = loss(student, views(2, 6, phase=100, offset=1.5))
    terms.loss.backward()
    value, gradient = GOLDEN[name]
    assert float(terms.loss.detach()) == pytest.approx(value, rel=1e-6)
    found = gradient_numbers([*leaves(student), *loss.propagation.transform[0].parameters()])
    assert found == pytest.approx(gradient, rel=1e-6)


def naive_pairs(one, two, source=SOURCE, radius=0.7, grid=4):
    """Token pairs within the radius where x and y are divided by the source's size - 1."""
    centers, diagonals = [], []
    for crops in (one, two):
        images, sizes = [], []
        for (x0, y0, x1, y1), mirrored in zip(*crops, strict=True):
            left, right = x0 / (source[1] - 1), (x1 - 1) / (source[1] - 1)
            top, bottom = y0 / (source[0] - 1), (y1 - 1) / (source[0] - 1)
            if mirrored:
                left, right = right, left
            dx, dy = (right - left) / grid, (bottom - top) / grid
            images.append([(left + (c + 0.5) * dx, top + (r + 0.5) * dy)
                           for r in range(grid) for c in range(grid)])  # fmt: skip
            sizes.append((dx * dx + dy * dy) ** 0.5)
        centers.append(images)
        diagonals.append(sizes)
    return torch.tensor([
        [[((x - u) ** 2 + (y - w) ** 2) ** 0.5 < radius * max(d, e) for u, w in second]
         for x, y in first]
        for first, second, d, e in zip(*centers, *diagonals, strict=True)
    ])  # fmt: skip


def test_legacy_measures_as_the_published_code_does():
    student, teacher = views(2, 6, offset=1.5), views(2, 6, phase=9, offset=1.5)
    legacy, paper = (recipe(legacy=x)(student, teacher).matches for x in (True, False))
    for v, q in ((0, 1), (1, 0)):
        expected = naive_pairs(CROPS[v], CROPS[q])
        assert torch.equal(legacy[v, q].weight > 0, expected)
        assert not torch.equal(paper[v, q].weight > 0, expected)  # or the test shows nothing
    alone = recipe(legacy=True).matcher(placed(0), placed(1))
    assert torch.equal(alone.weight, legacy[0, 1].weight)


def test_legacy_divides_by_the_size_less_one():
    source, grid = (4, 24), TokenGrid.tiling(4, 4, (16, 16))
    boxes = st.tuples(st.integers(0, 19), st.integers(0, 1), st.integers(2, 24), st.integers(3, 4))
    crops = boxes.filter(lambda box: box[0] + 1 < box[2])
    told_apart = set()

    @given(crops, crops, st.booleans(), st.booleans())
    def check(first, second, mirror_first, mirror_second):
        sides = [((first,), (mirror_first,)), ((second,), (mirror_second,))]
        one, two = (
            Tokens(None, from_box(torch.tensor(box).double(), (16, 16), source,
                                  hflip=torch.tensor(mirrored)), grid)
            for box, mirrored in sides
        )  # fmt: skip
        found = recipe(legacy=True).matcher(one, two).weight > 0
        expected = naive_pairs(*sides, source)
        # A pair at the very radius may go either way.
        unsure = expected != naive_pairs(*sides, source, radius=0.7 + 1e-9)
        unsure |= expected != naive_pairs(*sides, source, radius=0.7 - 1e-9)
        assert torch.equal(found | unsure, expected | unsure)
        told_apart.add(torch.equal(expected, naive_pairs(*sides, (5, 25))))

    check()
    assert False in told_apart  # or the test shows nothing


def test_legacy_knows_upright_crops_only():
    side = SIDES[0]
    turn = torch.tensor([[0.0, -0.5, 90.0], [0.5, 0.0, 10.0], [0.0, 0.0, 1.0]])
    geometry = from_matrix(turn.expand(2, 3, 3), (side, side), SOURCE)
    turned = [x._replace(tokens=x.tokens._replace(geometry=geometry)) for x in views(2, 6)]
    assert recipe()(turned, turned).loss.isfinite()
    with pytest.raises(GeometryError, match="legacy"):
        recipe(legacy=True)(turned, turned)


def test_teacher_receives_no_gradient():
    loss = recipe(instance_weight=1.0)
    student, teacher = (views(2, 6, phase=p, grad=True, offset=1.5) for p in (0.0, 9.0))
    check_teacher_is_still(loss, student, teacher)


@pytest.mark.parametrize(("students", "teachers"), VIEW_COUNTS)
@pytest.mark.parametrize("legacy", [False, True])
def test_any_number_of_views(students, teachers, legacy):
    student, teacher = views(students, 6, grad=True, offset=1.5), views(teachers, 6, offset=1.5)
    terms = recipe(legacy=legacy, instance_weight=0.5)(student, teacher)
    assert -1 <= terms.local_loss <= 1
    assert -1 <= terms.global_loss <= 1
    check_all_pairs(terms, students, teachers, 2, 4)


def test_without_an_instance_weight_whole_views_are_not_looked_at():
    bare = [x._replace(global_logits=None) for x in views(2, 6, offset=1.5)]
    terms = recipe()(bare, bare)
    assert terms.global_loss == 0
    assert terms.loss == 4 * terms.local_loss
    with pytest.raises(ShapeError, match="global_logits"):
        recipe(instance_weight=1.0)(bare, bare)


def test_state_goes_through_a_checkpoint():
    loss, later = recipe(), pixpro(6).double()
    step = (views(2, 6, offset=1.5), views(2, 6, phase=9, offset=1.5))
    assert loss(*step).loss != later(*step).loss
    later.load_state_dict(loss.state_dict())
    for other in (later, copy.deepcopy(loss)):
        assert torch.equal(loss(*step).loss, other(*step).loss)


def test_settings_reach_the_parts():
    loss = pixpro(5, gamma=1.5, num_layers=2, radius=0.6)
    assert isinstance(loss.matcher, RadiusMatcher)
    assert loss.matcher.radius == 0.6
    assert (loss.propagation.gamma, loss.propagation.num_layers) == (1.5, 2)
    assert pixpro(5, radius=0.6, legacy=True).matcher.matcher.radius == 0.6
    assert loss.consistency.normalize == "image"


def test_bad_input_is_refused():
    view = views(2, 6)
    bare = [x._replace(token_logits=None) for x in view]
    with pytest.raises(ShapeError, match="token_logits"):
        recipe()(bare, bare)
    for legacy in (False, True):
        nowhere = [x._replace(tokens=x.tokens._replace(geometry=None)) for x in view]
        with pytest.raises(ShapeError, match="geometry"):
            recipe(legacy=legacy)(nowhere, nowhere)
    with pytest.raises(ConfigError, match="radius"):
        pixpro(6, radius=0.0, legacy=True)
    with pytest.raises(ConfigError, match="weight"):
        pixpro(6, instance_weight=-1.0)


@pytest.mark.parametrize("legacy", [False, True])
def test_compiles_into_one_graph(legacy):
    step = (views(2, 6, grad=True, offset=1.5), views(2, 6, phase=9, offset=1.5))
    loss = recipe(legacy=legacy, instance_weight=1.0)
    check_compiles(loss, step)
