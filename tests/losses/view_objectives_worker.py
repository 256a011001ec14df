"""One rank of test_view_objective_processes.py: its share of each batch, over gloo."""

import json
import os
import sys

import torch
import torch.distributed as dist

from local_distill import Matches
from local_distill.distributed import all_gather_with_gradient, row_counts
from local_distill.losses.intermediate import IntermediateDistillationLoss
from local_distill.losses.view_objectives import ByolObjective, MocoV3Objective, SimclrObjective

LAYERS, DIM, TOKENS = 3, 4, (3, 5)
# What is done, how many images each rank holds, with matches or without.
CASES = [
    ("moco", [2, 2], False),
    ("moco", [3, 1, 2], True),
    ("moco", [2, 0, 1, 3], False),
    ("moco-own", [3, 0], True),
    ("simclr", [2, 2], False),
    ("simclr", [3, 1, 2], False),
    ("simclr", [1, 2, 2, 0], True),
    ("simclr-legacy", [2, 2], False),
    ("byol", [3, 1], True),
    ("byol", [1, 1, 2], False),
    ("moco", [3], True),
]


def objective(name, group=None):
    kinds = {
        "moco": lambda: MocoV3Objective(0.3, process_group=group),
        "moco-own": lambda: MocoV3Objective(0.3, detach_targets=False, process_group=group),
        "simclr": lambda: SimclrObjective(0.3, process_group=group),
        "simclr-legacy": lambda: SimclrObjective(0.3, legacy=True, process_group=group),
        "byol": lambda: ByolObjective(process_group=group),
    }
    return kinds[name]()


def data(total, matched):
    """The whole batch, the same on every rank: two views of several layers, targets, matches."""
    g = torch.Generator().manual_seed(3)
    student, targets = [], []
    for tokens in TOKENS:
        middle = (tokens,) if matched else ()
        shape = (LAYERS, total, *middle, DIM)
        student.append(torch.randn(shape, generator=g, dtype=torch.float64))
        targets.append(torch.randn(shape[1:], generator=g, dtype=torch.float64))
    if not matched:
        return student, targets, None
    matches = {}
    for v, q in ((0, 1), (1, 0)):
        weight = torch.rand(total, TOKENS[v], 2, generator=g, dtype=torch.float64) / 2
        weight[torch.rand(total, TOKENS[v], generator=g) < 0.4] = 0
        index = torch.randint(0, TOKENS[q], weight.shape, generator=g)
        matches[v, q] = Matches(index, weight, weight[..., 0])
    return student, targets, matches


def step(name, student, targets, matches, group=None):
    """Loss and gradients of a whole step of SDSSL."""
    student = [view.clone().requires_grad_() for view in student]
    targets = [view.clone().requires_grad_() for view in targets]
    loss = IntermediateDistillationLoss(objective(name, group), depth=LAYERS)
    terms = loss(student, targets, ratio=0.7, detached_layers=student, matches=matches)
    terms.loss.backward()
    gradients = [view.grad if view.grad is not None else view * 0 for view in (*student, *targets)]
    return {
        "terms": [float(term.detach()) for term in terms],
        "gradients": [gradient.tolist() for gradient in gradients],
    }


def share(parts, mine):
    student, targets, matches = parts
    if matches is not None:
        matches = {
            pair: Matches(*(part[mine] for part in found)) for pair, found in matches.items()
        }
    return [view[:, mine] for view in student], [view[mine] for view in targets], matches


def gathering(rank, group, sizes):
    """Rows of all ranks, and what a different use of them on each rank sends back."""
    rows = torch.arange(float(sizes[rank] * 2)).reshape(-1, 2) + 10 * rank
    rows = rows.double().requires_grad_()
    whole = all_gather_with_gradient(rows, group)
    numbers = torch.arange(1.0, whole.shape[0] + 1, dtype=torch.float64)[:, None]
    (whole * numbers * (rank + 1)).sum().backward()
    return {
        "rows": whole.tolist(),
        "gradient": rows.grad.tolist(),
        "counts": row_counts(rows, group),
    }


def main() -> None:
    settings = json.loads(sys.argv[1])
    rank = settings["rank"]
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=settings["meeting"], rank=rank, world_size=4)
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in (1, 2, 3)} | {4: None}
    said = []
    for name, sizes, matched in CASES:
        if rank >= len(sizes):
            said.append(None)
            continue
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        parts = share(data(sum(sizes), matched), mine)
        said.append(step(name, *parts, group=groups[len(sizes)]))
    # In evaluation and without a gradient nothing is sent: one rank alone may call it.
    alone = None
    if rank == 0:
        student, targets, _ = share(data(3, False), slice(0, 2))
        quiet = objective("simclr")
        with torch.no_grad():
            alone = [float(quiet.per_layer(student, targets)[0])]
        alone.append(float(quiet.eval().per_layer(student, targets)[0]))
    gathered = gathering(rank, None, [2, 0, 3, 1])
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps({"cases": said, "alone": alone, "gathered": gathered}))


if __name__ == "__main__":
    main()
