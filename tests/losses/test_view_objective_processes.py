"""SDSSL's objectives on several processes are those of one with the whole batch."""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch
from helpers.processes import said_by_all

WORKER = Path(__file__).with_name("view_objectives_worker.py")


@functools.cache
def worker_module():
    spec = importlib.util.spec_from_file_location("view_objectives_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache  # one spawn for all: to start processes takes longer than all that they do
def processes():
    return said_by_all(WORKER, 4)


def float64(rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("number", range(11))
def test_processes_agree_with_one(number):
    worker = worker_module()
    assert len(worker.CASES) == 11
    name, sizes, matched = worker.CASES[number]
    student, targets, matches = worker.data(sum(sizes), matched)
    alone = worker.step(name.removesuffix("-legacy"), student, targets, matches)
    results = [said["cases"][number] for said in processes()[: len(sizes)]]
    for result in results:
        assert result["terms"] == pytest.approx(alone["terms"], rel=1e-9)
    different = 0.0
    for part, whole in enumerate(alone["gradients"]):
        axis = 1 if part < 2 else 0  # the axis of images
        shape = list(float64(whole).shape)
        shares = []
        for result, size in zip(results, sizes, strict=True):
            shape[axis] = size
            shares.append(float64(result["gradients"][part]).reshape(shape))
        # gradients are averaged over the processes by data-parallel wrappers
        averaged, wanted = torch.cat(shares, axis) / len(sizes), float64(whole)
        if name == "simclr-legacy":
            different = max(different, float((averaged - wanted).abs().max()))
        else:
            torch.testing.assert_close(averaged, wanted, rtol=1e-9, atol=1e-12)
            reached = float(wanted.abs().max()) > 0
            assert reached == (part < 2 or name in ("simclr", "moco-own"))
    assert (different > 1e-3) == (name == "simclr-legacy")  # what other ranks say is lost there


def test_the_published_gather_keeps_the_gradient_of_the_own_loss_alone():
    # each rank: its own rows' mean loss, with the other ranks' keys as constants
    worker = worker_module()
    number = worker.CASES.index(("simclr-legacy", [2, 2], False))
    student, targets, _ = worker.data(4, False)
    for rank in range(2):
        mine = slice(2 * rank, 2 * rank + 2)
        own = [view[mine].clone().requires_grad_() for view in targets]
        unit = torch.nn.functional.normalize
        keys = [
            torch.cat([part if r == rank else view[2 * r : 2 * r + 2] for r in range(2)])
            for part, view in zip(own, targets, strict=True)
        ]
        rows = torch.arange(2 * rank, 2 * rank + 2)
        total = 0.0
        for v, q in ((0, 1), (1, 0)):
            s = unit(student[v][-1, mine], dim=-1)
            logits = torch.cat([s @ unit(keys[u], dim=-1).T for u in (q, v)], 1) / 0.3
            logits[torch.arange(2), 4 + rows] = -torch.inf
            total = total + torch.nn.functional.cross_entropy(logits, rows) / 2
        total.backward()
        said = processes()[rank]["cases"][number]["gradients"]
        for v in range(2):
            torch.testing.assert_close(float64(said[2 + v]), own[v].grad, rtol=1e-9, atol=1e-12)


def test_nothing_is_sent_in_evaluation_and_without_gradient():
    worker = worker_module()
    student, targets, _ = worker.share(worker.data(3, False), slice(0, 2))
    wanted = float(worker.objective("simclr").per_layer(student, targets)[0])
    assert processes()[0]["alone"] == pytest.approx([wanted, wanted], rel=1e-9)


def test_gathered_rows_send_the_gradient_of_all_ranks_back():
    sizes, wanted = [2, 0, 3, 1], []
    for rank, size in enumerate(sizes):
        wanted += [[10.0 * rank + 2 * row, 10.0 * rank + 2 * row + 1] for row in range(size)]
    for rank, said in enumerate(processes()):
        first = sum(sizes[:rank])
        assert said["gathered"]["rows"] == wanted
        assert said["gathered"]["counts"] == sizes
        # row n has the factor n on every rank, times the rank's own 1 + 2 + 3 + 4
        rows = [[10.0 * (first + row + 1)] * 2 for row in range(sizes[rank])]
        assert said["gathered"]["gradient"] == rows
