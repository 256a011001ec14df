"""Each property of matchers catches the wrong matcher that is made for it, and no other property
does; right matchers keep them all."""

import functools
import logging

import hypothesis
import pytest
import torch
from helpers.drawn import slow_for
from helpers.plain_matchers import PlainGated, PlainNearest
from helpers.wrong_matchers import WRONG
from hypothesis import HealthCheck, Phase, given

from local_distill import NearestMatcher, SimilarityMatcher
from local_distill.testing import check_matcher, matcher_kind, matcher_properties, matcher_test
from local_distill.testing.matcher_properties import REGISTRY
from local_distill.testing.matcher_properties._changing import inside_source, outside_source
from local_distill.testing.properties import PropertyFailed

EXAMPLES = 6


@pytest.fixture(autouse=True, scope="module")
def _without_shrinking():
    """What fails here is known to; looking for the smallest example of it would take minutes."""
    hypothesis.settings.register_profile(
        "without shrinking", phases=[Phase.explicit, Phase.generate]
    )
    hypothesis.settings.load_profile("without shrinking")
    yield
    hypothesis.settings.load_profile("local_distill")


@pytest.fixture(autouse=True, scope="module")
def _without_traces():
    """pytest keeps every debug record; torch's compiler writes thousands, at half of its time."""
    logging.disable(logging.DEBUG)
    yield
    logging.disable(logging.NOTSET)


@functools.cache
def examples_of(name, kind):
    """The examples that the kit draws for a property, drawn once for all matchers."""
    one = next(one for one in matcher_properties(kind) if one.name == name)
    # what compiles takes a second for every example
    most = 1 if one.name == "compiles_without_graph_breaks" else EXAMPLES
    drawn = []
    search = hypothesis.settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=min(most, one.max_examples or most),
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    search(given(one.examples)(lambda example: drawn.append(example)))()
    return drawn


def failing(matcher, leave_out=()):
    """{name: message} of the properties that a matcher breaks."""
    kind = matcher_kind(matcher)
    messages = {}
    for one in matcher_properties(kind):
        if one.name in leave_out:
            continue
        examples = examples_of(one.name, kind)
        try:
            check_matcher(matcher, kind=kind, properties=[one.name], examples=examples)
        except PropertyFailed as failure:
            messages[one.name] = str(failure)
    return messages


def test_every_property_has_a_wrong_matcher():
    assert {name for name, _ in WRONG} == {one.name for one in REGISTRY}


def test_names_and_summaries_are_of_one_property_each():
    assert len({one.name for one in REGISTRY}) == len(REGISTRY)
    assert len({one.summary for one in REGISTRY}) == len(REGISTRY)
    for one in REGISTRY:
        assert one.summary.endswith("."), one.name


@pytest.mark.parametrize(
    ("name", "matcher"), WRONG, ids=[f"{name}-{matcher.__name__}" for name, matcher in WRONG]
)
def test_a_wrong_matcher_breaks_one_property_alone(name, matcher, monkeypatch):
    # Graphs are captured as ever, and then run as they are: half the time of this file. Right
    # matchers, below, go through aot_eager.
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **k | {"backend": "eager"}))
    messages = failing(matcher(), leave_out=slow_for(name))
    assert list(messages) == [name], "\n\n".join(messages.values())


@pytest.mark.parametrize("kind", ["geometric", "similarity", "both"])
def test_there_are_enough_properties_of_each_kind(kind):
    assert len(matcher_properties(kind)) >= 40


test_plain_nearest = matcher_test(PlainNearest(), max_examples=EXAMPLES)
test_plain_gated = matcher_test(PlainGated(), max_examples=EXAMPLES)
test_nearest_by_lattice = matcher_test(NearestMatcher(), max_examples=EXAMPLES)
test_nearest_by_search = matcher_test(NearestMatcher(method="search"), max_examples=EXAMPLES)
test_similarity = matcher_test(SimilarityMatcher(), max_examples=EXAMPLES)

