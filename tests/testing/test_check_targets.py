"""`check_targets`: right targets pass; every property has wrong ones that it alone sees."""

import copy
import functools
import re

import pytest
from helpers.drawn import drawn, slow_for
from helpers.wrong_targets import WRONG, CutsTensorsIntoViews, ForgetsTheCenter, Stateless

from local_distill import Centering, ConfigError
from local_distill.testing import PropertyFailed, check_targets
from local_distill.testing.check_targets import targets_properties, targets_test
from local_distill.testing.target_properties import targets_examples

test_centering = targets_test(Centering)
test_centering_of_another_momentum = targets_test(lambda c: Centering(c, 0.3), max_examples=8)
test_targets_without_state = targets_test(Stateless, max_examples=8)
test_strict_xfail = targets_test(
    CutsTensorsIntoViews,
    xfail={"bare_tensors_are_refused": "a tensor is cut into views"},
    max_examples=2,
)


@functools.cache
def some_examples():
    return drawn(targets_examples(), 6)


def failing(targets, leave_out=()):
    """The names of the properties that targets do not keep, by the same few examples each."""
    found = set()
    for one in targets_properties():
        if one.name in leave_out:
            continue
        # copies, as wrong targets write into their inputs
        examples = copy.deepcopy(some_examples()[: one.max_examples])
        try:
            check_targets(targets, properties=[one.name], examples=examples)
        except PropertyFailed:
            found.add(one.name)
    return found


def test_every_property_has_wrong_targets():
    assert set(WRONG) == {one.name for one in targets_properties()}


@pytest.mark.parametrize("name", WRONG)
def test_exactly_this_property_sees_them(name):
    assert failing(WRONG[name], slow_for(name)) == {name}


def test_a_failure_is_small_and_its_snippet_repeats_it():
    name = "a_checkpoint_goes_on_alike"
    with pytest.raises(PropertyFailed) as caught:
        check_targets(ForgetsTheCenter, properties=[name], max_examples=5)
    snippet = str(caught.value).split("to repeat:\n\n")[1]
    code = "\n".join(line.removeprefix("    ") for line in snippet.splitlines())
    code = re.sub(r"subject = \.\.\..*", "", code)
    with pytest.raises(PropertyFailed, match=name):
        exec(code, {"subject": ForgetsTheCenter})
    exec(code, {"subject": Centering})


def test_what_is_no_factory_is_refused():
    with pytest.raises(ConfigError, match=r"lambda c: MyTargets\(c\)"):
        check_targets(Centering(3))
    with pytest.raises(ConfigError, match="must make targets"):
        targets_test(None)
    with pytest.raises(ConfigError, match="no property"):
        check_targets(Centering, properties=["nothing"])
    with pytest.raises(PropertyFailed, match="no Module"):
        check_targets(lambda c: [c], properties=["probs_are_distributions"], max_examples=1)
