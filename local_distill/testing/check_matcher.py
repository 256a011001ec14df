"""The test kit for matchers: one call checks all properties, one line makes them pytest tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

import torch

from local_distill.errors import ConfigError
from local_distill.structures import CropGeometry, Matcher, TokenGrid, Tokens
from local_distill.testing.matcher_properties import REGISTRY, MatcherExample, MatcherKind
from local_distill.testing.properties import Property, check_properties, properties_test
from local_distill.testing.strategies import ViewKind

__all__ = ["check_matcher", "matcher_kind", "matcher_properties", "matcher_test"]


def check_matcher(
    matcher: Matcher | type,
    *,
    kind: MatcherKind | None = None,
    views: ViewKind = "crop",
    properties: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    examples: Iterable[MatcherExample] | None = None,
    max_examples: int = 20,
) -> list[str]:
    """Check that a matcher keeps what the losses rely on, and tell of all that it does not.

    Args:
        matcher: any callable ``(student: Tokens, teacher: Tokens) -> Matches``, or a class that can
            be made without arguments.
        kind: what it looks at: ``"geometric"``, ``"similarity"`` (features) or ``"both"``; found
            out by trying where not given.
        views: the kind of views that it serves: ``"crop"``, ``"turn"``, ``"similar"``, ``"warp"``.
        properties: names of the properties to check; by default all that apply, see
            `matcher_properties`.
        exclude: names of properties to leave out, such as one that takes too long here.
        examples: look at these instead of searching: what a failure's snippet does.
        max_examples: how many examples to try for each property.

    Returns:
        The names of the properties that hold.

    Raises:
        PropertyFailed: an AssertionError that names each property that fails, the smallest example
            found, and the lines that repeat it.
        ConfigError: an unknown property, kind or kind of views, or a matcher whose kind cannot be
            found out.

    Example:
        >>> from local_distill import SimilarityMatcher
        >>> check_matcher(SimilarityMatcher(), properties=["a_view_matches_itself"])
        ['a_view_matches_itself']
    """
    subject = _made(matcher)
    known = kind or matcher_kind(subject)
    return check_properties(
        subject,
        matcher_properties(known, views),
        checker="check_matcher",
        settings={"kind": known},
        names=properties,
        exclude=exclude,
        examples=examples,
        max_examples=max_examples,
    )


def matcher_test(
    matcher: Matcher | type,
    *,
    kind: MatcherKind | None = None,
    views: ViewKind = "crop",
    xfail: Mapping[str, str] | None = None,
    exclude: Iterable[str] = (),
    max_examples: int = 20,
) -> Callable[[str], None]:
    """A pytest test of a matcher, with one id for each property.

    Args:
        matcher: see `check_matcher`.
        kind: see `check_matcher`.
        views: see `check_matcher`.
        xfail: ``{name: reason}`` of the properties that it is known not to keep. Strict: the test
            fails once it keeps them.
        exclude: names of properties to leave out, such as one that takes too long here.
        max_examples: how many examples to try for each property.

    Returns:
        A test function. Assign it to a name that starts with ``test_``.

    Raises:
        ConfigError: an unknown property in ``xfail`` or ``exclude``.
        MissingExtraError: pytest is not installed.

    Example:
        >>> from local_distill import NearestMatcher
        >>> test_nearest = matcher_test(NearestMatcher(max_distance=0.3))
        >>> test_nearest("a_view_matches_itself")  # pytest calls it for every property
    """
    subject = _made(matcher)
    known = kind or matcher_kind(subject)

    def check(name: str) -> object:
        return check_matcher(
            subject, kind=known, views=views, properties=[name], max_examples=max_examples
        )

    return properties_test(
        subject, matcher_properties(known, views), check, xfail=xfail or {}, exclude=exclude
    )


def matcher_properties(kind: MatcherKind, views: ViewKind = "crop") -> list[Property]:
    """The properties that matchers of this kind have to keep.

    Args:
        kind: ``"geometric"``, ``"similarity"`` or ``"both"``.
        views: the kind of views in their examples.

    Returns:
        One `Property` for each, in the order in which they are checked.

    Raises:
        ConfigError: an unknown kind, or an unknown kind of views.

    Example:
        >>> len(matcher_properties("geometric")) >= 25
        True
    """
    if kind not in ("geometric", "similarity", "both"):
        raise ConfigError(f'`kind` must be "geometric", "similarity" or "both", got {kind!r}')
    if views not in get_args(ViewKind):
        raise ConfigError(f"`views` must be one of {get_args(ViewKind)}, got {views!r}")
    return [
        Property(one.name, one.summary, one.check, one.examples(views), one.max_examples)
        for one in REGISTRY
        if kind in one.kinds
    ]


def matcher_kind(matcher: Matcher) -> MatcherKind:
    """Find out by trying what a matcher looks at: geometry, features or both.

    Args:
        matcher: what to try, on views of 2 × 3 tokens of two images.

    Returns:
        ``"geometric"``, ``"similarity"`` or ``"both"``: the first that it takes without an error.

    Raises:
        ConfigError: it takes none of them; the message has the three errors.

    Example:
        >>> from local_distill import NearestMatcher, SimilarityMatcher
        >>> matcher_kind(NearestMatcher()), matcher_kind(SimilarityMatcher())
        ('geometric', 'similarity')
    """
    size = torch.tensor([[16, 24]] * 2, dtype=torch.int32)
    geometry = CropGeometry(torch.eye(3).repeat(2, 1, 1), size, size)
    grid = TokenGrid.tiling(2, 3, (16, 24))
    features = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    tries: dict[MatcherKind, Tokens] = {
        "geometric": Tokens(None, geometry, grid),
        "similarity": Tokens(features, None, None),
        "both": Tokens(features, geometry, grid),
    }
    errors: dict[MatcherKind, Exception] = {}
    for kind, tokens in tries.items():
        try:
            matcher(tokens, tokens)
        except Exception as error:  # any error means that something is missing
            errors[kind] = error
        else:
            return kind
    said = "; ".join(f"{kind}: {type(e).__name__}: {e}" for kind, e in errors.items())
    raise ConfigError(
        f"`matcher` serves neither tokens with geometry (geometric), nor with features "
        f"(similarity), nor with both: {said}. Where its kind is clear, give it as kind=..."
    ) from errors["both"]


def _made(matcher: Any) -> Any:
    if not callable(matcher):
        raise ConfigError(
            "`matcher` must be a callable (student, teacher) -> Matches, or a class of such, got "
            f"{matcher!r}"
        )
    if not isinstance(matcher, type):
        return matcher
    try:
        return matcher()
    except TypeError as error:
        raise ConfigError(
            f"`matcher` is the class {matcher.__name__}, which cannot be made without arguments "
            f"({error}); give a made one: {matcher.__name__}(...)"
        ) from error
