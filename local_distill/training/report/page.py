"""The page: sections in the order in which one asks about a run."""

from __future__ import annotations

import base64
import hashlib
import platform
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from local_distill import __version__
from local_distill.training.report.curves import metric_panels, with_own_ids
from local_distill.training.report.evaluations import evaluation_html, legend, side_by_side
from local_distill.training.report.health import entropy_limit, find
from local_distill.training.report.html import (
    bytes_text,
    flat,
    image_uri,
    number_text,
    table,
    text,
)
from local_distill.training.report.read_run import Picture, RunRecord

__all__ = ["page"]

# A page holds so many pictures of a kind; of longer runs, evenly many of them are shown.
_MOST_PICTURES = 24
_MOST_BAD_IMAGES = 200

_KINDS = {
    "matches": (
        "Matches over training",
        "The same image and views at each step. Geometric matches say where a token truly lies in "
        "the other view; similarity matches are the teacher's own: the nearer they come to the "
        "geometric ones, the better its tokens know where they are.",
    ),
    "tokens": (
        "Patch tokens over training",
        "The first three principal components of the teacher's patch tokens as red, green and "
        "blue, over all images shown: tokens of one colour are alike to the network. Colours are "
        "made anew at each step, so follow what is told apart, not the hue.",
    ),
}


def page(run: RunRecord) -> str:
    """The whole page as text.

    Args:
        run: what `read_run` gave.

    Example:
        >>> from pathlib import Path
        >>> run = RunRecord(Path("runs/x"), [{"step": 1, "loss": 2.5}], None, {}, {}, None, {}, [])
        >>> html = page(run)
        >>> "2.5" in html, "no evaluation yet" in html
        (True, True)
    """
    sections = [
        ("health", "Health", _health(run)),
        ("curves", "Curves", _curves(run)),
        *((kind, *_pictures(run, kind)) for kind in _kinds(run)),
        ("evaluation", "Evaluation", _evaluation(run)),
        ("data", "Bad images", _bad_images(run)),
        ("checkpoints", "Checkpoints", _checkpoints(run)),
        ("settings", "Settings", _settings(run)),
    ]
    files = resources.files(__package__)
    style = files.joinpath("page.css").read_text(encoding="utf-8")
    script = files.joinpath("page.js").read_text(encoding="utf-8")
    # Nothing is fetched, and no script but this one runs, whatever a file's name may hold.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    name = run.folder.resolve().name
    links = "".join(
        f'<li><a href="#{text(key)}">{text(title.partition(" over ")[0])}</a></li>'
        for key, title, _ in sections
    )
    body = "\n".join(
        f'<section id="{text(key)}" class="part"><h2>{text(title)}</h2>\n{content}</section>'
        for key, title, content in sections
    )
    body = with_own_ids(body)
    versions = f"local_distill {__version__}, torch {torch.__version__}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{text(name)} – local_distill</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
