"""Blocks of images and tokens: the loss and the gradient of the plain form."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from local_distill import Centering, LocalDistillationLoss, Matches, TeacherTargets
from local_distill.kernels import byte_budget, paired_cross_entropy
from local_distill.kernels.paired_cross_entropy import AnsweredView, blockwise_cross_entropy
from local_distill.losses import _pairs
from local_distill.losses._pairs import plain_cross_entropy

PAIRS = [(0, 1), (1, 0), (2, 0), (2, 1)]


def problem(seed=0, b=3, c=5, counts=(4, 6, 3), k=2, dtype=torch.float64, scale=1.0):
    """Student views of several sizes, teacher views, and soft matches with rows of no mass."""
    g = torch.Generator().manual_seed(seed)
    draw = {"generator": g, "dtype": torch.float64}
    student = [(scale * torch.randn(b, s, c, **draw)).to(dtype).requires_grad_() for s in counts]
    targets = {
        q: TeacherTargets(torch.randn(b, counts[q], c, **draw).to(dtype), torch.randn(c, **draw), 1)
        for q in (0, 1)
    }
    answers = {v: [] for v in range(len(counts))}
    for v, q in PAIRS:
        index = torch.randint(0, counts[q], (b, counts[v], k), generator=g)
        weight = torch.rand(b, counts[v], k, **draw) / k
        weight[:, 0] = 0
        answers[v].append((q, Matches(index, weight, weight[..., 0]), torch.rand(b, **draw)))
    views = [AnsweredView(logits, answers[v]) for v, logits in enumerate(student)]
    return student, views, targets


def run(form, student, views, targets, factor=1.0):
    value = form(views, targets, 0.3)
    (value * factor).backward()
    gradients = [logits.grad for logits in student]
    for logits in student:
        logits.grad = None
    return value.detach(), gradients


@given(
    st.integers(0, 99),
    st.integers(1, 4),
    st.integers(1, 9),
    st.tuples(*[st.integers(1, 7)] * 3),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_blocks_of_any_length_are_as_the_plain_form(seed, b, c, counts, k, length, dtype):
    student, views, targets = problem(seed, b, c, counts, k, dtype)
    with mock.patch.object(paired_cross_entropy, "block_length", return_value=length):
        value, gradients = run(blockwise_cross_entropy, student, views, targets)
    wanted, slopes = run(plain_cross_entropy, student, views, targets)
    assert value.dtype == wanted.dtype
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    for one, two in zip(gradients, slopes, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, two)


def test_gradients_are_those_of_the_numbers():
    student, views, targets = problem()

    def loss(*logits):
        given = [view._replace(logits=one) for view, one in zip(views, logits, strict=True)]
        return blockwise_cross_entropy(given, targets, 0.3)

    assert torch.autograd.gradcheck(loss, student)


def test_a_second_derivative_is_refused():
    student, views, targets = problem()
    value = blockwise_cross_entropy(views, targets, 0.3)
    slopes = torch.autograd.grad(value, student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slopes[0].sum().backward()


def test_a_second_backward_gives_the_same():
    student, views, targets = problem()
    value = blockwise_cross_entropy(views, targets, 0.3)
    first = torch.autograd.grad(value, student, torch.tensor(3.0).double(), retain_graph=True)
    second = torch.autograd.grad(value, student, torch.tensor(3.0).double(), retain_graph=True)
    plain = torch.autograd.grad(plain_cross_entropy(views, targets, 0.3), student)
    for one, two, three in zip(first, second, plain, strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, 3 * three)


def test_loss_scaling_saves_small_gradients_of_half_precision():
    student, views, targets = problem(dtype=torch.float16)
    views = [
        AnsweredView(v.logits, [(q, m, 1e-7 * scale) for q, m, scale in v.answers]) for v in views
    ]
    _, lost = run(blockwise_cross_entropy, student, views, targets)
    _, gradients = run(blockwise_cross_entropy, student, views, targets, factor=2.0**16)
    _, wanted = run(plain_cross_entropy, student, views, targets, factor=2.0**16)
    for small, one, two in zip(lost, gradients, wanted, strict=True):
        torch.testing.assert_close(one, two)
        assert int((one != 0).sum()) > int((small != 0).sum())


def test_what_no_match_refers_to_stays_out():
    student, views, targets = problem(k=1)
    wanted, slopes = run(blockwise_cross_entropy, student, views, targets)
    with torch.no_grad():
        for logits in student:
            logits[:, 0] = torch.nan  # rows of no mass
    value, gradients = run(blockwise_cross_entropy, student, views, targets)
    torch.testing.assert_close(value, wanted)
    for one, two in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(one, two)
        assert not one[:, 0].any()


def test_only_what_asks_for_a_gradient_gets_one():
    student, views, targets = problem()
    frozen = [views[0]._replace(logits=views[0].logits.detach()), *views[1:]]
    value = blockwise_cross_entropy(frozen, targets, 0.3)
    value.backward()
    assert student[0].grad is None
    assert student[1].grad is not None
    with torch.no_grad():
        assert not blockwise_cross_entropy(views, targets, 0.3).requires_grad
    assert not blockwise_cross_entropy([frozen[0]], targets, 0.3).requires_grad


class Held(TorchDispatchMode):
    """The bytes of the largest tensor that any operation made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = not any(part.alias_info for part in func._schema.returns)  # not a view of another
        for leaf in torch.utils._pytree.tree_leaves(out):
            if made and isinstance(leaf, torch.Tensor):
                self.most = max(self.most, leaf.numel() * leaf.element_size())
        return out


