"""Every method in the trainer: what it teaches, what it keeps, and that it is the recipe."""

import json

import pytest
import torch
from helpers.training_cases import BACKBONE, HEAD, METHODS, small_views, train_small

from local_distill import ConfigError, MultiCrop, recipes
from local_distill.structures import PrototypeLogits, Tokens, ViewOutput
from local_distill.teacher import EmaTeacher
from local_distill.training import SyntheticScenes, methods
from local_distill.training.checkpoints import load_checkpoint
from local_distill.training.loading import view_loader
from local_distill.training.methods import Models
from local_distill.training.options import BackboneOptions, OptimOptions, TeacherOptions
from local_distill.training.progress import Progress

NAMES = sorted(METHODS)


def one_step(name, step=3, **settings):
    """The modules, a batch, and what the method says of it."""
    make, local_count = METHODS[name]
    method = make(**settings)
    torch.manual_seed(0)
    network, criterion = method.build(BACKBONE.build(layers=method.wants_layers), 12)
    teacher = EmaTeacher(network) if method.has_teacher else None
    models = Models(network, teacher, criterion, network.backbone, 2)
    views = small_views(local_count)
    sizes = [(24, 24), (24, 24), *[(16, 16)] * local_count]
    loader = view_loader(SyntheticScenes(12, 32), views, batch_size=4,
                         extras=method.extras(network.backbone, sizes, 2))  # fmt: skip
    batch = next(iter(loader))
    return models, batch, method.step(models, batch, Progress(step, 10, 1.0))


@pytest.mark.parametrize("name", NAMES)
def test_everything_that_is_trained_gets_a_gradient(name):
    models, _, terms = one_step(name)
    assert terms.loss.isfinite()
    terms.loss.backward()
    missing = [
        parameter_name
        for parameter_name, parameter in models.student.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    # PixPro has no loss of whole views: the class token's last attention output reaches nothing,
    # but every *parameter* is shared with the patches. So nothing may be missing.
    assert missing == []
    if models.teacher is not None:
        assert all(p.grad is None for p in models.teacher.parameters())
    assert not list(models.criterion.parameters())  # all that learns is in the network
    for value in terms.values.values():
        assert torch.isfinite(torch.as_tensor(value)).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_run_trains_saves_and_tells(tmp_path, name):
    result = train_small(tmp_path, name, steps=4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(value == value for line in lines for value in line.values())
    state = load_checkpoint(tmp_path)
    assert state["step"] == result.step == 4
    assert (state["teacher"] is None) is not METHODS[name][0]().has_teacher
    for part in ("network", "teacher", "criterion"):
        values = (state[part] or {}).values()
        assert all(value.isfinite().all() for value in values if value.is_floating_point())
    assert "feature_std" in lines[-1]


@pytest.mark.parametrize("name", ["glsd", "ibot", "cribo", "adasim", "densecl", "sdssl_moco"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, name):
    """State of every kind: centers, masks, queues, votes and partners, heads with BatchNorm."""
    whole = train_small(tmp_path / "whole", name, steps=9)
    train_small(tmp_path / "part", name, steps=9, save_every=1, keep=10)
    for path in (tmp_path / "part" / "checkpoints").glob("step-*"):
        if int(path.name[5:13]) > 3:  # an epoch is three steps: the boundary is the hard case
            path.unlink()
    (tmp_path / "part" / "checkpoints" / "manifest.json").unlink()
    again = train_small(tmp_path / "part", name, steps=9, resume=True)
    assert again.step == whole.step == 9
    one, two = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "part")
    for part in ("network", "teacher", "criterion"):
        assert one[part].keys() == two[part].keys()
        for key, value in one[part].items():
            assert torch.equal(value, two[part][key]), (part, key)


def view_outputs(models, batch, network, views, teacher=False):
    outputs = network(batch.views[:views], teacher=teacher)
    joined = []
    for out, geometry, view in zip(outputs, batch.geometries, batch.views, strict=False):
        grid = models.backbone.token_grid(tuple(view.shape[-2:]))
        logits = [
            part.features @ part.weight.T if isinstance(part, PrototypeLogits) else part
            for part in (out.global_logits, out.token_logits)
        ]
        joined.append(ViewOutput(*logits, Tokens(out.patch_tokens.detach(), geometry, grid)))
    return joined


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("glsd", lambda: recipes.glsd(16)),
        ("glsd_tables", lambda: recipes.glsd(16)),
        ("esvit", lambda: recipes.esvit(16)),
        ("dino", lambda: recipes.dino(16)),
    ],
)
def test_the_loss_is_the_recipes(name, recipe):
    settings = {"normalize": "all"} if name.startswith("glsd") else {}
    models, batch, terms = one_step(name, **settings)
    student = view_outputs(models, batch, models.student, len(batch.views))
    teacher = view_outputs(models, batch, models.teacher.module, 2, teacher=True)
    wanted = recipe()(student, teacher, teacher_temp=0.04)
    torch.testing.assert_close(terms.loss, wanted.loss, rtol=1e-5, atol=1e-6)
    assert float(terms.values["teacher_temp"]) == 0.04


