"""Frozen features put to the test, on scenes drawn once a process."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from benchmarks.study.settings import Preset
from local_distill.backbones import TimmBackbone
from local_distill.training.evaluation import (
    EvaluationImages,
    ViewPairs,
    correspondence_errors,
    correspondence_views,
    draw_scenes,
    draw_view_pairs,
    frozen_features,
    knn_accuracy,
    layer_accuracies,
    linear_probe,
    linear_segmentation,
    summarise_errors,
)
from local_distill.training.scenes import SyntheticScenes

__all__ = ["MEASURES", "ScoringScenes", "score_backbone", "score_layers", "scoring_scenes"]

# Larger is better but for the last one.
MEASURES = {
    "knn": "k-NN accuracy, global token",
    "knn_mean": "k-NN accuracy, mean of the patch tokens",
    "linear": "linear accuracy, global token",
    "miou": "linear segmentation, mIoU",
    "true_place": "nearest token within half a cell of the true place",
    "error": "correspondence error, cells",
}
# Seeds of the scenes that nothing is ever trained on; those to learn from start at 1,000.
_VOTERS, _SCENES = 0, {"final": 1, "tune": 2}
_STRENGTH = (0.1,)  # one regularisation for all: choosing it anew each time is noise


class ScoringScenes(NamedTuple):
    """Scenes that vote, scenes that are tested, and the latter in two views."""

    voters: EvaluationImages
    tested: EvaluationImages
    pairs: ViewPairs


@functools.cache
def _voters(count: int, size: int) -> EvaluationImages:
    return draw_scenes(SyntheticScenes(count, size, seed=_VOTERS))


@functools.cache
def _tested(count: int, size: int, role: str) -> EvaluationImages:
    return draw_scenes(SyntheticScenes(count, size, seed=_SCENES[role]))


@functools.cache
def _pairs(count: int, size: int, pair_size: int, role: str) -> ViewPairs:
    scenes = SyntheticScenes(count, size, seed=_SCENES[role])
    return draw_view_pairs(scenes, correspondence_views(pair_size))


def scoring_scenes(preset: Preset, role: str) -> ScoringScenes:
    """The scenes of a role: "tune" for validation, "final" for the test."""
    sizes, side = preset.evaluating, preset.size
    return ScoringScenes(
        _voters(sizes.voters, side),
        _tested(sizes.tested, side, role),
        _pairs(sizes.pairs, side, sizes.pair_size, role),
    )


def score_backbone(backbone: TimmBackbone, scenes: ScoringScenes, tokens: int) -> dict[str, float]:
    """The measures of `MEASURES`.

    Args:
        backbone: of the teacher, as trained.
        scenes: which.
        tokens: so many tokens of the voters are what the segmentation learns from.
    """
    device = next(backbone.parameters()).device
    voters = frozen_features(
        backbone, scenes.voters, tokens=True, most_tokens=tokens, device=device
    )
    tested = frozen_features(backbone, scenes.tested, tokens=True, device=device)
    assert voters.tokens is not None
    assert voters.token_labels is not None
    assert tested.tokens is not None
    assert tested.masks is not None
    ways = {"knn": voters.global_token, "knn_mean": voters.mean_of_tokens}
    against = {"knn": tested.global_token, "knn_mean": tested.mean_of_tokens}
    scores = {
        way: knn_accuracy(ways[way], voters.labels, against[way], tested.labels) for way in ways
    }
    probe = linear_probe(
        voters.global_token,
        voters.labels,
        tested.global_token,
        tested.labels,
        strengths=_STRENGTH,
    )
    dense = linear_segmentation(
        voters.tokens.flatten(0, 1),
        voters.token_labels.flatten(),
        tested.tokens,
        tested.masks,
        tested.grid,
        tested.view_size,
        strengths=_STRENGTH,
    )
    errors = summarise_errors(correspondence_errors(backbone, scenes.pairs, device=device).features)
    scores.update(
        linear=probe.accuracy,
        miou=dense.miou,
        true_place=errors["within_0.5"],
        error=errors["mean"],
    )
    return scores


def score_layers(backbone: TimmBackbone, scenes: ScoringScenes) -> dict[str, Any]:
    """k-NN and linear accuracy by layer, the first block's first; and those of the last layer."""
    device = next(backbone.parameters()).device
    voters = frozen_features(backbone, scenes.voters, layers=True, device=device)
    tested = frozen_features(backbone, scenes.tested, layers=True, device=device)
    knn = layer_accuracies(voters.layers, voters.labels, tested.layers, tested.labels)
    linear = [
        linear_probe(many, voters.labels, few, tested.labels, strengths=_STRENGTH).accuracy
        for many, few in zip(voters.layers, tested.layers, strict=True)
    ]
    return {"knn": knn[-1], "linear": linear[-1], "knn_layers": knn, "linear_layers": linear}
