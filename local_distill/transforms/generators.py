"""The global random generators that pipelines draw from: torch's, NumPy's and Python's."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

__all__ = ["generator_states", "generators_kept", "seed_generators"]


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Puts the generators back as they were."""
    # numpy's old global generator is what many pipelines draw from
    states = np.random.get_state(), random.getstate()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if _cuda_in_use() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(states[0])  # noqa: NPY002
        random.setstate(states[1])


def seed_generators(seed: int) -> None:
    """Seeds them all alike."""
    # torch.manual_seed would queue a seed for a GPU that is not in use yet
    torch.default_generator.manual_seed(seed)
    if _cuda_in_use():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def generator_states() -> tuple[Any, ...]:
    """The states of the CPU's generators, to be compared with ``==``."""
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    torch_state = torch.get_rng_state().numpy().tobytes()
    return torch_state, random.getstate(), name, np.asarray(keys).tobytes(), *rest


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
