"""Every loss and recipe on one process to four is what one process makes of the whole batch."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.process_cases import CASES, WITHIN, matches
from helpers.process_grid import (
    ALONE,
    COUNTED,
    GATHERED,
    POISONED,
    SPREADS,
    STEPS,
    results,
    said_alone,
    share_of,
    shares,
    steps,
)

from local_distill.losses.koleo import koleo_loss

CLOSE = {"rel": 1e-9, "abs": 1e-12}


@functools.cache
def whole(name, poisoned=False):
    """The module and what it says where there is no process group, on the whole batch."""
    assert not dist.is_initialized()
    return steps(name, poisoned=poisoned)


def check_gradients(wanted, found):
    """The ranks' shares side by side, averaged as data-parallel wrappers do with parameters'."""
    for part, numbers in enumerate(wanted):
        shares = [number for result in found for number in result.gradients[part]]
        assert [number / len(found) for number in shares] == pytest.approx(numbers, **CLOSE)


def check_as_whole(name, spread, poisoned=False):
    wanted, found = whole(name, poisoned)[1], results()[name, spread, poisoned]
    assert len(found) == len(spread)
    for result in found:
        assert result.values == pytest.approx(wanted.values, **CLOSE, nan_ok=True)
        assert result.state == found[0].state  # to the bit, and no NaN, which differs from itself
        assert result.state.keys() == wanted.state.keys()
        for part, numbers in wanted.state.items():
            assert result.state[part] == pytest.approx(numbers, **CLOSE)
    check_gradients(wanted.gradients, found)
    for part, numbers in enumerate(wanted.parameters):
        sides = zip(*(result.parameters[part] for result in found), strict=True)
        averaged = [sum(side) / len(spread) for side in sides]
        assert averaged == pytest.approx(numbers, **CLOSE)


@pytest.mark.parametrize("spread", SPREADS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_processes_are_one(name, spread):
    check_as_whole(name, spread)


@pytest.mark.parametrize("name", CASES)
def test_no_case_agrees_because_all_is_zero(name):
    module, result = whole(name)
    assert result.values[-1] != 0
    assert max(abs(number) for part in result.gradients for number in part) > 1e-3
    learnt = [part for part in result.parameters if any(part)]
    frozen = [p for key, p in module.named_parameters() if "teacher_head" in key]
    assert len(learnt) == len(result.parameters) - len(frozen)
    for part, numbers in result.state.items():
        if part.endswith(("center", "keys", "features", "vote_similarity")):
            assert any(numbers)


@pytest.mark.parametrize("name", COUNTED)
def test_nan_on_one_process_enters_no_state(name):
    check_as_whole(name, POISONED, poisoned=True)
    for result in results()[name, POISONED, True]:
        assert any(n[0] for part, n in result.state.items() if part.endswith("skipped"))
        assert all(math.isfinite(number) for part in result.state.values() for number in part)
        assert math.isfinite(result.values[-1])  # all is well a step later


def parts_of(name, x):
    """What this process counts, and its value: of every view, or of all in one."""
    if name == "koleo":
        flags = [some[:, 0] for some in x.masked]
        counts = [int(keep.sum()) for keep in flags]
        values = [koleo_loss(v, valid=keep) for v, keep in zip(x.s_cls, flags, strict=True)]
        # a row alone has no neighbour
        return [(n if n > 1 else 0, value) for n, value in zip(counts, values, strict=True)]
    make, call = WITHIN[name]
    rows = sum(int(found.matched.sum()) for found in matches(x).values())
    return [(rows**2, call(make(None).eval(), x))]


@pytest.mark.parametrize("spread", SPREADS, ids=str)
@pytest.mark.parametrize("name", ["koleo", "gram, batch"])
def test_what_stays_within_a_process_weighs_by_what_it_counts(name, spread):
    x = share_of(STEPS - 1, slice(None))
    leaves = [
        p.requires_grad_() for part, some in vars(x).items() if part[:2] == "s_" for p in some
    ]
    ranks = [
        SimpleNamespace(**{part: [p[mine] for p in some] for part, some in vars(x).items()})
        for mine in shares(spread)
    ]
    views = zip(*(parts_of(name, one) for one in ranks), strict=True)
    values = [
        sum(n * value for n, value in view) / max(1, sum(n for n, _ in view)) for view in views
    ]
    wanted = torch.stack(values).mean()
    wanted.backward()
    found = results()[name, spread, False]
    for result in found:
        assert result.values[-1] == pytest.approx(float(wanted.detach()), **CLOSE)
    gradients = [leaf.grad.flatten().tolist() for leaf in leaves if leaf.grad is not None]
    check_gradients(gradients, found)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_sent_in_evaluation_and_without_gradient(name):
    alone = said_alone(name, whole(name)[0], shares(ALONE)[0])
    assert results()[name, ALONE, False][0].alone == pytest.approx(alone, **CLOSE)


def test_the_published_gather_keeps_the_gradient_of_the_own_loss_alone():
    # each rank: its own rows' mean loss, with the other ranks' keys as constants
    name, spread = "simclr, legacy", (4, 4)
    unit, x = torch.nn.functional.normalize, share_of(STEPS - 1, slice(None))
    wanted, found = whole(name)[1], results()[name, spread, False]
    for mine, said in zip(shares(spread), found, strict=True):
        assert said.values == pytest.approx(wanted.values, **CLOSE)
        own = [view[mine].clone().requires_grad_() for view in x.s_layers]
        keys = []
        for view, live in zip(x.s_layers, own, strict=True):
            parts = [live if other == mine else view[other] for other in shares(spread)]
            keys.append(unit(torch.cat(parts)[:, 0], dim=-1))
        rows, total = torch.arange(8)[mine], 0.0
        for v, q in ((0, 1), (1, 0)):
            row = unit(x.s_cls[v][mine], dim=-1)
            logits = row @ torch.cat((keys[q], keys[v])).T / 0.2
            logits[torch.arange(4), 8 + rows] = -torch.inf
            total = total + torch.nn.functional.cross_entropy(logits, rows) / 2
        total.backward()
        for v in range(2):
            gradient = own[v].grad.flatten().tolist()
            assert said.gradients[2 + v] == pytest.approx(gradient, **CLOSE)  # behind the rows'
    lost = [number / 2 for said in found for number in said.gradients[2]]
    assert lost != pytest.approx(wanted.gradients[2], rel=1e-3)


def test_gathered_rows_send_the_gradient_of_all_ranks_back():
    wanted = [
        [10.0 * rank + 2 * row, 10.0 * rank + 2 * row + 1]
        for rank, size in enumerate(GATHERED)
        for row in range(size)
    ]
    for rank, said in enumerate(results()["gathered"]):
        assert said["rows"] == wanted
        assert said["counts"] == list(GATHERED)
        # row n has the factor n on every rank, times the rank's own 1 + 2 + 3 + 4
        first = sum(GATHERED[:rank])
        rows = [[10.0 * (first + row + 1)] * 2 for row in range(GATHERED[rank])]
        assert said["gradient"] == rows
