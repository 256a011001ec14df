"""A matcher of one's own by its import path."""

import sys

import pytest

from local_distill import Matches, NearestMatcher, SimilarityMatcher
from local_distill.benchmarking.by_path import (
    find_by_path,
    matcher_by_path,
    works_without_features,
)
from local_distill.benchmarking.sizes import Size, step
from local_distill.errors import ConfigError

MODULE = '''
import torch
from local_distill import NearestMatcher, SimilarityMatcher

class Own(NearestMatcher):
    """Works with the places alone."""

class Strict:
    def __init__(self, radius):
        self.radius = radius
    def __call__(self, student, teacher):
        return NearestMatcher()(student, teacher)

class Nested:
    Inner = Own

instance = Strict(0.5)
number = 3

def function(student, teacher):
    return SimilarityMatcher()(student, teacher)

def factory(radius=0.5):
    return Strict(radius)

def gives_nothing(student, teacher):
    return None

def wrong_shape(student, teacher):
    found = NearestMatcher()(student, teacher)
    return found._replace(cost=found.cost[:, 1:])

def breaks(student, teacher):
    raise KeyError("tokens")

def one_argument(student):
    return student
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "benched_matchers.py").write_text(MODULE)
    (tmp_path / "benched_broken.py").write_text("import no_such_library_at_all")
    (tmp_path / "benched_raising.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield "benched_matchers"
    assert sys.path == before
    sys.modules.pop("benched_matchers", None)


@pytest.mark.parametrize("name", ["Own", "Nested.Inner", "instance", "function", "factory"])
def test_class_instance_function_and_factory(module, name):
    matcher = matcher_by_path(f"{module}.{name}")
    made = step(Size(4, 2, 8), 2)
    found = matcher(made.student[3], made.teacher[0])
    assert isinstance(found, Matches)
    assert works_without_features(name, matcher, made) == (name != "function")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("benched_matchers.Ow", r"no `Ow` in `benched_matchers`: did you mean `Own`\?"),
        ("benched_matchers.Own.radios", r"no `radios` in `benched_matchers.Own`"),
        ("bensched_matchers.Own", r"no module `bensched_matchers`"),
        ("benched_matchers.Strict", r"`benched_matchers.Strict\(\)` failed.*radius"),
        ("benched_matchers.number", r"is no matcher.*got int"),
        ("benched_matchers.one_argument", r"is no matcher.*got function"),
        ("benched_broken.Own", r"`benched_broken` cannot be imported.*no_such_library_at_all"),
        ("benched_raising.Own", r"`benched_raising` cannot be imported: ZeroDivisionError"),
        ("NearestMatcher", r"is no import path; write package.module.Name"),
        ("my-module.Own", r"is no import path"),
        ("", r"is no import path"),
    ],
)
def test_what_is_wrong_is_said(module, path, message):
    with pytest.raises(ConfigError, match=message) as raised:
        matcher_by_path(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gives_nothing", r"gave NoneType, wanted `Matches`"),
        ("wrong_shape", r"gave `cost` for \(b, s\) = \(2, 3\), wanted \(2, 4\)"),
        ("breaks", r"cannot match a step's tokens: KeyError: 'tokens'"),
    ],
)
def test_a_matcher_that_does_not_match_is_refused(module, name, message):
    matcher = matcher_by_path(f"{module}.{name}")
    with pytest.raises(ConfigError, match=message):
        works_without_features(name, matcher, step(Size(4, 2, 8), 2))


def test_the_packages_own_are_found_too():
    assert find_by_path("local_distill.matching.NearestMatcher") is NearestMatcher
    assert isinstance(matcher_by_path("local_distill.SimilarityMatcher"), SimilarityMatcher)