def test_temperatures_ratio_and_neighbours_follow_the_run():
    head = {"temps": methods.Dino(HEAD).temps.__class__(0.1, 0.07, 0.04, 10)}
    for step, temp in ((0, 0.04), (5, 0.055), (10, 0.07), (99, 0.07)):
        assert one_step("dino", step, **head)[2].values["teacher_temp"] == pytest.approx(temp)
    ratios = [one_step("sdssl_byol", step)[2].values["ratio"] for step in (0, 5, 10)]
    assert ratios == pytest.approx([0.0, 0.4, 0.8])
    _, _, before = one_step("cribo", 0)
    parts = before.values["global_loss"] + before.values["local_loss"]
    torch.testing.assert_close(before.loss, parts)


def test_masks_are_of_the_global_views_alone_and_reach_the_student():
    models, batch, terms = one_step("ibot")
    masks = batch.extras["masks"]
    assert [tuple(mask.shape) for mask in masks] == [(4, 9), (4, 9)]
    assert 0 < float(terms.values["masked"]) < 0.6
    assert float(terms.values["masked"]) == pytest.approx(
        float(torch.cat([m.flatten() for m in masks]).float().mean())
    )
    token = models.student.masked_patches.token
    terms.loss.backward()
    assert token.grad.abs().sum() > 0


def test_densecl_compares_one_way_or_both():
    one = one_step("densecl")[2]
    both = one_step("densecl_both")[2]
    assert set(one.matches) == {(0, 1)}
    assert set(both.matches) == {(0, 1), (1, 0)}


def test_partners_come_from_the_votes():
    """Once an epoch has voted, AdaSim shows neighbours, and the sampler's state says which."""
    method = methods.Adasim(HEAD, top_k=3, votes=1, neighbour_temp=10.0)
    _, criterion = method.build(BACKBONE.build(), 12)
    images = torch.arange(12)
    assert torch.equal(method.draw_partners(criterion, images, 5), images)
    torch.manual_seed(0)
    features = torch.randn(12, 24) + 1.0
    for _ in range(2):
        criterion.sampler.observe(images, features)
        method.end_epoch(criterion)
    drawn = method.draw_partners(criterion, images, 5)
    assert torch.equal(drawn, method.draw_partners(criterion, images, 5))
    assert not torch.equal(drawn, images)


def test_a_method_of_ones_own(tmp_path):
    class Mine(methods.Dino):
        def step(self, models, batch, now):
            terms = super().step(models, batch, now)
            return terms._replace(loss=terms.loss * 2, values={**terms.values, "mine": now.step})

    train_small(tmp_path, method=Mine(HEAD), steps=2, log_every=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["mine"] for line in lines] == [0, 1]
    for line in lines:
        assert line["loss"] == pytest.approx(2 * line["global_loss"])


def test_frozen_prototypes_stand_still(tmp_path):
    for freeze, moved in ((99, False), (0, True)):
        out = tmp_path / str(freeze)
        optim = OptimOptions(warmup=0, freeze_last=freeze)
        train_small(out, steps=3, save_every=1, optim=optim,
                    teacher=TeacherOptions(momentum=1.0))  # fmt: skip
        state = load_checkpoint(out)
        name = "global_head.prototypes.parametrizations.weight.original1"
        same = torch.equal(state["network"][name], state["teacher"][f"module.{name}"])
        assert same is not moved
        assert not torch.equal(
            state["network"]["global_head.mlp.0.weight"],
            state["teacher"]["module.global_head.mlp.0.weight"],
        )


def test_settings_and_networks_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="normalize"):
        methods.Glsd(HEAD, normalize="some")
    with pytest.raises(ConfigError, match=r"method\.ratio"):
        methods.SdsslMoco(ratio=-1.0)

    class Nameless(methods.Dino):
        def build(self, backbone, num_images):
            _, loss = super().build(backbone, num_images)
            return torch.nn.Linear(2, 2), loss

    with pytest.raises(ConfigError, match="under the name `backbone`"):
        train_small(tmp_path, method=Nameless(HEAD))


@pytest.mark.parametrize(
    ("name", "backbone", "kwargs"),
    [
        ("glsd", "swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "embed_dim": 24,
                                                  "num_heads": (1, 1, 1, 1)}),
        ("ibot", "swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "embed_dim": 24,
                                                  "num_heads": (1, 1, 1, 1)}),
        ("densecl", "resnet18", {}),
        ("pixpro", "resnet18", {}),
        ("vicregl", "convnext_atto", {"depths": (1, 1, 1, 1)}),
        ("sdssl_moco", "convnext_atto", {"depths": (1, 1, 1, 1)}),
        ("esvit", "efficientnet_b0", {}),
        ("croc", "vit_tiny_patch16_224", {"depth": 2}),
        ("cribo", "vit_small_patch14_dinov2", {"depth": 1, "embed_dim": 24, "num_heads": 3}),
    ],
)  # fmt: skip
def test_other_backbones(tmp_path, name, backbone, kwargs):
    local = METHODS[name][1]
    views = MultiCrop(global_size=64, local_size=56, local_count=min(local, 1))
    options = BackboneOptions(name=backbone, kwargs=kwargs)
    train_small(tmp_path, name, steps=1, log_every=1, views=views, images=SyntheticScenes(4, 64),
                build_backbone=options.build)  # fmt: skip
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert torch.isfinite(torch.tensor(json.loads(line)["loss"]))
