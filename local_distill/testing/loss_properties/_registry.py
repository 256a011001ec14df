"""How the properties of losses are declared, and the examples that they are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor, nn

from local_distill.structures import Matches

LossKind = Literal["local", "global"]
LossFactory = Callable[[int], nn.Module]
Pair = tuple[int, int]

LOCAL: tuple[LossKind, ...] = ("local",)
GLOBAL: tuple[LossKind, ...] = ("global",)
ANY: tuple[LossKind, ...] = ("local", "global")


class LossExample(NamedTuple):
    """One step that a loss is tried on.

    Attributes:
        student_logits: per student view (b, s, c) for local losses, (b, c) for global ones.
        teacher_logits: per teacher view (b, t, c) or (b, c).
        matches: ``{(student view, teacher view): Matches}`` for local losses; None for global ones.
        pairs: (student view, teacher view) for global losses; None: those that the loss chooses.
        teacher_temp: the teacher's temperature.
        seed: of whatever else the property draws, such as a permutation.
    """

    student_logits: list[Tensor]
    teacher_logits: list[Tensor]
    matches: dict[Pair, Matches] | None = None
    pairs: list[Pair] | None = None
    teacher_temp: float = 0.1
    seed: int = 0

    def generator(self) -> torch.Generator:
        """A generator of the example's seed."""
        return torch.Generator().manual_seed(self.seed)


Check = Callable[[LossFactory, LossExample], None]


@dataclass(frozen=True)
class Declared:
    """A property of losses before their kind is known."""

    name: str
    summary: str
    check: Check
    kinds: tuple[LossKind, ...]
    max_examples: int | None

    def examples(self, kind: LossKind) -> SearchStrategy[LossExample]:
        """The strategy of its examples."""
        return loss_examples(kind)


REGISTRY: list[Declared] = []


def loss_property(
    *, kinds: tuple[LossKind, ...] = ANY, max_examples: int | None = None
) -> Callable[[Check], Check]:
    """Declare a property: its name is the function's, its summary the docstring's first line.

    Args:
        kinds: the kinds of losses that have to keep it.
        max_examples: at most so many, for a slow one or one whose examples are much alike.
    """

    def declare(check: Check) -> Check:
        summary = (check.__doc__ or "").strip().splitlines()[0]
        REGISTRY.append(Declared(check.__name__, summary, check, kinds, max_examples))
        return check

    return declare


@st.composite
def loss_examples(draw: DrawFn, kind: LossKind = "local") -> LossExample:
    """A step of one to three student and one or two teacher views of two or three images.

    In local ones every view has a token of which no match speaks, every image of every pair has a
    token with a match, and student and teacher views have different numbers of tokens.

    Args:
        draw: given by hypothesis.
        kind: of the loss.
    """
    b, c = draw(st.integers(2, 3)), draw(st.integers(2, 8))
    # The first of a list is what examples shrink to: two views on either side, as in training.
    teachers = draw(st.sampled_from([2, 1]))
    students = draw(st.sampled_from([2, 1, 3] if kind == "local" else [2, 3]))
    temp = draw(st.sampled_from([0.25, 0.1, 0.5]))
    seed = draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    if kind == "global":
        views = [_numbers((b, c), generator) for _ in range(students + teachers)]
        return LossExample(views[:students], views[students:], None, None, temp, seed)
    sizes = [draw(st.integers(2, 5)) for _ in range(students + teachers)]
    views = [_numbers((b, n, c), generator) for n in sizes]
    k = draw(st.integers(1, 3))
    pairs = [(v, q) for v in range(students) for q in range(teachers) if v != q] or [(0, 0)]
    matches = {(v, q): _matches(b, sizes[v], sizes[students + q], k, generator) for v, q in pairs}
    return LossExample(views[:students], views[students:], matches, None, temp, seed)


def _numbers(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal numbers with two decimals, which a snippet prints in full."""
    return (torch.randn(shape, generator=generator) * 100).round() / 100


def _matches(b: int, s: int, t: int, k: int, generator: torch.Generator) -> Matches:
    """Matches that leave the last student token and the last teacher token alone."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    index = torch.randint(0, t - 1, (b, s, k), generator=generator)
    weight = 0.1 + uniform(b, s, k)
    weight = weight / weight.sum(-1, keepdim=True) * (0.3 + 0.7 * uniform(b, s, 1))
    kept = uniform(b, s) > 0.3
    kept[:, 0], kept[:, -1] = True, False
    weight = (weight * kept[..., None] * 1000).round() / 1000
    cost = torch.where(kept, (uniform(b, s) * 100).round() / 100, torch.inf)
    return Matches(index, weight, cost)
