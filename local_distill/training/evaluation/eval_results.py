"""An evaluation as a table to read and as JSON to keep."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from local_distill import __version__
from local_distill.training.evaluation.tasks import Evaluation

__all__ = ["evaluation_record", "evaluation_table", "write_json"]

# What a number says, and the number that stands for knowing nothing.
_ROWS = {
    "knn/global_token": ("k-NN accuracy, global token", "knn/majority"),
    "knn/mean_of_tokens": ("k-NN accuracy, mean of patch tokens", "knn/majority"),
    "linear/global_token": ("linear accuracy, global token", "linear/majority"),
    "linear/mean_of_tokens": ("linear accuracy, mean of patch tokens", "linear/majority"),
    "dense/accuracy": ("token k-NN, accuracy", "dense/majority_accuracy"),
    "dense/miou": ("token k-NN, mIoU", "dense/majority_miou"),
    "segmentation/accuracy": ("segmentation, pixel accuracy", "segmentation/majority_accuracy"),
    "segmentation/miou": ("segmentation, mIoU", "segmentation/majority_miou"),
    **{
        f"correspondence/{measure}": (title, f"correspondence/chance_{measure}")
        for measure, title in {
            "median": "correspondence error, median (cells)",
            "mean": "correspondence error, mean (cells)",
            "within_0.5": "  within 0.5 cells",
            "within_1": "  within 1 cell",
            "within_2": "  within 2 cells",
        }.items()
    },
}
_LAYERS = {
    "knn/global_token": "k-NN, global token",
    "knn/mean_of_tokens": "k-NN, mean of tokens",
    "linear/global_token": "linear, global token",
    "linear/mean_of_tokens": "linear, mean of tokens",
}


def evaluation_table(found: Evaluation) -> str:
    """The numbers as text, each beside what it is without any features.

    Args:
        found: of `evaluate_backbone`.

    Returns:
        Several lines. "level" is the score of always answering the commonest class, or of a teacher
        token drawn at random; "same place" that of the token at the same place in the other view.

    Example:
        >>> found = Evaluation({"knn/global_token": 0.5, "knn/majority": 0.1}, {}, None, {}, {})
        >>> print(evaluation_table(found))
        measure                                   value    level
        --------------------------------------------------------
        k-NN accuracy, global token              0.5000   0.1000
    """
    numbers = found.numbers
    placed = any(key.startswith("correspondence/same_place") for key in numbers)
    head = f"{'measure':<38}{'value':>9}{'level':>9}" + f"{'same place':>12}" * placed
    lines = [head, "-" * len(head)] if any(key in numbers for key in _ROWS) else []
    for key, (title, level) in _ROWS.items():
        if key not in numbers:
            continue
        line = f"{title:<38}{numbers[key]:>9.4f}"
        line += f"{numbers[level]:>9.4f}" if level in numbers else ""
        place = numbers.get(key.replace("correspondence/", "correspondence/same_place_"))
        by_place = key.startswith("correspondence/") and place is not None
        lines.append(line + (f"{place:>12.4f}" if by_place else ""))
    if found.layers:
        depth = max(map(len, found.layers.values()))
        title = "accuracy by layer"
        head = f"{title:<24}" + "".join(f"{i:>7}" for i in range(1, depth + 1))
        lines += ([""] if lines else []) + [head, "-" * len(head)]
        for key, curve in found.layers.items():
            cells = "".join(f"{value:>7.3f}" for value in curve)
            lines.append(f"{_LAYERS.get(key, key):<24}{cells}")
    return "\n".join(lines)


def evaluation_record(found: Evaluation, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything that is to be kept, as JSON-able values.

    Args:
        found: of `evaluate_backbone`.
        settings: what was asked for.

    Returns:
        "version", "settings", "numbers", "layers", "counts" and "seconds"; numbers that are not
        finite are None.

    Example:
        >>> found = Evaluation({"correspondence/median": float("inf")}, {}, None, {}, {"knn": 0.51})
        >>> record = evaluation_record(found, {"k": 20})
        >>> record["numbers"], record["seconds"]
        ({'correspondence/median': None}, {'knn': 0.51})
    """
    return {
        "version": __version__,
        "settings": settings,
        "numbers": {
            name: value if math.isfinite(value) else None for name, value in found.numbers.items()
        },
        "layers": found.layers,
        "counts": found.counts,
        "seconds": {name: round(value, 3) for name, value in found.seconds.items()},
    }


def write_json(record: dict[str, Any], target: Path) -> None:
    """Write a record; the folder is made, a file that is there is replaced as a whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(target.name + ".part")
    aside.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    aside.replace(target)
