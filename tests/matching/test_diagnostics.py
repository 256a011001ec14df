import math
from unittest.mock import patch

import pytest
import torch
from helpers.some_matches import candidates, hard, soft
from helpers.strategies import matches_for, random_geometry
from hypothesis import given
from hypothesis import strategies as st

from local_distill import (
    CropGeometry,
    GeometryError,
    Matches,
    NearestMatcher,
    ShapeError,
    TokenGrid,
    Tokens,
)
from local_distill.errors import ConfigError
from local_distill.matching.diagnostics import (
    MatchDiagnostics,
    correspondence_accuracy,
    correspondence_error,
    coverage,
    diagnose,
    distinct_targets,
    entropy,
    hubness,
    mean_correspondence_error,
    mutual_rate,
    reachable_tokens,
    spread,
)
from local_distill.matching.mutual import mutual_matches

ALONE = [  # those that take matches and t
    lambda matches, t: coverage(matches),
    distinct_targets,
    hubness,
    lambda matches, t: entropy(matches),
]


def true_coverage(matches, t):
    tables, _ = candidates(matches)
    flags = [bool(table) for rows in tables for table in rows]
    return sum(flags) / len(flags)


def true_distinct(matches, t):
    shares = []
    for tops in candidates(matches)[1]:
        named = [top for top in tops if top is not None]
        if named:
            shares.append(len(set(named)) / min(len(named), t))
    return sum(shares) / len(shares) if shares else 0.0


def true_hubness(matches, t):
    values = []
    for rows in candidates(matches)[0]:
        received = [math.fsum(table.get(j, 0.0) for table in rows) for j in range(t)]
        if sum(received) == 0:
            continue
        mean = math.fsum(received) / t
        sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in received) / t)
        cubed = math.fsum((x - mean) ** 3 for x in received) / t
        values.append(cubed / sigma**3 if sigma > 1e-6 * mean else 0.0)
    return sum(values) / len(values) if values else 0.0


def true_entropy(matches, t):
    values = []
    for rows in candidates(matches)[0]:
        for table in rows:
            total = sum(table.values())
            if table:
                values.append(-sum(w / total * math.log(w / total) for w in table.values()))
    return sum(values) / len(values) if values else 0.0


TRUTHS = [true_coverage, true_distinct, true_hubness, true_entropy]
NAMES = ["coverage", "distinct_targets", "hubness", "entropy"]


@pytest.mark.parametrize(("number", "truth"), list(zip(ALONE, TRUTHS, strict=True)), ids=NAMES)
@given(st.data())
def test_agrees_with_the_definition(number, truth, data):
    b, s, t = data.draw(st.tuples(st.integers(2, 3), st.integers(1, 7), st.integers(1, 6)))
    dense = data.draw(st.booleans())
    seed = data.draw(st.integers(0, 99))
    matches = soft(b, s, t, seed) if dense else data.draw(matches_for(b, s, t))
    block = data.draw(st.sampled_from([1, 2, 100]))
    with patch.object(spread, "block_length", lambda _bytes, _device: block):
        found = number(matches, t)
    assert found.shape == ()
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(truth(matches, t), rel=1e-5, abs=1e-5)


@given(st.data())
def test_hubness_is_scipys_skewness(data):
    stats = pytest.importorskip("scipy.stats")
    t = data.draw(st.integers(2, 9))
    matches = data.draw(matches_for(2, 8, t, 1))
    matches = matches._replace(weight=matches.weight.double())
    values = []
    for image in range(2):
        received = torch.zeros(t, dtype=torch.float64)
        for i in range(8):
            received[matches.teacher_index[image, i, 0]] += matches.weight[image, i, 0]
        if received.sum() > 0 and received.std() > 0:
            values.append(float(stats.skew(received.numpy())))
        elif received.sum() > 0:
            values.append(0.0)
    wanted = sum(values) / len(values) if values else 0.0
    assert float(hubness(matches, t)) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_hubs_stand_out():
    even, hub = hard([[0, 1, 2, 3]] * 2), hard([[1, 1, 1, 1]] * 2)
    assert float(hubness(even, 4)) == 0
    # one of t receives all: (t − 2) / √(t − 1)
    assert float(hubness(hub, 4)) == pytest.approx(2 / math.sqrt(3))
    assert float(distinct_targets(even, 4)) == 1
    assert float(distinct_targets(hub, 4)) == 0.25


def test_equal_weights_but_for_rounding_are_no_hubs():
    # thirds, added in other numbers: N is 1 but for the last bits
    index = torch.tensor([[[0, 1, 2]] * 3, [[2, 1, 0]] * 3])
    weight = torch.full((2, 3, 3), 1 / 3)
    weight[0, 0, 0] += 6e-8
    assert float(hubness(Matches(index, weight, torch.zeros(2, 3)), 3)) == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0])
