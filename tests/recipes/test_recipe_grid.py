"""Every recipe: every dtype, autocast, many shapes and two layouts, against itself in float64.

The losses inside are held to naive oracles in `tests/losses`; here stands that putting them
together loses nothing. Numbers are drawn in float32 and cast, and the recipe in float64 works on
what the cast left, with the same state: that of one earlier step, so that no center is 0 and no
queue is empty. Networks inside a recipe (SDSSL's heads, PixPro's linear layer) are taken out for
the comparison, as they round in whatever dtype the user runs them, and are back for gradcheck.
"""

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from local_distill import TokenGrid, Tokens, ViewOutput, from_box, recipes
from local_distill.losses.pixel_propagation import PixelPropagation
from local_distill.recipes.croc import CrocView

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.07
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LAYERS, HEADS, FEATURES = 3, 2, 5


class Shape(NamedTuple):
    b: int  # images
    d: int  # prototypes, or channels
    grids: tuple[tuple[int, int], ...]  # of tokens, per view; the first two views are global
    size: float  # of the numbers


SHAPES = [
    Shape(1, 6, ((2, 2), (2, 2)), 1),
    Shape(1, 3, ((2, 3), (3, 2), (1, 3)), 1),
    Shape(2, 2, ((2, 2), (2, 2)), 1),
    Shape(2, 3, ((2, 3), (2, 3)), 1),
    Shape(2, 5, ((2, 3), (3, 2)), 1),
    Shape(2, 4, ((1, 5), (5, 1)), 1),
    Shape(3, 5, ((3, 3), (2, 2), (2, 2)), 1),
    Shape(3, 7, ((2, 2), (3, 3), (1, 3), (3, 1)), 1),
    Shape(3, 33, ((2, 2), (2, 3)), 1),
    Shape(4, 17, ((2, 2), (2, 2)), 1),
    Shape(5, 3, ((2, 2), (4, 1)), 1),
    Shape(5, 9, ((3, 2), (2, 2)), 1),
    Shape(2, 5, ((2, 3), (3, 2), (2, 2)), 0.01),
    Shape(3, 8, ((2, 2), (2, 3)), 0.01),
    Shape(2, 5, ((2, 2), (3, 2)), 10),
    Shape(3, 3, ((1, 4), (3, 3)), 10),
    Shape(4, 6, ((2, 3), (2, 2), (1, 3)), 10),
    Shape(2, 5, ((2, 2), (2, 3)), 100),
    Shape(3, 9, ((3, 2), (2, 2)), 100),
    Shape(2, 7, ((5, 1), (2, 2), (3, 1)), 100),
    Shape(2, 5, ((2, 2), (2, 3)), 2000),
    Shape(3, 8, ((2, 3), (4, 1)), 2000),
    Shape(2, 5, ((2, 2), (3, 2)), 20_000),
    Shape(3, 4, ((2, 2), (2, 2), (1, 3)), 20_000),
]
SMALL = Shape(2, 3, ((1, 3), (3, 1)), 1)
Parts = list[Tensor]


class Inputs(NamedTuple):
    live: list[tuple[int, ...]]  # shapes of what gets a gradient
    fixed: list[tuple[int, ...]]  # and of what gets none


class Recipe(NamedTuple):
    make: Callable[[Shape], nn.Module]
    inputs: Callable[[Shape], Inputs]
    loss: Callable[[nn.Module, Shape, Parts, Parts], Tensor]
    most: float  # size of the numbers
    temp: float = 1.0  # what the student's are divided by
    whole: Callable[[Shape], nn.Module] | None = None  # with its networks


@functools.cache
def places(shape, view):
    """The geometry and the grid of a view."""
    rows, columns = shape.grids[view]
    g = torch.Generator().manual_seed(view + 10 * shape.b)
    u = torch.rand(shape.b, 4, generator=g, dtype=torch.float64)
    left, top = 60 * u[:, 0], 60 * u[:, 1]
    box = torch.stack((left, top, left + 60 + 80 * u[:, 2], top + 60 + 80 * u[:, 3]), 1)
    size = (16 * rows, 16 * columns)
    return from_box(box, size, (200, 200), hflip=u[:, 0] > 0.5), TokenGrid.tiling(
        rows, columns, view_size=size
    )


def counts(shape):
    return [rows * columns for rows, columns in shape.grids]


