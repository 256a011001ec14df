"""One self-contained HTML page of a run: settings, health, curves, pictures, evaluations."""

from __future__ import annotations

from local_distill.training.report.report import report

__all__ = ["report"]
