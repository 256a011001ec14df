"""A few examples of a hypothesis strategy, always the same, without the search for the smallest;
and the properties that take too long to be tried on everything."""

import os

from hypothesis import HealthCheck, Phase, given, settings


def drawn(strategy, count):
    """At most ``count`` examples, the simplest first."""
    found = []

    def keep(example):
        found.append(example)

    settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(given(strategy)(keep))()
    return found


COMPILING = ("compiles_without_graph_breaks", "updates_compile_without_graph_breaks")


def slow_for(name):
    """Properties to leave out for what was made to break the property ``name`` alone.

    To compile takes as long as to check all other properties together. So it is tried on what is
    made to break it and on all that is right, and on the rest where ALL_PROPERTIES is set.
    """
    return () if name in COMPILING or os.environ.get("ALL_PROPERTIES") else COMPILING