def whole_and_tokens(shape):
    """Per student view numbers of the whole and of its tokens; the teacher's two, and features."""
    b, d = shape.b, shape.d
    student = [part for n in counts(shape) for part in ((b, d), (b, n, d))]
    features = [(b, n, FEATURES) for n in counts(shape)]
    return Inputs(student, student[:4] + features + features[:2])


def outputs(shape, numbers, features):
    return [
        ViewOutput(numbers[2 * v], numbers[2 * v + 1], Tokens(own, *places(shape, v)))
        for v, own in enumerate(features)
    ]


def both_sides(shape, live, fixed):
    views = len(shape.grids)
    return outputs(shape, live, fixed[4 : 4 + views]), outputs(shape, fixed[:4], fixed[-2:])


def distilled(recipe, shape, live, fixed):
    return recipe(*both_sides(shape, live, fixed), teacher_temp=TEACHER_TEMP).loss


def compared(recipe, shape, live, fixed):
    return recipe(*both_sides(shape, live, fixed)).loss


def masked(recipe, shape, live, fixed):
    g = torch.Generator().manual_seed(shape.b)
    valid = [torch.rand(shape.b, n, generator=g) > 0.5 for n in counts(shape)]
    hidden = [*valid[:2], *[None] * (len(valid) - 2)]
    return recipe(*both_sides(shape, live, fixed), hidden, teacher_temp=TEACHER_TEMP).loss


def drawn_together(shape):
    return Inputs([(shape.b, shape.d)] * 2, [(shape.b, shape.d)] * 2 + [(shape.b, FEATURES)])


def observed(recipe, shape, live, fixed):
    return recipe(
        [ViewOutput(part) for part in live],
        [ViewOutput(part) for part in fixed[:2]],
        teacher_temp=TEACHER_TEMP,
        index=torch.arange(shape.b),
        features=fixed[2],
    ).loss


def all_live(shape):
    return whole_and_tokens(shape)._replace(fixed=[])


def criterion(recipe, shape, live, fixed):
    views = range(len(shape.grids))
    return recipe(live[::2], live[1::2], [Tokens(None, *places(shape, v)) for v in views]).loss


def first_tokens(shape, count, clusters):
    """(count, clusters): where the clusters of both views' tokens start."""
    tokens = sum(counts(shape)[:2])
    return (torch.arange(clusters) + torch.arange(count)[:, None]) % tokens


def clustered(shape):
    """Per view logits of the whole, [CLS] and patches; the teacher's with keys."""
    b, d = shape.b, shape.d
    student = [part for n in counts(shape)[:2] for part in ((b, d), (b, d), (b, n, d))]
    keys = [part for n in counts(shape)[:2] for part in ((b, HEADS, n, 4), (b, HEADS, 4))]
    return Inputs(student, student + keys)


def same(pooled):
    return pooled  # a head that rounds nothing


def joined(recipe, shape, live, fixed):
    student, teacher = (
        [
            CrocView(part[3 * v], part[3 * v + 1], Tokens(part[3 * v + 2], *places(shape, v)))
            for v in range(2)
        ]
        for part in (live, fixed)
    )
    teacher = [
        view._replace(keys=fixed[6 + 2 * v], cls_keys=fixed[7 + 2 * v])
        for v, view in enumerate(teacher)
    ]
    return recipe(
        student, teacher, student_head=same, teacher_head=same, teacher_temp=TEACHER_TEMP,
        initial=first_tokens(shape, shape.b * HEADS, 5),
    ).loss  # fmt: skip


def patches(shape):
    b, d = shape.b, shape.d
    student = [part for n in counts(shape)[:2] for part in ((b, d), (b, n, d))]
    return Inputs(student, student)


def bootstrapped(recipe, shape, live, fixed):
    student, teacher = (
        [
            ViewOutput(part[2 * v], tokens=Tokens(part[2 * v + 1], *places(shape, v)))
            for v in range(2)
        ]
        for part in (live, fixed)
    )
    return recipe(
        student, teacher, student_head=same, teacher_head=same, teacher_temp=TEACHER_TEMP,
        initial=first_tokens(shape, shape.b, 3),
    ).loss  # fmt: skip


def layered(shape):
    return Inputs([(LAYERS, shape.b, shape.d)] * 2, [(shape.b, shape.d)] * 2)


def layered_alone(shape):
    return layered(shape)._replace(fixed=[])


def layer_by_layer(recipe, shape, live, fixed, ratio=0.5):
    return recipe(live, fixed or None, ratio=ratio).loss


def with_heads(make, shape):
    return make(LAYERS, embed_dim=shape.d, hidden_dim=6, last_hidden_dim=6, out_dim=4)


