"""Tokens of each view, in order, from forwards that somebody else makes."""

import copy
import io

import pytest
import timm
import torch
from token_tap.tapped_models import MultiCrop, gradients_of, loss_of, small_model, some_views
from torch import nn

from local_distill import ConfigError, CropGeometry, EmaTeacher, ShapeError, from_box
from local_distill.backbones import TimmBackbone, measure_token_grid, tiny_vit
from local_distill.token_tap import TokenTap


def test_each_view_gets_the_tokens_that_it_has_alone():
    model, views = small_model().train(), some_views()
    tap = TokenTap(model.backbone, "norm", layers=["blocks.0"])
    model(views)
    seen = tap.take_views(views)
    for view, got in zip(views, seen, strict=True):
        alone = model.backbone.forward_features(view)
        torch.testing.assert_close(got.tokens.features, alone[:, 1:])
        torch.testing.assert_close(got.prefix, alone[:, :1])
        assert got.layers[0].shape == got.tokens.features.shape
    assert seen[4].tokens.grid == TimmBackbone(model.backbone).token_grid((24, 32))
    assert list(model.state_dict()) == list(small_model().state_dict())


def test_geometries_are_handed_on_and_a_wrong_order_is_refused():
    model, views = small_model(), some_views()
    tap = TokenTap(model.backbone)
    crops = crops_of(views)
    model(views)
    got = tap.take(crops)[3].geometry
    assert all(torch.equal(part, wanted) for part, wanted in zip(got, crops[3], strict=True))
    for wrong in (crops[::-1], views[::-1]):
        model(views)
        with pytest.raises(ShapeError, match="order"):
            tap.take(wrong)


def test_a_step_that_was_left_out_is_seen():
    model, views = small_model(), some_views()
    tap = TokenTap(model.backbone)
    model(views), model(views)
    with pytest.raises(ShapeError, match="`clear` where a step is left out"):
        tap.take(views)
    model(views[:2]), model(views[:2])  # as many rows as two views of twice the batch
    with pytest.raises(ShapeError, match="was a step before this one not taken"):
        tap.take(views[:2])
    model(views)
    tap.clear()
    model(views)
    assert len(tap.take(views)) == 5


def crops_of(views, b=2):
    boxes = torch.tensor([[0.0, 0, 40, 30]] * b)
    return [from_box(boxes, view.shape[-2:], (60, 50)) for view in views]


@pytest.mark.parametrize("kind", ["geometries", "views"])
def test_views_that_this_network_did_not_see_are_counted(kind):
    """A teacher that sees two views, given those of all."""
    model, views = small_model(), some_views(b=3)[:2]
    tap = TokenTap(model.backbone)
    one = crops_of(views, b=3)[0] if kind == "geometries" else views[0]

    def take(steps, given):
        for _ in range(steps):
            model(views)
        return tap.take(given)

    says = (
        f"`views`: 4 {kind} of 3 images make 12, but .* `take` had 6: .* such as {kind}" + r"\[:2"
    )
    with pytest.raises(ShapeError, match=says):
        take(1, [one] * 4)
    left_out = f"2 {kind} of 3 images make 6, but .* had 12: was a step before this one not taken"
    with pytest.raises(ShapeError, match=left_out):
        take(2, [one] * 2)
    # neither a multiple nor a part
    with pytest.raises(ShapeError, match=f"4 {kind} .* had 18: give those of all views"):
        take(3, [one] * 4)
    assert len(take(1, [one] * 2)) == 2


def test_batches_of_the_given_views_must_be_one():
    model, views = small_model(), some_views()[:2]
    tap = TokenTap(model.backbone)
    sizes = (1, 3)
    model(views)
    with pytest.raises(
        ShapeError, match=r"entry 0 must have a matrix \(2, 3, 3\), .*have one batch"
    ):
        tap.take([crops_of(views, b)[0] for b in sizes])
    model(views)
    with pytest.raises(ShapeError, match=r"2 geometries of 3, 2 images make 5, but .* had 4: give"):
        tap.take([crops_of(views, b)[0] for b in (3, 2)])


def test_geometries_of_one_image_are_told_how_to_be_batched():
    model, views = small_model(), some_views()
    tap = TokenTap(model.backbone)
    model(views)
    alone = [CropGeometry(*(part[0] for part in crop)) for crop in crops_of(views)]
    says = (
        r"entry 0 must have a matrix \(b, 3, 3\), got \(3, 3\); .*default_collate\(\[geometry\]\)"
    )
    with pytest.raises(ShapeError, match=says):
        tap.take(alone)
    model(views)
    with pytest.raises(
        ShapeError, match=r"entry 1 must have the shape \(b, c, .*got \(3, 48, 48\)"
    ):
        tap.take([views[0], views[1][0]])


