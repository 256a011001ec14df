import copy
import math

import pytest
import torch
from torch import nn

from local_distill import ConfigError, EmaTeacher, ShapeError
from local_distill.layer_heads import LayerHeads

SMALL = {"hidden_dim": 6, "last_hidden_dim": 8, "out_dim": 3}
METHODS = ("moco", "byol", "simclr")


def kinds(head):
    return [type(layer).__name__ for layer in head]


def shapes(head):
    return [tuple(layer.weight.shape) for layer in head if isinstance(layer, nn.Linear)]


def test_published_widths():
    with torch.device("meta"):
        heads = LayerHeads(768, 12)
    assert len(heads.projectors) == len(heads.predictors) == 12
    for head in heads.projectors[:-1]:
        assert shapes(head) == [(2048, 768), (2048, 2048), (256, 2048)]
    assert shapes(heads.projectors[-1]) == [(4096, 768), (4096, 4096), (256, 4096)]
    for head in heads.predictors:
        assert shapes(head) == [(4096, 256), (256, 4096)]


@pytest.mark.parametrize("method", METHODS)
def test_layers_of_the_heads(method):
    heads = LayerHeads(4, 3, method=method, **SMALL)
    hidden = ["Linear", "BatchNorm1d", "ReLU"]
    last = ["Linear"] if method == "byol" else ["Linear", "BatchNorm1d"]
    assert [kinds(head) for head in heads.projectors] == [hidden + hidden + last] * 3
    predictors = 0 if method == "simclr" else 3
    assert [kinds(head) for head in heads.predictors] == [hidden + last] * predictors
    for layer in heads.modules():
        if isinstance(layer, nn.Linear):
            assert layer.bias is None
    for head in (*heads.projectors, *heads.predictors):
        norms = [layer.affine for layer in head if isinstance(layer, nn.BatchNorm1d)]
        if method != "byol":
            assert norms.pop() is False
        assert all(norms)


@pytest.mark.parametrize("method", METHODS)
def test_every_layer_goes_through_its_own_head(method):
    heads = LayerHeads((4, 5, 7), 3, method=method, **SMALL).double()
    layers = [torch.randn(6, d, dtype=torch.float64) for d in (4, 5, 7)]
    out = heads(layers)
    for position, features in enumerate(layers):
        projection = plain(heads.projectors[position], features)
        torch.testing.assert_close(out.projections[position], projection)
        if method == "simclr":
            wanted = projection
        else:
            wanted = plain(heads.predictors[position], projection)
            torch.testing.assert_close(out.detached[position], wanted)
        torch.testing.assert_close(out.predictions[position], wanted)
    if method == "simclr":
        assert out.detached is None
    torch.testing.assert_close(heads.project_last(layers[-1]), out.projections[-1])


def plain(head, x):
    """Matrix product, batch statistics and ReLU written out."""
    for layer in head:
        if isinstance(layer, nn.Linear):
            x = x @ layer.weight.T
        elif isinstance(layer, nn.BatchNorm1d):
            x = (x - x.mean(0)) / (x.var(0, unbiased=False) + layer.eps).sqrt()
            if layer.affine:
                x = x * layer.weight + layer.bias
        else:
            x = x.clamp_min(0)
    return x


def test_the_detached_pass_trains_predictors_alone():
    heads = LayerHeads(4, 2, **SMALL)
    features = torch.randn(2, 5, 4, requires_grad=True)
    out = heads(features)
    (out.detached * torch.randn_like(out.detached)).sum().backward()
    assert features.grad is None
    assert all(part.grad is None for part in heads.projectors.parameters())
    assert all(part.grad.abs().sum() > 0 for part in heads.predictors.parameters())
    heads.zero_grad()
    predictions = heads(features).predictions
    (predictions * torch.randn_like(predictions)).sum().backward()
    assert features.grad.abs().sum() > 0
    assert all(part.grad.abs().sum() > 0 for part in heads.parameters())


def test_a_teacher_needs_no_detached_pass():
    heads = LayerHeads(4, 2, **SMALL)
    x = torch.randn(2, 5, 4)
    with torch.no_grad():
        assert heads(x).detached is None
    teacher = EmaTeacher(heads)
    torch.testing.assert_close(
        teacher.module.project_last(x[-1]), heads(x).projections[-1].detach()
    )


