"""Parameter groups, schedules, clipping and the freeze, against the papers' definitions."""

import math

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from local_distill import ConfigError, schedules
from local_distill.backbones import TimmBackbone, tiny_vit
from local_distill.heads import ProjectionHead
from local_distill.training import DistillationNetwork
from local_distill.training.optimizer import build_optimizer, clip_gradients, set_schedules
from local_distill.training.options import OptimOptions
from local_distill.training.progress import Progress


def network(depth=3):
    head = ProjectionHead(24, 7, hidden_dim=12, bottleneck_dim=5, frozen_magnitude=False)
    return DistillationNetwork(tiny_vit(img_size=16, width=24, depth=depth), head)


def names(module, parameters):
    found = {id(parameter): name for name, parameter in module.named_parameters()}
    return {found[id(parameter)] for parameter in parameters}


@pytest.mark.parametrize("layer_decay", [1.0, 0.65])
def test_every_parameter_once_and_vectors_do_not_decay(layer_decay):
    module = network()
    optimizer = build_optimizer(module, OptimOptions(layer_decay=layer_decay, weight_decay=0.0))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held})
    assert names(module, held) == {n for n, p in module.named_parameters() if p.requires_grad}
    now = Progress(100, 100)
    set_schedules(optimizer, OptimOptions(weight_decay=0.0, weight_decay_end=0.3), now, 32)
    for group in optimizer.param_groups:
        vectors = {p.dim() <= 1 for p in group["params"]}
        assert vectors in ({True}, {False})
        assert group["weight_decay"] == (0.0 if vectors == {True} else pytest.approx(0.3))


def test_layer_decay_of_a_vit_and_a_swin():
    module = network(depth=3)
    optimizer = build_optimizer(module, OptimOptions(layer_decay=0.5))
    set_schedules(optimizer, OptimOptions(lr=1.0, warmup=0, layer_decay=0.5), Progress(0, 10), 1)
    rates = {
        name: group["lr"]
        for group in optimizer.param_groups
        for name in names(module, group["params"])
    }
    # heads, then the blocks, then the embedding
    assert rates["backbone.model.patch_embed.proj.weight"] == pytest.approx(0.5**4)
    for block in range(3):
        name = f"backbone.model.blocks.{block}.attn.qkv.weight"
        assert rates[name] == pytest.approx(0.5 ** (3 - block))
    assert rates["global_head.mlp.0.weight"] == 1.0
    assert rates["backbone.model.norm.weight"] == 0.5  # timm puts it with the last block
    swin = TimmBackbone("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24,
                        num_heads=(1, 1, 1, 1))  # fmt: skip
    scales = [
        group["lr_scale"]
        for group in build_optimizer(
            DistillationNetwork(swin), OptimOptions(layer_decay=0.5)
        ).param_groups
    ]
    assert max(scales) == 0.5  # there is no head here
    assert min(scales) < 0.1


def test_schedules_are_the_papers():
    optim = OptimOptions(lr=5e-4, lr_batch=256, lr_end=1e-6, warmup=10, weight_decay=0.04,
                         weight_decay_end=0.4)  # fmt: skip
    optimizer = build_optimizer(network(), optim)
    per_epoch, epochs = 7, 30
    for step in (0, 35, 70, 71, 140, 209):
        now = Progress(step, epochs * per_epoch, per_epoch)
        found = set_schedules(optimizer, optim, now, images=1024)
        peak = 5e-4 * 4
        if step < 70:
            wanted = peak * step / 70
        else:
            done = (step - 70) / (210 - 70)
            wanted = 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * done)) / 2
        assert found["lr"] == pytest.approx(wanted, rel=1e-12)
        assert optimizer.param_groups[0]["lr"] == found["lr"]
        assert found["weight_decay"] == pytest.approx(
            schedules.cosine(step, start=0.04, end=0.4, total=210)
        )
    assert Progress(6, 210, 7).within(1)
    assert not Progress(7, 210, 7).within(1)
    assert Progress(14, 210, 7).linear(0.04, 0.07, over=4) == pytest.approx(0.055)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "lamb"])
def test_timms_optimisers_step(name):
    torch.manual_seed(0)
    module = network()
    optimizer = build_optimizer(module, OptimOptions(name=name, lr=0.1))
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in module.named_parameters() if p.requires_grad}


def gradients(module, scale):
    torch.manual_seed(1)
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter) * scale


def test_clipping_whole_each_and_frozen():
    fabric = Fabric(accelerator="cpu", devices=1)
    module = network()
    wrapped, optimizer = fabric.setup(module, build_optimizer(module, OptimOptions()))
    trained = [p for p in module.parameters() if p.requires_grad]
    gradients(module, 10.0)
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in module.parameters()))
    kept = [p.grad.clone() for p in trained]
    assert float(clip_gradients(fabric, wrapped, optimizer, OptimOptions(clip=0.0), ())) == (
        pytest.approx(norm, rel=1e-5)
    )
    assert all(torch.equal(p.grad, g) for p, g in zip(trained, kept, strict=True))
    clip_gradients(fabric, wrapped, optimizer, OptimOptions(clip=2.0), ())
    after = math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters()))
    assert after == pytest.approx(2.0, rel=1e-3)
    gradients(module, 10.0)
    trained[0].grad.mul_(1e-6)
    small = trained[0].grad.clone()
    frozen = module.prototypes()
    clip_gradients(fabric, wrapped, optimizer, OptimOptions(clip=2.0, clip_each=True), frozen)
    assert torch.equal(trained[0].grad, small)  # below the limit by itself
    for parameter in module.parameters():
        if any(parameter is other for other in frozen):
            assert parameter.grad is None
        else:
            assert float(parameter.grad.norm()) <= 2.0 + 1e-4


def test_optimisers_that_are_not():
    with pytest.raises(ConfigError, match="'adamz'"):
        build_optimizer(nn.Linear(2, 2), OptimOptions(name="adamz"))
    with pytest.raises(ConfigError, match="momentumm"):
        build_optimizer(nn.Linear(2, 2), OptimOptions(name="sgd", kwargs={"momentumm": 1}))
    for change in ({"lr": 0.0}, {"warmup": -1}, {"clip": math.nan}, {"lr_batch": 0}):
        with pytest.raises(ConfigError, match=f"optim.{next(iter(change))}"):
            OptimOptions(**change)
