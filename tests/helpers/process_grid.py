"""The cases of process_cases.py on one process to four; run as a script this is one rank."""

import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist

from helpers.process_cases import CASES, WITHIN, WholeBatchNorm, batch
from helpers.processes import said_by_all
from local_distill.distributed import all_gather_with_gradient, row_counts

STEPS = 2
# One process to four: even, uneven, empty.
SPREADS = [(8,), (4, 4), (6, 2), (7, 1), (8, 0), (5, 0, 3), (2, 2, 2, 2)]
# In the first step the first image of this rank of this spread is NaN.
POISONED, POISONED_RANK = (6, 2), 1
# Where the first rank calls the module by itself as well.
ALONE = (6, 2)
# How many rows each of four ranks gives to `gather`.
GATHERED = (2, 0, 3, 1)

# Those with a state, which counts what it refuses.
COUNTED = [
    name
    for name in CASES
    if any("skipped" in part for part, _ in CASES[name].make(None).named_buffers())
]


class Result(NamedTuple):
    """What a process says of a case."""

    values: list  # of every step
    gradients: list  # of the student's views, the last step's, in the order of the fields
    parameters: list  # gradients of the module's
    state: dict
    alone: list | None  # what `said_alone` says of the first rank's share


def share_of(step, mine, poisoned=False):
    """The images ``mine`` of a step's batch; if poisoned one of the whole batch's is NaN."""
    parts = {name: [part.clone() for part in some] for name, some in batch(step).items()}
    if poisoned:
        for name, some in parts.items():
            # BatchNorm has a state that the student's features enter
            if name[:2] == "t_" or name == "s_layers":
                for part in some:
                    part[sum(POISONED[:POISONED_RANK])] = torch.nan
    return SimpleNamespace(**{name: [p[mine] for p in some] for name, some in parts.items()})


def steps(name, mine=slice(None), *, group=None, poisoned=False):
    """Some steps on the images ``mine`` of each batch; the module then, and what it said."""
    make, call = (CASES | WITHIN)[name]
    torch.manual_seed(0)
    module, values = make(group).double(), []
    for step in range(STEPS):
        x = share_of(step, mine, poisoned and step == 0)
        leaves = [p for name, some in vars(x).items() if name[:2] == "s_" for p in some]
        for leaf in leaves:
            leaf.requires_grad_()
        module.zero_grad()
        value = call(module, x)
        value.backward()
        values.append(float(value.detach()))
    state = {name: part.flatten().tolist() for name, part in module.named_buffers()}
    # most cases look at few of them, on all ranks at the same
    used = gradients_of(leaf for leaf in leaves if leaf.grad is not None)
    result = Result(values, used, gradients_of(module.parameters()), state, None)
    return module, result


def gradients_of(tensors):
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in tensors]
    return [gradient.flatten().tolist() for gradient in found]


def said_alone(name, module, mine):
    """Under no_grad and in evaluation nothing is sent: one process may call it, others wait."""
    call, x = CASES[name].call, share_of(STEPS, mine)
    WholeBatchNorm.together = False
    with torch.no_grad():
        values = [float(call(module, x))]
    values.append(float(call(module.eval(), x).detach()))
    WholeBatchNorm.together = True
    module.train()
    return values


def shares(spread):
    """Which images each rank holds."""
    return [slice(sum(spread[:r]), sum(spread[: r + 1])) for r in range(len(spread))]


@functools.cache  # one spawn for all: to start processes takes longer than all that they do
def said_or_failure():
    """What each rank says; or why not, so that a process that hangs is waited for once."""
    try:
        return said_by_all(__file__, 4)
    except (AssertionError, subprocess.TimeoutExpired) as failure:
        return failure


@functools.cache
def results():
    """{(case, spread, poisoned): what each rank says}, and under "gathered" what `gather` says."""
    ranks = said_or_failure()
    if isinstance(ranks, Exception):
        raise ranks
    found = {"gathered": []}
    for said in ranks:
        found["gathered"].append(said["gathered"])
        for name, spread, poisoned, *result in said["cases"]:
            key = name, tuple(spread), poisoned
            found.setdefault(key, []).append(Result(*result))
    return found


def gather(rank):
    """Rows of all ranks, and what a different use of them on each rank sends back."""
    rows = torch.arange(2.0 * GATHERED[rank], dtype=torch.float64).reshape(-1, 2) + 10 * rank
    whole = all_gather_with_gradient(rows.requires_grad_())
    numbers = torch.arange(1.0, whole.shape[0] + 1, dtype=torch.float64)[:, None]
    (whole * numbers * (rank + 1)).sum().backward()
    return {
        "rows": whole.tolist(),
        "gradient": rows.grad.tolist(),
        "counts": row_counts(rows),
    }


def main() -> None:
    settings = json.loads(sys.argv[1])
    rank = settings["rank"]
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=settings["meeting"], rank=rank, world_size=4)
    # Four processes are the default group, fewer are a group of their own.
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in (1, 2, 3)} | {4: None}
    said = []
    todo = [(spread, False) for spread in SPREADS] + [(POISONED, True)]
    for spread, poisoned in todo:
        if rank >= len(spread):
            continue
        mine = shares(spread)[rank]
        for name in COUNTED if poisoned else CASES | WITHIN:
            module, result = steps(name, mine, group=groups[len(spread)], poisoned=poisoned)
            if rank == 0 and spread == ALONE and name in CASES and not poisoned:
                result = result._replace(alone=said_alone(name, module, mine))
            said.append((name, spread, poisoned, *result))
    gathered = gather(rank)
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps({"cases": said, "gathered": gathered}))


if __name__ == "__main__":
    main()
