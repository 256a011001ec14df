"""Draws `evaluation.png`: layers and correspondence of runs beside random weights.

local-distill demo --output runs/demo
python docs/pictures/make_evaluation.py "after the demo=runs/demo/geometric"
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from local_distill.training import SyntheticScenes
from local_distill.training.backbone_loading import load_backbone
from local_distill.training.evaluation import (
    correspondence_views,
    draw_scenes,
    draw_view_pairs,
    evaluate_backbone,
)
from local_distill.training.options import BackboneOptions

COLOURS = ["#7f7f7f", "#009e73", "#d55e00", "#0072b2", "#cc79a7"]
SIZE = 64


def main(arguments: list[str]) -> None:
    runs = {"random weights": None} | dict(entry.split("=", 1) for entry in arguments)
    tested = SyntheticScenes(1000, SIZE, seed=1)
    voters, held_out = draw_scenes(SyntheticScenes(2000, SIZE)), draw_scenes(tested)
    pairs = draw_view_pairs(tested, correspondence_views(SIZE), count=200)
    figure, (knn, linear, place) = plt.subplots(
        1, 3, figsize=(11.5, 3.8), dpi=110, layout="constrained"
    )
    for (name, run), colour in zip(runs.items(), COLOURS, strict=False):
        backbone = load_backbone(run, BackboneOptions(), 0)
        found = evaluate_backbone(backbone, voters, held_out, pairs)
        for panel, kind in ((knn, "knn"), (linear, "linear")):
            curve = found.layers[f"{kind}/global_token"]
            panel.plot(range(1, len(curve) + 1), curve, "o-", color=colour, label=name)
        draw_shares(place, found.errors.features, colour, "-", name)
        shown = {
            key: round(value, 3)
            for key, value in found.numbers.items()
            if "chance" not in key and "majority" not in key
        }
        print(name, shown, {key: round(value, 1) for key, value in found.seconds.items()})
    # the levels hang on the views alone, not on the backbone
    draw_shares(place, found.errors.same_place, "black", "--", "same place in the view")
    draw_shares(place, found.errors.chance, "black", ":", "chance")
    for panel, title in ((knn, "k-NN by layer"), (linear, "linear probe by layer")):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("layer")
        panel.set_ylabel("accuracy, global token")
        panel.set_ylim(0.3, 0.9)
        panel.set_xticks(range(1, len(curve) + 1))
    place.set_title("correspondence", fontsize=10)
    place.set_xlabel("error / larger cell diagonal")
    place.set_ylabel("share of tokens with less")
    place.set_xlim(0, 4)
    place.set_ylim(0, 1)
    for panel in (knn, linear, place):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(Path(__file__).with_name("evaluation.png"))


def draw_shares(panel, errors, colour, style, name) -> None:
    at = np.linspace(0, 4, 161)
    shares = np.searchsorted(np.sort(errors.numpy()), at, side="right") / len(errors)
    panel.plot(at, shares, color=colour, linestyle=style, label=name)


if __name__ == "__main__":
    main(sys.argv[1:])
