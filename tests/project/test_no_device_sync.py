"""No forward waits for a device: on made-up CUDA tensors, which have a shape and no values.

Such tensors cannot be looked at: `.item()`, a shape that depends on values, `if tensor:` and copies
to the host, all of which wait for a device, are errors or are seen on the way. So this needs no
GPU; where there is one, `test_on_a_gpu` lets CUDA itself watch.
"""

import types

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from local_distill import matching
from local_distill.kernels import prototype_cross_entropy
from tests.helpers.process_cases import CASES, WITHIN, batch, places

MATCHERS = {
    "nearest": matching.NearestMatcher(),
    "nearest, search": matching.NearestMatcher(method="search"),
    "bilinear": matching.BilinearMatcher(),
    "radius": matching.RadiusMatcher(),
    "overlap": matching.OverlapMatcher(),
    "overlap, clip": matching.OverlapMatcher(method="clip"),
    "similarity": matching.SimilarityMatcher(),
    "similarity, l2": matching.SimilarityMatcher("l2"),
    "soft similarity": matching.SoftSimilarityMatcher(),
    "sinkhorn": matching.SinkhornMatcher(),
    "gated similarity": matching.GatedSimilarityMatcher(),
    "mutual": matching.Mutual(matching.SimilarityMatcher()),
    "keep best": matching.KeepBest(matching.NearestMatcher(), count=2),
}
LOSSES = CASES | WITHIN


class _NoCopies(TorchDispatchMode):
    """Refuses copies from a device to the host, which wait for what was told to it before."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [one for one in torch.utils._pytree.tree_leaves((args, kwargs))
                 if isinstance(one, torch.Tensor)]  # fmt: skip
        made = [one for one in torch.utils._pytree.tree_leaves(result)
                if isinstance(one, torch.Tensor)]  # fmt: skip
        if any(one.is_cuda for one in given) and any(one.is_cpu and one.dim() for one in made):
            raise AssertionError(f"{func} brings values from the device to the host")
        return result


def on_device(device, mode=None):
    """A batch of `process_cases`, on a device; made up where there is a mode."""

    def moved(value):
        if not isinstance(value, torch.Tensor):
            return value
        moved = (value if mode is None else mode.from_tensor(value)).to(device)
        return moved.float() if moved.is_floating_point() else moved

    found = {name: [moved(one) for one in values] for name, values in batch(0).items()}
    return types.SimpleNamespace(**found)


def made_up(run, module=None):
    """Run with made-up CUDA tensors, and a module's state as such."""
    batch(0)  # outside: it is kept for the next test
    with FakeTensorMode() as mode, torch.device("cuda"):
        x = on_device("cuda", mode)
        for part in () if module is None else module.modules():
            for store in (part._parameters, part._buffers):
                for name, value in store.items():
                    if value is not None:
                        fake = mode.from_tensor(value).detach().to("cuda")
                        store[name] = fake.requires_grad_(value.requires_grad)
        with _NoCopies():
            return run(x)


@pytest.mark.parametrize("name", MATCHERS)
def test_matchers(name):
    def run(x):
        views = [place._replace(features=found)
                 for place, found in zip(places(x), x.s_features, strict=True)]  # fmt: skip
        return matching.match_views(MATCHERS[name], views, views[:2])

    found = made_up(run)
    assert found[0, 1].weight.device.type == "cuda"


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_recipes(name):
    case = LOSSES[name]
    loss = case.make(None)
    value = made_up(lambda x: case.call(loss, x), loss)
    assert value.device.type == "cuda"
    assert value.dim() == 0


@pytest.mark.parametrize("max_bytes", [400, 10**6], ids=["tiles", "chunks"])
def test_the_fused_loss_itself(max_bytes):
    """Within it operators are not seen from outside: it is one to them."""

    def run(_):
        student, teacher = torch.randn(2, 7, 4), torch.randn(2, 5, 4)
        weight, index = torch.randn(19, 4), torch.zeros(2, 7, 2, dtype=torch.int64)
        parts = student, weight, teacher, weight, torch.zeros(19), index, torch.rand(2, 7, 2)
        scale = torch.ones(())
        return prototype_cross_entropy._loss_and_slopes(
            *parts, scale, scale, max_bytes, True, True
        )[0]

    assert made_up(run).device.type == "cuda"


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.s_whole[0].sum().item(),
        lambda x: x.s_whole[0][x.s_whole[0] > 0],
        lambda x: x.s_whole[0].cpu(),
        lambda x: x.s_whole[0].nonzero(),
        lambda x: bool(x.s_whole[0].isnan().any()),
    ],
    ids=["item", "boolean index", "cpu", "nonzero", "bool"],
)
def test_what_waits_is_seen(waits):
    with pytest.raises((AssertionError, RuntimeError, DataDependentOutputException)):
        made_up(waits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    x = on_device("cuda")
    for case in LOSSES.values():
        loss = case.make(None).cuda()
        case.call(loss, x)  # what is compiled or set up once may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            case.call(loss, x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
