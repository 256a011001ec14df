import copy

import pytest
import torch
from torch import nn

from local_distill import ConfigError, ProjectionHead, ShapeError


def test_it_is_the_formula():
    head = ProjectionHead(4, 7, hidden_dim=6, bottleneck_dim=3).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    z = x
    for layer in head.mlp:
        z = layer(z)
    z = z / z.norm(dim=-1, keepdim=True)
    v = head.prototypes.parametrizations.weight.original1
    rows = v / v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(x), z @ rows.T)
    assert float(head(x).detach().abs().max()) <= 1 + 1e-9  # both sides have norm 1


def test_three_layers_of_dino_by_default():
    head = ProjectionHead(384, 100)
    shapes = [tuple(layer.weight.shape) for layer in head.mlp if isinstance(layer, nn.Linear)]
    assert shapes == [(2048, 384), (2048, 2048), (256, 2048)]
    assert [type(layer).__name__ for layer in head.mlp][1::2] == ["GELU", "GELU"]
    assert head.prototypes.bias is None


@pytest.mark.parametrize("frozen", [True, False])
def test_the_magnitude(frozen):
    head = ProjectionHead(4, 7, hidden_dim=6, bottleneck_dim=3, frozen_magnitude=frozen)
    magnitude = head.prototypes.parametrizations.weight.original0
    assert magnitude.shape == (7, 1)
    assert magnitude.eq(1).all()
    assert magnitude.requires_grad is not frozen
    head(torch.randn(3, 4)).sum().backward()
    assert (magnitude.grad is None) is frozen


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_layers(layers, batch_norm):
    head = ProjectionHead(4, 7, hidden_dim=6, bottleneck_dim=3, num_layers=layers,
                          batch_norm=batch_norm)  # fmt: skip
    assert head(torch.randn(3, 5, 4)).shape == (3, 5, 7)
    norms = [layer for layer in head.mlp if isinstance(layer, nn.BatchNorm1d)]
    assert len(norms) == (layers - 1 if batch_norm else 0)


def test_a_zero_bottleneck_is_no_nan():
    head = ProjectionHead(4, 7, hidden_dim=6, bottleneck_dim=3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
        out = copy.deepcopy(head).to(dtype)(x)
        out.float().sum().backward()
        assert out.isfinite().all()
        assert x.grad.isfinite().all()


def test_empty_batches_and_autocast():
    head = ProjectionHead(4, 7, hidden_dim=6, bottleneck_dim=3)
    assert head(torch.zeros(0, 9, 4)).shape == (0, 9, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(torch.randn(2, 4)).dtype == torch.bfloat16


def test_state_dict_and_compile():
    head, other = (ProjectionHead(4, 7, hidden_dim=6, bottleneck_dim=3) for _ in range(2))
    other.load_state_dict(head.state_dict())
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(head(x), other(x))
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), head(x))


def test_bad_input_is_refused():
    with pytest.raises(
        ShapeError, match=r"axis `d` is 5 in `features` \(shape \(2, 5\)\).*in_dim=4"
    ):
        ProjectionHead(4, 7)(torch.zeros(2, 5))
    with pytest.raises(ConfigError, match="num_prototypes"):
        ProjectionHead(4, 0)
