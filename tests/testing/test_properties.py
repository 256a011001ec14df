"""What the kit says of a failure, and how it is told to expect one."""

import functools
import re
import subprocess
import sys
import textwrap
from typing import NamedTuple

import pytest
import torch
from helpers.plain_matchers import PlainGated
from helpers.wrong_matchers import (
    ComparesTheFirstFeatures,
    DithersEveryOtherCall,
    ForgetsTheStudentsPadding,
    MeasuresInSourcePixels,
    TakesNanForZeroInTheTeacher,
    WeighsTwice,
)
from hypothesis import find
from hypothesis import strategies as st
from torchvision.transforms import v2

from local_distill import (
    Centering,
    ConfigError,
    GlobalDistillationLoss,
    Matches,
    NearestMatcher,
    SimilarityMatcher,
)
from local_distill.testing import (
    MatcherExample,
    PropertyFailed,
    check_loss,
    check_matcher,
    check_targets,
    check_transform,
    loss_properties,
    matcher_kind,
    matcher_properties,
    matcher_test,
    targets_properties,
    transform_properties,
)
from local_distill.testing.matcher_properties import matcher_examples
from local_distill.testing.properties import Property, check_properties, ensure, properties_test
from local_distill.testing.snippets import to_code

# One of each kind of failure: wrong weights, padding, a missing error, bad tokens, geometry.
BROKEN = [
    (WeighsTwice, "weights_are_shares"),
    (ForgetsTheStudentsPadding, "student_tokens_outside_the_source_are_unmatched"),
    (ComparesTheFirstFeatures, "features_of_other_widths_are_refused"),
    (TakesNanForZeroInTheTeacher, "nan_teacher_tokens_capture_nothing"),
    (MeasuresInSourcePixels, "the_source_may_be_enlarged"),
]


def failure_of(matcher, name, **more):
    with pytest.raises(PropertyFailed) as caught:
        check_matcher(matcher, properties=[name], **more)
    return caught.value


def snippet_of(message):
    return textwrap.dedent(message.partition("to repeat:\n\n")[2])


def run_snippet(message, subject):
    """Run the lines of a message, with the subject where they ask for it."""
    lines = snippet_of(message).splitlines()
    left = [line for line in lines if not line.startswith("subject = ...")]
    assert len(left) == len(lines) - 1
    known = {"subject": subject}
    exec("\n".join(left), known)
    return known


@pytest.mark.parametrize(("wrong", "name"), BROKEN)
def test_the_snippet_of_a_failure_fails_alike(wrong, name):
    matcher = wrong()
    message = str(failure_of(matcher, name))
    with pytest.raises(PropertyFailed) as again:
        run_snippet(message, matcher)
    assert str(again.value) == message
    # and holds once the fault is mended
    known = run_snippet(message, matcher.right)
    assert isinstance(known["example"], MatcherExample)


@pytest.mark.parametrize(("wrong", "name"), BROKEN)
def test_a_failure_says_what_of_what_and_is_small(wrong, name):
    matcher = wrong()
    message = str(failure_of(matcher, name))
    first, second, *_ = message.splitlines()
    summary = next(
        one.summary for one in matcher_properties(matcher_kind(matcher)) if one.name == name
    )
    assert first == f"{name}: {summary}"
    assert second.startswith(f"broken by {wrong.__name__}(")
    example = run_snippet(message, matcher.right)["example"]
    for view in example[:2]:
        assert view.features.shape[0] == 2
        assert view.num_tokens <= 4
    assert len(message.splitlines()) < 45


def test_the_same_failure_has_the_same_message():
    first, second = (str(failure_of(WeighsTwice(), "weights_are_shares")) for _ in range(2))
    assert first == second


def test_the_same_search_looks_at_the_same_examples():
    def looked_at():
        seen = []

        def matcher(student, teacher):
            seen.append(to_code([student, teacher]))
            return SimilarityMatcher()(student, teacher)

        check_matcher(matcher, kind="similarity", properties=["weights_are_shares"])
        return seen

    first = looked_at()
    assert first == looked_at()
    assert len(set(first)) > 10


