"""`NearestMatcher.match_views`: all pairs of a step together, as pair by pair."""

import itertools

import pytest
import torch
from helpers.strategies import random_geometry, view_pairs
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from local_distill import (
    CropGeometry,
    GeometryError,
    NearestMatcher,
    ShapeError,
    TokenGrid,
    Tokens,
    match_views,
    nearest_matches,
)
from local_distill.matching.nearest import nearest_view_matches

METHODS = pytest.mark.parametrize("method", ["lattice", "search"])
SOURCE = (50, 70)


def view(rows, cols, size, seed, *, b=2, dtype=torch.float32):
    geometry = random_geometry(b, size, SOURCE, seed=seed)
    geometry = geometry._replace(matrix=geometry.matrix.to(dtype))
    return Tokens(None, geometry, TokenGrid.tiling(rows, cols, size))


def mixed_views(b=2):
    """Three grids, one of them empty and one of one token, and two dtypes."""
    return [
        view(3, 5, (24, 40), 0, b=b),
        view(3, 5, (24, 40), 1, b=b),
        view(2, 2, (16, 16), 2, b=b),
        view(1, 1, (16, 16), 3, b=b),
        view(2, 2, (16, 16), 4, b=b, dtype=torch.float64),
        view(3, 5, (24, 40), 5, b=b)._replace(grid=TokenGrid(0, 5, (8.0, 8.0), (4.0, 4.0))),
    ]


def assert_as_pair_by_pair(found, student, teacher, **settings):
    """Equal to the bit but for the float64 products' last place: costs within 1 ulp.

    The product of all pairs' matrices may be cut into other blocks than that of one pair.
    """
    for (v, q), matches in found.items():
        one = nearest_matches(student[v], teacher[q], **settings)
        for part, other in zip(matches, one, strict=True):
            assert part.dtype == other.dtype
            assert part.shape == other.shape
        assert torch.equal(matches.teacher_index, one.teacher_index)
        assert torch.equal(matches.weight, one.weight)
        ulp = torch.finfo(one.cost.dtype).eps
        torch.testing.assert_close(matches.cost, one.cost, rtol=ulp, atol=1e-14)


@METHODS
@pytest.mark.parametrize("limit", [0.5, None])
def test_mixed_grids_sizes_and_dtypes_are_as_pair_by_pair(method, limit):
    views = mixed_views()
    pairs = list(itertools.product(range(6), range(6)))[::-1]
    found = NearestMatcher(limit, method).match_views(views, views, pairs)
    assert list(found) == pairs
    assert_as_pair_by_pair(found, views, views, max_distance=limit, method=method)
    assert found[4, 0].cost.dtype == torch.float64
    assert found[0, 4].cost.dtype == torch.float32
    assert found[0, 5].weight.shape == (2, 15, 0)
    assert found[5, 0].weight.shape == (2, 0, 1)
    assert found[3, 3].cost.tolist() == [[0.0], [0.0]]


@METHODS
@given(view_pairs("crop", padding=12.0), st.booleans())
def test_crops_with_padding_are_as_pair_by_pair(method, pair, twice):
    student, teacher = pair
    views = [student, teacher, student] if twice else [student, teacher]
    pairs = list(itertools.product(range(len(views)), range(2)))
    found = nearest_view_matches(views, views, pairs, method=method)
    assert_as_pair_by_pair(found, views, views, method=method)


@given(view_pairs("warp", padding=5.0), view_pairs("crop"))
def test_perspective_students_are_as_pair_by_pair(bent, straight):
    """The lattice serves any student; only the teacher has to be a lattice."""
    size = bent[0].geometry.source_size
    b = min(size.shape[0], straight[1].geometry.matrix.shape[0])
    cut = [
        part._replace(geometry=CropGeometry(*(value[:b] for value in part.geometry)))
        for part in (*bent, straight[1])
    ]
    cut[2] = cut[2]._replace(geometry=cut[2].geometry._replace(source_size=size[:b]))
    found = nearest_view_matches(cut[:2], cut[2:], [(0, 0), (1, 0)])
    assert_as_pair_by_pair(found, cut[:2], cut[2:])


@METHODS
def test_the_function_prefers_the_matchers_own(method):
    views = mixed_views()[:3]
    found = match_views(NearestMatcher(method=method), views, views[:2])
    assert list(found) == [(0, 1), (1, 0), (2, 0), (2, 1)]
    assert_as_pair_by_pair(found, views, views, method=method)


