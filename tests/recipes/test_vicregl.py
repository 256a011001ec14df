"""VICRegL's recipe gives the published numbers, and holds together as a module."""

import copy

import pytest
import torch

from local_distill import ConfigError, ShapeError, TokenGrid, Tokens, from_box
from local_distill.recipes.vicregl import vicregl

PATCHES, SIZES = (7, 7, 3), (224, 224, 96)


def waves(*shape, phase):
    steps = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(steps * 0.7 + phase).reshape(shape)


def step_of(b=4, *, flips=True):
    """Embeddings of two global views and a small one, and where they lie in a 240 × 260 image."""
    embeddings = [waves(b, 6, phase=3 * v).requires_grad_() for v in range(3)]
    maps = [waves(b, n * n, 4, phase=50 + 7 * v).square() for v, n in enumerate(PATCHES)]
    tokens = []
    for v, (n, side) in enumerate(zip(PATCHES, SIZES, strict=True)):
        boxes, flipped = [], []
        for image in range(b):
            u = waves(4, phase=11 * v + 5 * image).abs().tolist()
            height, width = 80 + 120 * u[0], 80 + 120 * u[1]
            top, left = u[2] * (240 - height), u[3] * (260 - width)
            boxes.append([left, top, left + width, top + height])
            flipped.append(flips and (v + image) % 2 == 1)
        box = torch.tensor(boxes, dtype=torch.float64)
        geometry = from_box(box, (side, side), (240, 260), hflip=torch.tensor(flipped))
        tokens.append(Tokens(None, geometry, TokenGrid.tiling(n, n, view_size=(side, side))))
    return embeddings, [values.requires_grad_() for values in maps], tokens


def norm(views):
    return float(torch.cat([view.grad.flatten() for view in views]).norm())


# What the authors' `global_loss` and `local_loss` (facebookresearch/VICRegL, num_matches [20, 4],
# α = 0.75, float64, one process, its grids of places for these crops) give: the loss, the norms of
# the gradients of all views' embeddings and of all patches'. First those with grids that flip
# (no-flip-grid 0) and 20 or all matches by features, then those that do not.
GOLDEN = {
    (False, 20): (41.854532246336845, 7.932769228540595, 0.4132237344651669),
    (False, None): (41.54366927264011, 7.932769228540595, 0.37559715102552893),
    (True, 20): (41.91930626533539, 7.932769228540595, 0.4071524829603703),
    (True, None): (41.60844329163865, 7.932769228540595, 0.37136785614122964),
}


@pytest.mark.parametrize(("legacy", "count"), GOLDEN)
def test_the_authors_numbers(legacy, count):
    embeddings, maps, tokens = step_of()
    recipe = vicregl(feature_counts=None if count is None else (count, 4), legacy=legacy)
    terms = recipe(embeddings, maps, tokens)
    terms.loss.backward()
    reached = [float(terms.loss.detach()), norm(embeddings), norm(maps)]
    assert reached == pytest.approx(GOLDEN[legacy, count], rel=1e-10)


def test_without_flips_the_two_grids_are_one():
    embeddings, maps, tokens = step_of(flips=False)
    losses = [vicregl(legacy=legacy)(embeddings, maps, tokens).loss for legacy in (False, True)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)


def test_terms_make_up_the_loss_and_every_view_gets_a_gradient():
    embeddings, maps, tokens = step_of()
    terms = vicregl(alpha=0.6)(embeddings, maps, tokens)
    local = terms.location_loss + terms.feature_loss
    torch.testing.assert_close(terms.loss, 0.6 * terms.global_loss + 0.4 * local)
    terms.loss.backward()
    for view in (*embeddings, *maps):
        assert float(view.grad.abs().max()) > 0


def test_features_of_tokens_and_gradient_through_matching_play_no_part():
    embeddings, maps, tokens = step_of()
    wanted = vicregl()(embeddings, maps, tokens).loss
    nan = [torch.full_like(values, torch.nan) for values in maps]
    poison = [view._replace(features=part) for view, part in zip(tokens, nan, strict=True)]
    torch.testing.assert_close(vicregl()(embeddings, maps, poison).loss, wanted)


def test_small_views_keep_what_they_have_and_other_numbers_of_global_views_do():
    embeddings, maps, tokens = step_of()
    for views in (1, 2, 3):
        loss = vicregl(location_counts=(30, 30))(embeddings, maps, tokens, global_views=views).loss
        assert loss.isfinite()
    half = [view.detach().half() for view in embeddings]
    local = [view.detach().half() for view in maps]
    assert vicregl()(half, local, tokens).loss.dtype == torch.float32


def test_a_batch_of_one_is_finite():
    embeddings, maps, tokens = step_of(b=1)
    terms = vicregl()(embeddings, maps, tokens)
    terms.loss.backward()
    assert terms.loss.isfinite()
    assert all(view.grad.isfinite().all() for view in (*embeddings, *maps))


def test_state_and_settings():
    recipe = vicregl(alpha=0.9, location_counts=(7, 3), feature_counts=None, legacy=True)
    assert recipe.state_dict() == {}
    recipe.load_state_dict(recipe.state_dict())
    embeddings, maps, tokens = step_of()
    first = recipe(embeddings, maps, tokens).loss
    torch.testing.assert_close(copy.deepcopy(recipe)(embeddings, maps, tokens).loss, first)
    text = "location_counts=(7, 3), feature_counts=None, legacy=True"
    assert text in repr(recipe)
    assert "alpha=0.9" in repr(recipe)


def test_bad_input_is_refused():
    embeddings, maps, tokens = step_of()
    recipe = vicregl()
    with pytest.raises(ShapeError, match="`tokens` has 2 views"):
        recipe(embeddings, maps, tokens[:2])
    with pytest.raises(ShapeError, match="`token_embeddings` has 1 views"):
        recipe(embeddings, maps[:1], tokens)
    with pytest.raises(ShapeError, match="`global_views`"):
        recipe(embeddings, maps, tokens, global_views=0)
    with pytest.raises(ShapeError, match="geometry"):
        recipe(embeddings, maps, [view._replace(geometry=None) for view in tokens])
    for settings, text in (
        ({"alpha": 2.0}, "`alpha`"),
        ({"location_counts": (0, 4)}, "`location_counts`"),
        ({"location_counts": 20}, "`location_counts`"),
        ({"feature_counts": (20,)}, "`feature_counts`"),
        ({"variance_weight": -1.0}, "`variance_weight`"),
    ):
        with pytest.raises(ConfigError, match=text):
            vicregl(**settings)
    with pytest.raises(TypeError):
        vicregl(count=20)
