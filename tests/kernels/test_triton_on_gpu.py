"""The kernels on a real GPU, where one is at hand, against the plain forms on it."""

import pytest
import torch
from helpers.interpreted import needs_triton
from helpers.strategies import random_geometry

from local_distill import (
    Centering,
    LocalDistillationLoss,
    NearestMatcher,
    SimilarityMatcher,
    TokenGrid,
    Tokens,
)
from local_distill.kernels import use_triton
from local_distill.kernels.triton_switch import triton_serves

DEVICE = "cuda"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
PAIRS = [(0, 1), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)]
pytestmark = [
    needs_triton,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def views(dtype=torch.float32, b=3, d=100):
    """Two large views and two small ones of the same images."""
    found = []
    for seed, (rows, cols) in enumerate(((14, 14), (14, 14), (6, 5), (6, 5))):
        size = (16 * rows, 16 * cols)
        crop = random_geometry(b, view_size=size, source_size=(300, 400), seed=seed).to(DEVICE)
        features = torch.randn(b, rows * cols, d).to(DEVICE, dtype)
        found.append(Tokens(features, crop, TokenGrid.tiling(rows, cols, size)))
    return found


def both(run):
    """What is found with the kernels and without them."""
    results = []
    for triton in (True, False):
        with use_triton(triton):
            assert triton_serves(torch.zeros(1, device=DEVICE)) is triton
            results.append(run())
    return results


@pytest.mark.parametrize("limit", [0.5, None])
def test_the_lattice(limit):
    sides = views()
    kernel, plain = both(lambda: NearestMatcher(limit).match_views(sides, sides[:2], PAIRS))
    for pair, one in kernel.items():
        two = plain[pair]
        assert torch.equal(one.weight, two.weight)
        assert torch.equal(one.teacher_index[two.matched], two.teacher_index[two.matched])
        torch.testing.assert_close(one.cost, two.cost, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_similarity(dtype):
    sides = views(dtype)
    kernel, plain = both(lambda: SimilarityMatcher().match_views(sides, sides[:2], PAIRS))
    for (v, q), one in kernel.items():
        two = plain[v, q]
        torch.testing.assert_close(one.cost, two.cost, rtol=0, atol=3e-6)
        f, g = (sides[n].features.double() for n in (v, q))
        table = torch.cosine_similarity(f[:, :, None], g[:, None], dim=-1)
        reached = table.gather(2, one.teacher_index)[..., 0]
        torch.testing.assert_close(reached, table.amax(-1), rtol=0, atol=3e-6)


@pytest.mark.parametrize("c", [1271, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_local_loss(dtype, c):
    sides = views()
    matches = NearestMatcher().match_views(sides, sides[:2], PAIRS)
    student = [
        torch.randn(3, side.num_tokens, c).to(DEVICE, dtype).requires_grad_() for side in sides
    ]
    teacher = [torch.randn(3, 196, c).to(DEVICE, dtype) for _ in range(2)]
    loss = LocalDistillationLoss(Centering(c)).to(DEVICE).eval()

    def step():
        value = loss(student, teacher, matches, teacher_temp=0.07)
        return value.detach(), torch.autograd.grad(value * 0.3, student)

    (value, slopes), (wanted, plain) = both(step)
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    for one, two in zip(slopes, plain, strict=True):
        torch.testing.assert_close(one, two)
