"""What is no `Tokens`, or has parts that do not fit, is refused by every matcher in one wording."""

import pytest
import torch
from helpers.strategies import random_geometry

from local_distill import ConfigError, CropGeometry, ShapeError, TokenGrid, Tokens, ViewOutput
from local_distill import match_views as match
from local_distill.matching import (
    BilinearMatcher,
    GatedSimilarityMatcher,
    KeepBest,
    Mutual,
    NearestMatcher,
    OverlapMatcher,
    RadiusMatcher,
    SimilarityMatcher,
    SinkhornMatcher,
    SoftSimilarityMatcher,
)

MATCHERS = [
    NearestMatcher(),
    NearestMatcher(method="search"),
    BilinearMatcher(),
    RadiusMatcher(),
    OverlapMatcher(),
    SimilarityMatcher(),
    SoftSimilarityMatcher(),
    SinkhornMatcher(),
    SinkhornMatcher(distance_weight=0.5),
    GatedSimilarityMatcher(),
    Mutual(SimilarityMatcher()),
    KeepBest(NearestMatcher(), count=2),
]
every_matcher = pytest.mark.parametrize("matcher", MATCHERS, ids=repr)
GOOD = Tokens(torch.ones(2, 15, 8), random_geometry(), TokenGrid.tiling(3, 5, (24, 40)))


def with_features(*shape):
    return GOOD._replace(features=torch.ones(shape))


def with_grid(*parts):
    return GOOD._replace(grid=TokenGrid(*parts))


BAD = {
    "a tensor": (
        GOOD.features,
        r"` must be Tokens\(features, geometry, grid\), got Tensor; of features \(b, n, d\) make",
    ),
    "a geometry": (GOOD.geometry, r"` must be Tokens.*, got CropGeometry; make Tokens\(None, geom"),
    "an output": (ViewOutput(tokens=GOOD), r"` must be Tokens.*, got ViewOutput; give its .tokens"),
    "nothing": (None, "` must be Tokens.*, got NoneType$"),
    "features of numpy": (
        GOOD._replace(features=GOOD.features.numpy()),
        r".features` must be a tensor \(b, n, d\) or None, got ndarray",
    ),
    "a matrix alone": (
        GOOD._replace(geometry=GOOD.geometry.matrix),
        ".geometry` must be a CropGeometry or None, got Tensor; build one with from_box",
    ),
    "rows and cols": (
        GOOD._replace(grid=(3, 5)),
        r".grid` must be a TokenGrid or None, got tuple; .*TokenGrid.tiling\(rows, cols",
    ),
    "one stride": (
        with_grid(3, 5, 8, (4.0, 4.0)),
        r".grid.stride` must be a pair \(x, y\) in view pixels, got 8; .* \(8, 8\)",
    ),
    "one offset": (
        with_grid(3, 5, (8.0, 8.0), 4.5),
        r".grid.offset` must be a pair .*, got 4.5; .* \(4.5, 4.5\)",
    ),
    "a stride of three": (
        with_grid(3, 5, (8.0, 8.0, 8.0), (4.0, 4.0)),
        r".grid.stride` must be a pair .*, got \(8.0, 8.0, 8.0\)$",
    ),
    "a map": (
        with_features(2, 8, 3, 5),
        r".features` must have 3 axes `b n d`, got 4: shape \(2, 8, 3, 5\); .*x.flatten\(2\).mT",
    ),
    "one image's features": (
        with_features(15, 8),
        r".features` must have 3 axes `b n d`, got 2: shape \(15, 8\)$",
    ),
    "the class token": (
        with_features(2, 16, 8),
        r".features` holds 16 tokens .*3 × 5 = 15; drop class and register tokens$",
    ),
    "class and register tokens": (
        with_features(2, 31, 8),
        ".features` holds 31 .*; drop class and register tokens$",
    ),
    "far more tokens": (
        with_features(2, 32, 8),
        r".features` holds 32 tokens .*3 × 5 = 15; give features and grid of the same view$",
    ),
    "fewer tokens": (
        with_features(2, 14, 8),
        ".features` .* 14 .*; give features and grid of the same view$",
    ),
    "swapped axes": (
        with_features(2, 8, 15),
        r".features` holds 8 .*; axes are \(b, n, d\): give x.mT",
    ),
    "other images": (
        with_features(4, 15, 8),
        r".geometry.matrix` but 4 in `\S+.features` \(shape \(4, 15, 8\), wanted `b n d`\); give "
        "both of the same images",
    ),
    "one image's geometry": (
        GOOD._replace(geometry=CropGeometry(*(part[0] for part in GOOD.geometry))),
        r".geometry.matrix` must have 3 axes `b 3 3`, got 2: shape \(3, 3\); .*"
        r"torch.utils.data.default_collate\(\[geometry\]\)",
    ),
    "a batch of batches": (
        GOOD._replace(geometry=CropGeometry(*(part[None] for part in GOOD.geometry))),
        r".geometry.matrix` must have 3 axes `b 3 3`, got 4: .*its images alone",
    ),
}
every_bad_one = pytest.mark.parametrize(("bad", "text"), BAD.values(), ids=BAD)


