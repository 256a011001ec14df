"""How the properties of targets are declared, and the examples that they are tried on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor, nn

from local_distill.structures import TeacherTargets
from local_distill.testing.properties import Property, ensure

TargetsFactory = Callable[[int], nn.Module]


class TargetsExample(NamedTuple):
    """What targets are tried on.

    Attributes:
        teacher_logits: per view (b, c) or (b, t, c).
        later: the same of a later step.
        teacher_temp: the teacher's temperature.
        seed: of whatever else the property draws, such as a permutation.
    """

    teacher_logits: list[Tensor]
    later: list[Tensor]
    teacher_temp: float = 0.1
    seed: int = 0

    def generator(self) -> torch.Generator:
        """A generator of the example's seed."""
        return torch.Generator().manual_seed(self.seed)


Check = Callable[[TargetsFactory, TargetsExample], None]


@st.composite
def targets_examples(draw: DrawFn) -> TargetsExample:
    """Two steps of one or two teacher views, of whole views or of tokens, with a mean that counts.

    Args:
        draw: given by hypothesis.
    """
    b, c = draw(st.integers(2, 3)), draw(st.integers(2, 8))
    local = draw(st.sampled_from([True, False]))
    views = draw(st.sampled_from([2, 1, 3]))
    sizes = [draw(st.integers(2, 4)) for _ in range(views)]
    temp, seed = draw(st.sampled_from([0.25, 0.1, 0.5])), draw(st.integers(0, 999))
    generator = torch.Generator().manual_seed(seed)
    tilt = torch.linspace(-0.5, 1.5, c)

    def numbers(n: int) -> Tensor:
        shape = (b, n, c) if local else (b, c)
        # two decimals: a snippet prints them in full
        return ((torch.randn(shape, generator=generator) + tilt) * 100).round() / 100

    first, later = [numbers(n) for n in sizes], [numbers(n) for n in sizes]
    return TargetsExample(first, later, temp, seed)


REGISTRY: list[Property] = []


def targets_property(*, max_examples: int | None = None) -> Callable[[Check], Check]:
    """Declare a property: its name is the function's, its summary the docstring's first line.

    Args:
        max_examples: at most so many, for a slow one or one whose examples are much alike.
    """

    def declare(check: Check) -> Check:
        summary = (check.__doc__ or "").strip().splitlines()[0]
        name = check.__name__
        REGISTRY.append(Property(name, summary, check, targets_examples(), max_examples))
        return check

    return declare


def make(factory: TargetsFactory, example: TargetsExample, c: int | None = None) -> Any:
    """Targets in their first state, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(example.seed)
        targets = factory(example.teacher_logits[0].shape[-1] if c is None else c)
    ensure(isinstance(targets, nn.Module), f"the factory gave {type(targets).__name__}, no Module")
    return targets


def updated(factory: TargetsFactory, example: TargetsExample) -> Any:
    """Targets after one update."""
    targets = make(factory, example)
    targets.update(example.teacher_logits)
    return targets


def probs_of(targets: Any, logits: list[Tensor], temp: float) -> list[Tensor]:
    """The distributions of all views."""
    made: list[TeacherTargets] = targets(logits, teacher_temp=temp)
    return [each.probs() for each in made]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all tensors that a checkpoint would hold."""
    return {
        name: part.detach().clone()
        for name, part in module.state_dict().items()
        if isinstance(part, Tensor)
    }


def numbers_of(module: nn.Module) -> dict[str, Tensor]:
    """The floating-point part of the state: not its counters."""
    return {name: part for name, part in state_of(module).items() if part.is_floating_point()}


def ensure_same_state(
    found: dict[str, Tensor], wanted: dict[str, Tensor], what: str, *, atol: float = 0.0
) -> None:
    """Refuse states that differ by more than ``atol``, and those that hold a NaN."""
    ensure(list(found) == list(wanted), f"{what}: the state holds {list(found)}")
    for name, part in found.items():
        same = part.shape == wanted[name].shape and torch.allclose(
            part.double(), wanted[name].double(), rtol=atol, atol=atol
        )
        ensure(same, f"{what}: `{name}` is {part.tolist()} instead of {wanted[name].tolist()}")


def ensure_same_probs(
    found: list[Tensor], wanted: list[Tensor], what: str, *, atol: float = 1e-5
) -> None:
    """Refuse distributions that differ by more than ``atol``, naming the view."""
    ensure(len(found) == len(wanted), f"{what}: {len(found)} views instead of {len(wanted)}")
    for view, (one, two) in enumerate(zip(found, wanted, strict=True)):
        shapes = f"{tuple(one.shape)} instead of {tuple(two.shape)}"
        ensure(one.shape == two.shape, f"{what}: view {view} has shape {shapes}")
        off = float((one.double() - two.double()).abs().nan_to_num(torch.inf).max())
        ensure(off <= atol, f"{what}: probs of view {view} are off by {off:.3g}")
