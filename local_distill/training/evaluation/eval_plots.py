"""Plots of an evaluation: accuracy by layer, and how far matches lie from the true place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from local_distill.errors import ConfigError, require_extra
from local_distill.training.evaluation.correspondence import CorrespondenceErrors

__all__ = ["plot_correspondence", "plot_layers"]

_NAMES = {"global_token": "global token", "mean_of_tokens": "mean of patch tokens"}
_COLOURS = {"global_token": "#0072b2", "mean_of_tokens": "#d55e00"}
_TITLES = {"knn": "k-NN vote", "linear": "linear probe"}


def plot_layers(
    layers: dict[str, list[float]], target: Path | None = None, *, majority: float | None = None
) -> Any:
    """Accuracy by layer: one panel a kind of test, one line a kind of token.

    Args:
        layers: `Evaluation.layers`.
        target: a PNG to write; its folder is made. None: nothing is written.
        majority: accuracy of the commonest class, drawn as a line.

    Returns:
        The matplotlib ``Figure``.

    Raises:
        ConfigError: no layers.

    Example:
        >>> curves = {"knn/global_token": [0.2, 0.4], "linear/global_token": [0.3, 0.5]}
        >>> figure = plot_layers(curves)
        >>> [panel.get_title() for panel in figure.axes]
        ['k-NN vote', 'linear probe']
    """
    if not layers:
        raise ConfigError('`layers` is empty: evaluate with the task "layers"')
    figure_class = require_extra("matplotlib.figure", "train").Figure
    kinds = list(dict.fromkeys(key.partition("/")[0] for key in layers))
    figure = figure_class(figsize=(1.2 + 3.8 * len(kinds), 3.6), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for panel, kind in zip(panels, kinds, strict=True):
        for token, name in _NAMES.items():
            curve = layers.get(f"{kind}/{token}", [])
            if curve:
                x = np.arange(1, len(curve) + 1)
                panel.plot(x, curve, "o-", color=_COLOURS[token], label=name)
                panel.set_xticks(x if len(x) <= 12 else x[::4])
        if majority is not None:
            panel.axhline(majority, color="0.5", linestyle=":", label="commonest class")
        panel.set_title(_TITLES.get(kind, kind), fontsize=10)
        panel.set_xlabel("layer")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    panels[0].legend(fontsize=8)
    _save(figure, target)
    return figure


def plot_correspondence(errors: CorrespondenceErrors, target: Path | None = None) -> Any:
    """Histogram of the errors, and the share of tokens within each radius, beside chance.

    Args:
        errors: of `correspondence_errors`.
        target: a PNG to write; its folder is made. None: nothing is written.

    Returns:
        The matplotlib ``Figure``.

    Example:
        >>> import torch
        >>> errors = CorrespondenceErrors(torch.rand(50), 3 * torch.rand(50), None)
        >>> len(plot_correspondence(errors).axes)
        2
    """
    figure_class = require_extra("matplotlib.figure", "train").Figure
    figure = figure_class(figsize=(8.8, 3.6), layout="constrained")
    histogram, shares = figure.subplots(1, 2)
    lines = (
        ("features", errors.features, "#0072b2", "-"),
        ("same place in the view", errors.same_place, "#d55e00", "--"),
        ("chance", errors.chance, "0.5", ":"),
    )
    reach = float(np.quantile(errors.chance.numpy(), 0.99)) or 1.0
    edges = np.linspace(0, reach, 41)
    for name, part, colour, style in lines:
        if part is None:
            continue
        values = part.numpy()
        # what lies beyond the axis, +inf too, stands in the last bin: nothing is left out
        counts, _ = np.histogram(values.clip(0, reach), edges)
        histogram.stairs(counts / len(values), edges, color=colour, linestyle=style, label=name)
        within = np.searchsorted(np.sort(values), edges, side="right") / len(values)
        shares.plot(edges, within, color=colour, linestyle=style, label=name)
    histogram.set_ylabel("share of tokens")
    histogram.set_title("error (the last bin holds all beyond)", fontsize=10)
    shares.set_ylabel("share of tokens within it")
    shares.set_title("cumulated", fontsize=10)
    shares.set_ylim(0, 1.02)
    for panel in (histogram, shares):
        panel.set_xlabel("distance from the true place / larger cell diagonal")
        panel.grid(alpha=0.3)
        panel.set_xlim(0, reach)
    shares.legend(fontsize=8)
    _save(figure, target)
    return figure


def _save(figure: Any, target: Path | None) -> None:
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(str(target), dpi=110)
