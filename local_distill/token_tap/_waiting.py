"""Forwards of a tapped backbone whose tokens nobody has taken yet."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Forward(NamedTuple):
    """One forward of views of one size: their (b, height, width), and what the modules gave."""

    images: tuple[int, int, int]
    output: Tensor
    layers: tuple[Tensor, ...]


class Waiting:
    """The forwards that wait to be taken: this one, and those before it.

    A chain rather than a list: torch.compile looks into a list that it appends to, which makes the
    tokens of earlier forwards inputs of the graph, and compiles one for each length.
    """

    def __init__(self, before: Waiting | None, forward: Forward | None) -> None:
        self.before, self.forward = before, forward
        self.count: int = 0 if before is None else before.count + 1

    def forwards(self) -> list[Forward]:
        """In the order in which they ran."""
        found, link = [], self
        while link.before is not None and link.forward is not None:
            found.append(link.forward)
            link = link.before
        return found[::-1]
