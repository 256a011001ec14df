"""Linear classifiers on frozen features: the probe, and what segmentation is made of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from local_distill._check import check_positive
from local_distill.errors import ConfigError, DataError, require_extra
from local_distill.training.evaluation.knn import check_dimensions, check_samples

__all__ = ["LinearClassifier", "LinearProbe", "fit_linear", "linear_probe"]

# scikit-learn's C, the inverse of the weight decay: from strong to weak.
_STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
_HELD_OUT = 0.2
_ITERATIONS = 200


class LinearClassifier(NamedTuple):
    """A fitted linear classifier; the standardisation is folded into its weights.

    Attributes:
        weight: (c, d) float32.
        bias: (c,) float32.
        classes: (c,) int64, the label of each row.
        strength: the C of scikit-learn that it was fitted with.

    Example:
        >>> one = LinearClassifier(torch.eye(2), torch.zeros(2), torch.tensor([4, 9]), 1.0)
        >>> one.predict(torch.tensor([[0.0, 1.0]]))
        tensor([9])
    """

    weight: Tensor
    bias: Tensor
    classes: Tensor
    strength: float

    def scores(self, features: Tensor) -> Tensor:
        """Logits (…, c) of features (…, d)."""
        return torch.nn.functional.linear(features.float(), self.weight, self.bias)

    def predict(self, features: Tensor) -> Tensor:
        """Labels (…) of features (…, d)."""
        return self.classes[self.scores(features).argmax(-1)]


class LinearProbe(NamedTuple):
    """What a linear probe found.

    Attributes:
        accuracy: share of the test samples that are right, in [0, 1].
        train_accuracy: the same of those that it was fitted on: a gap shows overfitting.
        strength: the C of scikit-learn that was chosen.
    """

    accuracy: float
    train_accuracy: float
    strength: float


def linear_probe(
    train_features: Tensor,
    train_labels: Sequence[int] | Tensor,
    test_features: Tensor,
    test_labels: Sequence[int] | Tensor,
    *,
    strengths: Sequence[float] = _STRENGTHS,
    seed: int = 0,
) -> LinearProbe:
    """Accuracy of a logistic regression on frozen features.

    Args:
        train_features: (n, d), what it is fitted on.
        train_labels: (n,).
        test_features: (m, d), looked at once, at the end.
        test_labels: (m,).
        strengths: see `fit_linear`.
        seed: see `fit_linear`.

    Returns:
        `LinearProbe`.

    Raises:
        ShapeError: features that are not (n, d), of other dimensions, or labels of other lengths.
        ConfigError, DataError: as `fit_linear`.

    Example:
        >>> features = torch.tensor([[0.0, 1], [0, 2], [1, 1], [1, 2]]).repeat(5, 1)
        >>> labels = [0, 0, 1, 1] * 5
        >>> linear_probe(features, labels, features, labels).accuracy
        1.0
    """
    check_samples("test_features", test_features, len(test_labels))
    check_samples("train_features", train_features, len(train_labels))
    check_dimensions(train_features, test_features)
    fitted = fit_linear(train_features, train_labels, strengths=strengths, seed=seed)

    def accuracy(features: Tensor, labels: Sequence[int] | Tensor) -> float:
        return float((fitted.predict(features.cpu()) == torch.as_tensor(labels)).float().mean())

    return LinearProbe(
        accuracy(test_features, test_labels),
        accuracy(train_features, train_labels),
        fitted.strength,
    )


def fit_linear(
    features: Tensor,
    labels: Sequence[int] | Tensor,
    *,
    strengths: Sequence[float] = _STRENGTHS,
    seed: int = 0,
) -> LinearClassifier:
    """Logistic regression on standardised features, its regularisation chosen on a split of them.

    A fifth of the samples, drawn at random by class, is set aside. Each strength is fitted on the
    rest, from strong to weak, each from where the last one ended; the one of least cross-entropy on
    the fifth is fitted once more on all samples. Cross-entropy and not accuracy, because it is less
    noisy on few samples, and because logits that are interpolated have to be of the right size.

    Convention: features are standardised with the mean and standard deviation of all ``features``;
    a feature that does not vary is left at 0. L-BFGS stops after 200 iterations at the latest.

    Args:
        features: (n, d).
        labels: (n,), of at least two classes.
        strengths: values of scikit-learn's C, the inverse of the weight decay. With one alone there
            is nothing to choose and no split.
        seed: of the split.

    Returns:
        `LinearClassifier`, the same for the same input.

    Raises:
        ShapeError: features that are not (n, d), or labels of another length.
        ConfigError: no strength, or one that is not above 0.
        DataError: labels of one class alone.

    Example:
        >>> features = torch.tensor([[0.0, 1], [0, 2], [1, 1], [1, 2]])
        >>> fit_linear(features, [3, 3, 8, 8], strengths=[1.0]).predict(features)
        tensor([3, 3, 8, 8])
    """
    linear_model = require_extra("sklearn.linear_model", "train")
    check_samples("features", features, len(labels))
    if len(strengths) == 0:
        raise ConfigError("`strengths` is empty; give at least one, such as 1.0")
    tried = sorted(check_positive("strengths", strength) for strength in strengths)
    y = np.asarray(labels)
    if len(np.unique(y)) < 2:
        raise DataError(
            f"`labels` are all {y[0]}: a classifier needs samples of at least two classes"
        )
    x = features.double().cpu().numpy()
    middle, spread = x.mean(0), x.std(0)
    spread[spread < 1e-12 * (1 + np.abs(middle))] = np.inf
    x = ((x - middle) / spread).astype(np.float32)
    strength = tried[0] if len(tried) == 1 else _choose(linear_model, x, y, tried, seed)
    model = _regression(linear_model, strength)
    _fit(model, x, y)
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:  # two classes, as above
        weight, bias = np.stack((0 * weight[0], weight[0])), np.array([0, bias[0]])
    weight = weight / spread
    return LinearClassifier(
        torch.from_numpy(weight).float(),
        torch.from_numpy(bias - weight @ middle).float(),
        torch.from_numpy(model.classes_),
        strength,
    )


def _choose(linear_model: Any, x: Any, y: Any, tried: list[float], seed: int) -> float:
    order = np.random.default_rng(seed).permutation(len(y))
    # by class: of each class's samples every fifth of the shuffled ones
    by_class = order[np.argsort(y[order], kind="stable")]
    held_out = np.zeros(len(y), bool)
    held_out[by_class[:: round(1 / _HELD_OUT)]] = True
    left = np.unique(y[~held_out])
    if len(left) < 2 or not np.isin(y[held_out], left).any():
        return tried[0]  # too few samples to choose by
    model = _regression(linear_model, tried[0]).set_params(warm_start=True)
    best, chosen = float("inf"), tried[0]
    for strength in tried:
        model.set_params(C=strength)
        _fit(model, x[~held_out], y[~held_out])
        judged = held_out & np.isin(y, model.classes_)  # a class of one sample may be set aside
        logits = torch.from_numpy(model.decision_function(x[judged]))
        if logits.dim() == 1:  # of two classes scikit-learn tells the second one's logit alone
            logits = torch.stack((torch.zeros_like(logits), logits), 1)
        truth = torch.from_numpy(np.searchsorted(model.classes_, y[judged]))
        loss = float(torch.nn.functional.cross_entropy(logits, truth))
        if loss < best:
            best, chosen = loss, strength
    return chosen


def _regression(linear_model: Any, strength: float) -> Any:
    return linear_model.LogisticRegression(C=strength, max_iter=_ITERATIONS, tol=1e-3)


def _fit(model: Any, x: Any, y: Any) -> None:
    exceptions = require_extra("sklearn.exceptions", "train")
    with warnings.catch_warnings():
        # Where hardly anything is regularised it stops early, and that regularises as well.
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        model.fit(x, y)
