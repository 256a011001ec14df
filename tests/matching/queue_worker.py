"""One rank of test_cross_image.py: its share of each batch, over gloo on the loopback."""

import json
import os
import sys

import torch
import torch.distributed as dist

from local_distill import Tokens
from local_distill.distributed import all_gather_rows
from local_distill.matching.cross_image import CrossImageQueue

IMAGES, OBJECTS, DIM = 7, 3, 4


def steps(sizes):
    """The whole batches, the same on every rank: objects of both views, validity, image ids."""
    g = torch.Generator().manual_seed(2)
    for step in range(4):
        total = sum(sizes)
        one = torch.randn(total, OBJECTS, DIM, generator=g)
        two = one + 0.2 * torch.randn(total, OBJECTS, DIM, generator=g)
        valid = torch.rand(total, OBJECTS, generator=g) > 0.2
        one[total // 2, 1], two[-1, 0] = torch.nan, torch.inf
        yield one, two, valid, torch.arange(total) + total * step


def main() -> None:
    settings = json.loads(sys.argv[1])
    sizes, rank = settings["sizes"], settings["rank"]
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=settings["meeting"], rank=rank, world_size=len(sizes)
    )
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    queue = CrossImageQueue(IMAGES, num_objects=OBJECTS, feature_dim=DIM)
    for one, two, valid, ids in steps(sizes):
        queue.update(Tokens(one[mine]), Tokens(two[mine]), valid=valid[mine], image_id=ids[mine])
    # what is gathered is without gradient, whatever it is gathered from
    rows = torch.full((sizes[rank], 2), float(rank), requires_grad=True)
    gathered = all_gather_rows(rows)
    flags = all_gather_rows(torch.full((sizes[rank],), rank == 1))
    dist.barrier()
    dist.destroy_process_group()
    print(
        json.dumps(
            {
                "state": {name: part.tolist() for name, part in queue.state_dict().items()},
                "gathered": gathered.tolist(),
                "requires_grad": gathered.requires_grad,
                "flags": flags.tolist(),
            }
        )
    )


if __name__ == "__main__":
    main()
