"""The losses on features, and the targets: every dtype, autocast, many shapes and two layouts.

The manner of `test_grid.py`, which holds the distillation losses: numbers are drawn in float32 and
cast, and the oracle works in float64 on what the cast left. The bound on the loss is the same in
all dtypes, as all of them are worked out in float32 at least; gradients are held to float64's
autograd of the oracle, as closely as their dtype can say them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers import feature_oracles as oracles
from helpers.order_oracle import patch_order

from local_distill import Matches
from local_distill.losses.dense_contrastive import DenseContrastiveLoss
from local_distill.losses.gram import GramAnchoringLoss
from local_distill.losses.koleo import KoLeoLoss
from local_distill.losses.local_variance_covariance import VICRegLLoss
from local_distill.losses.negative_queue import NegativeQueue
from local_distill.losses.patch_order import PatchOrderLoss
from local_distill.losses.pixel_propagation import PixelConsistencyLoss
from local_distill.losses.variance_covariance import VICRegLoss
from local_distill.losses.view_objectives import ByolObjective, MocoV3Objective, SimclrObjective
from local_distill.targets import Centering, SinkhornKnopp

TEMP = 0.2
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# images, student tokens, teacher tokens, candidates, channels, size of the numbers
SHAPES = [
    (2, 1, 1, 1, 1, 1),
    (2, 1, 1, 1, 2, 1),
    (1, 1, 1, 1, 3, 1),
    (1, 4, 4, 1, 6, 1),
    (2, 4, 6, 1, 5, 1),
    (2, 6, 4, 1, 5, 1),
    (3, 9, 4, 1, 7, 1),
    (2, 3, 5, 2, 4, 1),
    (2, 3, 5, 5, 4, 1),
    (2, 2, 12, 12, 3, 1),
    (5, 1, 3, 1, 3, 1),
    (2, 7, 1, 1, 3, 1),
    (3, 2, 2, 1, 33, 1),
    (2, 5, 5, 3, 17, 1),
    (4, 3, 2, 2, 3, 1),
    (2, 4, 6, 1, 5, 10),
    (2, 6, 4, 4, 5, 10),
    (3, 3, 3, 1, 4, 10),
    (2, 4, 6, 1, 5, 100),
    (2, 6, 4, 2, 9, 100),
    (3, 3, 3, 3, 5, 100),
    (2, 4, 6, 1, 5, 0.01),
    (3, 2, 5, 2, 8, 0.01),
    (2, 5, 2, 1, 3, 0.01),
]


class Step(NamedTuple):
    live: list[torch.Tensor]  # these get a gradient
    fixed: list[torch.Tensor]
    matches: Matches | None = None


class Component(NamedTuple):
    draw: Callable[[int], Step]
    loss: Callable[..., torch.Tensor]  # of a step's parts
    oracle: Callable[..., torch.Tensor]  # likewise, in float64
    any_length: bool = True  # rows are brought to length 1


def normal(number, *shapes, most=100.0):
    g = torch.Generator().manual_seed(number)
    size = min(SHAPES[number][5], most)
    return [size * torch.randn(shape, generator=g) for shape in shapes]


def drawn_matches(number):
    """With gaps; weights that float32 adds up exactly."""
    b, s, t, k, *_ = SHAPES[number]
    g = torch.Generator().manual_seed(number)
    weight = torch.randint(0, 65, (b, s, k), generator=g) / 1024
    weight[:, ::3] = 0
    weight[0, 0] = 1 / 16
    return Matches(torch.randint(0, t, (b, s, k), generator=g), weight, weight.sum(-1))


def token_pair(number):
    b, s, t, _, d, _ = SHAPES[number]
    student, teacher = normal(number, (b, s, d), (b, t, d))
    return Step([student], [teacher], drawn_matches(number))


def two_views(number):
    b, s, _, _, d, _ = SHAPES[number]
    views = normal(number, *[(b * s, d)] * 4)
    return Step(views[:2], views[2:])


def all_live(number):
    step = two_views(number)
    return Step(step.live + step.fixed, [])


def two_moderate_views(number):
    """VICReg's covariances grow with the fourth power, and their gradient is to fit into half."""
    b, s, _, _, d, _ = SHAPES[number]
    return Step(normal(number, *[(b * s, d)] * 2, most=10.0), [])


def views_and_tokens(number):
    b, s, t, _, d, _ = SHAPES[number]
    shapes = (b, d), (b, d), (b, s, d), (b, t, d)
    return Step(normal(number, *shapes, most=10.0), [], drawn_matches(number))


@functools.cache
def keys(dim):
    return torch.randn(7, dim, generator=torch.Generator().manual_seed(dim))


def dense_contrastive(live, fixed, matches):
    loss = DenseContrastiveLoss(NegativeQueue(9, live[0].shape[-1]), temp=TEMP)
    loss.to(torch.promote_types(live[0].dtype, torch.float32)).eval()
    loss.queue.update(keys(live[0].shape[-1]))
    return loss(live, fixed, {(0, 0): matches})