def test_nothing_in_evaluation_and_while_not_enabled():
    model, views = small_model(), some_views()
    tap, always = TokenTap(model.backbone), TokenTap(model.backbone, in_eval=True)
    model(views)
    always.clear()
    model.eval()(views)
    assert len(always.take(5)) == 5
    model.train()
    with pytest.raises(ShapeError, match="no forward was collected"):
        tap.take(5)
    always.enabled = False
    model(views)
    with pytest.raises(ShapeError, match="no forward was collected"):
        always.take(5)
    assert len(tap.take(5)) == 5


def test_a_forward_that_fails_leaves_nothing_behind():
    model, views = small_model(), some_views()
    tap = TokenTap(model.backbone)
    broken = [*views[:2], torch.zeros(2, 3, 5, 5)]  # the second forward fails
    with pytest.raises(AssertionError):
        model(broken)
    model(views)
    assert len(tap.take(views)) == 5


def test_a_forgotten_take_is_an_error():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8))
    TokenTap(backbone, "0")
    for _ in range(64):
        backbone(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ConfigError, match="call `take`"):
        backbone(torch.zeros(2, 3, 8, 8))


def test_copies_are_not_tapped():
    model, views = small_model(), some_views()
    tap = TokenTap(model.backbone)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    teacher = EmaTeacher(model)
    for other in (copy.deepcopy(model), teacher, torch.load(file, weights_only=False)):
        other(views)
        with pytest.raises(ShapeError, match="no forward"):
            tap.take(5)
    with pytest.raises(ShapeError, match="no forward"):
        copy.deepcopy(tap).take(5)
    own = TokenTap(teacher.module.backbone)
    teacher(views)
    assert not own.take(views)[0].features.requires_grad


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "backbone"])
def test_what_checkpointing_runs_again_is_not_collected_again(whole):
    model, views = small_model(), some_views()
    plain = copy.deepcopy(model)
    taps = [TokenTap(m.backbone, layers=["blocks.0"]) for m in (plain, model)]
    run = model
    if whole:
        run = MultiCrop(_Checkpointed(model.backbone))
        run.head = model.head
    else:
        model.backbone.set_grad_checkpointing(True)
    wanted, _ = gradients_of(plain, taps[0], views)
    model.zero_grad()
    for _ in range(2):
        model.zero_grad()
        loss, _ = loss_of(run, taps[1], views)
        loss.backward()
    for got, want in zip((p.grad for p in model.parameters()), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


class _Checkpointed(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, images):
        return torch.utils.checkpoint.checkpoint(self.call, images, use_reentrant=False)


def test_reentrant_checkpointing_of_a_tapped_block_is_refused():
    backbone = tiny_vit(depth=1).model
    block = backbone.blocks[0]
    TokenTap(backbone, layers=["blocks.0"])
    backbone.blocks = nn.Sequential(_Reentrant(block))
    with pytest.raises(ConfigError, match="use_reentrant"):
        backbone(torch.zeros(2, 3, 48, 48))


class _Reentrant(_Checkpointed):
    def forward(self, images):
        return torch.utils.checkpoint.checkpoint(
            self.call, images.requires_grad_(), use_reentrant=True
        )


def test_replicas_of_data_parallel_are_refused():
    backbone = small_model().backbone
    TokenTap(backbone)
    with pytest.raises(ConfigError, match="DistributedDataParallel"):
        backbone._replicate_for_data_parallel()(torch.zeros(2, 3, 48, 48))
    with pytest.raises(ConfigError, match="DistributedDataParallel"):
        TokenTap(nn.DataParallel(backbone), "module.norm")


def test_stems_that_do_not_cut_are_refused_and_a_grid_serves_them():
    resnet = timm.create_model("resnet18", num_classes=0)
    grid = TimmBackbone(resnet).token_grid
    tap = TokenTap(resnet, "layer4", grid=grid)
    resnet(torch.zeros(2, 3, 64, 97))
    assert tap.take(1)[0].grid == grid((64, 97))
    for size in (None, 32):
        with pytest.raises(ConfigError, match="does not cut a view"):
            TokenTap(MultiCrop(resnet), "backbone.layer4", patch_size=size)


def test_maps_with_channels_last():
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, strict_img_size=False, embed_dim=12,
        depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), drop_path_rate=0.0,
    )  # fmt: skip
    tap = TokenTap(swin, "norm")
    view = torch.randn(2, 3, 64, 96)
    swin(view)
    features = swin.forward_features(view)
    assert features.shape[1:3] == (2, 3)
    got = tap.take([view])[0]
    torch.testing.assert_close(got.features, features.flatten(1, 2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "module", "sizes"),
    [
        ("convnext_atto", "stages", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}),
        (
            "vit_small_patch14_reg4_dinov2",
            "norm",
            {"embed_dim": 24, "depth": 1, "num_heads": 2, "dynamic_img_size": True},
        ),
    ],
)
def test_timms_own_grids_and_prefixes(name, module, sizes):
    backbone = timm.create_model(name, num_classes=0, **sizes).train()
    tap = TokenTap(backbone, module)
    view = torch.randn(2, 3, 70, 98)
    output = backbone.forward_features(view)
    backbone(view)
    got = tap.take_views([view])[0]
    whole = TimmBackbone(backbone)
    assert got.tokens.grid == whole.token_grid((70, 98))
    if output.dim() == 4:
        assert got.prefix.shape[1] == 0
        torch.testing.assert_close(got.tokens.features, output.flatten(2).mT)
    else:
        assert tap.num_prefix_tokens == got.prefix.shape[1] == 5
        torch.testing.assert_close(got.tokens.features, output[:, 5:])


