"""Compiled, the tokens and their gradients are the eager ones, and nothing is compiled again."""

import copy

import pytest
import torch
from token_tap.tapped_models import gradients_of, small_model, some_views
from torch._dynamo.testing import CompileCounterWithBackend

from local_distill import ConfigError
from local_distill.token_tap import TokenTap


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


def test_a_tap_after_compilation_is_refused():
    backbone = small_model(depth=1).backbone
    with pytest.raises(ConfigError, match="make the TokenTap first"):
        TokenTap(torch.compile(backbone))
    backbone.blocks.compile()
    with pytest.raises(ConfigError, match="make the TokenTap first"):
        TokenTap(backbone, "blocks.0")
    assert len(TokenTap(backbone, "norm")._handles) == 3  # beside what is compiled