def test_the_snippet_gives_the_kind_that_was_given():
    """Found out by trying it would be geometric, and the property would not apply."""
    name = "a_bad_image_stays_alone"
    message = str(failure_of(spoilt_by_nan, name, kind="both"))
    assert f'check_matcher(subject, kind="both", properties=["{name}"]' in message
    with pytest.raises(PropertyFailed):
        run_snippet(message, spoilt_by_nan)
    with pytest.raises(ConfigError, match="no property"):
        check_matcher(spoilt_by_nan, properties=[name])


def spoilt_by_nan(student, teacher):
    found = NearestMatcher()(student, teacher)
    if student.features is None:
        return found
    return found._replace(cost=found.cost + 0 * student.features.sum())


def broken_in_two(student, teacher):
    found = SimilarityMatcher()(student, teacher)
    return Matches(found.teacher_index, found.weight * 2, found.cost.float())


class Stranger:
    """Without a repr of its own."""

    def __call__(self, student, teacher):
        return SimilarityMatcher()(student, teacher)


def test_several_failures_are_told_together():
    names = ["weights_are_shares", "float64_stays_float64", "indices_are_in_range"]
    with pytest.raises(PropertyFailed) as caught:
        check_matcher(broken_in_two, properties=names)
    message = str(caught.value)
    assert message.startswith(
        "2 of 3 properties fail: weights_are_shares, float64_stays_float64\n\nweights_are_shares: "
    )
    assert "\n\nfloat64_stays_float64: " in message
    assert message.count("to repeat:") == 2
    assert "indices_are_in_range:" not in message


def test_what_holds_is_returned_in_the_order_asked_for():
    names = ["indices_are_in_range", "weights_are_shares"]
    assert check_matcher(SimilarityMatcher(), properties=names) == names
    assert check_matcher(SimilarityMatcher, properties=iter(names)) == names


def test_a_class_is_made_and_one_with_arguments_is_refused():
    failure = failure_of(WeighsTwice, "weights_are_shares")
    assert "broken by WeighsTwice(" in str(failure)

    class Needy:
        def __init__(self, radius):
            self.radius = radius

    with pytest.raises(ConfigError, match=r"class Needy.*without arguments.*Needy\(\.\.\.\)"):
        check_matcher(Needy)
    with pytest.raises(ConfigError, match="must be a callable"):
        check_matcher("nearest")


def test_examples_are_looked_at_instead_of_a_search():
    seen = []

    def matcher(student, teacher):
        seen.append(student)
        return SimilarityMatcher()(student, teacher)

    example = find(matcher_examples(), lambda example: example.student.num_tokens == 3)
    names = ["indices_are_in_range", "weights_are_shares"]
    # an iterator: every property has to see its examples
    assert (
        check_matcher(matcher, kind="similarity", properties=names, examples=iter([example]))
        == names
    )
    assert len(seen) == 2
    assert all(student is example.student for student in seen)


def test_excluded_properties_have_no_id():
    def ids(**settings):
        test = matcher_test(SimilarityMatcher(), **settings)
        return [param.id for mark in test.pytestmark for param in mark.args[1]]

    left = ids(exclude=["vmap_works", "weights_are_shares"])
    assert left == [name for name in ids() if name not in ("vmap_works", "weights_are_shares")]
    assert len(left) == len(ids()) - 2
    with pytest.raises(ConfigError, match="did you mean vmap_works"):
        ids(exclude=["vmap_work"])


def test_check_matcher_leaves_out_what_is_excluded():
    left_out = ["vmap_works", "compiles_without_graph_breaks"]
    names = ["indices_are_in_range", "vmap_works", "weights_are_shares"]
    matcher = SimilarityMatcher()
    assert check_matcher(matcher, properties=names, exclude=left_out) == names[::2]
    every = [one.name for one in matcher_properties("similarity")]
    held = check_matcher(matcher, exclude=iter(left_out), max_examples=1)
    assert held == [name for name in every if name not in left_out]
    # what fails is not looked at either
    assert check_matcher(WeighsTwice(), properties=names[1:], exclude=names[2:]) == ["vmap_works"]
    with pytest.raises(ConfigError, match="did you mean vmap_works"):
        check_matcher(matcher, exclude=["vmap_work"])


