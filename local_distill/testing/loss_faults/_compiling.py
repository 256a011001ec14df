"""torch.compile in one graph, over steps of other numbers and temperatures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from local_distill.testing.loss_faults._cases import CASES
from local_distill.testing.loss_faults._comparing import ensure_equal, measured, new
from local_distill.testing.loss_faults._subject import LossSubject, drawn
from local_distill.testing.properties import ensure


def _compiled(backend: str) -> None:
    @CASES.case("compile", f"{backend}, ten steps")
    def case(subject: LossSubject) -> None:
        graphs = 0

        def counting(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
            nonlocal graphs
            graphs += 1
            compiler = torch._dynamo.lookup_backend(backend)
            made: Callable[..., object] = compiler(module, inputs)
            return made

        torch.compiler.reset()
        plain, loss = new(subject), new(subject)
        call = torch.compile(
            lambda step: subject.call(loss, step), fullgraph=True, backend=counting
        )
        compiled = subject._replace(call=lambda _, step: call(step))
        for number in range(10):
            step = drawn(subject, 40 + number, temp=0.05 + 0.01 * number)
            wanted = measured(subject, plain, step)
            found = measured(compiled, loss, step)
            ensure_equal(found, wanted, f"compiled, step {number}", share=2e-4)
        ensure(graphs <= 2, f"{graphs} graphs over ten steps")

    return None


_compiled("aot_eager")
_compiled("inductor")