def test_a_shared_geometry_is_as_a_copy_of_it():
    views = mixed_views()[:3]
    copies = [
        part._replace(geometry=CropGeometry(*(value.clone() for value in part.geometry)))
        for part in views[:2]
    ]
    pairs = [(0, 1), (1, 0), (2, 0), (2, 1)]
    shared = nearest_view_matches(views, views[:2], pairs)
    apart = nearest_view_matches(views, copies, pairs)
    for pair in pairs:
        assert all(torch.equal(a, b) for a, b in zip(shared[pair], apart[pair], strict=True))


@METHODS
def test_no_pairs_and_no_images(method):
    matcher = NearestMatcher(method=method)
    assert matcher.match_views([], [], []) == {}
    empty = mixed_views(b=2)
    empty = [
        part._replace(geometry=CropGeometry(*(value[:0] for value in part.geometry)))
        for part in empty
    ]
    found = matcher.match_views(empty, empty, [(0, 2), (2, 0), (1, 0), (3, 3), (0, 5)])
    assert found[0, 2].weight.shape == (0, 15, 1)
    assert found[3, 3].cost.shape == (0, 1)
    assert found[0, 5].weight.shape == (0, 15, 0)


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that any tensor held that an operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


def test_no_table_of_all_pairs_of_tokens_is_made():
    """A DINO step at stride 8: what is made grows with s + t, never with s · t."""
    b = 2
    views = [view(28, 28, (224, 224), seed, b=b) for seed in range(2)]
    views += [view(12, 12, (96, 96), seed, b=b) for seed in range(2, 10)]
    pairs = [(v, q) for v in range(10) for q in range(2) if v != q]
    with LargestTensor() as lattice:
        NearestMatcher().match_views(views, views[:2], pairs)
    # three coordinates of all student tokens of a group of pairs
    assert lattice.numel <= 3 * b * max(2 * 28 * 28, 16 * 12 * 12)
    assert lattice.numel < 28 * 28 * 12 * 12  # one image of one pair
    with LargestTensor() as search:  # the check sees a table where there is one
        NearestMatcher(method="search").match_views(views, views[:2], pairs)
    assert search.numel >= 28 * 28 * 12 * 12


def test_the_search_stays_within_the_byte_budget():
    from local_distill.kernels import byte_budget

    views = [view(28, 28, (224, 224), seed, b=3) for seed in range(2)]
    with LargestTensor() as search:
        nearest_view_matches(views, views, [(0, 1)], method="search")
    assert search.numel * 8 <= byte_budget(torch.device("cpu"))


def test_many_pairs_go_through_in_blocks(monkeypatch):
    from local_distill.kernels import lattice
    from local_distill.matching import nearest

    monkeypatch.setattr(nearest, "are_aligned", lambda matrix: False)
    views = mixed_views()[:4]
    pairs = list(itertools.product(range(4), range(4)))
    whole = nearest_view_matches(views, views, pairs)
    monkeypatch.setattr(lattice, "block_length", lambda *_: 2)
    blocks = nearest_view_matches(views, views, pairs)
    for pair in pairs:
        assert torch.equal(whole[pair].teacher_index, blocks[pair].teacher_index)
        torch.testing.assert_close(whole[pair].cost, blocks[pair].cost, rtol=2e-7, atol=1e-14)


