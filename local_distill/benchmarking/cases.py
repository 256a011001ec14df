"""What is measured: cases, each of one question and the ways of answering it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from local_distill.structures import Matcher

__all__ = ["Case", "Settings", "Way", "Work"]

# One call of it is what is timed. Its result is kept until it has been measured, then dropped.
Way = Callable[[], object]


class Work(NamedTuple):
    """What a question takes, whichever way it is answered; by formula.

    Attributes:
        flops: additions, multiplications, comparisons and exponentials, each as one; leading terms.
        bytes: input that has to be read once, and output that has to be written once.
    """

    flops: float
    bytes: float


class Case(NamedTuple):
    """One question, the ways of answering it, and what it takes at least.

    A suite is a function from `Settings` to an iterable of these; it makes one after the other, so
    that the tensors of two cases need not fit into memory together.

    Attributes:
        suite: the suite's name.
        name: the question and its sizes; different from all others of the suite.
        ways: callables by name, without arguments. What they keep from call to call, such as
            gradients of parameters, would be memory of the call before: ask `torch.autograd.grad`.
        reference: which of the ways the others are compared with.
        work: flops and bytes of the question.
        check: called once, before anything is timed; gives why ways are not to be measured, by
            name, where they do not agree with the reference. What it raises ends the run.
    """

    suite: str
    name: str
    ways: Mapping[str, Way]
    reference: str
    work: Work
    check: Callable[[], Mapping[str, str] | None] | None = None


class Settings(NamedTuple):
    """What the suites make their cases of.

    Attributes:
        sizes: names out of `SIZES`; None: the suite's own choice.
        batch: images.
        prototypes: c.
        device: where.
        dtype: of features, logits and prototypes; geometry stays float32.
        matchers: the user's own, by the name they were given by.
        quick: small inputs, for a first look and for CI.
    """

    sizes: tuple[str, ...] | None
    batch: int
    prototypes: int
    device: torch.device
    dtype: torch.dtype
    matchers: Mapping[str, Matcher]
    quick: bool = False