def test_no_table_is_larger_than_the_byte_budget():
    student, views, targets = problem(b=4, c=8192, counts=(49, 49, 9), k=1, dtype=torch.float32)
    with Held() as blocks, torch.no_grad():
        blockwise_cross_entropy([v._replace(logits=v.logits.detach()) for v in views], targets, 0.3)
    with Held() as plain, torch.no_grad():
        plain_cross_entropy(views, targets, 0.3)
    assert blocks.most <= byte_budget(torch.device("cpu"))
    assert plain.most >= 4 * 49 * 8192 * 4
    assert all(logits.grad is None for logits in student)


def test_the_loss_works_in_blocks_but_not_in_a_graph():
    loss = LocalDistillationLoss(Centering(5))
    student, teacher = torch.randn(2, 4, 5, requires_grad=True), torch.randn(2, 4, 5)
    matches = {(0, 0): Matches.identity(torch.ones(2, 4, dtype=torch.bool))}

    def step(logits):
        return loss([logits], [teacher], matches, teacher_temp=0.1)

    with mock.patch.object(_pairs, "plain_cross_entropy", side_effect=AssertionError):
        value = step(student)
    with mock.patch.object(_pairs, "blockwise_cross_entropy", side_effect=AssertionError):
        other = torch.func.vmap(lambda logits: loss.eval()(
            [logits], [teacher], matches, teacher_temp=0.1
        ))(student[None])  # fmt: skip
    assert other.shape == (1,)
    assert value.requires_grad


@pytest.mark.parametrize("normalize", ["all", "matched", "image"])
def test_a_weight_that_is_no_number_is_seen(normalize):
    """Never a loss of 0 in silence: what comes is NaN, which the step skips."""
    weight = torch.full((2, 3, 1), 0.5)
    weight[0, 0] = torch.nan
    matches = {(0, 0): Matches(torch.zeros(2, 3, 1, dtype=torch.int64), weight, weight[..., 0])}
    loss = LocalDistillationLoss(Centering(4), normalize=normalize)
    value = loss([torch.randn(2, 3, 4)], [torch.randn(2, 2, 4)], matches, teacher_temp=0.1)
    assert value.isnan()