def without_heads(make, shape):
    recipe = make(LAYERS, embed_dim=shape.d, hidden_dim=1, last_hidden_dim=1, out_dim=shape.d)
    heads = recipe.student_heads
    for modules in (heads.projectors, heads.predictors):
        for place in range(len(modules)):
            modules[place] = nn.Identity()
    if recipe.teacher_head is not None:
        recipe.teacher_head.module = nn.Identity()
    return recipe


def pixpro(shape):
    return recipes.pixpro(shape.d, instance_weight=1.0)


def pixpro_without_layer(shape):
    recipe = pixpro(shape)
    recipe.propagation = PixelPropagation(shape.d, num_layers=0)
    return recipe


def sdssl(make, inputs):
    whole = functools.partial(with_heads, make)
    return Recipe(functools.partial(without_heads, make), inputs, layer_by_layer, 100, 1, whole)


def cut(make, inputs, loss, most):
    """A recipe whose student's numbers are logits."""
    return Recipe(make, inputs, loss, most, STUDENT_TEMP)


VICREGL_COUNTS = {"location_counts": (3, 2), "feature_counts": (3, 2)}
RECIPES = {
    "glsd": cut(lambda s: recipes.glsd(s.d), whole_and_tokens, distilled, 60_000),
    "esvit": cut(lambda s: recipes.esvit(s.d), whole_and_tokens, distilled, 60_000),
    "dino": cut(lambda s: recipes.dino(s.d), whole_and_tokens, distilled, 60_000),
    "ibot": cut(lambda s: recipes.ibot(s.d), whole_and_tokens, masked, 60_000),
    "adasim": cut(
        lambda s: recipes.adasim(9, FEATURES, s.d, top_k=2, votes=2),
        drawn_together, observed, 60_000,
    ),
    "croc": cut(lambda s: recipes.croc(s.d, s.d), clustered, joined, 60_000),
    "cribo": cut(
        lambda s: recipes.cribo(s.d, s.d, s.d, num_clusters=3, queue_images=9),
        patches, bootstrapped, 60_000,
    ),
    "densecl": Recipe(lambda s: recipes.densecl(s.d, num_keys=9), whole_and_tokens, compared, 100),
    "pixpro": Recipe(pixpro_without_layer, whole_and_tokens, compared, 100, 1, pixpro),
    "vicregl": Recipe(lambda s: recipes.vicregl(**VICREGL_COUNTS), all_live, criterion, 10),
    "sdssl_moco": sdssl(recipes.sdssl_moco, layered),
    "sdssl_byol": sdssl(recipes.sdssl_byol, layered),
    "sdssl_simclr": sdssl(recipes.sdssl_simclr, layered_alone),
}  # fmt: skip


@functools.cache
def drawn(name, shape, seed):
    """The inputs of a recipe in float32."""
    g = torch.Generator().manual_seed(seed)
    size = min(shape.size, RECIPES[name].most)
    return [
        [(size * torch.randn(part, generator=g)).clamp(-60_000, 60_000) for part in parts]
        for parts in RECIPES[name].inputs(shape)
    ]


@functools.cache
def kept(name, shape, dtype, whole):
    """A recipe after one step, and its state then: centers have moved, queues hold keys."""
    torch.manual_seed(0)
    make, _, loss, _, _, networks = RECIPES[name]
    recipe = (networks or make if whole else make)(shape)
    live, fixed = drawn(name, shape, 1000)
    loss(recipe, shape, [part.clone().requires_grad_() for part in live], fixed)
    recipe.to(dtype)
    return recipe, {part: value.clone() for part, value in recipe.named_buffers()}


def after_a_step(name, shape, dtype=torch.float32, whole=False):
    """The recipe in the state that `kept` left it in."""
    recipe, state = kept(name, shape, torch.promote_types(dtype, torch.float32), whole)
    for part, value in recipe.named_buffers():
        value.copy_(state[part])
    return recipe.train()


def laid_out(values, dtype, strided):
    values = values.to(dtype, copy=True)
    return values.mT.contiguous().mT if strided else values


def step(name, shape, recipe, live, fixed, autocast=False):
    """The loss, and the gradient of each live part."""
    for part in live:
        part.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        value = RECIPES[name].loss(recipe, shape, live, fixed)
    gradients = torch.autograd.grad(value, live, allow_unused=True, materialize_grads=True)
    return value.detach(), gradients


