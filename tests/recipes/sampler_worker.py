"""One rank of test_adasim.py: its share of each step, over gloo on the loopback."""

import json
import os
import sys

import torch
import torch.distributed as dist

from local_distill.neighbour_sampler import NeighbourSampler


def observed(sizes, rank=None):
    """Three epochs, of which this process sees its share, or all where ``rank`` is None."""
    g = torch.Generator().manual_seed(5)
    total = sum(sizes)
    mine = slice(0, total) if rank is None else slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    sampler = NeighbourSampler(9, feature_dim=4, top_k=3, votes=2)
    for _ in range(3):
        for _ in range(3):
            index = torch.randint(0, 9, (total,), generator=g)  # some twice
            features = torch.randn(total, 4, generator=g)
            features[int(torch.randint(0, total, (), generator=g))] = torch.nan
            sampler.observe(index[mine], features[mine])
        sampler.end_epoch()
    return sampler


def main() -> None:
    settings = json.loads(sys.argv[1])
    sizes, rank = settings["sizes"], settings["rank"]
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=settings["meeting"], rank=rank, world_size=len(sizes)
    )
    state = observed(sizes, rank).state_dict()
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps({name: part.tolist() for name, part in state.items()}))


if __name__ == "__main__":
    main()
