"""The linear probe, k-NN for several k, and accuracy by layer."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from local_distill import ConfigError, DataError, ShapeError
from local_distill.training.evaluation import (
    fit_linear,
    knn_accuracies,
    knn_accuracy,
    knn_predictions,
    layer_accuracies,
    linear_probe,
)


def blobs(n, classes, d, spread, seed):
    g = torch.Generator().manual_seed(seed)
    middles = 3 * torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (n,), generator=g)
    return middles[labels] + spread * torch.randn(n, d, generator=g), labels


def test_labels_as_features_are_told_and_noise_is_chance():
    labels = torch.arange(300) % 5
    hot = torch.nn.functional.one_hot(labels).float()
    found = linear_probe(hot[:200], labels[:200], hot[200:], labels[200:])
    assert found.accuracy == found.train_accuracy == 1
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(900, 6, generator=g)
    labels = torch.randint(0, 3, (900,), generator=g)
    found = linear_probe(noise[:500], labels[:500], noise[500:], labels[500:])
    assert found.accuracy == pytest.approx(1 / 3, abs=0.1)  # four standard deviations


@pytest.mark.parametrize("classes", [2, 4])
def test_the_classifier_is_scikit_learns(classes):
    x, y = blobs(150, classes, 5, 3.0, 0)
    test, _ = blobs(60, classes, 5, 3.0, 1)
    y = 10 + 3 * y  # labels need not start at 0
    fitted = fit_linear(x, y, strengths=[0.5])
    mean, std = x.mean(0), x.std(0, correction=0)
    model = LogisticRegression(C=0.5, max_iter=200, tol=1e-3)
    model.fit(((x - mean) / std).numpy(), y.numpy())
    assert fitted.classes.tolist() == model.classes_.tolist()
    probs = fitted.scores(test).softmax(-1).numpy()
    wanted = model.predict_proba(((test - mean) / std).numpy())
    np.testing.assert_allclose(probs, wanted, atol=2e-3)
    assert fitted.predict(test).tolist() == model.classes_[probs.argmax(1)].tolist()


def test_scale_and_shift_of_features_change_nothing():
    x, y = blobs(200, 3, 4, 2.0, 0)
    test, labels = blobs(100, 3, 4, 2.0, 1)
    scale, shift = torch.tensor([1e-3, 1.0, 50.0, 7.0]), torch.tensor([0.0, -3.0, 10.0, 1.0])
    plain = linear_probe(x, y, test, labels)
    moved = linear_probe(x * scale + shift, y, test * scale + shift, labels)
    assert moved.strength == plain.strength
    assert moved.accuracy == pytest.approx(plain.accuracy, abs=0.011)
    # a feature that says nothing, and one that never varies
    dead = [torch.cat((part, torch.full((len(part), 1), 4.2)), 1) for part in (x, test)]
    assert linear_probe(dead[0], y, dead[1], labels).accuracy == plain.accuracy


def test_the_strength_is_chosen_and_the_same_each_time():
    # 60 features of noise beside two that tell the class: weak regularisation overfits
    g = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 2, (460,), generator=g)
    told = labels[:, None] * 1.5 + torch.randn(460, 2, generator=g)
    features = torch.cat((told, torch.randn(460, 60, generator=g)), 1)
    train, test = slice(0, 80), slice(80, None)
    arguments = features[train], labels[train], features[test], labels[test]
    weakest = linear_probe(*arguments, strengths=[100.0])
    chosen = linear_probe(*arguments, strengths=[100.0, 0.01])
    assert chosen.strength == 0.01
    assert chosen.accuracy > weakest.accuracy
    assert weakest.train_accuracy == 1
    torch.manual_seed(0)
    again = linear_probe(*arguments, strengths=[0.01, 100.0])
    assert again == chosen


def test_few_samples_are_no_obstacle():
    """One of each class: no split leaves two classes on both sides."""
    fitted = fit_linear(torch.eye(2), [0, 1])
    assert fitted.predict(torch.eye(2)).tolist() == [0, 1]


def test_several_k_are_each_one_k():
    g = torch.Generator().manual_seed(0)
    x, test = torch.randn(40, 3, generator=g), torch.randn(15, 3, generator=g)
    y, truth = (torch.randint(0, 4, (n,), generator=g) for n in (40, 15))
    found = knn_accuracies(x, y, test, truth, ks=[20, 1, 7, 100])
    assert list(found) == [20, 1, 7, 100]
    for k, value in found.items():
        assert value == knn_accuracy(x, y, test, truth, k=k)
    # in blocks as at once
    many = test.repeat(400, 1)
    predictions = knn_predictions(x.repeat(300, 1), y.repeat(300), many, ks=[1])
    assert torch.equal(predictions.view(400, 15), predictions[:, :15].expand(400, -1))
    # features that are the labels
    hot = torch.nn.functional.one_hot(y).float()
    assert knn_accuracies(hot, y, hot, y, ks=[1, 5]) == {1: 1.0, 5: 1.0}
    with pytest.raises(ConfigError, match="`ks` is empty"):
        knn_predictions(x, y, test, ks=[])


@pytest.mark.parametrize("linear", [False, True])
def test_layers_are_the_same_test_on_each(linear):
    layers, tested = [], []
    for spread in (20.0, 2.0, 0.1):  # ever better told apart, and of different widths
        x, y = blobs(120, 3, 4, spread, 0)
        test, labels = blobs(80, 3, 4, spread, 1)
        layers.append(torch.cat((x, x[:, :1]), 1) if spread == 2 else x)
        tested.append(torch.cat((test, test[:, :1]), 1) if spread == 2 else test)
    curve = layer_accuracies(layers, y, tested, labels, linear=linear, k=5)
    assert curve[0] < curve[1] <= curve[2] == 1
    one = (
        linear_probe(layers[1], y, tested[1], labels).accuracy
        if linear
        else knn_accuracy(layers[1], y, tested[1], labels, k=5)
    )
    assert curve[1] == one
    with pytest.raises(ShapeError, match="3 layers but `test_layers` 2"):
        layer_accuracies(layers, y, tested[:2], labels, linear=linear)


def test_bad_input_is_refused():
    x = torch.randn(6, 3)
    with pytest.raises(ShapeError, match="`features` must be"):
        fit_linear(x, [0, 1])
    with pytest.raises(ShapeError, match="`test_features` must be"):
        linear_probe(x, [0, 1] * 3, x[:0], [])
    with pytest.raises(ShapeError, match="axis `d`"):
        linear_probe(x, [0, 1] * 3, x[:, :2], [0, 1] * 3)
    with pytest.raises(DataError, match="all 4"):
        fit_linear(x, [4] * 6)
    with pytest.raises(ConfigError, match="`strengths` is empty"):
        fit_linear(x, [0, 1] * 3, strengths=[])
    with pytest.raises(ConfigError, match="`strengths` must be"):
        fit_linear(x, [0, 1] * 3, strengths=[-1.0])