@functools.cache
def truth(name, dtype, number):
    """In float64, of what the cast to ``dtype`` left of the numbers."""
    shape = SHAPES[number]
    live, fixed = (
        [part.to(dtype).double() for part in parts] for parts in drawn(name, shape, number)
    )
    value, slopes = step(name, shape, after_a_step(name, shape, torch.float64), live, fixed)
    return float(value), slopes


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_grid(name, dtype, autocast, strided):
    # of what the dtype can hold, beside the float32 that it is worked out in
    eps = 2 * max(torch.finfo(dtype).eps, 1e-5 if dtype != torch.float64 else 1e-9)
    temp = RECIPES[name].temp
    for number, shape in enumerate(SHAPES):
        live, fixed = (
            [laid_out(part, dtype, strided) for part in parts]
            for parts in drawn(name, shape, number)
        )
        recipe = after_a_step(name, shape, dtype)
        value, gradients = step(name, shape, recipe, live, fixed, autocast)
        wanted, slopes = truth(name, dtype, number)
        largest = max(float(part.detach().double().abs().max()) for part in live)
        size = largest / temp if temp < 1 else abs(wanted)
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        assert abs(float(value) - wanted) <= 1e-5 * max(1.0, size), f"shape {number}"
        # A slope of 0 may be what is left of terms of this size.
        floor = (
            1e-2 if temp < 1 else 1 / max(float(part.detach().norm(dim=-1).max()) for part in live)
        )
        steepest = max(floor, *(float(slope.abs().max()) for slope in slopes))
        for part, (gradient, slope) in enumerate(zip(gradients, slopes, strict=True)):
            assert gradient.dtype == dtype
            torch.testing.assert_close(
                gradient.double(), slope, rtol=eps, atol=eps * steepest,
                msg=lambda text: f"shape {number}, part {part}: {text}",  # noqa: B023
            )  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_student_alone_gets_a_gradient(name):
    recipe = after_a_step(name, SMALL, whole=True)
    live, fixed = (
        [part.clone().requires_grad_() for part in parts] for parts in drawn(name, SMALL, 1)
    )
    RECIPES[name].loss(recipe, SMALL, live, fixed).backward()
    assert all(part.grad is None for part in fixed)
    seen = [part.grad is not None and bool(part.grad.abs().sum() > 0) for part in live]
    unseen = 2 if name == "dino" else 0  # its tokens take no part
    assert seen.count(False) == unseen


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_are_exact(name):
    recipe = copy.deepcopy(after_a_step(name, SMALL, torch.float64, whole=True))
    loss = RECIPES[name].loss
    live, fixed = ([part.double() for part in parts] for parts in drawn(name, SMALL, 2))
    for part in live:
        part.requires_grad_()
    if not name.startswith("sdssl"):
        recipe.eval()  # or its state would move from one number to the next
        assert torch.autograd.gradcheck(lambda *x: loss(recipe, SMALL, list(x), fixed), live)
        return
    # What is detached moves with the numbers all the same: it is held still, or left out.
    recipe.loss.detached_weight = 0.0
    if name != "sdssl_simclr":
        assert torch.autograd.gradcheck(lambda *x: loss(recipe, SMALL, list(x), fixed), live)
        return
    assert torch.autograd.gradcheck(lambda *x: loss(recipe, SMALL, list(x), fixed, 0.0), live)
    last = [part[-1:].detach() for part in live]
    lower = [part[:-1].detach().requires_grad_() for part in live]
    assert torch.autograd.gradcheck(
        lambda *x: loss(
            recipe, SMALL, [torch.cat(both) for both in zip(x, last, strict=True)], fixed
        ),
        lower,
    )


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "vicregl"])
def test_sixty_thousand_in_half_precision_is_finite(name, autocast):
    # VICRegL's gradient, which grows with the third power of its features, is beyond half precision
    live, fixed = (
        [(60_000 * part.sign()).half() for part in parts] for parts in drawn(name, SMALL, 3)
    )
    recipe = after_a_step(name, SMALL)
    value, gradients = step(name, SMALL, recipe, live, fixed, autocast)
    assert bool(value.isfinite())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert all(bool(part.isfinite().all()) for part in recipe.buffers() if part.is_floating_point())


def test_the_grid_is_one():
    assert len(SHAPES) >= 24
    assert len(set(SHAPES)) == len(SHAPES)
    assert set(RECIPES) == {name for name in recipes.__all__ if name.islower()}
    for name in ("densecl", "sdssl_moco"):
        live, _ = drawn(name, SHAPES[4], 0)
        assert not any(laid_out(part, torch.float16, True).is_contiguous() for part in live)
