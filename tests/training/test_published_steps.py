"""Steps of the trainer over epochs against the same steps done by the published codes.

The numbers in `helpers.published_steps` came out of the authors' own code: `train_one_epoch`, the
loss, `cosine_scheduler`, `clip_gradients`, `cancel_gradients_last_layer`, `get_params_groups` and
the networks of facebookresearch/dino, tileb1/global-local-self-distillation and bytedance/ibot, and
`PLLearner` of hagiss/SDSSL; in float64 on a CPU, one gloo process, on the weights, views and masks
that `start_at`, `noise` and `masks` give. The order of the images is that of seed 1.
"""

import functools
import json

import pytest
import torch
from helpers.published_steps import PUBLISHED, SCHEDULES
from lightning_fabric import Fabric
from numpy.random import RandomState  # its numbers are the same in every version of numpy

from local_distill import ConfigError, from_box
from local_distill.training import methods
from local_distill.training.checkpoints import load_checkpoint
from local_distill.training.optimizer import build_optimizer, set_schedules
from local_distill.training.options import (
    BackboneOptions,
    HeadOptions,
    OptimOptions,
    TeacherOptions,
    TemperatureOptions,
)
from local_distill.training.progress import Progress
from local_distill.training.trainer import train

EPOCHS, BATCH, SIDE = 4, 4, 32  # of three steps
HEAD = HeadOptions(num_prototypes=16, hidden_dim=24, bottleneck_dim=8, frozen_magnitude=False)
TEMPS = TemperatureOptions(
    teacher=0.07, teacher_start=0.04, teacher_warmup=3, whole_epochs=True
)  # fmt: skip
VIT = {"img_size": SIDE, "patch_size": 8, "width": 24, "depth": 2, "num_heads": 3}
DINO_OPTIM = OptimOptions(
    lr=5e-3, lr_batch=8, lr_end=1e-4, warmup=0, weight_decay=0.04, weight_decay_end=0.4, clip=0.5,
    clip_each=True, freeze_last=1,
)  # fmt: skip
SDSSL_OPTIM = OptimOptions(
    lr=2e-3, lr_batch=4, lr_end=0.0, warmup=0, weight_decay=0.1, weight_decay_end=0.1, clip=0.0
)
SDSSL_SIZES = {"hidden_dim": 16, "last_hidden_dim": 32, "out_dim": 8}


def start_at(network):
    """Weights that do not depend on how a library starts its layers."""
    for number, (name, parameter) in enumerate(sorted(network.named_parameters())):
        drawn = torch.from_numpy(RandomState(number).standard_normal(parameter.shape))
        one = ("norm" in name and name.endswith("weight")) or name.endswith("original0")
        scale = 0.1 if one or parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        with torch.no_grad():
            parameter.copy_(scale * drawn + float(one))


def noise(count):
    """A stand-in for `MultiCrop`: the number of an image → views, and boxes where they lie."""

    def views(number):
        made, places = [], []
        for v in range(count):
            state = RandomState(10 * number + v)
            made.append(torch.from_numpy(state.standard_normal((3, SIDE, SIDE))))
            left, top, width, height = state.uniform((0, 0, 30, 30), (20, 20, 40, 40))
            box = torch.tensor([left, top, left + width, top + height])
            places.append(from_box(box, (SIDE, SIDE), (64, 64), hflip=bool(v % 2)))
        return made, places

    return views


class MaskedIbot(methods.Ibot):
    def extras(self, backbone, sizes, num_global):
        return masks


def masks(views):
    """A patch is hidden where it is bright on average."""
    means = [view.reshape(3, 4, 8, 4, 8).mean((0, 2, 4)).flatten() for view in views[:2]]
    return {"masks": [mean > mean.median() + 0.05 for mean in means]}


METHODS = {
    "dino": lambda: methods.Dino(HEAD, TEMPS, fused=False),
    "glsd": lambda: methods.Glsd(HEAD, TEMPS, fused=False),
    "ibot": lambda: MaskedIbot(HEAD, TEMPS, fused=False),
    "sdssl_moco": functools.partial(methods.SdsslMoco, **SDSSL_SIZES, ratio=1.0),
    "sdssl_byol": functools.partial(methods.SdsslByol, **SDSSL_SIZES, ratio=0.8),
    "sdssl_simclr": functools.partial(methods.SdsslSimclr, **SDSSL_SIZES, ratio=0.8),
}


def run(name, output, method=None, accumulate=1):
    method = METHODS[name]() if method is None else method
    build = method.build

    def started(backbone, num_images):
        network, loss = build(backbone, num_images)
        start_at(network)
        return network, loss

    method.build = started
    sdssl = name.startswith("sdssl")
    backbone = BackboneOptions(
        kwargs=VIT | ({"img_size": SIDE, "depth": 12} if sdssl else {}),
        frozen=["patch_embed", "pos_embed"] if sdssl else [],
    )
    train(
        [(number, 0) for number in range(12)],
        noise(2 if sdssl else 4),
        method,
        backbone.build,
        num_global=2,
        output=output,
        epochs=2 if sdssl else EPOCHS,
        batch_size=BATCH // accumulate,
        accumulate=accumulate,
        optim=SDSSL_OPTIM if sdssl else DINO_OPTIM,
        teacher=TeacherOptions(0.9, 1.0),
        seed=1,
        log_every=1,
        save_every=10**6,
        fabric=Fabric(accelerator="cpu", devices=1, precision="64-true"),
    )
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], load_checkpoint(output)


