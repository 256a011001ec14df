"""Test kit for matchers, losses, targets and transforms of your own. It needs the extra `testing`.

One line makes all properties of a matcher pytest tests::

    test_my_matcher = matcher_test(MyMatcher())
"""

from __future__ import annotations

from local_distill.testing.check_matcher import (
    check_matcher,
    matcher_kind,
    matcher_properties,
    matcher_test,
)
from local_distill.testing.matcher_properties import MatcherExample
from local_distill.testing.properties import PropertyFailed
from local_distill.testing.strategies import (
    crop_geometries,
    matches,
    token_grids,
    tokens,
    view_pairs,
)

__all__ = [
    "MatcherExample",
    "PropertyFailed",
    "check_matcher",
    "crop_geometries",
    "matcher_kind",
    "matcher_properties",
    "matcher_test",
    "matches",
    "token_grids",
    "tokens",
    "view_pairs",
]
