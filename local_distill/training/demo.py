"""The demo: a tiny ViT learns the built-in scenes, and the figures and pictures to show it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from local_distill._check import check_at_least
from local_distill.matching import SimilarityMatcher
from local_distill.training.backbone_loading import load_backbone
from local_distill.training.commands import show, train
from local_distill.training.demo_method import demo_method
from local_distill.training.evaluation import extract_features, knn_accuracy, scene_tokens
from local_distill.training.methods.method import Method
from local_distill.training.options import BackboneOptions, SceneOptions
from local_distill.training.scenes import SyntheticScenes
from local_distill.training.views import eval_transform

__all__ = ["demo"]

_METHODS: dict[str, Callable[[], Method]] = {
    "none": lambda: demo_method(local=False),
    "similarity": lambda: demo_method(SimilarityMatcher()),
    "geometric": demo_method,
}
_COLUMNS = {
    "global_token": "global token",
    "mean_of_tokens": "mean of tokens",
    "tokens": "each token",
}


def demo(
    output: str = "runs/demo",
    matching: Literal["geometric", "similarity", "none", "all"] = "geometric",
    steps: int = 800,
    scenes: SceneOptions = SceneOptions(),
    train_count: int = 2000,
    test_count: int = 1000,
    seed: int = 0,
    workers: int = 1,
) -> dict[str, dict[str, float]]:
    """Train a tiny ViT on the built-in scenes and show what it learned.

    Ends with a table of k-NN accuracies (raw pixels, random backbone, trained backbone), the loss
    curve and a picture of the matches, all in the output folder. A run that was interrupted goes
    on where it stopped.

    Args:
        output: folder for the checkpoints, the figures and the pictures.
        matching: how patches are matched; none: no local loss; all: the three ways in turn.
        steps: optimiser steps of each training.
        scenes: the built-in scenes.
        train_count: so many scenes vote in the k-NN.
        test_count: so many held-out scenes are tested.
        seed: of weights, order and augmentations.
        workers: loader processes.

    Returns:
        Accuracy in [0, 1] by row and column of the table.
    """
    check_at_least("train_count", train_count, 1)
    check_at_least("test_count", test_count, 1)
    folder = Path(output)
    ways = list(_METHODS) if matching == "all" else [matching]
    # As many vote however few there are to learn from: that is a question about learning.
    voters = SyntheticScenes(train_count, scenes.size, seed=scenes.seed)
    tested = SyntheticScenes(test_count, scenes.size, seed=scenes.seed + 1)
    results = {
        "raw pixels": _raw_pixels(voters, tested, centered=False),
        "raw pixels less their mean": _raw_pixels(voters, tested, centered=True),
        "random backbone": _evaluate(None, voters, tested, scenes.size, seed),
    }
    runs: dict[str, Path] = {}
    for way in ways:
        run = runs[way] = folder / way
        print(f"training, {_name(way)}:")
        result = train(
            output=str(run),
            method=_METHODS[way](),
            scenes=scenes,
            steps=steps,
            seed=seed,
            workers=workers,
            resume=(run / "checkpoints").exists(),
            pictures=False,
            config={
                "matching": way,
                "steps": steps,
                "scenes": vars(scenes),
                "seed": seed,
                "backbone": vars(BackboneOptions()),
            },
        )
        if result.interrupted:
            raise KeyboardInterrupt
        results[f"trained, {_name(way)}"] = _evaluate(str(run), voters, tested, scenes.size, seed)
    shown = "geometric" if "geometric" in runs else ways[-1]
    _loss_curve(runs, folder / "losses.png")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(_table(results))
    print(
        f"results: {folder / 'results.json'}\nlosses:  {folder / 'losses.png'}\nmatches: ", end=""
    )
    show("scenes", str(folder / "matches.png"), checkpoint=str(runs[shown]), seed=1)
    return results


def _name(way: str) -> str:
    return {"none": "no local loss", "similarity": "similarity", "geometric": "geometry"}[way]


def _evaluate(
    checkpoint: str | None,
    voters: SyntheticScenes,
    tested: SyntheticScenes,
    size: int,
    seed: int,
) -> dict[str, float]:
    backbone = load_backbone(checkpoint, BackboneOptions(), seed)
    transform = eval_transform(size)
    many = extract_features(backbone, voters, transform, description="voting scenes")
    few = extract_features(backbone, tested, transform, description="tested scenes")
    voting = scene_tokens(backbone, voters, transform, most=10_000, description="voting tokens")
    dense = scene_tokens(backbone, tested, transform, most=4_000, description="tested tokens")
    return {
        "global_token": knn_accuracy(many[0], many[2], few[0], few[2]),
        "mean_of_tokens": knn_accuracy(many[1], many[2], few[1], few[2]),
        "tokens": knn_accuracy(*voting, *dense),
    }


def _raw_pixels(
    voters: SyntheticScenes, tested: SyntheticScenes, *, centered: bool
) -> dict[str, float]:
    """k-NN on the pixels: the whole image is the feature."""

    def pixels(scenes: SyntheticScenes) -> tuple[Tensor, list[int]]:
        flat = torch.stack([scenes.scene(i).image.flatten().float() for i in range(len(scenes))])
        return flat - flat.mean(1, keepdim=True) * centered, scenes.targets

    return {"global_token": knn_accuracy(*pixels(voters), *pixels(tested))}


def _table(results: dict[str, dict[str, float]]) -> str:
    width = max(map(len, results)) + 2
    head = "k-NN accuracy".ljust(width) + "".join(f"{title:>16}" for title in _COLUMNS.values())
    lines = [head, "-" * len(head)]
    for name, row in results.items():
        cells = [f"{row[column]:.3f}" if column in row else "" for column in _COLUMNS]
        lines.append(name.ljust(width) + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def _loss_curve(runs: dict[str, Path], target: Path) -> None:
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = {
        "global_loss": "global loss (nats)",
        "local_loss": "local loss (nats)",
        "teacher_entropy": "entropy of the teacher (nats)",
    }
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for way, run in runs.items():
            lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            points = [(row["step"], row[key]) for row in rows if key in row]
            if not points:
                continue
            x, y = np.array(points).T
            panel.plot(x, y, linewidth=1.5, label=_name(way))
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(str(target), dpi=110)
