"""Compiled, the tokens and their gradients are the eager ones, and nothing is compiled again."""

import copy

import pytest
import torch
from token_tap.tapped_models import gradients_of, small_model, some_views
from torch._dynamo.testing import CompileCounterWithBackend

from local_distill import ConfigError
from local_distill.token_tap import TokenTap

SETTING = "skip_fwd_side_effects_in_bwd_under_checkpoint"
HAS_SETTING = hasattr(torch._dynamo.config, SETTING)  # torch 2.6 has not


# torch hides this warning of its own tracing; where warnings are errors it cannot
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("how", ["wrapper", "backbone"])
def test_tokens_and_gradients_are_the_eager_ones(how):
    torch._dynamo.reset()
    eager = small_model(depth=1)
    model = copy.deepcopy(eager)
    taps = [TokenTap(m.backbone, layers=["blocks.0"]) for m in (eager, model)]
    counter = CompileCounterWithBackend("aot_eager")
    run = model
    if how == "wrapper":
        run = torch.compile(model, backend=counter, fullgraph=True)
    else:
        model.backbone.compile(backend=counter, fullgraph=True)
    compiled = []
    for _ in range(3):
        views = some_views()
        wanted = gradients_of(eager, taps[0], views)
        for got, want in zip(gradients_of(run, taps[1], views), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        compiled.append(counter.frame_count)
    assert compiled[0] > 0
    assert compiled[1] == compiled[2]  # torch 2.6 compiles once more in the second step


def test_one_graph_serves_batches_of_every_size():
    torch._dynamo.reset()
    eager = small_model(depth=1)
    model = copy.deepcopy(eager)
    taps = [TokenTap(m.backbone, layers=["blocks.0"]) for m in (eager, model)]
    counter = CompileCounterWithBackend("aot_eager")
    model.backbone.compile(backend=counter, fullgraph=True, dynamic=True)
    compiled = []
    for b in (2, 3, 5):
        views = some_views(b)
        with torch.no_grad():
            eager(views), model(views)
        pairs = zip(taps[1].take_views(views), taps[0].take_views(views), strict=True)
        for got, want in pairs:
            torch.testing.assert_close(got.tokens.features, want.tokens.features)
            torch.testing.assert_close(got.layers[0], want.layers[0])
            assert got.tokens.grid == want.tokens.grid
        compiled.append(counter.frame_count)
    assert compiled[0] > 0
    assert compiled[0] == compiled[2]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("layers", [[], ["blocks.0"]] if HAS_SETTING else [[]])
def test_compiled_with_checkpointed_blocks(layers):
    torch._dynamo.reset()
    eager = small_model(depth=2)
    model = copy.deepcopy(eager)
    model.backbone.set_grad_checkpointing(True)
    taps = [TokenTap(m.backbone, layers=layers) for m in (eager, model)]
    model.backbone.compile(backend="aot_eager", fullgraph=True)
    if layers:
        # what runs within a checkpoint may leave nothing behind, but for this setting of torch's
        with pytest.raises(torch._dynamo.exc.Unsupported, match=SETTING):
            model(some_views())
        taps[1].clear()
    with torch._dynamo.config.patch({SETTING: True} if layers else {}):
        for _ in range(2):
            views = some_views()
            wanted = gradients_of(eager, taps[0], views)
            for got, want in zip(gradients_of(model, taps[1], views), wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_a_tap_after_compilation_is_refused():
    backbone = small_model(depth=1).backbone
    with pytest.raises(ConfigError, match="make the TokenTap first"):
        TokenTap(torch.compile(backbone))
    backbone.blocks.compile()
    with pytest.raises(ConfigError, match="make the TokenTap first"):
        TokenTap(backbone, "blocks.0")
    assert len(TokenTap(backbone, "norm")._handles) == 3  # beside what is compiled
