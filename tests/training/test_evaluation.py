import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from local_distill import ConfigError, ShapeError
from local_distill.backbones import tiny_vit
from local_distill.training import SyntheticScenes, extract_features, knn_accuracy
from local_distill.training.evaluation import scene_tokens
from local_distill.training.views import eval_transform


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_knn_is_the_weighted_vote(n, m, k, seed):
    g = torch.Generator().manual_seed(seed)
    train, test = torch.randn(n, 3, generator=g), torch.randn(m, 3, generator=g)
    labels = torch.randint(0, 3, (n,), generator=g)
    truth = torch.randint(0, 3, (m,), generator=g)
    right = 0
    for i in range(m):
        cosines = [float((test[i] @ row) / (test[i].norm() * row.norm())) for row in train]
        nearest = sorted(range(n), key=lambda j: -cosines[j])[:k]
        votes = [0.0, 0.0, 0.0]
        for j in nearest:
            votes[int(labels[j])] += math.exp(cosines[j] / 0.07)
        right += votes.index(max(votes)) == int(truth[i])
    found = knn_accuracy(train, labels, test, truth, k=k)
    assert found == pytest.approx(right / m)


def test_knn_refuses_what_does_not_fit():
    a = torch.randn(4, 3)
    with pytest.raises(ShapeError, match="`train_features` must be"):
        knn_accuracy(a, [0, 1], a, [0] * 4)
    with pytest.raises(ShapeError, match="axis `d`"):
        knn_accuracy(a, [0] * 4, a[:, :2], [0] * 4)
    with pytest.raises(ConfigError, match="`k`"):
        knn_accuracy(a, [0] * 4, a, [0] * 4, k=0)
    with pytest.raises(ConfigError, match="`temp`"):
        knn_accuracy(a, [0] * 4, a, [0] * 4, temp=0.0)


def test_features_are_the_backbones_and_its_mode_comes_back():
    backbone = tiny_vit(img_size=16, width=24, depth=1).train()
    scenes = SyntheticScenes(5, 32)
    whole, means, labels = extract_features(backbone, scenes, eval_transform(16), batch_size=2)
    assert backbone.training
    assert whole.shape == means.shape == (5, 24)
    assert labels.tolist() == scenes.targets
    with torch.inference_mode():
        one = backbone.eval()(eval_transform(16)(scenes[3][0])[None])
    torch.testing.assert_close(whole[3], one.global_token[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(means[3], one.patch_tokens[0].mean(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="empty"):
        extract_features(backbone, SyntheticScenes(0, 32), eval_transform(16))


@pytest.mark.parametrize("size", [32, 64])
def test_scene_tokens_carry_the_class_at_their_centre(size):
    backbone = tiny_vit(img_size=16, width=24, depth=1)
    scenes = SyntheticScenes(3, 32)
    features, labels = scene_tokens(backbone, scenes, eval_transform(size), most=1000)
    side = size // 8
    assert features.shape == (3 * side * side, 24)
    wanted = []
    for i in range(3):
        mask = scenes.scene(i).class_mask
        step = 32 / side
        wanted += [
            int(mask[int((r + 0.5) * step), int((c + 0.5) * step)])
            for r in range(side)
            for c in range(side)
        ]
    assert sorted(labels.tolist()) == sorted(wanted)
    # the draw keeps features and labels together
    few, few_labels = scene_tokens(backbone, scenes, eval_transform(size), most=7)
    assert torch.equal(few, features[:7])
    assert torch.equal(few_labels, labels[:7])
