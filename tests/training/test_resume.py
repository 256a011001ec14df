"""A run that was stopped or killed in the middle of an epoch ends as if it had not been."""

import json
import os

import pytest
import torch
from helpers.training_ranks import train_on_processes

from local_distill.training.checkpoints import CheckpointStore

# Five steps an epoch: the seventh is in the middle of the second one. Then 50 more.
STOPPED, STEPS = 7, 57
RUN = {
    "method": "Glsd",
    "images": 10,
    "batch": 2,
    "small": 0,
    "steps": STEPS,
    "save_every": STEPS,
    "log_every": STOPPED,
    "drop_path": 0.2,  # whose random numbers go on as well
    "precision": "32-true",
}
# Processes, workers, signal; the last one, which takes the longest, with ALL_PROPERTIES=1 alone.
CASES = [(1, 0, "SIGTERM"), (1, 2, "SIGKILL"), (2, 0, "SIGKILL")]
if os.environ.get("ALL_PROPERTIES"):
    CASES += [(2, 2, "SIGTERM")]


def name(ranks, workers, number):
    return f"{ranks}-{workers}-{number}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    groups = [
        {"ranks": n, "cases": [{"run": f"{n}-whole", "record": "seen", **RUN}]} for n in (1, 2)
    ]
    for ranks, workers, number in CASES:
        case = RUN | {"run": name(ranks, workers, number), "workers": workers}
        own = 2 // ranks
        # Killed in the second step after a checkpoint, so that one is lost; the last rank is. The
        # first image of all is looked at for its views' sizes.
        at = (STOPPED + (1 if number == "SIGKILL" else -1)) * own + 2
        stop = (ranks - 1, at, number)
        groups += [
            {
                "ranks": ranks,
                "dies": number == "SIGKILL",
                "cases": [case | {"record": "before", "stop": stop, "save_every": STOPPED}],
            },
            {"ranks": ranks, "cases": [case | {"record": "after", "resume": True}]},
        ]
    train_on_processes(folder, groups)
    return folder


def seeds(folder, run, ranks, phase):
    return [
        (folder / f"{run}-{phase}-{rank}.txt").read_text().split()[1:]  # the first asks for sizes
        for rank in range(ranks)
    ]


@pytest.mark.parametrize(("ranks", "workers", "number"), CASES)
def test_the_weights_are_those_of_the_uninterrupted_run(folder, ranks, workers, number):
    whole, part = (
        CheckpointStore(folder / run / "checkpoints").load()
        for run in (f"{ranks}-whole", name(ranks, workers, number))
    )
    assert whole.step == part.step == STEPS
    leaves = [
        torch.utils._pytree.tree_flatten_with_path(
            {k: v for k, v in saved.state.items() if k != "config"}
        )[0]
        for saved in (whole, part)
    ]
    assert len(leaves[0]) > 200  # network, teacher, criterion, optimiser, random numbers
    for (path, a), (_, b) in zip(*leaves, strict=True):
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert same, torch.utils._pytree.keystr(path)


@pytest.mark.parametrize(("ranks", "workers", "number"), CASES)
def test_no_augmentation_is_replayed_or_left_out(folder, ranks, workers, number):
    run, own = name(ranks, workers, number), 2 // ranks
    for whole, before, after in zip(
        seeds(folder, f"{ranks}-whole", ranks, "seen"),
        seeds(folder, run, ranks, "before"),
        seeds(folder, run, ranks, "after"),
        strict=True,
    ):
        assert len(set(whole)) == len(whole) == STEPS * own
        first = len(whole) - len(after) if workers == 0 else None
        if first is not None:
            assert after == whole[first:]
            assert first // own == STOPPED  # went on right behind the checkpoint
        else:  # workers are ahead of the steps, in turns
            resumed = set(after) & set(whole)
            kept = set(whole) - resumed
            assert resumed == set(whole[len(kept) :])
        assert set(before) | set(after) >= set(whole)


@pytest.mark.parametrize(("ranks", "workers", "number"), CASES)
def test_the_metrics_go_on_without_a_gap(folder, ranks, workers, number):
    whole, part = (
        [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
        for run in (f"{ranks}-whole", name(ranks, workers, number))
    )
    assert [line["step"] for line in whole] == [*range(STOPPED, STEPS, STOPPED), STEPS]
    # a run that is told to stop writes a line for its last step, whichever that is
    regular = [line for line in part if line["step"] % STOPPED == 0 or line["step"] == STEPS]
    assert regular == whole
    assert len(part) <= len(whole) + 1