@METHODS
def test_compiles_to_one_graph_over_changing_crops(method):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("inductor")
    matcher = NearestMatcher(method=method)
    pairs = [(0, 1), (1, 0), (2, 0), (2, 1)]
    compiled = torch.compile(matcher.match_views, fullgraph=True, backend=counter)
    for step in range(10):
        views = [
            view(3, 5, (24, 40), 3 * step),
            view(3, 5, (24, 40), 3 * step + 1),
            view(2, 2, (16, 16), 3 * step + 2),
        ]
        found = compiled(views, views[:2], pairs)
        for pair, plain in matcher.match_views(views, views[:2], pairs).items():
            assert torch.equal(found[pair].matched, plain.matched)
            torch.testing.assert_close(found[pair].cost, plain.cost, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


@METHODS
def test_vmap(method):
    grids = TokenGrid.tiling(3, 5, (24, 40)), TokenGrid.tiling(2, 2, (16, 16))
    geometries = [
        CropGeometry(*(torch.stack([part, part.flip(0)]) for part in random_geometry(3, size)))
        for size in ((24, 40), (16, 16))
    ]

    def run(one, two):
        views = [Tokens(None, one, grids[0]), Tokens(None, two, grids[1])]
        return nearest_view_matches(views, views, [(0, 1), (1, 0)], method=method)

    found = torch.vmap(run)(*geometries)
    for i in range(2):
        plain = run(*(CropGeometry(*(part[i] for part in one)) for one in geometries))
        for pair, matches in plain.items():
            assert torch.equal(found[pair].teacher_index[i], matches.teacher_index)
            torch.testing.assert_close(found[pair].cost[i], matches.cost)
    # one side batched alone
    alone = torch.vmap(run, in_dims=(0, None))(
        geometries[0], CropGeometry(*(part[0] for part in geometries[1]))
    )
    assert alone[0, 1].teacher_index.shape == (2, 3, 15, 1)


@pytest.mark.parametrize(
    ("side", "change", "error", "text"),
    [
        ("student", {"geometry": None}, ShapeError, r"`student\[2\]` has no geometry"),
        ("teacher", {"grid": None}, ShapeError, r"`teacher\[1\]` has no grid"),
        (
            "student",
            {"geometry": random_geometry(1)},
            ShapeError,
            r"axis `b` is 2 in `student\[0\].geometry.matrix` but 1 in `student\[2\]",
        ),
        (
            "teacher",
            {"geometry": random_geometry(3)},
            ShapeError,
            r"axis `b` is 2 in `student\[0\].geometry.matrix` but 3 in `teacher\[1\]",
        ),
        (
            "teacher",
            {"geometry": random_geometry(source_size=(70, 50))},
            GeometryError,
            r"`student\[0\].geometry` and `teacher\[1\].geometry` have different source sizes",
        ),
        ("student", {"features": torch.zeros(2, 16, 4)}, ShapeError, r"`student\[2\].features`"),
        (
            "student",
            {"grid": TokenGrid.tiling(5, 3, (40, 24))},
            GeometryError,
            r"`student\[2\].geometry`: the grid's last token",
        ),
    ],
)
@METHODS
def test_bad_views_are_refused_by_name(method, side, change, error, text):
    good = Tokens(None, random_geometry(), TokenGrid.tiling(3, 5, (24, 40)))
    student, teacher = [good] * 3, [good] * 2
    if side == "student":
        student[2] = good._replace(**change)
    else:
        teacher[1] = good._replace(**change)
    with pytest.raises(error, match=text):
        NearestMatcher(method=method).match_views(student, teacher, [(0, 1), (1, 0), (2, 0)])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 0.0])
@METHODS
def test_bad_matrices_are_refused_by_name(method, bad):
    views = mixed_views()[:3]
    matrix = views[2].geometry.matrix.clone()
    matrix[1, 0, 0] = bad
    views[2] = views[2]._replace(geometry=views[2].geometry._replace(matrix=matrix))
    with pytest.raises(GeometryError, match=r"`student\[2\].geometry`"):
        NearestMatcher(method=method).match_views(views, views, [(0, 1), (2, 1)])
    # no pair names it
    assert len(NearestMatcher(method=method).match_views(views, views, [(0, 1)])) == 1


def test_unserved_teachers_are_refused_by_name():
    views = mixed_views()[:3]
    matrix = views[1].geometry.matrix.clone()
    matrix[1, 0, 1] = 0.3
    views[1] = views[1]._replace(geometry=views[1].geometry._replace(matrix=matrix))
    with pytest.raises(GeometryError, match=r"`teacher\[1\].geometry` of image 1.*search"):
        nearest_view_matches(views, views, [(0, 0), (2, 1)])
    # as a student it is welcome, beside teachers of its grid
    assert len(nearest_view_matches(views, views, [(1, 0), (2, 0)])) == 2


def test_pairs_of_views_that_are_not_there_are_refused():
    views = mixed_views()[:2]
    with pytest.raises(ShapeError, match="2 teacher views"):
        NearestMatcher().match_views(views, views, [(0, 2)])
    with pytest.raises(ShapeError, match="`student` must be a list"):
        NearestMatcher().match_views(torch.zeros(2), views, [(0, 1)])


@METHODS
def test_no_gradient_and_no_change_of_inputs(method):
    views = mixed_views()[:3]
    views = [
        part._replace(
            geometry=part.geometry._replace(matrix=part.geometry.matrix.clone().requires_grad_())
        )
        for part in views
    ]
    before = [part.geometry.matrix.detach().clone() for part in views]
    found = nearest_view_matches(views, views, [(0, 1), (2, 0)], method=method)
    assert not any(part.requires_grad for matches in found.values() for part in matches)
    for part, old in zip(views, before, strict=True):
        assert torch.equal(part.geometry.matrix, old)


@METHODS
def test_inference_mode_inputs_and_repeated_pairs(method):
    with torch.inference_mode():
        views = mixed_views()[:3]
    found = nearest_view_matches(views, views, [(2, 0), (2, 0), (0, 1)], method=method)
    assert list(found) == [(2, 0), (0, 1)]
    assert_as_pair_by_pair(found, views, views, method=method)