class _Lists(nn.Module):
    """Takes a list of batches of two sizes, and norms each, as DINOv2's nested tensors go."""

    def __init__(self, nested):
        super().__init__()
        self.embed, self.nested = nn.Conv2d(3, 8, 8, stride=8), nested
        self.blocks, self.norm = _OnEach(nn.Linear(8, 8)), nn.LayerNorm(8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, batches, masks=None):
        tokens = [self.embed(images).flatten(2).mT for images in batches]
        tokens = [torch.cat([self.cls_token.expand(len(t), -1, -1), t], 1) for t in tokens]
        if self.nested:
            tokens = self.blocks(tokens)
        return [self.norm(part) for part in tokens]


class _OnEach(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, parts):
        return [self.layer(part) for part in parts]


@pytest.mark.parametrize("layers", [[], ["blocks"]])
def test_a_list_of_batches_as_dinov2_takes_it(layers):
    model = _Lists(nested=bool(layers))
    tap = TokenTap(model, layers=layers)
    crops = [torch.randn(4, 3, 48, 32), torch.randn(6, 3, 16, 24)]
    outputs = model(crops, masks=None)
    seen = tap.take_views([*crops[0].split(2), *crops[1].split(2)])
    assert [view.tokens.grid.rows for view in seen] == [6, 6, 2, 2, 2]
    assert all(len(view.layers) == len(layers) for view in seen)
    for start, part in ((0, outputs[0]), (2, outputs[1])):
        for number, rows in enumerate(part.split(2)):
            torch.testing.assert_close(seen[start + number].tokens.features, rows[:, 1:])
            torch.testing.assert_close(seen[start + number].prefix, rows[:, :1])


def test_tokens_under_autocast_are_as_the_module_gives_them():
    model, views = small_model(), some_views()
    tap = TokenTap(model.backbone, "norm", layers=["blocks.0.mlp"])
    with torch.autocast("cpu", torch.bfloat16):
        model(views)
        alone = model.backbone.forward_features(views[0])
    got = tap.take_views(views)[0]
    assert got.layers[0].dtype == torch.bfloat16
    assert got.tokens.features.dtype == alone.dtype
    # bfloat16 has 8 bits, and a batch of another size is rounded in another order
    torch.testing.assert_close(got.tokens.features, alone[:, 1:], rtol=0.05, atol=0.05)
    (got.tokens.features.float().sin().sum() + got.layers[0].float().sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.backbone.blocks.parameters())


class _Tokens(nn.Module):
    def __init__(self, backbone, **settings):
        super().__init__()
        self.backbone, self.settings = backbone, settings

    def forward(self, images):
        tap = TokenTap(self.backbone, in_eval=True, **self.settings)
        try:
            self.backbone(images)
            return tap.take([images])[0].features
        finally:
            tap.remove()


def test_the_grid_is_where_the_input_gradients_of_the_tokens_lie():
    backbone = tiny_vit(depth=1, width=24, num_heads=2).model
    grid = TokenTap(backbone).grid((48, 72))
    measured = measure_token_grid(_Tokens(backbone), (48, 72), shape=(grid.rows, grid.cols))
    assert measured.stride == pytest.approx(grid.stride, abs=0.1)
    assert measured.offset == pytest.approx(grid.offset, abs=0.1)


@pytest.mark.parametrize("kind", ["ViT", "Dinov2"])
def test_transformers(kind):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        image_size=32, patch_size=8,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}Model")(config).train()
    tap = TokenTap(model, "layernorm")
    view = torch.randn(2, 3, 35, 50)
    settings = {"interpolate_pos_encoding": True} if kind == "ViT" else {}
    output = model(pixel_values=view, **settings).last_hidden_state
    got = tap.take([view])[0]
    assert (got.grid.rows, got.grid.cols) == (4, 6)
    torch.testing.assert_close(got.features, output[:, 1:])


def test_a_tap_says_what_it_listens_to():
    model = small_model()
    tap = TokenTap(model.backbone, layers=["blocks.0"])
    model(some_views())
    assert repr(tap) == "TokenTap('norm', 'blocks.0'; 2 forwards wait)"
