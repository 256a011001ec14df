"""A few examples of a hypothesis strategy, always the same, without the search for the smallest."""

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
