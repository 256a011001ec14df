"""Steps without a finite gradient, of which a run survives a few."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from local_distill.errors import LocalDistillError

__all__ = ["SpoiltSteps"]


class SpoiltSteps:
    """Tells of steps whose gradient was not finite, and ends a run that does not recover.

    Args:
        output: the run's folder, for the message.
        say: prints a line.
        most: so many in a row end the run.

    Attributes:
        total: how many there were.

    Example:
        >>> spoilt = SpoiltSteps(Path("runs/x"), say=print)
        >>> spoilt.count(7, finite=False)
        step 7: the gradient is not finite, skipped
        >>> spoilt.count(8, finite=True)
        >>> spoilt.total
        1
    """

    def __init__(self, output: Path, say: Callable[[str], None], *, most: int = 50) -> None:
        self.output, self.say, self.most = output, say, most
        self.total = self._in_a_row = 0

    def count(self, step: int, *, finite: bool) -> None:
        """Note one step.

        Args:
            step: its number.
            finite: whether its gradient was.

        Raises:
            LocalDistillError: it was the last of too many in a row.
        """
        if finite:
            self._in_a_row = 0
            return
        self.total += 1
        self._in_a_row += 1
        self.say(f"step {step}: the gradient is not finite, skipped")
        if self._in_a_row == self.most:
            raise LocalDistillError(
                f"the gradient was not finite for {self.most} steps in a row, up to step {step}; "
                f"`output` {str(self.output)!r} holds the last good checkpoint: lower optim.lr, or "
                "look at the data"
            )