def test_hubness_and_entropy_do_not_see_the_scale_of_the_weights(scale):
    matches = soft(2, 6, 5)
    scaled = matches._replace(weight=matches.weight * scale)
    assert float(hubness(scaled, 5)) == pytest.approx(float(hubness(matches, 5)), rel=1e-4)
    assert float(entropy(scaled)) == pytest.approx(float(entropy(matches)), rel=1e-4)


def test_more_student_than_teacher_tokens_can_still_be_all_different():
    assert float(distinct_targets(hard([[0, 1, 0, 1, 0], [1, 1, 1, 0, 0]]), 2)) == 1
    assert float(distinct_targets(hard([[0, 0, 0, 0, 0], [1, 1, 1, 0, 0]]), 2)) == 0.75


def test_images_without_a_match_take_no_part_but_in_coverage():
    matches = hard([[0, 0, 0], [2, 1, 0]], [[0.0, 0, 0], [1, 1, 1]])
    assert float(distinct_targets(matches, 3)) == 1
    alone = hard([[2, 2, 2]] * 2, [[0.0, 0, 0], [1, 1, 1]])
    assert float(hubness(alone, 3)) == pytest.approx(2**-0.5)
    assert float(coverage(matches)) == 0.5


def test_entropy_counts_a_token_named_twice_once():
    index = torch.tensor([[[1, 2, 1, 2]] * 2] * 2)
    matches = Matches(index, torch.full((2, 2, 4), 0.25), torch.zeros(2, 2))
    assert float(entropy(matches)) == pytest.approx(math.log(2))
    assert float(entropy(soft(2, 3, 1, zeros=0.0))) == 0
    assert float(
        entropy(soft(2, 3, 4)._replace(weight=torch.full((2, 3, 4), 0.25)))
    ) == pytest.approx(math.log(4))


@given(st.data())
def test_mutual_rate_is_the_share_that_stays(data):
    b, s, t = data.draw(st.tuples(st.integers(2, 3), st.integers(1, 6), st.integers(1, 6)))
    one, two = data.draw(matches_for(b, s, t)), data.draw(matches_for(b, t, s))
    matched = int(one.matched.sum())
    stay = int(mutual_matches(one, two).matched.sum())
    wanted = stay / matched if matched else 0.0
    assert float(mutual_rate(one, two)) == pytest.approx(wanted)


def both_views(seed=0):
    grid, small = TokenGrid.tiling(3, 5, (24, 40)), TokenGrid.tiling(2, 3, (16, 16))
    student = Tokens(None, random_geometry(2, (16, 16), seed=seed), small)
    return student, Tokens(None, random_geometry(2, (24, 40), seed=seed + 50), grid)


def test_diagnose_gathers_the_single_functions():
    student, teacher = both_views()
    matches, reverse = soft(2, 6, 15), soft(2, 15, 6, 1)
    numbers = diagnose(matches, student, teacher, reverse)
    wanted = {
        "coverage": coverage(matches),
        "distinct_targets": distinct_targets(matches, 15),
        "hubness": hubness(matches, 15),
        "entropy": entropy(matches),
        "mutual_rate": mutual_rate(matches, reverse),
        "correspondence_error": mean_correspondence_error(matches, student, teacher),
        "correspondence_accuracy": correspondence_accuracy(matches, student, teacher),
    }
    found = numbers.as_dict()
    count = float(found.pop("correspondence_tokens"))
    assert found == wanted
    error = correspondence_error(matches, student, teacher)
    assert count == int((error.isfinite() & reachable_tokens(student, teacher)).sum())


def test_diagnose_leaves_out_what_it_has_no_input_for():
    student, teacher = (Tokens(torch.randn(2, n, 4)) for n in (6, 15))
    matches = soft(2, 6, 15)
    plain = {"coverage", "distinct_targets", "hubness", "entropy"}
    assert set(diagnose(matches, student, teacher).as_dict()) == plain
    found = diagnose(matches, student, teacher, soft(2, 15, 6)).as_dict("a/")
    assert set(found) == {f"a/{name}" for name in plain | {"mutual_rate"}}
    placed = both_views()
    half = diagnose(matches, placed[0], placed[1]._replace(geometry=None))
    assert half.correspondence_error is None
    assert half.correspondence_tokens is None
    full = diagnose(matches, *placed).as_dict()
    assert set(full) == set(MatchDiagnostics._fields) - {"mutual_rate"}


