"""How the properties of matchers are declared, and the examples that they are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from local_distill.structures import Matcher, Tokens
from local_distill.testing.same_cells import same_cell_pairs
from local_distill.testing.strategies import ViewKind, view_pairs

MatcherKind = Literal["geometric", "similarity", "both"]
GEOMETRIC: tuple[MatcherKind, ...] = ("geometric", "both")
SIMILARITY: tuple[MatcherKind, ...] = ("similarity", "both")
ANY: tuple[MatcherKind, ...] = ("geometric", "similarity", "both")


class MatcherExample(NamedTuple):
    """What a matcher is tried on.

    Attributes:
        student: tokens of the student's view, with features and geometry.
        teacher: tokens of the teacher's view of the same images.
        seed: of whatever else the property draws, such as a permutation.
    """

    student: Tokens
    teacher: Tokens
    seed: int = 0

    def generator(self) -> torch.Generator:
        """A generator of the example's seed."""
        return torch.Generator().manual_seed(self.seed)


Check = Callable[[Matcher, MatcherExample], None]


@dataclass(frozen=True)
class Declared:
    """A property of matchers before the kind of views is known."""

    name: str
    summary: str
    check: Check
    kinds: tuple[MatcherKind, ...]
    padding: float
    max_examples: int | None
    same_cells: bool = False

    def examples(self, views: ViewKind) -> SearchStrategy[MatcherExample]:
        """The strategy of its examples."""
        if self.same_cells:
            return same_cell_examples()
        return matcher_examples(views, padding=self.padding)


REGISTRY: list[Declared] = []


def matcher_property(
    *,
    kinds: tuple[MatcherKind, ...] = ANY,
    padding: float = 0.0,
    max_examples: int | None = None,
    same_cells: bool = False,
) -> Callable[[Check], Check]:
    """Declare a property: its name is the function's, its summary the docstring's first line.

    Args:
        kinds: the kinds of matchers that have to keep it.
        padding: how far the examples' crops reach out of the source, in pixels.
        max_examples: at most so many, for a slow one.
        same_cells: its examples are those of `same_cell_pairs`, whichever kind of views is served.
    """

    def declare(check: Check) -> Check:
        summary = (check.__doc__ or "").strip().splitlines()[0]
        name = check.__name__
        REGISTRY.append(Declared(name, summary, check, kinds, padding, max_examples, same_cells))
        return check

    return declare


@st.composite
def matcher_examples(
    draw: DrawFn, views: ViewKind = "crop", *, padding: float = 0.0
) -> MatcherExample:
    """Two views in general position, with features and geometry, and a seed.

    Args:
        draw: given by hypothesis.
        views: see `crop_geometries`.
        padding: how far crops reach out of the source, in pixels.
    """
    dim = draw(st.integers(3, 6))
    pair = view_pairs(views, padding=padding, max_side=4, dim=dim, general_position=True)
    student, teacher = draw(pair)
    return MatcherExample(student, teacher, draw(st.integers(0, 999)))


@st.composite
def same_cell_examples(draw: DrawFn) -> MatcherExample:
    """Two shifted views of equal cells, with features and geometry, and a seed.

    Args:
        draw: given by hypothesis.
    """
    student, teacher = draw(same_cell_pairs(dim=draw(st.integers(3, 6))))
    return MatcherExample(student, teacher, draw(st.integers(0, 999)))
