"""Losses on features in several processes: what one rank does, and how the ranks are started."""

import functools
import json
import os
import sys

import torch
import torch.distributed as dist

from helpers.processes import said_by_all
from local_distill import Matches
from local_distill.losses.dense_contrastive import DenseContrastiveLoss
from local_distill.losses.global_contrastive import GlobalContrastiveLoss
from local_distill.losses.negative_queue import NegativeQueue
from local_distill.losses.pixel_propagation import PixelConsistencyLoss

DIM, TOKENS = 3, 4


def build(name):
    """A loss in its first state; the queue is no multiple of any batch, and soon full."""
    if name.startswith("pixel"):
        return PixelConsistencyLoss(normalize=name.removeprefix("pixel-"))
    kind = {"dense": DenseContrastiveLoss, "global": GlobalContrastiveLoss}[name]
    return kind(NegativeQueue(11, DIM)).double()


def run(name, total, mine, poisoned=False):
    """Three steps on the images ``mine`` of each batch: the last value and gradient, the state."""
    loss, g = build(name), torch.Generator().manual_seed(5)
    for step in range(3):
        student = torch.randn(total, TOKENS, DIM, generator=g, dtype=torch.float64)
        teacher = torch.randn(2, total, TOKENS + 1, DIM, generator=g, dtype=torch.float64)
        weight = torch.rand(2, total, TOKENS, 2, generator=g) / 2
        weight[:, ::2, 1] = 0
        index = torch.randint(0, TOKENS + 1, weight.shape, generator=g)
        student, teacher = student[mine].requires_grad_(), teacher[:, mine]
        weight, index = weight[:, mine], index[:, mine]
        if poisoned and step == 1:
            teacher[0, 0, 0] = torch.nan
            weight[0, 0, 0, 0], index[0, 0, 0, 0] = 0.5, 0
        if name == "global":
            views = [student[:, 0]], [view[:, 0] for view in teacher]
            more = {"pairs": [(0, 0), (0, 1)]}
        else:
            cost = torch.zeros(weight.shape[1:3])
            matches = {(0, q): Matches(index[q], weight[q], cost) for q in range(2)}
            views, more = ([student], list(teacher)), {"matches": matches}
        value = loss(*views, **more)
        value.backward()
    result = {
        "value": float(value.detach()),
        "gradient": student.grad.tolist(),
        "state": {name: part.tolist() for name, part in loss.state_dict().items()},
    }
    # In evaluation and under no_grad nothing is sent: each rank may call it alone.
    with torch.no_grad():
        result["alone"] = float(loss(*views, **more))
        result["eval"] = float(loss.eval()(*views, **more))
    return result


@functools.cache  # to start processes takes longer than all that they do
def results_of(cases):
    """What every rank says of each case: (loss, sizes of the ranks' batches, poisoned rank)."""
    ranks = len(cases[0][1])
    said = said_by_all(__file__, ranks, ranks=ranks, cases=cases)
    return dict(zip(cases, zip(*said, strict=True), strict=True))


def main() -> None:
    settings = json.loads(sys.argv[1])
    rank = settings["rank"]
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=settings["meeting"], rank=rank, world_size=settings["ranks"]
    )
    results = []
    for name, sizes, poison in settings["cases"]:
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        results.append(run(name, sum(sizes), mine, poison == rank))
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
