import torch

from local_distill import from_box
from local_distill.backbones import tiny_vit
from local_distill.training import DistillationNetwork
from local_distill.training.network import view_outputs


def make(**settings):
    settings = {"num_prototypes": 7, "hidden_dim": 12, "bottleneck_dim": 5} | settings
    return DistillationNetwork(tiny_vit(img_size=16, width=24, depth=1), **settings).eval()


def test_views_of_one_size_go_together_and_come_back_in_order():
    network = make()
    calls = []
    network.backbone.register_forward_hook(lambda _, given, out: calls.append(given[0].shape))
    views = [torch.randn(2, 3, *size) for size in ((16, 24), (8, 8), (16, 24), (8, 16))]
    outputs = network(views)
    assert [tuple(shape) for shape in calls] == [(4, 3, 16, 24), (2, 3, 8, 8), (2, 3, 8, 16)]
    for view, found in zip(views, outputs, strict=True):
        alone = network([view])[0]
        for a, b in zip(found, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert found.token_logits.shape[1] == (view.shape[2] // 8) * (view.shape[3] // 8)


def test_without_a_local_head():
    network = make(local=False)
    assert network.local_head is None
    assert network([torch.randn(2, 3, 16, 16)])[0].token_logits is None


def test_view_outputs_join_geometry_outside_the_network():
    network = make()
    views = [torch.randn(2, 3, 16, 24), torch.randn(2, 3, 8, 8)]
    geometries = [
        from_box(torch.tensor([[0.0, 0, w, h]] * 2), view_size=(h, w), source_size=(30, 40))
        for h, w in ((16, 24), (8, 8))
    ]
    outputs = network(views)
    joined = view_outputs(outputs, views, geometries, network.backbone)
    assert [(view.tokens.grid.rows, view.tokens.grid.cols) for view in joined] == [(2, 3), (1, 1)]
    assert joined[0].tokens.geometry is geometries[0]
    assert not joined[0].tokens.features.requires_grad
    # the teacher has fewer views than there are geometries
    assert len(view_outputs(outputs[:1], views, geometries, network.backbone)) == 1