def empty_views(b, s, t):
    geometry = CropGeometry(*(part[:b] for part in random_geometry()))
    return (Tokens(None, geometry, TokenGrid(n, 1, (2.0, 2.0), (1.0, 1.0))) for n in (s, t))


@pytest.mark.parametrize(
    ("b", "s", "t", "k"),
    [
        (0, 3, 4, 1),
        (0, 3, 4, 4),
        (0, 0, 0, 0),
        (2, 0, 4, 1),
        (2, 0, 4, 4),
        (2, 3, 0, 0),
        (2, 3, 4, 0),
    ],
)
def test_empty_gives_zeros(b, s, t, k):
    matches = Matches(torch.zeros(b, s, k).long(), torch.ones(b, s, k), torch.zeros(b, s))
    reverse = Matches(torch.zeros(b, t, 0).long(), torch.ones(b, t, 0), torch.zeros(b, t))
    student, teacher = empty_views(b, s, t)
    assert correspondence_error(matches, student, teacher).shape == (b, s)
    for name, value in diagnose(matches, student, teacher, reverse).as_dict().items():
        assert value.shape == (), name
        assert float(value) == 0, name


def test_nothing_matched_gives_zeros():
    student, teacher = both_views()
    matches = soft(2, 6, 15, zeros=2.0)
    assert bool(correspondence_error(matches, student, teacher).isposinf().all())
    for name, value in diagnose(matches, student, teacher, soft(2, 15, 6)).as_dict().items():
        assert float(value) == 0, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_any_dtype(dtype):
    student, teacher = both_views()
    matches, reverse = soft(2, 6, 15), soft(2, 15, 6, 1)
    cast = matches._replace(weight=matches.weight.to(dtype))
    wanted = diagnose(cast._replace(weight=cast.weight.double()), student, teacher, reverse)
    found = diagnose(cast, student, teacher, reverse).as_dict()
    for name, value in found.items():
        wide = dtype == torch.float64 and not name.startswith("correspondence")
        assert value.dtype == (torch.float64 if wide else torch.float32), name
        assert float(value) == pytest.approx(float(getattr(wanted, name)), rel=1e-6), name


def test_float64_geometry_stays():
    student, teacher = (
        tokens._replace(geometry=tokens.geometry._replace(matrix=tokens.geometry.matrix.double()))
        for tokens in both_views()
    )
    matches = soft(2, 6, 15)
    assert correspondence_error(matches, student, teacher).dtype == torch.float64
    numbers = diagnose(matches, student, teacher)
    assert numbers.correspondence_accuracy.dtype == torch.float64
    assert numbers.correspondence_error.dtype == torch.float64


def test_no_gradient_nothing_changed_any_layout():
    student, teacher = both_views()
    matches, reverse = soft(2, 6, 15), soft(2, 15, 6, 1)
    wanted = diagnose(matches, student, teacher, reverse)
    strided = Matches(
        matches.teacher_index,
        matches.weight.mT.contiguous().mT.requires_grad_(),
        matches.cost.clone().requires_grad_(),
    )
    matrix = student.geometry.matrix.clone().requires_grad_()
    moved = student._replace(geometry=student.geometry._replace(matrix=matrix))
    before = [part.clone() for part in (*strided, matrix)]
    found = diagnose(strided, moved, teacher, reverse)
    for name, value in found.as_dict().items():
        assert not value.requires_grad, name
        assert float(value) == pytest.approx(float(getattr(wanted, name))), name
    assert not correspondence_error(strided, moved, teacher).requires_grad
    for part, old in zip((*strided, matrix), before, strict=True):
        assert torch.equal(part, old)


def test_inference_mode_and_autocast():
    student, teacher = both_views()
    matches, reverse = soft(2, 6, 15), soft(2, 15, 6, 1)
    wanted = diagnose(matches, student, teacher, reverse).as_dict()
    with torch.inference_mode():
        inner = Matches(*(part.clone() for part in matches))
        assert diagnose(inner, *both_views(), reverse).as_dict() == wanted
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert diagnose(matches, student, teacher, reverse).as_dict() == wanted


def all_but_the_search(matches, student, teacher, reverse):
    """Inductor builds the search for `reachable_tokens` in the tests of the nearest match."""
    plain = diagnose(matches, Tokens(student.features, None, student.grid), teacher, reverse)
    error = correspondence_error(matches, student, teacher)
    mean = mean_correspondence_error(matches, student, teacher, threshold=None)
    # field by field: torch 2.6 can trace neither `_replace` nor a slice
    return MatchDiagnostics(
        plain.coverage,
        plain.distinct_targets,
        plain.hubness,
        plain.entropy,
        plain.mutual_rate,
        mean,
        None,
        error.amin(),
    )


