"""One rank of test_taps_on_processes.py: its images' gradients, under DDP and under FSDP2."""

import json
import sys

import torch
import torch.distributed as dist
from token_tap.tapped_models import loss_of, small_model, some_views

from local_distill.token_tap import TokenTap


def wrapped(model, how):
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if how == "fsdp":
        for block in model.backbone.blocks:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(gradient):
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def farthest(how, tap_first, rank, ranks):
    """How far the gradients are from those of one process with the same images."""
    torch.manual_seed(0)
    model, plain = small_model(), small_model()
    plain.load_state_dict(model.state_dict())
    views = some_views(2 * ranks)
    mine = [view[2 * rank : 2 * rank + 2] for view in views]
    tap = TokenTap(model.backbone, layers=["blocks.0"]) if tap_first else None
    run = wrapped(model, how)
    tap = tap or TokenTap(model.backbone, layers=["blocks.0"])
    plain_tap = TokenTap(plain.backbone, layers=["blocks.0"])
    for _ in range(2):
        run.zero_grad()
        loss_of(run, tap, mine)[0].backward()
    loss_of(plain, plain_tap, views)[0].backward()
    apart = [
        (whole(got.grad) - wanted.grad).abs().max().item()
        for got, wanted in zip(model.parameters(), plain.parameters(), strict=True)
    ]
    return max(apart), max(p.grad.abs().max().item() for p in plain.parameters())


if __name__ == "__main__":
    said = json.loads(sys.argv[1])
    rank, ranks = said["rank"], said["ranks"]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=said["meeting"], rank=rank, world_size=ranks)
    print(json.dumps([farthest(how, first, rank, ranks) for how, first in said["cases"]]))
    dist.destroy_process_group()
