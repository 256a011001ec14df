"""What ``local-distill report RUN`` does."""

from __future__ import annotations

import os
from pathlib import Path

from local_distill.errors import ConfigError
from local_distill.training.report.page import page
from local_distill.training.report.read_run import read_run

__all__ = ["report"]


def report(run: str, output: str | None = None) -> Path:
    r"""Write one HTML page of a run: settings, health, curves, pictures, evaluations.

    Everything is in the one file, which opens by a double click and fetches nothing. The run may
    still be going on.

    Args:
        run: the folder of the run, the --output of `train`.
        output: the file to write; null: report.html in the run's folder.

    Returns:
        The file written.

    Raises:
        DataError: the folder is missing, or holds no metrics.
        ConfigError: ``output`` does not end in .html, or cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        ...     path = report(folder)
        ...     path.name, path.read_text()[:15]
        /...report.html
        ('report.html', '<!doctype html>')
    """
    record = read_run(run)
    target = record.folder / "report.html" if output is None else Path(output)
    if target.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"`output` must end in .html, got {output!r}")
    html = page(record)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_text(html, encoding="utf-8")
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"`output` {str(target)!r} cannot be written: {error}") from error
    print(target)
    return target
