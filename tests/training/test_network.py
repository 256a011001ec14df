import pytest
import torch

from local_distill import ConfigError, PrototypeLogits, ShapeError, TimmBackbone, from_box
from local_distill.backbones import tiny_vit
from local_distill.heads import ProjectionHead
from local_distill.training import DistillationNetwork
from local_distill.training.attention_keys import AttentionKeys
from local_distill.training.masked_patches import MaskedPatches
from local_distill.training.network import view_outputs
from local_distill.training.row_mlp import RowMlp


def backbone():
    return tiny_vit(img_size=16, width=24, depth=1)


def head():
    return ProjectionHead(24, 7, hidden_dim=12, bottleneck_dim=5)


def make(**settings):
    return DistillationNetwork(backbone(), head(), head(), **settings).eval()


VIEWS = [torch.randn(2, 3, *size) for size in ((16, 24), (8, 8), (16, 24), (8, 16))]


def test_views_of_one_size_go_together_and_come_back_in_order():
    network = make()
    calls = []
    network.backbone.register_forward_hook(lambda _, given, out: calls.append(given[0].shape))
    outputs = network(VIEWS)
    assert [tuple(shape) for shape in calls] == [(4, 3, 16, 24), (2, 3, 8, 8), (2, 3, 8, 16)]
    for view, found in zip(VIEWS, outputs, strict=True):
        alone = network([view])[0]
        for a, b in zip(found, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert found.token_logits.shape[1] == (view.shape[2] // 8) * (view.shape[3] // 8)


def test_fused_logits_are_the_same_logits():
    network = make()
    plain = network(VIEWS)
    network.fused = True
    for a, b in zip(plain, network(VIEWS), strict=True):
        for name in ("global_logits", "token_logits"):
            found = getattr(b, name)
            assert isinstance(found, PrototypeLogits)
            product = found.features @ found.weight.T
            torch.testing.assert_close(product, getattr(a, name), rtol=1e-4, atol=1e-5)


def test_heads_may_be_missing_and_others_see_view_by_view():
    seen = []
    mlp = RowMlp((24, 8, 3), batch_norm=True)
    mlp.register_forward_hook(lambda _, given, out: seen.append(tuple(given[0].shape)))
    network = DistillationNetwork(backbone(), None, mlp)
    outputs = network(VIEWS)
    assert all(out.global_logits is None for out in outputs)
    assert seen == [(2, 6, 24), (2, 1, 24), (2, 6, 24), (2, 2, 24)]
    assert network.prototypes() == []
    assert len(make().prototypes()) == 4  # magnitude and direction of both


def test_a_teacher_does_not_propagate():
    network = DistillationNetwork(backbone(), None, head(), propagation=torch.nn.Tanh()).eval()
    student, teacher = network(VIEWS), network(VIEWS, teacher=True)
    for a, b in zip(student, teacher, strict=True):
        torch.testing.assert_close(a.token_logits, b.token_logits.tanh())


@pytest.mark.parametrize(
    ("name", "small", "cell"),
    [
        ("vit_tiny_patch16_224", {"depth": 2}, 16),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, 32),
    ],
)
def test_masked_patches_are_not_seen_and_others_are(name, small, cell):
    torch.manual_seed(0)
    model = TimmBackbone(name, **small).eval()
    masked = MaskedPatches(model)
    one = torch.randn(2, 3, 64, 96)
    other = one.clone()
    other[:, :, :cell, :cell] += 1.0  # the first token's patches alone
    hidden = torch.zeros(2, (64 // cell) * (96 // cell), dtype=torch.bool)
    with torch.no_grad():
        plain = [model(view).patch_tokens for view in (one, other)]
        with masked.hide(hidden):
            nothing = model(one).patch_tokens
        hidden[:, 0] = True
        with masked.hide(hidden):
            alike = [model(view).patch_tokens for view in (one, other)]
    assert hidden.shape[1] == plain[0].shape[1]
    assert torch.equal(nothing, plain[0])
    assert not torch.allclose(plain[0], plain[1])
    assert torch.equal(alike[0], alike[1])
    assert not torch.allclose(alike[0], plain[0])
    with pytest.raises(ShapeError, match=r"`valid` has shape \(2, 5\)"), masked.hide(hidden[:, :5]):
        model(one)


def test_the_mask_token_learns_and_its_copy_watches_the_copy():
    import copy

    network = DistillationNetwork(backbone(), head(), head(), mask_token=True)
    valid = torch.zeros(2, 6, dtype=torch.bool)
    valid[:, 1] = True
    network(VIEWS[:1], [valid])[0].token_logits.square().sum().backward()
    assert network.masked_patches.token.grad.abs().sum() > 0
    twin = copy.deepcopy(network).eval()
    with torch.no_grad():
        twin.masked_patches.token.fill_(3.0)
        changed = twin(VIEWS[:1], [valid])[0].patch_tokens
        same = twin(VIEWS[:1], [torch.zeros_like(valid)])[0].patch_tokens
        torch.testing.assert_close(same, network.eval()(VIEWS[:1])[0].patch_tokens)
    assert not torch.allclose(changed, same)


def test_attention_keys_are_those_that_timm_takes():
    vit = backbone()
    keys = AttentionKeys(vit)
    block = vit.model.blocks[-1]
    given = []
    block.attn.register_forward_hook(lambda _, args, out: given.append(args[0]))
    with keys.watch() as seen:
        vit(VIEWS[0])
    b, n, _ = given[0].shape
    weight, bias = block.attn.qkv.weight[24:48], block.attn.qkv.bias[24:48]
    wanted = torch.nn.functional.linear(given[0], weight, bias).reshape(b, n, 3, 8).transpose(1, 2)
    patches, whole = keys.split(seen[0])
    torch.testing.assert_close(patches, wanted[:, :, 1:])
    torch.testing.assert_close(whole, wanted[:, :, 0])


def test_backbones_that_cannot():
    convnet = TimmBackbone("resnet18")
    with pytest.raises(ConfigError, match="no patch embedding whose tokens could be masked"):
        MaskedPatches(convnet)
    with pytest.raises(ConfigError, match="no last block with attn"):
        AttentionKeys(convnet)


def test_view_outputs_join_geometry_outside_the_network():
    network = make()
    sizes = [(16, 24), (8, 8)]
    geometries = [
        from_box(torch.tensor([[0.0, 0, w, h]] * 2), view_size=(h, w), source_size=(30, 40))
        for h, w in sizes
    ]
    outputs = network(VIEWS[:2])
    joined = view_outputs(outputs, geometries, sizes, network.backbone)
    assert [(view.tokens.grid.rows, view.tokens.grid.cols) for view in joined] == [(2, 3), (1, 1)]
    assert joined[0].tokens.geometry is geometries[0]
    assert not joined[0].tokens.features.requires_grad
    # the teacher has fewer views than there are geometries
    assert len(view_outputs(outputs[:1], geometries, sizes, network.backbone)) == 1


def test_a_head_for_other_features_is_refused():
    with pytest.raises(ShapeError, match="axis `d` is 5"):
        RowMlp((4, 2))(torch.zeros(3, 5))
