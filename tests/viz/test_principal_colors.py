"""Tokens as colours, against a naive principal component analysis in float64."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from local_distill import TokenGrid
from local_distill.errors import DataError, ShapeError
from local_distill.viz.principal_colors import principal_colors, principal_figure


def naive_colors(rows):
    """(n, d) → (n, 3) by eigenvectors of the covariance, one component after the other."""
    rows = np.asarray(rows, dtype=np.float64)
    centered = rows - rows.mean(0)
    values, vectors = np.linalg.eigh(centered.T @ centered)
    colors = np.full((len(rows), 3), 0.5)
    for component, column in enumerate(np.argsort(values)[::-1][:3]):
        scores = centered @ vectors[:, column]
        if sum(score**3 for score in scores) < 0:
            scores = -scores
        low, high = np.percentile(scores, [2, 98])
        colors[:, component] = [min(max((s - low) / (high - low), 0), 1) for s in scores]
    return colors


def tokens(b=2, n=15, d=7, seed=0):
    """Skewed, with components of clearly different size, so that their order and sign are sure."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(b, n, 3, generator=generator, dtype=torch.float64).pow(3)
    axes = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0][:3]
    noise = 1e-3 * torch.randn(b, n, d, generator=generator, dtype=torch.float64)
    return scores * torch.tensor([9.0, 3.0, 1.0]) @ axes + noise + 4


@given(b=st.integers(1, 3), n=st.integers(13, 40), d=st.integers(3, 12), seed=st.integers(0, 99))
def test_as_the_naive_analysis(b, n, d, seed):
    features = tokens(b, n, d, seed)
    found = principal_colors(features)
    assert found.shape == (b, n, 3)
    assert found.dtype == torch.float32
    wanted = naive_colors(features.flatten(0, 1))
    np.testing.assert_allclose(found.flatten(0, 1).numpy(), wanted, atol=1e-5)


def test_a_mirrored_or_rotated_feature_space_has_the_same_colours():
    features = tokens()
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))[0]
    for other in (-features, features @ turn, 3.5 * features - 100, features.flip(-1)):
        torch.testing.assert_close(principal_colors(other), principal_colors(features))
    torch.testing.assert_close(
        principal_colors(features.flip(1)), principal_colors(features).flip(1)
    )


def test_the_components_are_shared_by_the_images():
    features = tokens(b=3)
    together = principal_colors(features)
    torch.testing.assert_close(together.flatten(0, 1), principal_colors(features.flatten(0, 1)))
    assert not torch.allclose(together[0], principal_colors(features[0]), atol=0.01)


@pytest.mark.parametrize("value", [0.0, 1e-30, 0.1, 1e6])
def test_constant_features_are_grey(value):
    assert bool((principal_colors(torch.full((2, 5, 4), value)) == 0.5).all())
    assert bool((principal_colors(torch.full((1, 4), value)) == 0.5).all())


def test_few_dimensions_and_symmetric_scores():
    two = principal_colors(torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 0.5], [0.0, -0.5]]))
    assert bool((two[:, 2] == 0.5).all())
    assert float((two[0, 0] - two[1, 0]).abs()) == 1.0
    one_apart = torch.zeros(200, 3)
    one_apart[7] = 1
    assert float(principal_colors(one_apart)[7, 0]) == 1.0  # percentiles alone would divide by 0
    half = principal_colors(tokens().bfloat16())
    assert bool(half.isfinite().all())


def test_what_has_no_colour_is_refused():
    bad = tokens()
    bad[1, 3, 2] = torch.nan
    with pytest.raises(DataError, match="1 of 30 tokens"):
        principal_colors(bad)
    with pytest.raises(ShapeError, match="floating-point"):
        principal_colors(torch.zeros(2, 3, 4, dtype=torch.int64))
    for features in (torch.zeros(5), torch.zeros(2, 0, 4), [[1.0]]):
        with pytest.raises(ShapeError, match="`features`"):
            principal_colors(features)


def test_each_token_stands_where_its_grid_says():
    grid = TokenGrid(rows=2, cols=3, stride=(32.0, 32.0), offset=(0.5, 0.5))  # as a ResNet's
    features = tokens(b=2, n=6)
    figure = principal_figure(list(torch.rand(2, 3, 64, 96)), features, [grid, grid])
    cells = figure.axes[2].images[0]
    assert tuple(cells.get_extent()) == (-15.5, 80.5, 48.5, -15.5)
    np.testing.assert_allclose(
        cells.get_array(), principal_colors(features)[0].reshape(2, 3, 3).numpy(), atol=1e-6
    )
    assert figure.axes[2].get_xlim() == (-15.5, 96)
    drawn = [io.BytesIO(), io.BytesIO()]
    for target in drawn:
        figure.savefig(target, format="png")
    assert drawn[0].getvalue() == drawn[1].getvalue()


@pytest.mark.parametrize(
    ("images", "features", "grids", "text"),
    [
        (2, (2, 5, 4), 2, "2 × 3 = 6 tokens"),
        (1, (2, 6, 4), 2, "`images`"),
        (2, (2, 6, 4), 1, "`grids`"),
        (2, (6, 4), 2, "`features`"),
        (0, (0, 6, 4), 0, "at least one image"),
    ],
)
def test_what_does_not_fit_is_refused(images, features, grids, text):
    grid = TokenGrid.tiling(2, 3, (16, 24))
    with pytest.raises(ShapeError, match=text):
        principal_figure([torch.rand(3, 16, 24)] * images, torch.rand(features), [grid] * grids)