def assert_state(state, wanted):
    for part in ("network", "teacher"):
        for key, (norm, first) in wanted[part].items():
            value = state[part][key]
            assert (float(value.norm()), float(value.flatten()[0])) == pytest.approx(
                (norm, first), rel=1e-6, abs=1e-7
            ), (part, key)
    for key, first in wanted["criterion"].items():
        assert state["criterion"][key][:3].tolist() == pytest.approx(first, rel=1e-6), key


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_trainers_steps_are_the_published_ones(tmp_path, name):
    """Losses, students, teachers and centers: schedules, clipping, freeze, decay, momentum.

    BYOL's numbers were made with a first ratio of 1e-30 in place of 0, for which the authors' code
    takes another loss, see `recipes.sdssl_byol`. BatchNorm's running statistics are not compared:
    training does not read them, and theirs see the predictors' inputs in another order.
    """
    lines, state = run(name, tmp_path)
    wanted = PUBLISHED[name]
    assert [line["loss"] for line in lines] == pytest.approx(wanted["loss"], rel=1e-6)
    assert_state(state, wanted)
    if name == "dino":
        temps = [line["teacher_temp"] for line in lines]
        assert temps == pytest.approx([0.04] * 3 + [0.055] * 3 + [0.07] * 6)


def test_steps_of_two_micro_batches_are_the_published_ones(tmp_path):
    """Means of means: gradients and centers of a step do not depend on how it is cut."""
    lines, state = run("glsd", tmp_path, accumulate=2)
    assert_state(state, PUBLISHED["glsd"])
    assert len(lines) == len(PUBLISHED["glsd"]["loss"])


def test_schedules_are_the_published_ones():
    optim = OptimOptions(lr=5e-4, lr_end=1e-6, warmup=10, weight_decay=0.04, weight_decay_end=0.4)
    optimizer = build_optimizer(torch.nn.Linear(2, 3), optim)
    for at, step in enumerate(SCHEDULES["steps"]):
        now = Progress(step, total=1500, unit=5.0, epoch=step / 5)
        rates = set_schedules(optimizer, optim, now, images=256)
        wanted = {key: values[at] for key, values in SCHEDULES.items()}
        # Theirs reaches the peak one of the warm-up's 50 steps earlier; the cosine is the same.
        assert rates["lr"] == pytest.approx(wanted["lr"], rel=1e-6 if step >= 50 else 0.0205)
        assert rates["weight_decay"] == pytest.approx(wanted["weight_decay"])
        assert now.cosine(0.996, 1.0) == pytest.approx(wanted["momentum"])
        assert now.cosine(0.0, 0.8) == pytest.approx(wanted["ratio"])
        assert now.stairs(0.04, 0.07, over=30) == pytest.approx(wanted["teacher_temp"])
        # Our own, step by step, is less than a step of the stairs away.
        assert abs(now.linear(0.04, 0.07, over=30) - wanted["teacher_temp"]) < 0.03 / 29


def test_whole_epochs_of_any_length():
    """A step that begins an epoch is in it, also where epochs are not whole steps long."""
    for unit in (1.0, 3.0, 10 / 3, 3.5, 7.0):
        steps = [round(unit * epoch) for epoch in range(7) if (unit * epoch).is_integer()]
        got = [Progress(step, 1000, unit).stairs(0.0, 5.0, over=6) for step in steps]
        assert got == pytest.approx([min(round(step / unit), 5) for step in steps])
    assert Progress(0, 10).stairs(1.0, 2.0, over=0) == 2.0
    assert [Progress(step, 10).stairs(1.0, 2.0, over=1) for step in (0, 1)] == [1.0, 2.0]


def test_vectors_decay_where_they_are_asked_to():
    norm = torch.nn.LayerNorm(4)
    for vectors in (False, True):
        optim = OptimOptions(weight_decay=0.1, weight_decay_end=0.1, decay_vectors=vectors)
        optimizer = build_optimizer(norm, optim)
        set_schedules(optimizer, optim, Progress(0, 10), 1)
        decays = {group["weight_decay"] for group in optimizer.param_groups}
        assert decays == {0.1 if vectors else 0.0}


def test_frozen_parameters_keep_their_weights():
    small = {"img_size": 16, "width": 24, "depth": 1}
    backbone = BackboneOptions(kwargs=small, frozen=["patch_embed", "pos_embed"]).build()
    still = {name for name, p in backbone.model.named_parameters() if not p.requires_grad}
    assert still == {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"}
    optimizer = build_optimizer(torch.nn.ModuleDict({"backbone": backbone}), OptimOptions())
    held = sum(len(group["params"]) for group in optimizer.param_groups)
    assert held == len(list(backbone.parameters())) - 3
    with pytest.raises(ConfigError, match=r"backbone\.frozen.*'patchembed'"):
        BackboneOptions(kwargs=small, frozen=["patchembed"]).build()
