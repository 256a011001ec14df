"""What to think of each of their tests that fails on our parts, and the proof."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from local_distill import (
    Centering,
    GlobalDistillationLoss,
    KoLeoLoss,
    LocalDistillError,
    Matches,
    SimilarityMatcher,
    Tokens,
    VICRegLLoss,
    VICRegLoss,
    similarity_matches,
)

__all__ = ["VERDICTS", "Verdict"]


class Verdict(NamedTuple):
    """Of one failing test.

    Attributes:
        whose: "theirs", "ours", or "nobody's" where it asks for what is no behaviour of the part.
        why: in a sentence.
        proof: says what it found, or fails.
    """

    whose: str
    why: str
    proof: Callable[[], str]


def _refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except LocalDistillError as error:
        return f"ours: {type(error).__name__}, “{str(error).split(';')[0][:90]}”"
    raise AssertionError("ours does not refuse it")


def a_match_of_a_view_without_tokens_is_refused() -> str:
    wholes, tokens = list(torch.randn(2, 2, 8)), [torch.randn(2, 4, 8)]
    matches = Matches.identity(torch.ones(2, 4, dtype=torch.bool))
    return _refusal(lambda: VICRegLLoss()(wholes, tokens, {(0, 1): matches}))


def shapes_are_refused() -> str:
    return _refusal(lambda: VICRegLoss()([torch.randn(2, 32), torch.randn(2, 16)]))


def a_single_view_is_refused() -> str:
    loss = GlobalDistillationLoss(Centering(4))
    return _refusal(lambda: loss([torch.randn(2, 4)], [torch.randn(2, 4)], teacher_temp=0.04))


def _vicreg_oracle(a: Tensor, b: Tensor) -> float:
    """VICReg with Lightly's weights in float64, pair by pair."""
    a, b = a.double(), b.double()
    total = 25 * (a - b).square().mean()
    for values in (a, b):
        centered = values - values.mean(0)
        count, dim = values.shape
        variance = centered.square().sum(0) / (count - 1)
        total = total + 25 * (1 - (variance + 1e-4).sqrt()).clamp(min=0).mean() / 2
        for i in range(dim):
            for j in range(dim):
                if i != j:
                    covariance = (centered[:, i] * centered[:, j]).sum() / (count - 1)
                    total = total + covariance.square() / dim
    return float(total)


def rounding_is_no_larger_than_theirs() -> str:
    from lightly.loss.vicreg_loss import VICRegLoss as LightlyVICRegLoss

    generator = torch.Generator().manual_seed(0)
    ours, theirs = [], []
    for _ in range(20):
        a, b = torch.randn(2, 12, 24, generator=generator)
        exact = _vicreg_oracle(a, b)
        ours.append(abs(float(VICRegLoss(25.0, 25.0, 2.0, eps=1e-4)([a, b])) / exact - 1))
        theirs.append(abs(float(LightlyVICRegLoss()(a, b)) / exact - 1))
    assert max(ours) < 3e-7
    return f"off from float64 by {max(ours):.0e} at most (theirs {max(theirs):.0e}), 20 draws"


def there_is_no_such_argument() -> str:
    parameters = list(inspect.signature(VICRegLoss).parameters)
    assert "gather_distributed" not in parameters
    return f"arguments: {', '.join(f'`{name}`' for name in parameters)}"


def one_row_has_no_variance() -> str:
    a, b = torch.randn(2, 1, 8)
    wanted = 25 * float((a - b).square().mean())
    assert abs(float(VICRegLoss()([a, b])) - wanted) < 1e-5 * wanted
    return "25 times the squared difference, variance and covariance 0"


def one_row_has_no_neighbour() -> str:
    from lightly.loss.koleo_loss import KoLeoLoss as LightlyKoLeoLoss

    values, slopes = [], []
    for scale in (0.3, 1.0, 40.0):
        row = (scale * torch.randn(1, 6)).requires_grad_()
        loss = LightlyKoLeoLoss()(row)
        loss.backward()
        assert row.grad is not None
        values.append(float(loss.detach()))
        slopes.append(float(row.grad.abs().max()) * scale)
    assert max(values) - min(values) < 1e-3
    assert max(slopes) < 1e-3
    assert float(KoLeoLoss()(torch.randn(1, 6))) == 0
    return f"theirs is {values[0]:.4f} for any row, with a gradient of {max(slopes):.0e}; ours 0"