NO_DIRECTION = "l2 compares places, not directions: a token at the origin is one like any other"
test_similarity_l2 = matcher_test(
    SimilarityMatcher("l2"),
    max_examples=EXAMPLES,
    xfail={
        "zero_student_tokens_are_unmatched": NO_DIRECTION,
        "zero_teacher_tokens_capture_nothing": NO_DIRECTION,
        "features_may_be_scaled": "l2 compares places: a token times two is another place",
    },
)


@pytest.mark.parametrize("views", ["turn", "similar", "warp"])
def test_right_matchers_keep_all_properties_on_other_views(views):
    matcher = PlainNearest()
    names = [
        one.name for one in matcher_properties("geometric", views) if "compile" not in one.name
    ]
    assert check_matcher(matcher, views=views, properties=names, max_examples=4) == names


# What a property says of nothing, it does not say: its examples have to have some.


def outside(side):
    return lambda matcher, example: bool(outside_source(example[side]).any())


def inside(side):
    return lambda matcher, example: bool(inside_source(example[side]).any())


def all_inside(matcher, example):
    return all(bool(inside_source(view).all()) for view in example[:2])


def some_match(matcher, example):
    return bool(matcher(*example[:2]).matched.any())


def some_do_not_match(matcher, example):
    return not bool(matcher(*example[:2]).matched.all())


def candidates_differ(matcher, example):
    """Not all student tokens match the same teacher token: an index can be seen to be wrong."""
    found = matcher(*example[:2])
    return any(len(set(row[ok].tolist())) > 1 for row, ok in zip(
        found.teacher_index[..., 0], found.matched, strict=True
    ))  # fmt: skip


PREMISES = [
    ("student_tokens_outside_the_source_are_unmatched", "geometric", outside(0)),
    ("student_tokens_outside_the_source_are_unmatched", "similarity", outside(0)),
    ("teacher_tokens_outside_the_source_capture_nothing", "geometric", outside(1)),
    ("teacher_tokens_outside_the_source_capture_nothing", "similarity", outside(1)),
    ("student_tokens_outside_the_source_are_unmatched", "geometric", inside(0)),
    ("teacher_tokens_outside_the_source_capture_nothing", "geometric", inside(1)),
    ("cost_is_infinite_where_nothing_matched", "similarity", some_do_not_match),
    ("indices_are_in_range", "geometric", some_do_not_match),
    ("geometry_does_not_matter", "similarity", all_inside),
]


@pytest.mark.parametrize(("name", "kind", "premise"), PREMISES)
def test_examples_have_what_a_property_is_about(name, kind, premise):
    matcher = NearestMatcher() if kind == "geometric" else SimilarityMatcher()
    examples = examples_of(name, kind)
    assert sum(premise(matcher, example) for example in examples) >= len(examples) / 4


@pytest.mark.parametrize("kind", ["geometric", "similarity", "both"])
def test_examples_of_every_property_match(kind):
    matcher = {"geometric": NearestMatcher(), "similarity": SimilarityMatcher()}.get(
        kind, PlainGated()
    )
    for one in matcher_properties(kind):
        examples = examples_of(one.name, kind)
        count = sum(some_match(matcher, example) for example in examples)
        assert count >= len(examples) / 3, one.name
        if len(examples) == EXAMPLES:
            assert any(candidates_differ(matcher, example) for example in examples), one.name


@pytest.mark.parametrize("kind", ["geometric", "similarity", "both"])
def test_the_first_example_of_every_property_is_the_smallest(kind):
    for one in matcher_properties(kind):
        student, teacher, seed = examples_of(one.name, kind)[0]
        assert student.num_tokens == teacher.num_tokens == 1, one.name
        assert student.features.shape[0] == 2
        assert seed == 0
        assert not torch.equal(student.features, teacher.features)