COMPONENTS = {
    "dense_contrastive": Component(
        token_pair,
        dense_contrastive,
        lambda live, fixed, matches: oracles.dense_contrastive(
            live[0], fixed[0], matches, keys(live[0].shape[-1]).double(), TEMP
        ),
    ),
    "pixel_consistency": Component(
        token_pair,
        lambda live, fixed, matches: PixelConsistencyLoss()(live, fixed, {(0, 0): matches}),
        lambda live, fixed, matches: oracles.pixel_consistency(live[0], fixed[0], matches),
    ),
    "gram_anchoring": Component(
        token_pair,
        lambda live, fixed, matches: GramAnchoringLoss()(live, fixed, {(0, 0): matches}),
        lambda live, fixed, matches: oracles.gram(live[0], fixed[0], matches),
    ),
    "patch_order": Component(
        token_pair,
        lambda live, fixed, matches: PatchOrderLoss()(
            live[0], fixed[0], keys(live[0].shape[-1])[:5], matches
        ),
        lambda live, fixed, matches: patch_order(
            live[0], fixed[0], keys(live[0].shape[-1])[:5].double(), matches
        ),
    ),
    "vicreg": Component(
        two_moderate_views,
        lambda live, *_: VICRegLoss()(live),
        lambda live, *_: oracles.vicreg(*live),
        any_length=False,
    ),
    "vicregl": Component(
        views_and_tokens,
        lambda live, _, matches: (
            VICRegLLoss()(live[:2], live[2:], feature_matches={(0, 1): matches}).loss
        ),
        lambda live, _, matches: oracles.vicregl(live[:2], live[2:], matches),
        any_length=False,
    ),
    "koleo": Component(
        all_live,
        lambda live, *_: KoLeoLoss()(live),
        lambda live, *_: oracles.mean([oracles.koleo(view) for view in live]),
    ),
    "moco_v3": Component(
        two_views,
        lambda live, fixed, _: MocoV3Objective(TEMP)(live, fixed),
        lambda live, fixed, _: oracles.moco_v3(live, fixed, TEMP),
    ),
    "byol": Component(
        two_views,
        lambda live, fixed, _: ByolObjective()(live, fixed),
        lambda live, fixed, _: oracles.byol(live, fixed),
    ),
    "simclr": Component(
        all_live,
        lambda live, *_: SimclrObjective(TEMP)(live[:2], live[2:]),
        lambda live, *_: oracles.simclr(live[:2], live[2:], TEMP),
    ),
}


@functools.cache
def truth(name, dtype, number):
    """The loss and its slopes in float64, of what the cast to ``dtype`` left of the numbers."""
    step = COMPONENTS[name].draw(number)
    live = [part.to(dtype).double().requires_grad_() for part in step.live]
    value = COMPONENTS[name].oracle(
        live, [part.to(dtype).double() for part in step.fixed], step.matches
    )
    return float(value.detach()), torch.autograd.grad(value, live)


def laid_out(values, dtype, strided):
    values = values.to(dtype, copy=True)
    return values.mT.contiguous().mT if strided else values


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestFeatureGrid:
    @pytest.mark.parametrize("name", COMPONENTS)
    def test_loss(self, name, dtype, autocast, strided):
        draw, loss, _, any_length = COMPONENTS[name]
        # of what the dtype can hold, beside the float32 that it is worked out in
        eps = 2 * max(torch.finfo(dtype).eps, 1e-5 if dtype != torch.float64 else 1e-9)
        for number in range(len(SHAPES)):
            step = draw(number)
            live = [laid_out(part, dtype, strided).requires_grad_() for part in step.live]
            fixed = [laid_out(part, dtype, strided) for part in step.fixed]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                value = loss(live, fixed, step.matches)
            wanted, slopes = truth(name, dtype, number)
            assert value.dtype == torch.promote_types(dtype, torch.float32)
            assert abs(float(value.detach()) - wanted) <= 1e-5 * max(1.0, abs(wanted)), number
            gradients = torch.autograd.grad(value, live)
            longest = max(float(part.norm(dim=-1).max()) for part in step.live)
            steepest = max(float(slope.abs().max()) for slope in slopes)
            # a slope of 0 may be what is left of terms of this size
            steepest = max(steepest, 1 / longest if any_length else 1e-2)
            for gradient, slope in zip(gradients, slopes, strict=True):
                assert gradient.dtype == dtype
                assert bool(gradient.isfinite().all())
                torch.testing.assert_close(
                    gradient.double(), slope, rtol=eps, atol=eps * steepest,
                    msg=lambda text: f"shape {number}: {text}",  # noqa: B023
                )  # fmt: skip

    @pytest.mark.parametrize("name", ["centering", "sinkhorn_knopp"])
    def test_targets(self, name, dtype, autocast, strided):
        for number in range(len(SHAPES)):
            b, s, t, _, c, _ = SHAPES[number]
            logits = [
                laid_out(part, dtype, strided) for part in normal(number, (b, s, c), (b, t, c))
            ]
            targets = Centering(c) if name == "centering" else SinkhornKnopp(c)
            if name == "centering":
                targets.center.copy_(keys(c)[0])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                found = [each.probs() for each in targets(logits, teacher_temp=TEMP)]
            wanted = target_truth(name, dtype, number)
            # Probabilities know no more of their logits than float32 does.
            scale = max(float(part.double().abs().max()) for part in logits) / TEMP
            for view, probs in zip(wanted, found, strict=True):
                assert probs.dtype == torch.promote_types(dtype, torch.float32)
                torch.testing.assert_close(
                    probs.double(), view.view_as(probs), rtol=0, atol=max(1e-5, 1e-6 * scale),
                    msg=lambda text: f"shape {number}: {text}",  # noqa: B023
                )  # fmt: skip


@functools.cache
def target_truth(name, dtype, number):
    b, s, t, _, c, _ = SHAPES[number]
    views = normal(number, (b, s, c), (b, t, c))
    rows = torch.cat([view.to(dtype).double().reshape(-1, c) for view in views])
    probs = (
        oracles.centering(rows, keys(c)[0].double(), TEMP)
        if name == "centering"
        else oracles.sinkhorn_knopp(rows, TEMP)
    )
    return probs.split([b * s, b * t])


def test_the_grid_is_one():
    assert len(SHAPES) >= 24
    assert len(set(SHAPES)) == len(SHAPES)
    step = COMPONENTS["vicregl"].draw(4)
    assert not laid_out(step.live[2], torch.float32, True).is_contiguous()
