"""Dense evaluation: class masks, mIoU, retrieval of tokens, linear segmentation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score
from torch.nn import functional as F

from local_distill import ConfigError, DataError, ShapeError, TokenGrid
from local_distill.training.evaluation import (
    confusion_matrix,
    linear_segmentation,
    majority_scores,
    mean_iou,
    pixel_accuracy,
    token_labels,
    token_retrieval,
    upsample_scores,
)


def test_a_matrix_worked_by_hand():
    #           right    0 for 1   ignored  1       2 for 1   1 for 0; class 3 occurs nowhere
    target = torch.tensor([[0, 0, 0, 255], [1, 1, 1, 0]])
    guess = torch.tensor([[0, 0, 1, 2], [1, 1, 2, 0]])
    confusion = confusion_matrix(guess, target, 4)
    assert confusion.tolist() == [[3, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    # 0: 3 / 4.  1: 2 / 4.  2 is never true but guessed once: 0 / 1.  3 takes no part.
    assert mean_iou(confusion) == pytest.approx((3 / 4 + 2 / 4 + 0) / 3)
    assert pixel_accuracy(confusion) == pytest.approx(5 / 7)
    nothing = confusion_matrix(guess, torch.full_like(target, 255), 4)
    assert mean_iou(nothing) == pixel_accuracy(nothing) == 0


@given(st.integers(2, 6), st.integers(1, 60), st.integers(0, 999))
def test_miou_is_scikit_learns(c, n, seed):
    g = torch.Generator().manual_seed(seed)
    target, guess = (torch.randint(0, c, (n,), generator=g) for _ in range(2))
    half = n // 2  # matrices of two batches add up
    confusion = confusion_matrix(guess[:half], target[:half], c)
    confusion += confusion_matrix(guess[half:], target[half:], c)
    assert mean_iou(confusion) == pytest.approx(jaccard_score(target, guess, average="macro"))


def test_ids_that_are_no_classes_are_refused():
    ids = torch.tensor([0, 1, 2])
    with pytest.raises(ShapeError, match="`target` holds ids from 0 to 2"):
        confusion_matrix(ids.clamp_max(1), ids, 2)
    with pytest.raises(ShapeError, match="`predicted` holds ids"):
        confusion_matrix(ids, ids.clamp_max(1), 2)
    with pytest.raises(ShapeError, match=r"`predicted` is \(3,\)"):
        confusion_matrix(ids, ids[:2], 3)
    with pytest.raises(ConfigError, match="`num_classes`"):
        confusion_matrix(ids, ids, 0)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=25)
def test_upsampling_of_tiling_cells_is_torchs(rows, cols, factor, seed):
    scores = torch.randn(2, rows * cols, 3, generator=torch.Generator().manual_seed(seed))
    view_size, mask_size = (rows * 8, cols * 4), (rows * factor, cols * 2 * factor)
    grid = TokenGrid.tiling(rows, cols, view_size=view_size)
    maps = scores.transpose(1, 2).reshape(2, 3, rows, cols)
    wanted = F.interpolate(maps, mask_size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(upsample_scores(scores, grid, view_size, mask_size), wanted)


def test_upsampling_keeps_to_the_true_centres():
    """A ResNet's: 32 i + 0.5, so that the first one stands at the view's very corner."""
    grid = TokenGrid(2, 3, (32.0, 32.0), (0.5, 0.5))
    scores = torch.randn(1, 6, 2, dtype=torch.float64)
    maps = upsample_scores(scores, grid, (64, 96), (64, 96))
    for r in range(2):
        for c in range(3):  # pixel 32 c has its centre at 32 c + 0.5
            torch.testing.assert_close(maps[0, :, 32 * r, 32 * c], scores[0, 3 * r + c])
    for y, x in ((5, 40), (63, 95), (17, 63)):
        down, across = min(y / 32, 1), min(x / 32, 2)
        r, c = min(int(down), 0), min(int(across), 1)
        wanted = 0
        for i in (0, 1):
            for j in (0, 1):
                weight = (1 - abs(down - r - i)) * (1 - abs(across - c - j))
                wanted = wanted + weight * scores[0, 3 * (r + i) + c + j]
        torch.testing.assert_close(maps[0, :, y, x], wanted)
    # the labels are taken at the same places
    mask = torch.arange(64 * 96).reshape(1, 64, 96)
    labels = token_labels(mask, grid, (64, 96))[0].reshape(2, 3)
    assert labels.tolist() == [[0, 32, 64], [32 * 96, 32 * 96 + 32, 32 * 96 + 64]]
    with pytest.raises(ShapeError, match="`scores` has 6 tokens but `grid` has 2 × 2"):
        upsample_scores(scores, TokenGrid.tiling(2, 2, view_size=(8, 8)), (8, 8), (8, 8))


def one_hot(labels, c):
    return F.one_hot(labels.where(labels != 255, 0).long(), c).float()


def test_features_that_are_the_classes_are_retrieved():
    g = torch.Generator().manual_seed(0)
    voters, tested = (
        torch.randint(0, 5, (200,), generator=g),
        torch.randint(0, 5, (100,), generator=g),
    )
    tested[::7] = 255
    voters[:20] = 255
    features = one_hot(voters, 5)
    features[:20] = one_hot(torch.full((20,), 3), 5)  # ignored voters do not vote
    found = token_retrieval(features, voters, one_hot(tested, 5), tested)
    assert found.accuracy == found.miou == 1
    assert int(found.confusion.sum()) == int((tested != 255).sum())


def test_random_tokens_are_retrieved_at_chance():
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 4, (1500,), generator=g)
    tokens = torch.randn(1500, 8, generator=g)
    found = token_retrieval(tokens[:1000], labels[:1000], tokens[1000:], labels[1000:], k=1)
    assert found.accuracy == pytest.approx(0.25, abs=0.08)  # four standard deviations
    assert found.miou == pytest.approx(1 / 7, abs=0.06)  # 1/16 over 7/16


def stripes(images, classes, side, cells, seed=0):
    """Masks of vertical stripes, a class each, and the class of every token."""
    g = torch.Generator().manual_seed(seed)
    of_column = torch.randint(0, classes, (images, cells), generator=g)
    masks = of_column.repeat_interleave(side // cells, 1)[:, None].repeat(1, side, 1)
    return masks, of_column[:, None].expand(-1, cells, -1).reshape(images, -1)


def test_tokens_that_know_their_class_segment_every_pixel():
    masks, labels = stripes(12, 3, 32, 4)
    tokens, grid = one_hot(labels, 3), TokenGrid.tiling(4, 4, view_size=(64, 64))
    masks[:, :3] = 255
    # the classes of the last image's left half are one that no training token has
    arguments = (tokens[:8].flatten(0, 1), labels[:8].flatten(), tokens[8:], masks[8:])
    found = linear_segmentation(*arguments, grid, (64, 64))
    assert found.accuracy == found.miou == 1
    assert int(found.confusion.sum()) == 4 * 29 * 32
    unseen = masks[8:].clone()
    unseen[0, 3:, :16] = 3
    scores = linear_segmentation(*arguments[:3], unseen, grid, (64, 64))
    assert scores.confusion.shape == (4, 4)
    assert scores.confusion[3].sum() == 29 * 16
    assert scores.confusion[:, 3].sum() == 0
    assert scores.miou < 0.75


def test_pixels_count_and_not_only_token_centres():
    masks, labels = stripes(12, 3, 32, 4)
    tokens, grid = one_hot(labels, 3), TokenGrid.tiling(4, 4, view_size=(32, 32))
    thin = masks.clone()
    thin[:, ::8] = 0  # the first row of every cell: no centre lies there
    assert torch.equal(token_labels(thin, grid, (32, 32)), labels)
    train = tokens[:8].flatten(0, 1), labels[:8].flatten()
    found = linear_segmentation(*train, tokens[8:], thin[8:], grid, (32, 32))
    hit = (thin[8:] == masks[8:]).float().mean()
    assert found.accuracy == pytest.approx(float(hit))
    assert found.accuracy < 0.95


def test_the_commonest_class_is_the_level():
    train, test = torch.tensor([1, 1, 0, 255, 255, 255]), torch.tensor([[1, 0], [2, 255]])
    level = majority_scores(train, test)
    assert level.accuracy == pytest.approx(1 / 3)
    assert level.miou == pytest.approx((1 / 3) / 3)


def test_what_does_not_fit_is_refused():
    tokens, labels = torch.eye(3), torch.tensor([0, 1, 1])
    with pytest.raises(ShapeError, match="`train_tokens` must have 2 axes"):
        token_retrieval(tokens[None], labels, tokens, labels)
    with pytest.raises(ShapeError, match="axis `n`"):
        token_retrieval(tokens, labels[:2], tokens, labels)
    with pytest.raises(ShapeError, match="no label other than 255"):
        token_retrieval(tokens, torch.full((3,), 255), tokens, labels)
    grid = TokenGrid.tiling(1, 3, view_size=(8, 24))
    with pytest.raises(ShapeError, match="axis `m`"):
        linear_segmentation(tokens, labels, tokens[None], labels.view(3, 1, 1), grid, (8, 24))
    with pytest.raises(DataError, match="all 1: a classifier needs"):
        linear_segmentation(
            tokens, torch.ones(3), tokens[None], labels.view(1, 1, 3), grid, (8, 24)
        )