def a_center_of_momentum_one_stands_still() -> str:
    from lightly.models.modules.center import Center

    center = Center((1, 3), momentum=1.0)
    for _ in range(5):
        center.update(torch.randn(4, 3) + 7)
    assert center.value.abs().max() == 0
    return "theirs is still 0 after five updates; " + _refusal(lambda: Centering(3, momentum=1.0))


def ours_compile_and_are_no_torchscript() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch deprecates TorchScript
        try:
            torch.jit.script(similarity_matches)
        except torch.jit.frontend.FrontendError as error:
            said = type(error).__name__
        else:
            raise AssertionError("ours can be scripted")
    one, two = torch.randn(2, 1, 9, 8)
    matcher = SimilarityMatcher("l2")

    def match(one: Tensor, two: Tensor) -> Tensor:
        return matcher(Tokens(one), Tokens(two)).teacher_index

    compiled = torch.compile(match, fullgraph=True, backend="eager")
    assert torch.equal(compiled(one, two), match(one, two))
    return f"`torch.jit.script`: {said}; `torch.compile(fullgraph=True)`: the same matches"


_WORDING = "it asks for their wording of an error that ours has as well"
_SAME_BITS = "it asks for the same bits, where the sums run in another order"
_LENGTHS = Verdict(
    "nobody's",
    "it asks for their wording; ours takes matches, not grids, and refuses one of a missing view",
    a_match_of_a_view_without_tokens_is_refused,
)
_ROUNDING = Verdict("nobody's", _SAME_BITS, rounding_is_no_larger_than_theirs)
_GATHER = Verdict(
    "nobody's",
    "it watches an argument that ours has not: with a process group, ours is of the whole batch",
    there_is_no_such_argument,
)
_SCRIPT = Verdict("nobody's", "it puts ours into TorchScript", ours_compile_and_are_no_torchscript)
_VICREGL, _VICREG = "test_vicregl_loss.py::test_", "test_vicreg_loss.py::test_"

VERDICTS: dict[str, dict[str, Verdict]] = {
    "lightly": {
        f"{_VICREGL}forward__error_global_view_features_and_grids_not_same_length": _LENGTHS,
        f"{_VICREGL}forward__error_local_view_features_and_grids_not_same_length": _LENGTHS,
        f"{_VICREGL}forward__error_local_view_features_and_grids_must_both_be_set": _LENGTHS,
        f"{_VICREGL}global_loss__compare": _ROUNDING,
        f"{_VICREG}forward__compare": _ROUNDING,
        f"{_VICREG}_gather_distributed": _GATHER,
        f"{_VICREG}_gather_distributed_dist_not_available": _GATHER,
        f"{_VICREG}forward_pass__error_batch_size_1": Verdict(
            "nobody's",
            "ours takes a batch of one, which has neither variance nor covariance",
            one_row_has_no_variance,
        ),
        f"{_VICREG}forward_pass__error_different_shapes": Verdict(
            "nobody's", "it wants an AssertionError, ours is a ShapeError", shapes_are_refused
        ),
        "test_dino_loss.py::test_single_view_raises": Verdict(
            "nobody's", _WORDING, a_single_view_is_refused
        ),
        "test_koleo_loss.py::test_forward[cpu-x0-17.7275]": Verdict(
            "theirs",
            "a lone row is taken for its own neighbour: a constant that teaches nothing",
            one_row_has_no_neighbour,
        ),
        "test_center.py::test_update__momentum[1.0-expected3]": Verdict(
            "nobody's",
            "ours refuses a momentum of 1, with which a center never moves",
            a_center_of_momentum_one_stands_still,
        ),
    },
    "kornia": {
        f"test_matching.py::test_jit[cpu-float32-{kind}]": _SCRIPT
        for kind in ("nn", "snn", "mnn", "smnn")
    },
}
"""By library and test, as `their_tests.name_of` has it."""
