"""Losses on features in several processes: what one rank does, and how the ranks are started."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

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
    with tempfile.TemporaryDirectory() as folder:
        # A file to meet at: a free port may be taken before it is used, and its server goes with
        # the first process that ends.
        settings = {"ranks": ranks, "cases": cases, "meeting": (Path(folder) / "store").as_uri()}
        workers = [
            subprocess.Popen(
                [sys.executable, __file__, json.dumps(settings | {"rank": rank})],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        said = []
        try:
            for worker in workers:
                out, err = worker.communicate(timeout=120)
                assert worker.returncode == 0, err
                said.append(json.loads(out.splitlines()[-1]))
        finally:  # nobody is left waiting for one that failed
            for worker in workers:
                worker.kill()
                worker.communicate()
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
