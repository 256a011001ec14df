"""All tasks on one frozen backbone, with features computed once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from local_distill.backbones import TimmBackbone
from local_distill.errors import ConfigError, DataError
from local_distill.training.evaluation.confusion import IGNORED
from local_distill.training.evaluation.correspondence import (
    CorrespondenceErrors,
    ViewPairs,
    correspondence_errors,
    summarise_errors,
)
from local_distill.training.evaluation.dense import (
    DenseScores,
    linear_segmentation,
    majority_scores,
    token_retrieval,
)
from local_distill.training.evaluation.frozen import FrozenFeatures, frozen_features
from local_distill.training.evaluation.image_sets import EvaluationImages, StoredImages
from local_distill.training.evaluation.knn import knn_accuracies
from local_distill.training.evaluation.layers import layer_accuracies
from local_distill.training.evaluation.linear_probe import linear_probe

__all__ = ["TASKS", "Evaluation", "Task", "evaluate_backbone"]

Task = Literal["knn", "linear", "layers", "dense", "segmentation", "correspondence"]
TASKS: tuple[Task, ...] = get_args(Task)
LABELLED = ("knn", "linear", "layers")
MASKED = ("dense", "segmentation")


class Evaluation(NamedTuple):
    """What a frozen backbone is worth.

    Attributes:
        numbers: "task/measure" → number; see the documentation's page on evaluation.
        layers: "knn/global_token", "knn/mean_of_tokens", "linear/..." → accuracy by layer.
        errors: of the correspondence; None where it was not asked for.
        counts: how many images, tokens and pixels the numbers are made of.
        seconds: by task, features apart.
    """

    numbers: dict[str, float]
    layers: dict[str, list[float]]
    errors: CorrespondenceErrors | None
    counts: dict[str, int]
    seconds: dict[str, float]


def evaluate_backbone(
    backbone: TimmBackbone,
    train: EvaluationImages | StoredImages | None,
    test: EvaluationImages | StoredImages | None,
    pairs: ViewPairs | None = None,
    *,
    tasks: Sequence[Task] = TASKS,
    k: int | Sequence[int] = 20,
    temp: float = 0.07,
    layer_probes: bool = True,
    most_tokens: int = 10_000,
    batch_size: int = 128,
    workers: int = 0,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Run evaluation tasks on a frozen backbone; each image goes through it once.

    Draw the images once (`draw_scenes`, `draw_view_pairs`) and pass them to many calls.

    Args:
        backbone: a live model; is put into evaluation mode and back.
        train: the images that vote and that linear classifiers learn from; None where only
            "correspondence" is asked for.
        test: held-out images.
        pairs: views of held-out images, for "correspondence".
        tasks: which.
        k: neighbours; of several the first serves "layers" and "dense".
        temp: temperature of their weights.
        layer_probes: "layers" has linear probes as well as k-NN; they take most of its time.
        most_tokens: about so many patch tokens of ``train`` vote and are learned from.
        batch_size: images at a time.
        workers: loader processes, of folders.
        device: where the backbone computes; it is moved there.
        seed: of draws, splits and the chance level.
        progress: show progress bars.

    Returns:
        `Evaluation`.

    Raises:
        ConfigError: an unknown task, none, or a task without what it needs.
        DataError: images without labels or masks for a task that needs them, features that are
            not finite.

    Example:
        >>> from local_distill.backbones import tiny_vit
        >>> from local_distill.training import SyntheticScenes
        >>> from local_distill.training.evaluation import draw_scenes
        >>> voters = draw_scenes(SyntheticScenes(20, 32))
        >>> tested = draw_scenes(SyntheticScenes(10, 32, seed=1))
        >>> found = evaluate_backbone(tiny_vit(width=24), voters, tested, tasks=["knn", "dense"])
        >>> sorted(found.numbers)
        ['dense/accuracy', 'dense/majority_accuracy', 'dense/majority_miou', 'dense/miou',
         'knn/global_token', 'knn/majority', 'knn/mean_of_tokens']
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise ConfigError(f"`tasks` must be some of {list(TASKS)}, got {list(tasks)}")
    ks = [k] if isinstance(k, int) else list(k)
    if not ks:
        raise ConfigError("`k` is empty; give a number of neighbours, such as 20")
    results = Evaluation({}, {}, None, {}, {})
    backbone.to(device)
    if any(task != "correspondence" for task in tasks):
        sets = _checked(train, test, tasks)
        with _timed("features", results):
            voters, tested = (
                frozen_features(
                    backbone,
                    images,
                    layers="layers" in tasks,
                    tokens=any(task in MASKED for task in tasks),
                    most_tokens=most_tokens if name == "voters" else None,
                    batch_size=batch_size,
                    workers=workers,
                    device=device,
                    seed=seed,
                    description=name if progress else None,
                )
                for name, images in zip(("voters", "tested"), sets, strict=True)
            )
        results.counts.update(voters=len(voters.labels), tested=len(tested.labels))
        tests = _Tests(voters, tested, ks, temp, seed, results)
        if "knn" in tasks:
            tests.knn()
        if "linear" in tasks:
            tests.linear()
        if "layers" in tasks:
            tests.layers(probes=layer_probes)
        if "dense" in tasks:
            tests.dense()
        if "segmentation" in tasks:
            tests.segmentation()
    if "correspondence" not in tasks:
        return results
    if pairs is None:
        raise ConfigError('the task "correspondence" needs `pairs`; make them with draw_view_pairs')
    with _timed("correspondence", results):
        errors = correspondence_errors(
            backbone,
            pairs,
            batch_size=batch_size,
            device=device,
            seed=seed,
            description="view pairs" if progress else None,
        )
    results.numbers.update(_error_numbers(errors))
    results.counts.update(view_pairs=len(pairs.student), matched_tokens=len(errors.features))
    return results._replace(errors=errors)


@dataclasses.dataclass
class _Tests:
    """The tasks on one pair of sets; each adds to the results."""

    voters: FrozenFeatures
    tested: FrozenFeatures
    ks: list[int]
    temp: float
    seed: int
    results: Evaluation

    def knn(self) -> None:
        numbers = self.results.numbers
        with _timed("knn", self.results):
            for name, (many, few) in self._global_features().items():
                found = knn_accuracies(
                    many, self.voters.labels, few, self.tested.labels, ks=self.ks, temp=self.temp
                )
                numbers[f"knn/{name}"] = found[self.ks[0]]
                if len(self.ks) > 1:
                    numbers.update({f"knn/{name}/{k}": found[k] for k in self.ks})
        numbers["knn/majority"] = self._majority()

    def linear(self) -> None:
        numbers = self.results.numbers
        with _timed("linear", self.results):
            for name, (many, few) in self._global_features().items():
                probe = linear_probe(
                    many, self.voters.labels, few, self.tested.labels, seed=self.seed
                )
                numbers[f"linear/{name}"] = probe.accuracy
                numbers[f"linear/{name}_train"] = probe.train_accuracy
                numbers[f"linear/{name}_strength"] = probe.strength
        numbers["linear/majority"] = self._majority()

    def layers(self, *, probes: bool) -> None:
        by_layer = {
            "global_token": (self.voters.layers, self.tested.layers),
            "mean_of_tokens": (self.voters.layer_means, self.tested.layer_means),
        }
        with _timed("layers", self.results):
            for kind in ("knn", "linear") if probes else ("knn",):
                for name, (many, few) in by_layer.items():
                    curve = layer_accuracies(
                        many,
                        self.voters.labels,
                        few,
                        self.tested.labels,
                        linear=kind == "linear",
                        k=self.ks[0],
                        temp=self.temp,
                        seed=self.seed,
                    )
                    self.results.layers[f"{kind}/{name}"] = curve
                    self.results.numbers.update(
                        {f"layers/{kind}/{name}/{i}": value for i, value in enumerate(curve, 1)}
                    )
        self.results.numbers["layers/majority"] = self._majority()

    def dense(self) -> None:
        many, many_labels = _token_rows(self.voters)
        few, few_labels = _token_rows(self.tested)
        c = self._mask_classes()
        with _timed("dense", self.results):
            found = token_retrieval(
                *(many, many_labels, few, few_labels),
                k=self.ks[0],
                temp=self.temp,
                num_classes=c,
            )
        self._add_dense("dense", found, majority_scores(many_labels, few_labels, num_classes=c))
        counts = self.results.counts
        counts.update(voting_tokens=len(many), tested_tokens=int(found.confusion.sum()))

    def segmentation(self) -> None:
        assert self.tested.tokens is not None
        assert self.tested.masks is not None
        many, many_labels = _token_rows(self.voters)
        c = self._mask_classes()
        with _timed("segmentation", self.results):
            found = linear_segmentation(
                many,
                many_labels,
                self.tested.tokens,
                self.tested.masks,
                self.tested.grid,
                self.tested.view_size,
                num_classes=c,
                seed=self.seed,
            )
        level = majority_scores(many_labels, self.tested.masks, num_classes=c)
        self._add_dense("segmentation", found, level)
        counts = self.results.counts
        counts.update(voting_tokens=len(many), tested_pixels=int(found.confusion.sum()))

    def _add_dense(self, task: str, found: DenseScores, level: DenseScores) -> None:
        self.results.numbers.update(
            {
                f"{task}/accuracy": found.accuracy,
                f"{task}/miou": found.miou,
                f"{task}/majority_accuracy": level.accuracy,
                f"{task}/majority_miou": level.miou,
            }
        )

    def _global_features(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            "global_token": (self.voters.global_token, self.tested.global_token),
            "mean_of_tokens": (self.voters.mean_of_tokens, self.tested.mean_of_tokens),
        }

    def _majority(self) -> float:
        common = self.voters.labels.bincount().argmax()
        return float((self.tested.labels == common).float().mean())

    def _mask_classes(self) -> int:
        assert self.voters.masks is not None
        assert self.tested.masks is not None
        largest = [
            int(masks.where(masks != IGNORED, 0).max())
            for masks in (self.voters.masks, self.tested.masks)
        ]
        return 1 + max(largest)


def _checked(
    train: EvaluationImages | StoredImages | None,
    test: EvaluationImages | StoredImages | None,
    tasks: Sequence[Task],
) -> tuple[EvaluationImages | StoredImages, EvaluationImages | StoredImages]:
    if train is None or test is None:
        raise ConfigError(f"the tasks {list(tasks)} need `train` and `test` images")
    for name, images in (("train", train), ("test", test)):
        for task in tasks:
            if task in LABELLED and not images.classes:
                raise DataError(
                    f"`{name}` has no classes, as a flat folder has none: the task {task!r} needs "
                    "one folder per class, with the images in it, or a list with labels"
                )
            if task in MASKED and not images.has_masks:
                raise DataError(
                    f"`{name}` has no masks: the task {task!r} needs a folder with images/ and "
                    "masks/ in it, or the built-in scenes"
                )
    if train.classes != test.classes:
        raise DataError(
            f"`train` has the classes {list(train.classes)} but `test` has {list(test.classes)}"
        )
    return train, test


def _token_rows(features: FrozenFeatures) -> tuple[Tensor, Tensor]:
    assert features.tokens is not None
    assert features.token_labels is not None
    return features.tokens.flatten(0, 1), features.token_labels.flatten()


def _error_numbers(errors: CorrespondenceErrors) -> dict[str, float]:
    parts = {"": errors.features, "chance_": errors.chance, "same_place_": errors.same_place}
    return {
        f"correspondence/{prefix}{name}": value
        for prefix, part in parts.items()
        if part is not None
        for name, value in summarise_errors(part).items()
    }


@contextmanager
def _timed(name: str, results: Evaluation) -> Iterator[None]:
    start = time.perf_counter()
    yield
    results.seconds[name] = time.perf_counter() - start