@every_matcher
@every_bad_one
def test_either_side_is_refused_by_name(matcher, bad, text):
    with pytest.raises(ShapeError, match="`student" + text):
        matcher(bad, GOOD)
    with pytest.raises(ShapeError, match="`teacher" + text):
        matcher(GOOD, bad)


@every_matcher
@every_bad_one
def test_of_several_views_the_bad_one_is_named(matcher, bad, text):
    views = [GOOD, GOOD, bad]
    for pairs in ([(2, 1)], [(0, 1), (1, 0), (2, 0), (2, 1)]):
        with pytest.raises(ShapeError, match=r"`student\[2\]" + text):
            match(matcher, views, views[:2], pairs)
    with pytest.raises(ShapeError, match=r"`teacher\[2\]" + text):
        match(matcher, views, views, [(0, 1), (1, 2)])


@every_matcher
def test_one_view_where_a_list_is_wanted(matcher):
    for student, teacher, name in ((GOOD, [GOOD], "student"), ([GOOD], GOOD, "teacher")):
        says = rf"`{name}` must be a list with Tokens per view, got Tokens; .* as \[{name}\]"
        with pytest.raises(ShapeError, match=says):
            match(matcher, student, teacher)
        with pytest.raises(ShapeError, match=says):
            match(matcher, student, teacher, [(0, 0)])
    with pytest.raises(ShapeError, match=r"got list; lists of views go to match_views"):
        matcher([GOOD], [GOOD])


@every_matcher
def test_the_class_of_a_matcher_is_refused(matcher):
    name = type(matcher).__name__
    with pytest.raises(ConfigError, match=rf"got the class {name}; make one: {name}\(\)"):
        match(type(matcher), [GOOD, GOOD], [GOOD, GOOD])


def test_what_cannot_be_called_is_no_matcher():
    with pytest.raises(ConfigError, match=r"`matcher` must be a callable .*, got 'nearest'"):
        match("nearest", [GOOD, GOOD], [GOOD, GOOD])


@pytest.mark.parametrize("pairs", [(0, 1), [(0, 1, 0)], [(0, 1), 1], ["01", "0"]])
def test_pairs_that_are_none(pairs):
    with pytest.raises(ShapeError, match=r"`pairs` must hold pairs .*; wrap a single pair as"):
        match(NearestMatcher(), [GOOD, GOOD], [GOOD, GOOD], pairs)


@every_matcher
def test_good_tokens_are_not_refused(matcher):
    found = match(matcher, [GOOD, GOOD], (GOOD, GOOD), iter([(0, 1), (1, 0)]))
    assert [one.cost.shape for one in found.values()] == [(2, 15)] * 2
