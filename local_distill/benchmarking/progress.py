"""How far a run has come: tqdm's bar where it is installed, otherwise a line a case."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(label: str, turns: int) -> Iterator[Callable[[], None]]:
    """Gives what to call after each turn; writes to stderr, and takes its bar away at the end."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        print(f"measuring {label} …", file=sys.stderr, flush=True)
        yield lambda: None
        return
    with tqdm(total=turns, desc=label, leave=False) as bar:

        def advance() -> None:
            bar.update()

        yield advance