@pytest.mark.parametrize(
    ("backend", "numbers"), [("aot_eager", diagnose), ("inductor", all_but_the_search)]
)
def test_compiles_to_one_graph_over_changing_crops(backend, numbers):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(numbers, fullgraph=True, backend=counter)
    for seed in range(10):
        student, teacher = both_views(seed)
        matches, reverse = soft(2, 6, 15, seed), soft(2, 15, 6, seed + 50)
        found = compiled(matches, student, teacher, reverse)
        plain = numbers(matches, student, teacher, reverse).as_dict()
        for name, value in found.as_dict().items():
            assert float(value) == pytest.approx(float(plain[name]), rel=1e-4, abs=1e-5), name
    assert counter.frame_count <= 2


def test_vmap():
    student, teacher = both_views()
    pairs = [(soft(2, 6, 15, seed), soft(2, 15, 6, seed + 9)) for seed in range(3)]
    stacked = [
        Matches(*(torch.stack(parts) for parts in zip(*side, strict=True)))
        for side in zip(*pairs, strict=True)
    ]
    found = torch.vmap(lambda m, r: diagnose(m, student, teacher, r))(*stacked)
    for i, (matches, reverse) in enumerate(pairs):
        for name, value in diagnose(matches, student, teacher, reverse).as_dict().items():
            assert float(getattr(found, name)[i]) == pytest.approx(float(value), rel=1e-6), name


def test_a_geometry_of_nan_says_nothing_where_it_cannot_be_refused():
    student, teacher = both_views()
    matrix = student.geometry.matrix.clone()
    matrix[1] = torch.nan
    bad = student._replace(geometry=student.geometry._replace(matrix=matrix))
    matches = soft(2, 6, 15, zeros=0.0)
    compiled = torch.compile(correspondence_error, fullgraph=True, backend="eager")
    found = compiled(matches, bad, teacher)
    good = correspondence_error(matches, student, teacher)
    assert torch.equal(found[0], good[0])
    assert bool(found[1].isposinf().all())
    with pytest.raises(GeometryError, match=r"`student.geometry`"):
        correspondence_error(matches, bad, teacher)


def test_bad_input_is_refused_by_name():
    student, teacher = both_views()
    matches = soft(2, 6, 15)
    for wrong in (-1, 2.0, True):
        with pytest.raises(ConfigError, match="`num_teacher_tokens`"):
            hubness(matches, wrong)
    for number in (distinct_targets, hubness):
        with pytest.raises(ShapeError, match=r"\[0, 14\).*`num_teacher_tokens`.*from 0 to 14"):
            number(matches, 14)
    for number in ALONE:
        with pytest.raises(ShapeError, match="axis `s` is 6"):
            number(matches._replace(weight=matches.weight[:, :5]), 15)
        with pytest.raises(ShapeError, match="`matches` must be Matches"):
            number(matches.weight, 15)
    for wrong in (0.0, -1.0, math.nan, "near"):
        with pytest.raises(ConfigError, match="`threshold`"):
            correspondence_accuracy(matches, student, teacher, wrong)
        with pytest.raises(ConfigError, match="`threshold`"):
            mean_correspondence_error(matches, student, teacher, threshold=wrong)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m, s, t: (m, s._replace(geometry=None), t), "`student` has no geometry"),
        (lambda m, s, t: (m, s, t._replace(grid=None)), "`teacher` has no grid"),
        (lambda m, s, t: (m, t, t), r"6 student tokens but `student.grid` has 3 × 5 = 15"),
        (lambda m, s, t: (m, s, s), r"`matches.teacher_index` must lie in \[0, 6\).*teacher.grid"),
        (lambda m, s, t: (Matches(*(p[:1] for p in m)), s, t), "axis `b` is 1 in `matches"),
    ],
)
def test_matches_of_other_views_are_refused_by_name(change, text):
    arguments = change(soft(2, 6, 15), *both_views())
    for number in (correspondence_error, mean_correspondence_error, correspondence_accuracy):
        with pytest.raises(ShapeError, match=text):
            number(*arguments)


def test_diagnose_of_a_real_matcher_both_ways():
    student, teacher = both_views()
    matcher = NearestMatcher(max_distance=None)
    numbers = diagnose(matcher(student, teacher), student, teacher, matcher(teacher, student))
    assert float(numbers.coverage) == 1
    assert float(numbers.entropy) == 0
    assert 0 < float(numbers.mutual_rate) <= 1
    assert float(numbers.correspondence_accuracy) == 1
    assert float(numbers.correspondence_error) < 0.5
