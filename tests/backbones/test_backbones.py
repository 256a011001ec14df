"""TimmBackbone against timm's own calls: tokens, layers, sizes, errors, training."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from local_distill import backbones
from local_distill.backbones import TimmBackbone, tiny_vit
from local_distill.errors import ConfigError, LocalDistillError, ShapeError

torch.set_num_threads(1)

# Small members of each family; `None` as the name means the demo's model.
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48}),
    "vit_patch14": (
        "vit_small_patch14_reg4_dinov2",
        {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 224},
    ),
    "vit_average": ("vit_base_patch16_gap_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}),
    "vit_map": ("vit_base_patch16_siglip_224", {"depth": 2, "embed_dim": 48, "num_heads": 3}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {"depth": 2, "embed_dim": 48}),
    "eva_dinov3": ("vit_small_patch16_dinov3", {"depth": 2, "embed_dim": 48, "num_heads": 3}),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 2, 2)}),
    "swin_v2": (
        "swinv2_tiny_window8_256",
        {"embed_dim": 24, "depths": (1, 1, 1, 1), "img_size": 224, "window_size": 7},
    ),
    "convnext": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}),
    "resnet": ("resnet18", {}),
    "regnet": ("regnetx_002", {}),
    "mobilenet": ("mobilenetv3_small_050", {}),
    "mobilenet_tf": ("tf_mobilenetv3_small_minimal_100", {}),
    "mobilenet_v4": ("mobilenetv4_conv_small_050", {}),
    "efficientnet": ("test_efficientnet", {}),
    "pvt_v2": ("pvt_v2_b0", {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 40, 64)}),
    "tiny": (None, {}),
}
SIZES = [(224, 224), (96, 96), (96, 160), (224, 160), (100, 165)]
VITS = [name for name in MODELS if name.startswith(("vit", "deit", "eva", "tiny"))]


def build(family: str, **more: object) -> TimmBackbone:
    torch.manual_seed(0)
    name, options = MODELS[family]
    if name is None:
        return tiny_vit(**more).eval()
    return TimmBackbone(name, **options, **more).eval()


@pytest.mark.parametrize("family", MODELS)
def test_one_instance_takes_every_size_and_the_grid_counts_its_tokens(family: str) -> None:
    backbone = build(family, layers=True, patch_layers=True)
    for height, width in SIZES:
        with torch.no_grad():
            out = backbone(torch.randn(2, 3, height, width))
        grid = backbone.token_grid((height, width))
        d = backbone.embed_dim
        assert out.global_token.shape == (2, d)
        assert out.patch_tokens.shape == (2, grid.num_tokens, d)
        assert tuple(layer.shape for layer in out.layers) == tuple(
            (2, dim) for dim in backbone.layer_dims
        )
        torch.testing.assert_close(out.layers[-1], out.global_token, rtol=0, atol=0)
        torch.testing.assert_close(out.patch_layers[-1], out.patch_tokens, rtol=0, atol=0)
        assert tuple(part.shape[2] for part in out.patch_layers) == backbone.layer_dims
        counts = [part.shape[1] for part in out.patch_layers]
        assert sorted(counts, reverse=True) == counts
        assert all(part.isfinite().all() for part in (out.patch_tokens, *out.layers))


@pytest.mark.parametrize("family", MODELS)
def test_known_families_need_no_forward_pass_for_their_grid(family: str) -> None:
    backbone = build(family)

    def refuse(*_: object) -> None:
        raise AssertionError("a forward pass was made")

    backbone.model.register_forward_pre_hook(refuse)
    for module in backbone.model.modules():
        module.register_forward_pre_hook(refuse)
    assert backbone.token_grid((96, 160)).num_tokens > 1


@pytest.mark.parametrize(
    ("family", "view_size", "rows", "cols", "stride", "offset"),
    [
        ("vit", (96, 160), 6, 10, 16.0, 8.0),
        ("vit_patch14", (96, 96), 6, 6, 14.0, 7.0),
        ("tiny", (24, 48), 3, 6, 8.0, 4.0),
        ("swin", (96, 160), 3, 5, 32.0, 16.0),
        ("swin", (100, 165), 4, 6, 32.0, 16.0),
        ("swin_v2", (100, 165), 4, 6, 32.0, 16.0),
        ("convnext", (100, 165), 3, 5, 32.0, 16.0),
        ("resnet", (96, 160), 3, 5, 32.0, 0.5),
        ("resnet", (97, 161), 4, 6, 32.0, 0.5),
        ("regnet", (97, 161), 4, 6, 32.0, 0.5),
        ("mobilenet", (97, 161), 4, 6, 32.0, 0.5),
        ("mobilenet_tf", (96, 160), 3, 5, 32.0, 31.5),  # pads at the end alone, five times
        ("mobilenet_v4", (97, 161), 4, 6, 32.0, 0.5),
        ("pvt_v2", (97, 161), 4, 6, 32.0, 0.5),
    ],
)
def test_grid_of_each_family(family, view_size, rows, cols, stride, offset) -> None:
    grid = build(family).token_grid(view_size)
    assert grid == (rows, cols, (stride, stride), (offset, offset))


@pytest.mark.parametrize("side", range(8, 72, 5))
@pytest.mark.parametrize(
    "family",
    [
        "tiny",
        "swin",
        "convnext",
        "resnet",
        "regnet",
        "mobilenet",
        "mobilenet_tf",
        "mobilenet_v4",
        "efficientnet",
        "pvt_v2",
    ],
)
def test_odd_sizes_count_as_the_network_does_or_are_refused(family: str, side: int) -> None:
    backbone = build(family)
    images = torch.randn(2, 3, side, 64)
    if side < backbone._least[0]:
        for call in (lambda: backbone(images), lambda: backbone.token_grid((side, 64))):
            with pytest.raises(ShapeError, match="too small"):
                call()
        with pytest.raises(RuntimeError), torch.no_grad():  # timm could not have run it
            backbone.model.forward_features(images)
    else:
        with torch.no_grad():
            tokens = backbone(images).patch_tokens
        assert tokens.shape[1] == backbone.token_grid((side, 64)).num_tokens


@pytest.mark.parametrize("family", ["vit", "vit_patch14", "deit_distilled", "tiny"])
def test_class_token_models_agree_with_timm(family: str) -> None:
    backbone = build(family, layers=True, patch_layers=True)
    images = torch.randn(2, 3, 112, 224)
    model = backbone.model
    with torch.no_grad():
        out = backbone(images)
        features = model.forward_features(images)
        each = model.forward_intermediates(
            images, norm=True, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
    torch.testing.assert_close(out.global_token, features[:, 0])
    torch.testing.assert_close(out.patch_tokens, features[:, model.num_prefix_tokens :])
    for mine, patches, (spatial, prefix) in zip(out.layers, out.patch_layers, each, strict=True):
        torch.testing.assert_close(mine, prefix[:, 0])
        torch.testing.assert_close(patches, spatial)


@pytest.mark.parametrize("family", ["vit_average", "vit_map", "swin", "convnext", "resnet"])
def test_pooled_models_agree_with_timm(family: str) -> None:
    backbone = build(family)
    images = torch.randn(2, 3, 96, 160)
    model = backbone.model
    with torch.no_grad():
        out = backbone(images)
        features = model.forward_features(images)
        pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(out.global_token, pooled)
    if family == "swin":
        expected = features.reshape(2, -1, backbone.embed_dim)
    elif family == "resnet":
        expected = features.permute(0, 2, 3, 1).reshape(2, -1, backbone.embed_dim)
        torch.testing.assert_close(out.patch_tokens.mean(1), out.global_token)
    elif family == "convnext":
        expected = model.head.norm(features).permute(0, 2, 3, 1).reshape(2, -1, backbone.embed_dim)
    else:
        expected = model.fc_norm(features)
    torch.testing.assert_close(out.patch_tokens, expected)


@pytest.mark.parametrize("family", ["swin", "convnext", "resnet"])
def test_patch_tokens_of_lower_stages_have_the_stages_means(family: str) -> None:
    backbone = build(family, layers=True, patch_layers=True)
    with torch.no_grad():
        out = backbone(torch.randn(2, 3, 96, 160))
    for whole, patches in zip(out.layers[:-1], out.patch_layers[:-1], strict=True):
        torch.testing.assert_close(patches.mean(1), whole)
    assert build(family)(torch.randn(2, 3, 96, 160)).patch_layers == ()


@pytest.mark.parametrize("family", MODELS)
def test_layers_come_from_the_same_single_pass(family: str) -> None:
    backbone = build(family, layers=True)
    images = torch.randn(2, 3, 96, 160)
    calls = []
    convolution = next(part for part in backbone.modules() if isinstance(part, nn.Conv2d))
    convolution.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        out = backbone(images)
    assert len(calls) == 1
    backbone.layer_dims = ()
    with torch.no_grad():
        plain = backbone(images)
    assert plain.layers == ()
    torch.testing.assert_close(plain.global_token, out.global_token)
    torch.testing.assert_close(plain.patch_tokens, out.patch_tokens)


def test_the_remainder_of_a_view_is_cropped_at_the_right_and_bottom() -> None:
    backbone = build("vit_patch14")
    images = torch.randn(2, 3, 96, 100)
    changed = images.clone()
    changed[..., 84:, :] = 5.0
    changed[..., 98:] = -5.0
    with torch.no_grad():
        torch.testing.assert_close(backbone(changed), backbone(images), rtol=0, atol=0)


def test_dynamic_padding_gives_the_token_that_cropping_leaves_out() -> None:
    backbone = build("vit_patch14", dynamic_img_pad=True)
    assert backbone.token_grid((96, 100)) == (7, 8, (14.0, 14.0), (7.0, 7.0))
    with torch.no_grad():
        assert backbone(torch.randn(2, 3, 96, 100)).patch_tokens.shape[1] == 56


@pytest.mark.parametrize("family", VITS)
def test_tokens_are_row_major(family: str) -> None:
    # Changing one patch moves its own token most: residuals dominate at initialisation.
    backbone = build(family)
    images = torch.randn(2, 3, 112, 224)
    grid = backbone.token_grid((112, 224))
    changed = images.clone()
    row, col = 2, 5
    patch = int(grid.stride[0])
    changed[..., row * patch : (row + 1) * patch, col * patch : (col + 1) * patch] += 3.0
    with torch.no_grad():
        moved = (backbone(changed).patch_tokens - backbone(images).patch_tokens).norm(dim=-1)
    assert moved.argmax(1).tolist() == [row * grid.cols + col] * 2


def test_copies_and_state_dict() -> None:
    backbone = build("tiny", layers=True)
    twin = copy.deepcopy(backbone)
    assert all(key.startswith("model.") for key in backbone.state_dict())
    assert not any("head" in key for key in backbone.state_dict())
    with torch.no_grad():
        for weight in twin.parameters():
            weight.add_(0.1)
    images = torch.randn(2, 3, 24, 48)
    assert not torch.equal(twin(images).global_token, backbone(images).global_token)
    twin.load_state_dict(backbone.state_dict(), strict=True)
    torch.testing.assert_close(twin(images), backbone(images), rtol=0, atol=0)


@pytest.mark.parametrize("family", ["tiny", "swin", "convnext", "resnet"])
def test_other_dtypes(family: str) -> None:
    backbone = build(family, layers=True)
    images = torch.randn(2, 3, 96, 96)
    for dtype in (torch.bfloat16, torch.float64):
        out = copy.deepcopy(backbone).to(dtype)(images.to(dtype))
        assert {part.dtype for part in (out.global_token, out.patch_tokens, *out.layers)} == {dtype}
        assert out.patch_tokens.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert backbone(images).patch_tokens.isfinite().all()


# A distilled model's second class token, and the layer that a MobileNet widens its pooled vector
# with before the classifier, have no part in what a backbone gives.
@pytest.mark.parametrize(
    "family", [name for name in MODELS if not name.startswith(("deit_distilled", "mobilenet"))]
)
def test_every_parameter_is_trained_by_global_and_patch_tokens(family: str) -> None:
    backbone = build(family, layers=True).train()
    out = backbone(torch.randn(4, 3, 96, 96))
    torch.manual_seed(1)
    parts = (out.global_token, out.patch_tokens, *out.layers)
    sum((part * torch.randn_like(part)).sum() for part in parts).backward()
    assert [name for name, weight in backbone.named_parameters() if weight.grad is None] == []


def test_tiny_vit_trains_compiled_without_graph_breaks_at_two_sizes() -> None:
    torch._dynamo.reset()
    eager = build("tiny", layers=True).train()
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for size in (48, 24, 48):
        images = torch.randn(4, 3, size, size)
        for network, parameters in ((eager, eager), (compiled, traced)):
            out = network(images)
            loss = out.global_token.square().mean() + out.patch_tokens.square().mean()
            (loss + sum(layer.square().mean() for layer in out.layers)).backward()
            with torch.no_grad():
                for weight in parameters.parameters():
                    weight -= 0.1 * weight.grad
                    weight.grad = None
    for a, b in zip(eager.parameters(), traced.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_tiny_vit_is_the_model_of_the_demo() -> None:
    backbone = tiny_vit()
    assert backbone.embed_dim == 96
    assert len(backbone.model.blocks) == 3
    for size, tokens in ((48, 36), (24, 9)):
        assert backbone(torch.randn(2, 3, size, size)).patch_tokens.shape == (2, tokens, 96)


def test_a_model_already_built_is_wrapped() -> None:
    inner = build("convnext").model
    assert TimmBackbone(inner).token_grid((64, 96)) == (2, 3, (32.0, 32.0), (16.0, 16.0))
    with pytest.raises(ConfigError, match="already built"):
        TimmBackbone(inner, in_chans=4)
    with pytest.raises(ConfigError, match="forward_features"):
        TimmBackbone(nn.Linear(2, 2))


def test_other_channel_counts() -> None:
    backbone = TimmBackbone("resnet18", in_chans=4)
    assert backbone(torch.randn(2, 4, 64, 64)).patch_tokens.shape == (2, 4, 512)
    with pytest.raises(ShapeError, match="images"):
        backbone(torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (torch.zeros(3, 48, 48), "4 axes"),
        (torch.zeros(2, 1, 48, 48), "b 3 h w"),
        (torch.zeros(2, 3, 48, 48, dtype=torch.uint8), "floating-point"),
        (torch.zeros(2, 3, 7, 48), "too small"),
        ([torch.zeros(3, 48, 48)], "tensor"),
    ],
)
def test_bad_images(images: object, told: str) -> None:
    with pytest.raises(ShapeError, match=told) as caught:
        build("tiny")(images)
    assert "`images`" in str(caught.value)


def test_unknown_names_and_arguments() -> None:
    with pytest.raises(ConfigError, match=r"vit_smal_patch16_224.*vit_small_patch16_224"):
        TimmBackbone("vit_smal_patch16_224")
    with pytest.raises(ConfigError, match="no_such_tag"):
        TimmBackbone("vit_tiny_patch16_224.no_such_tag", pretrained=True)
    with pytest.raises(ConfigError, match="flavour"):
        TimmBackbone("resnet18", flavour="sweet")
    with pytest.raises(ConfigError, match="name"):
        TimmBackbone(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="num_heads"):
        tiny_vit(width=97)
    for bad in ((0, 48), (48.0, 48), (-8, 8)):
        with pytest.raises(LocalDistillError, match="view_size"):
            tiny_vit().token_grid(bad)
    with pytest.raises(ShapeError, match="view_size"):
        tiny_vit().token_grid((48, 48, 3))


def test_a_model_of_one_size_says_so() -> None:
    backbone = build("vit", dynamic_img_size=False)
    assert backbone(torch.randn(2, 3, 224, 224)).patch_tokens.shape[1] == 196
    with pytest.raises(ShapeError, match=r"dynamic_img_size=True"):
        backbone(torch.randn(2, 3, 96, 96))
    with pytest.raises(ShapeError, match="224 × 224 alone"):
        backbone.token_grid((96, 96))


class _OneConv(nn.Module):
    """The least that a backbone can be; timm knows nothing of it."""

    def __init__(self, padding: int = 0) -> None:
        super().__init__()
        self.num_features = 8
        self.conv = nn.Conv2d(3, 8, 8, 8, padding)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images)

    def forward_head(self, features: torch.Tensor, pre_logits: bool = True) -> torch.Tensor:
        return features.mean((2, 3))


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> dict[object, object]:
    grids: dict[object, object] = {}
    monkeypatch.setattr(backbones, "_measured_grids", grids)
    return grids


@pytest.mark.usefixtures("nothing_measured")
def test_unknown_families_are_measured_once_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    backbone = TimmBackbone("ghostnet_050").train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with caplog.at_level(logging.INFO, logger="local_distill.backbones"):
        grid = backbone.token_grid((64, 96))
        assert backbone.token_grid((64, 96)) is grid
    assert len(caplog.records) == 1
    assert "64 × 96" in caplog.text
    assert (grid.rows, grid.cols) == (2, 3)
    # Its strided 3 × 3 convolutions centre token i at 32i + 0.5, as a ResNet's do.
    for measured, true in zip((*grid.stride, *grid.offset), (32, 32, 0.5, 0.5), strict=True):
        assert abs(measured - true) < 0.5
    assert backbone.training
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key])


def test_what_was_measured_serves_every_instance_of_the_architecture(
    caplog: pytest.LogCaptureFixture, nothing_measured: dict[object, object]
) -> None:
    with caplog.at_level(logging.INFO, logger="local_distill.backbones"):
        grid = TimmBackbone(_OneConv()).token_grid((64, 96))
        assert len(caplog.records) == 1
        again = TimmBackbone(_OneConv()).double().eval()  # other weights, dtype and mode
        copied = copy.deepcopy(again)
        pickled = pickle.loads(pickle.dumps(again))
        for other in (again, copied, pickled, copy.deepcopy(TimmBackbone(_OneConv()))):
            assert other.token_grid((64, 96)) == grid
        assert len(caplog.records) == 1
        # Of the same weights' shapes, but padded: another network.
        padded = TimmBackbone(_OneConv(padding=2)).token_grid((64, 96))
        assert len(caplog.records) == 2
        assert TimmBackbone(_OneConv()).token_grid((96, 64)).rows == 12
    assert len(caplog.records) == len(nothing_measured) == 3
    assert abs(grid.offset[0] - padded.offset[0] - 2) < 0.2


def test_settings_that_no_weight_shows_are_told_apart() -> None:
    def told(name: str, **options: object) -> object:
        return backbones._architecture(TimmBackbone(name, **options).model)

    assert told("resnet18") == told("resnet18")
    assert told("resnet18") != told("resnet18", output_stride=16)
    pads = [told("vit_tiny_patch16_224", depth=1, dynamic_img_pad=pad) for pad in (False, True)]
    assert pads[0] != pads[1]


@pytest.mark.usefixtures("nothing_measured")
def test_a_model_without_formula_is_measured_at_sizes_that_its_patches_do_not_divide() -> None:
    backbone = tiny_vit()
    known = backbone.token_grid((51, 60))
    backbone._steps = None
    grid = backbone.token_grid((51, 60))
    assert (grid.rows, grid.cols) == (known.rows, known.cols) == (6, 7)
    for measured, true in zip(grid.stride + grid.offset, known.stride + known.offset, strict=True):
        assert abs(measured - true) < 0.1
