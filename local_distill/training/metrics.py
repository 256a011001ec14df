"""What a run tells: a progress bar, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from tqdm.auto import tqdm

from local_distill.losses.monitors import distillation_monitors, feature_std
from local_distill.structures import Matches
from local_distill.training.methods.method import StepTerms
from local_distill.training.progress import Progress

__all__ = ["RunLog", "match_coverage", "step_values"]

# What is shown beside the bar, where it is there; the file has all.
_SHOWN = {
    "loss": "loss",
    "global_loss": "global",
    "local_loss": "local",
    "intermediate_loss": "lower",
    "coverage": "coverage",
    "teacher_entropy": "entropy",
}


class RunLog:
    """Writes a run's numbers to its folder and its progress to the terminal.

    Args:
        folder: gets ``metrics.jsonl`` and TensorBoard's event files.
        total: steps of the whole run.
        start: the first step of this call; later lines of an interrupted run are cut off.
        enabled: False on all processes but the first.
    """

    def __init__(self, folder: Path, *, total: int, start: int = 0, enabled: bool = True) -> None:
        self.enabled = enabled
        self._bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not enabled,
            # a log file keeps every redraw: a few are enough there
            mininterval=0.1 if sys.stderr.isatty() else 10.0,
        )
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= start]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._stream = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder), purge_step=start + 1)

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record all values, and show a few of them beside the bar."""
        if not self.enabled:
            return
        self._bar.set_postfix(
            {short: f"{values[name]:.3g}" for name, short in _SHOWN.items() if name in values},
            refresh=sys.stderr.isatty(),
        )
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self.enabled:
            self._bar.write(text)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if self.enabled:
            self._stream.close()
            self._board.close()


def match_coverage(matches: Mapping[tuple[int, int], Matches]) -> float:
    """Share of the student tokens that have a match, over all pairs of views.

    Example:
        >>> round(match_coverage({(0, 1): Matches.identity(torch.tensor([[True, False]]))}), 2)
        0.5
    """
    flags = [found.matched.flatten() for found in matches.values()]
    return float(torch.cat(flags).float().mean()) if flags else 0.0


@torch.no_grad()
def step_values(
    terms: StepTerms, now: Progress, more: Mapping[str, float | Tensor]
) -> dict[str, float]:
    """All that is to be logged of a step, by name: its loss and parts, matches, signs of collapse.

    Args:
        terms: of this process.
        now: the step.
        more: learning rate and the like.
    """
    values: dict[str, float | Tensor] = {"epoch": now.epoch, "loss": terms.loss, **terms.values}
    if terms.matches:
        values["coverage"] = match_coverage(terms.matches)
    if terms.targets:
        values.update(distillation_monitors(terms.targets, terms.features or None).as_dict())
    elif terms.features:
        values["feature_std"] = feature_std(terms.features)
    values.update(more)
    return {name: float(value) for name, value in values.items()}


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    # A killed run may have left half a line at the end.
    return [line for line in lines if line.startswith("{") and line.endswith("}")]