def test_losses_targets_and_transforms_are_excluded_from_alike():
    everything = [one.name for one in targets_properties()]
    assert check_targets(Centering, exclude=everything[1:], max_examples=1) == everything[:1]
    everything = [one.name for one in loss_properties("global")]
    held = check_loss(
        lambda c: GlobalDistillationLoss(Centering(c)), exclude=everything[1:], max_examples=1
    )
    assert held == everything[:1]
    everything = [one.name for one in transform_properties()]
    crop = v2.CenterCrop(32)
    held = check_transform(crop, seeds=1, exclude=everything[1:], max_examples=1)
    assert held == everything[:1]


@pytest.mark.parametrize(
    ("matcher", "name"),
    [
        (broken_in_two, f"{__name__}.broken_in_two"),
        (
            SimilarityMatcher().forward,
            "local_distill.matching.similarity.SimilarityMatcher.forward",
        ),
        (functools.partial(broken_in_two), "functools.partial(broken_in_two)"),
        (Stranger(), f"{__name__}.Stranger"),
        (SimilarityMatcher(), "SimilarityMatcher(metric='cosine')"),
    ],
)
def test_what_is_broken_is_called_by_its_name_not_by_its_address(matcher, name):
    test = properties_test(matcher, [], lambda _: None, xfail={})
    assert test.__doc__ == f"The properties of {name}, one by one."


def test_max_examples_is_the_number_of_examples():
    seen = []

    def matcher(student, teacher):
        seen.append(student)
        return SimilarityMatcher()(student, teacher)

    check_matcher(matcher, kind="similarity", properties=["weights_are_shares"], max_examples=7)
    assert len(seen) == 7


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("weight_are_shares", "did you mean weights_are_shares"),
        ("features_do_not_matter", "did you mean .*geometry_does_not_matter"),
        ("qqq", "there are nan_student_tokens_are_unmatched"),
    ],
)
def test_an_unknown_name_is_an_error_with_a_close_one(name, hint):
    with pytest.raises(ConfigError, match=f"no property '{name}' applies here; .*({hint})"):
        check_matcher(SimilarityMatcher(), properties=[name])
    with pytest.raises(ConfigError, match=f"no property '{name}' applies here"):
        matcher_test(SimilarityMatcher(), xfail={name: "no reason"})


def test_unknown_kinds_are_errors():
    with pytest.raises(ConfigError, match=r"`kind` must be .*got 'geometry'"):
        check_matcher(SimilarityMatcher(), kind="geometry")
    with pytest.raises(ConfigError, match=r"`views` must be one of .*got 'spiral'"):
        check_matcher(SimilarityMatcher(), views="spiral")


@pytest.mark.parametrize(
    ("matcher", "kind"),
    [
        (NearestMatcher(), "geometric"),
        (SimilarityMatcher(), "similarity"),
        (PlainGated(), "both"),
    ],
)
def test_the_kind_is_found_out(matcher, kind):
    assert matcher_kind(matcher) == kind


def test_what_has_no_kind_says_why():
    def matcher(student, teacher):
        if student.features is None:
            raise KeyError("no features")
        raise OSError(f"no disk, geometry is {'un' * (student.geometry is None)}known")

    with pytest.raises(ConfigError) as caught:
        check_matcher(matcher)
    message = str(caught.value)
    assert "geometric: KeyError: 'no features'" in message
    assert "similarity: OSError: no disk, geometry is unknown" in message
    assert "both: OSError: no disk, geometry is known" in message
    assert isinstance(caught.value.__cause__, OSError)


def test_an_error_of_the_matcher_is_a_failure_with_its_place():
    def matcher(student, teacher):
        return torch.zeros(2) + torch.zeros(3)

    message = str(failure_of(matcher, "weights_are_shares", kind="similarity"))
    assert re.search(
        r"RuntimeError: The size of tensor a .* \(.*test_properties\.py:\d+\)", message
    )


def test_a_matcher_that_changes_its_mind_fails_and_is_told_so():
    """Hypothesis then sees the example fail and hold, and raises an error of its own."""
    failure = failure_of(DithersEveryOtherCall(), "the_same_call_gives_the_same")
    assert isinstance(failure, PropertyFailed)

    calls = []

    def once(student, teacher):
        calls.append(0)
        found = SimilarityMatcher()(student, teacher)
        return found._replace(weight=found.weight * (2 if len(calls) == 5 else 1))

    failure = failure_of(once, "weights_are_shares", kind="similarity")
    assert "the weights of a token sum to 2" in str(failure)
    assert "The same example held at another try" in str(failure)