def test_patch_tokens_are_rows():
    heads = LayerHeads((4, 5), 2, **SMALL)
    layers = [torch.randn(2, 3, 4), torch.randn(2, 3, 5)]
    out = heads(layers)
    assert out.predictions.shape == out.detached.shape == (2, 2, 3, 3)
    flat = heads([layer.flatten(0, 1) for layer in layers])
    torch.testing.assert_close(out.predictions.flatten(1, 2), flat.predictions)
    stacked = LayerHeads(4, 2, **SMALL)
    one = torch.randn(2, 5, 4)
    torch.testing.assert_close(stacked(one).predictions, stacked(list(one)).predictions)


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method):
    heads = LayerHeads((2, 3), 2, method=method, hidden_dim=3, last_hidden_dim=2, out_dim=2)
    heads.double()
    # in training BatchNorm takes the batch's statistics, whatever was there before
    layers = [torch.randn(4, d, dtype=torch.float64, requires_grad=True) for d in (2, 3)]
    assert torch.autograd.gradcheck(lambda *x: heads(x).predictions, layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_and_empty_batches(dtype):
    heads = LayerHeads(4, 2, **SMALL).to(dtype)
    out = heads(torch.randn(2, 5, 4, dtype=dtype))
    assert out.predictions.dtype == dtype
    before = copy.deepcopy(heads.state_dict())
    empty = heads(torch.zeros(2, 0, 4, dtype=dtype))
    assert empty.predictions.shape == empty.detached.shape == (2, 0, 3)
    assert heads.project_last(torch.zeros(0, 7, 4, dtype=dtype)).shape == (0, 7, 3)
    for name, part in heads.state_dict().items():
        if "running" in name:
            assert torch.equal(part, before[name]), name


def test_autocast_and_compile():
    heads = LayerHeads(4, 2, **SMALL)
    x = torch.randn(2, 5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert heads(x).predictions.isfinite().all()
    compiled = torch.compile(heads, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).predictions, heads(x).predictions)


def test_state_and_copies():
    heads, other = (LayerHeads((4, 5), 2, **SMALL).eval() for _ in range(2))
    other.load_state_dict(heads.state_dict())
    x = [torch.randn(5, 4), torch.randn(5, 5)]
    wanted = heads(x).predictions
    assert torch.equal(other(x).predictions, wanted)
    assert torch.equal(copy.deepcopy(heads)(x).predictions, wanted)
    assert repr(heads).startswith(
        "LayerHeads(\n  embed_dims=(4, 5), depth=2, method='moco'\n  (projectors)"
    )


def test_bad_input_is_refused():
    heads = LayerHeads((4, 5), 2, **SMALL)
    x = [torch.randn(3, 4), torch.randn(3, 5)]
    with pytest.raises(ShapeError, match="has 1 layers but these heads were made for depth=2"):
        heads(x[:1])
    with pytest.raises(ShapeError, match=r"axis `d` is 4 in `layers\[1\]`.*embed_dim=5"):
        heads([x[0], x[0]])
    with pytest.raises(ShapeError, match="all axes but the last must agree"):
        heads([x[0], x[1][:2]])
    with pytest.raises(ShapeError, match="a single row"):
        heads([part[:1] for part in x])
    with pytest.raises(ShapeError, match="a single row"):
        heads.project_last(x[1][:1])
    assert heads.eval()([part[:1] for part in x]).predictions.isfinite().all()
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(LayerHeads((4, 5), 2, **SMALL))
    assert not synchronized._normalizes_alone()
    for settings, text in (
        ({"embed_dim": [4, 5], "depth": 3}, "one for each of the 3 layers"),
        ({"embed_dim": 0, "depth": 3}, "`embed_dim`"),
        ({"embed_dim": 4, "depth": 0}, "`depth`"),
        ({"embed_dim": 4, "depth": 1, "method": "dino"}, "byol, moco, simclr"),
        ({"embed_dim": 4, "depth": 1, "out_dim": 0}, "`out_dim`"),
        ({"embed_dim": 4, "depth": 1, "hidden_dim": 0}, "`hidden_dim`"),
        ({"embed_dim": 4, "depth": 1, "last_hidden_dim": math.nan}, "`last_hidden_dim`"),
    ):
        with pytest.raises(ConfigError, match=text):
            LayerHeads(**settings)
