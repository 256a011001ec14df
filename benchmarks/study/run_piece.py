"""One piece: train a variant, test what it learned, and say all of it in one record."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.pieces import UNTRAINED, Piece
from benchmarks.study.scoring import score_backbone, score_layers, scoring_scenes
from benchmarks.study.settings import Preset, Recipe
from benchmarks.study.shared_views import SharedViews
from benchmarks.study.variants import build_method
from local_distill.training.options import BackboneOptions, OptimOptions, TeacherOptions
from local_distill.training.scenes import SyntheticScenes
from local_distill.training.trainer import train
from local_distill.transforms import MultiCrop

__all__ = ["run_piece", "scenes_of"]

# Seeds of scenes to learn from: each piece's seed has scenes of its own, far from the tested ones.
_FIRST_SCENES = 1000
# Samples whose views are kept, of so many shares and seeds: 0.8 GB each at the CPU's sizes.
_MOST_KEPT, _MOST_DRAWN = 32_000, 2
_KEPT: dict[tuple[Any, ...], tuple[list[Any], SharedViews]] = {}


def run_piece(preset: Preset, piece: Piece) -> dict[str, Any]:
    """Train and test one variant.

    Args:
        preset: the settings.
        piece: which variant, with what.

    Returns:
        The record: the piece, the study's fingerprint, scores, and how the training went.
    """
    study = preset.study(piece.study)
    layers = piece.study == "layers"
    started = time.process_time()
    if piece.variant == UNTRAINED:
        torch.manual_seed(piece.seed)
        backbone, training = BackboneOptions(**study.recipe.backbone).build(layers=layers), {}
    else:
        backbone, training = _train(preset, study.recipe, piece)
    scenes = scoring_scenes(preset, piece.role)
    if layers:
        scores = score_layers(backbone, scenes)
    else:
        scores = score_backbone(backbone, scenes, preset.evaluating.tokens)
    return {
        "settings": preset.fingerprint(study),
        **piece._asdict(),
        "scores": _rounded(scores),
        "training": _rounded(training),
        "seconds": round(time.process_time() - started, 1),
        "torch": torch.__version__,
    }


def scenes_of(preset: Preset, piece: Piece) -> SyntheticScenes:
    """The scenes that a piece learns from; a smaller share of a seed is the start of a larger."""
    count = round(piece.share * preset.scenes)
    return SyntheticScenes(count, preset.size, seed=_FIRST_SCENES + piece.seed)


def _train(preset: Preset, recipe: Recipe, piece: Piece) -> tuple[Any, dict[str, float]]:
    method, watched = build_method(piece.variant, recipe, piece.temp)
    images, views = _drawn(preset, piece)
    optim = OptimOptions(**recipe.optim, lr=piece.lr)
    log_every = max(1, recipe.steps // 10)
    with tempfile.TemporaryDirectory() as folder:
        # its progress bar would get in the way of that of the study
        with contextlib.redirect_stderr(io.StringIO()):
            result = train(
                images,
                views,
                method,
                BackboneOptions(**recipe.backbone).build,
                num_global=2,
                output=Path(folder),
                steps=recipe.steps,
                batch_size=recipe.batch_size,
                optim=optim,
                teacher=TeacherOptions(**recipe.teacher),
                seed=piece.seed,
                workers=preset.workers,
                log_every=log_every,
                save_every=recipe.steps,
            )
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    if result.interrupted:
        raise KeyboardInterrupt
    rows = [json.loads(line) for line in lines]
    training = {
        name: rows[-1][name]
        for name in ("loss", "global_loss", "local_loss", "teacher_entropy", "information")
        if name in rows[-1]
    }
    norms = [row["gradient_norm"] for row in rows]
    training["gradient_norm"] = sum(norms) / len(norms)
    training["clipped"] = sum(norm > optim.clip for norm in norms) / len(norms)
    if watched is not None:
        training.update(watched.summary())
    return result.network.backbone, training


def _drawn(preset: Preset, piece: Piece) -> tuple[list[Any], SharedViews]:
    """Images and views of one share and seed: drawn once, for all variants and settings."""
    study = preset.study(piece.study)
    name = preset.fingerprint(study), piece.study, piece.share, piece.seed
    if name not in _KEPT:
        scenes = scenes_of(preset, piece)
        while len(_KEPT) >= _MOST_DRAWN:
            del _KEPT[next(iter(_KEPT))]  # the first that was drawn
        views = SharedViews(
            MultiCrop(**study.recipe.views), most=0 if preset.workers else _MOST_KEPT
        )
        _KEPT[name] = [scenes[i] for i in range(len(scenes))], views
    return _KEPT[name]


def _rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _rounded(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return round(float(values), 5)
