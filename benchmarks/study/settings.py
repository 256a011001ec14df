"""What a study consists of, and the fingerprint by which results of other settings are told."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

__all__ = ["Evaluating", "Preset", "Recipe", "Study"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that the variants of a study have in common.

    Plain arguments and not the trainer's options: a default that is added there does not make the
    results of before into those of other settings.

    Attributes:
        backbone: arguments of `BackboneOptions`.
        views: arguments of `MultiCrop`, its two global views first.
        head: arguments of the projection heads.
        steps: optimiser steps of a run.
        batch_size: images per step.
        optim: arguments of `OptimOptions` but for the learning rate, which is tuned.
        teacher: arguments of `TeacherOptions`.
    """

    backbone: dict[str, Any]
    views: dict[str, Any]
    head: dict[str, int]
    steps: int
    batch_size: int
    optim: dict[str, Any]
    teacher: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Study:
    """One question: variants, on shares of the scenes, tuned alike.

    Attributes:
        name: "matching" or "layers".
        variants: what is compared; the first one is what the others are compared with.
        recipe: what they have in common.
        shares: shares of the scenes to learn from.
        seeds: of weights, order, augmentations and scenes.
        rates: learning rates to begin with, rising, each tried at the first temperature.
        temps: temperatures, the teacher's or that of the contrast; tried at the best rate.
        extensions: while the best of them is the largest or the smallest, twice or half of it is
            tried as well, so many times at most.
        tuned_on: share and seed of each tuning run of a setting; seeds other than the final.
        criterion: the measures whose mean, on validation scenes, chooses.
    """

    name: str
    variants: tuple[str, ...]
    recipe: Recipe
    shares: tuple[float, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    temps: tuple[float, ...]
    extensions: int
    tuned_on: tuple[tuple[float, int], ...]
    criterion: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Evaluating:
    """How frozen features are tested.

    Attributes:
        voters: labelled scenes that vote and that probes learn from; never trained on.
        tested: held-out scenes; as many others validate.
        pairs: tested scenes seen in two views for the correspondence.
        tokens: tokens that the linear segmentation learns from.
        pair_size: side of the two views in pixels.
    """

    voters: int
    tested: int
    pairs: int
    tokens: int
    pair_size: int


@dataclasses.dataclass(frozen=True)
class Preset:
    """A whole study of some size.

    Attributes:
        name: of its file of results.
        scenes: so many there are to learn from.
        size: side of the scenes in pixels.
        evaluating: how features are tested.
        studies: the questions.
        workers: loader processes of a run; with any, views are drawn anew for every run.
    """

    name: str
    scenes: int
    size: int
    evaluating: Evaluating
    studies: tuple[Study, ...]
    workers: int = 0

    def study(self, name: str) -> Study:
        """The study of that name."""
        return next(study for study in self.studies if study.name == name)

    def fingerprint(self, study: Study) -> str:
        """Of everything that a piece's numbers hang on, apart from what the piece itself says."""
        parts = [dataclasses.asdict(part) for part in (self.evaluating, study.recipe)]
        text = json.dumps([self.scenes, self.size, *parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