<h1>{text(name)}</h1>
<p class="soft">{text(_summary(run))}</p>
{_facts(run)}
</header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{body}
</main>
<footer>Written with {text(versions)}, Python {text(platform.python_version())}.
Run: <code>{text(run.folder)}</code></footer>
<script>{script}</script>
</body>
</html>
"""


def _kinds(run: RunRecord) -> list[str]:
    return [*_KINDS, *(kind for kind in run.pictures if kind not in _KINDS)]


def _summary(run: RunRecord) -> str:
    config = run.config or {}
    method = _short(config.get("method") or config.get("matcher"))
    backbone = config.get("backbone")
    name = backbone.get("name") if isinstance(backbone, dict) else backbone
    parts = [part for part in (method, name) if part]
    data = config.get("data")
    said = " · ".join(map(str, parts))
    on = f" on {data}" if data else ""
    return f"{said}{on}" if said or on else "A run of local self-distillation."


def _facts(run: RunRecord) -> str:
    last, config = run.metrics[-1], run.config or {}
    planned = config.get("steps")
    step = f"{last['step']:,}" + (f" of {planned:,}" if isinstance(planned, int) else "")
    facts: list[tuple[str, Any]] = [("step", step)]
    epochs = config.get("epochs")
    if "epoch" in last:
        of = f" of {number_text(epochs)}" if epochs else ""
        facts.append(("epoch", f"{number_text(last['epoch'])}{of}"))
    names = ("loss", "global_loss", "local_loss", "coverage", "teacher_entropy", "lr")
    facts += [(name, last[name]) for name in names if name in last]
    if "batch_size" in config:
        facts.append(("batch size", config["batch_size"]))
    cells = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(number_text(value))}</dd></div>"
        for name, value in facts
    )
    return f'<dl class="facts">{cells}</dl>'


def _health(run: RunRecord) -> str:
    items = "".join(
        f'<li class="{found.level}"><b>{text(found.title)}</b><span>{text(found.text)}</span></li>'
        for found in find(run)
    )
    return f'<ul class="findings">{items}</ul>'


def _curves(run: RunRecord) -> str:
    limit = entropy_limit(run)
    panels = metric_panels(run.metrics, entropy_limit=limit)
    figures = "".join(
        f'<figure class="panel"><figcaption>{text(panel.title)}</figcaption>{panel.svg}'
        f"{legend(panel.curves)}</figure>\n"
        for panel in panels
    )
    notes = ["The number beside a name is the last one logged."]
    if limit is not None:
        notes.append(
            f"Dashed: ln c = {limit:.4g}, the entropy of a teacher that gives all prototypes alike."
        )
    return f'<div class="panels">{figures}</div><p class="soft">{text(" ".join(notes))}</p>'


def _pictures(run: RunRecord, kind: str) -> tuple[str, str]:
    title, explained = _KINDS.get(kind, (kind, ""))
    found = run.pictures.get(kind, [])
    shown, failed, tiles = _evenly(found), [], []
    for picture in shown:
        try:
            uri, width, height = image_uri(picture.path)
        except OSError as error:
            failed.append(f"{picture.path.name}: {error}")
            continue
        label = f"step {picture.step:,}"
        tiles.append(
            f'<figure data-step="{text(label)}"><img src="{uri}" width="{width}" height="{height}" '
            f'alt="{text(title)}, {text(label)}">'
            f"<figcaption>{text(label)}</figcaption></figure>"
        )
    pieces = [f"<p class=soft>{text(explained)}</p>"] if explained else []
    if not tiles:
        pieces.append(_missing("no pictures yet: they are drawn while a run trains"))
    else:
        stepper = (
            '<div class="stepper" hidden><button type="button" aria-label="earlier">←</button>'
            f'<input type="range" min="0" step="1" aria-label="{text(title)}">'
            '<button type="button" aria-label="later">→</button><output></output></div>'
        )
        pieces.append(
            f'<div class="card frames {text(kind)}">{stepper}<div>{"".join(tiles)}</div></div>'
        )
    if len(shown) < len(found):
        pieces.append(f'<p class="soft">{len(shown)} of {len(found)} pictures are shown.</p>')
    if failed:
        pieces.append(_missing(f"pictures that cannot be read: {'; '.join(failed)}"))
    return title, "\n".join(pieces)


def _evenly(pictures: Sequence[Picture]) -> list[Picture]:
    count = min(len(pictures), _MOST_PICTURES)
    if count < 2:
        return list(pictures)
    return [pictures[round(i * (len(pictures) - 1) / (count - 1))] for i in range(count)]


def _evaluation(run: RunRecord) -> str:
    if not run.evaluations:
        return _missing(f"no evaluation yet: local-distill eval --checkpoint {run.folder}")
    plots = {
        name: "".join(_plot(path) for path in run.evaluation_plots.get(name, []))
        for name in run.evaluations
    }
    return side_by_side(run.evaluations) + "".join(
        f"<h3>{text(name)}</h3>{evaluation_html(value)}{plots[name]}"
        for name, value in run.evaluations.items()
    )


def _plot(path: Path) -> str:
    try:
        uri, width, height = image_uri(path)
    except OSError as error:
        return _missing(f"{path.name} cannot be read: {error}")
    return (
        f'<figure class="card plot"><img src="{uri}" width="{width}" height="{height}" '
        f'alt="{text(path.stem)}"></figure>'
    )


def _bad_images(run: RunRecord) -> str:
    if run.bad_images is None:
        return "<p>None were reported.</p>"
    if not run.bad_images:
        return "<p>There is a report, and it is empty.</p>"
    lines = run.bad_images[:_MOST_BAD_IMAGES]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    rows = [[str(number_text(line.get(name, ""))) for name in columns] for line in lines]
    count = len(run.bad_images)
    more = count - len(lines)
    rest = f'<p class="soft">{more} more: see bad_images.jsonl.</p>' if more else ""
    return (
        f"<p>{count} reported; other images stood in for them.</p>"
        + table(columns, rows, labels=len(columns))
        + rest
    )


def _checkpoints(run: RunRecord) -> str:
    if not run.checkpoints:
        return _missing("no checkpoint yet")
    rows = [
        (name, "–" if s is None else s, bytes_text(b)) for name, (s, b) in run.checkpoints.items()
    ]
    return table(["file", "step", "size"], rows)


def _settings(run: RunRecord) -> str:
    if run.config is None:
        return _missing("no settings: the folder holds no config.yaml that can be read")
    rows = [(name, _setting(value)) for name, value in flat(run.config)]
    return table(["setting", "value"], rows, labels=2, kind="settings")


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else ("null" if value is None else str(value))


def _short(value: Any) -> str:
    """The last part of an import path, of a class or of a setting that names one."""
    if isinstance(value, dict):
        value = value.get("class_path")
    return value.rpartition(".")[2] if isinstance(value, str) else ""


def _missing(what: str) -> str:
    return f'<p class="missing">{text(what)}</p>'