# The machinery on its own, without matchers


class Number(NamedTuple):
    value: int


NUMBERS = st.builds(Number, st.integers(0, 1000))


def small(subject, example):
    """Numbers are below the subject."""
    ensure(example.value < subject, f"{example.value} is not below {subject}")


def even(subject, example):
    """Even numbers are fine, but for 8."""
    ensure(example.value != 8, "it is 8")


SMALL = Property("small", "Numbers are small.", small, NUMBERS)
EVEN = Property("even", "Even numbers are fine.", even, NUMBERS, max_examples=3)


def test_the_smallest_example_is_found_and_none_fails_where_all_hold():
    with pytest.raises(PropertyFailed, match="10 is not below 10"):
        check_properties(10, [SMALL], checker="check", max_examples=100)
    assert check_properties(1001, [SMALL, EVEN], checker="check") == ["small", "even"]


def test_given_examples_are_looked_at_in_turn():
    examples = [Number(3), Number(8), Number(11)]
    with pytest.raises(PropertyFailed, match=r"(?s)broken by 9: it is 8\n.*Number\(value=8\)"):
        check_properties(9, [EVEN], checker="check", examples=examples)
    assert check_properties(9, [EVEN], checker="check", examples=examples[:1]) == ["even"]


def test_a_test_has_an_id_a_property():
    test = properties_test(10, [SMALL, EVEN], lambda name: None, xfail={"even": "8 is odd here"})
    (mark,) = test.pytestmark
    assert [param.id for param in mark.args[1]] == ["small", "even"]
    assert test.__doc__ == "The properties of 10, one by one."


SUITE = """
import hypothesis
from local_distill import SimilarityMatcher
from local_distill.testing import matcher_test

hypothesis.settings.register_profile("quick", phases=[hypothesis.Phase.generate])
hypothesis.settings.load_profile("quick")


def twice(student, teacher):
    found = SimilarityMatcher()(student, teacher)
    return found._replace(weight=found.weight * 2)


test_right = matcher_test(SimilarityMatcher(), max_examples=1)
test_known = matcher_test(twice, xfail={"weights_are_shares": "it doubles"}, max_examples=1)
test_unknown = matcher_test(twice, max_examples=1)
test_mended = matcher_test(
    SimilarityMatcher(), xfail={"weights_are_shares": "it doubled"}, max_examples=1
)
"""
CHOSEN = "weights_are_shares or indices_are_in_range"


def test_pytest_shows_one_id_a_property_and_a_strict_xfail(tmp_path):
    path = tmp_path / "test_suite.py"
    path.write_text(SUITE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-rA", "-k", CHOSEN,
         "--rootdir", str(tmp_path), str(path)],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    outcomes = dict(re.findall(r"^test_suite\.py::(\S+) (\w+)", done.stdout, re.MULTILINE))
    assert outcomes == {
        "test_right[weights_are_shares]": "PASSED",
        "test_right[indices_are_in_range]": "PASSED",
        "test_known[weights_are_shares]": "XFAIL",
        "test_known[indices_are_in_range]": "PASSED",
        "test_unknown[weights_are_shares]": "FAILED",
        "test_unknown[indices_are_in_range]": "PASSED",
        "test_mended[weights_are_shares]": "FAILED",
        "test_mended[indices_are_in_range]": "PASSED",
    }
    assert "[XPASS(strict)] it doubled" in done.stdout
    # the message, and not the search that led to it
    assert re.search(r"(?m)^E +\S+PropertyFailed: weights_are_shares: Weights are", done.stdout)
    assert "example = MatcherExample(" in done.stdout
    assert "hypothesis/core.py" not in done.stdout


def test_every_property_is_collected(tmp_path):
    path = tmp_path / "test_suite.py"
    path.write_text(SUITE)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q",
         "--rootdir", str(tmp_path), f"{path}::test_right"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    ids = re.findall(r"::test_right\[(\w+)\]", done.stdout)
    assert ids == [one.name for one in matcher_properties("similarity")]
