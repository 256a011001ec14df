"""One rank of test_processes.py: its share of the batch, over gloo on the loopback."""

import json
import os
import sys

import torch
import torch.distributed as dist

from local_distill import Centering, GlobalDistillationLoss, LocalDistillationLoss, Matches


def main() -> None:
    settings = json.loads(sys.argv[1])
    rank = settings["rank"]
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=settings["meeting"], rank=rank, world_size=settings["ranks"]
    )
    results = [run(rank, *case) for case in settings["cases"]]
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(results))


def run(rank, sizes, normalize, poison):
    """Two steps on this rank's share of a batch; ``poison`` is the rank with a NaN, or -1."""
    total, c = sum(sizes), 5
    g = torch.Generator().manual_seed(3)
    student = torch.randn(total, 4, c, generator=g, dtype=torch.float64)
    teacher = torch.randn(total, 6, c, generator=g, dtype=torch.float64)
    weight = torch.rand(total, 4, 2, generator=g, dtype=torch.float64) / 2
    weight[::2, 1] = 0
    index = torch.randint(0, 6, (total, 4, 2), generator=g)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    student, teacher, weight, index = student[mine], teacher[mine], weight[mine], index[mine]
    student.requires_grad_()
    if poison == rank:
        teacher[0, 0] = torch.nan
        weight[0, 0, 0], index[0, 0, 0] = 0.5, 0
    matches = {(0, 0): Matches(index, weight, weight[..., 0])}
    local = LocalDistillationLoss(Centering(c).double(), normalize=normalize)
    whole = GlobalDistillationLoss(Centering(c).double())
    for _ in range(2):
        value = local([student], [teacher], matches, teacher_temp=0.2)
        value = value + whole([student[:, 0]], [teacher[:, 0]], teacher_temp=0.2, pairs=[(0, 0)])
    value.backward()
    result = {
        "value": float(value.detach()),
        "gradient": student.grad.flatten().tolist(),
        "centers": [local.targets.center.tolist(), whole.targets.center.tolist()],
        "skipped": [int(local.targets.skipped), int(whole.targets.skipped)],
    }
    # In evaluation nothing is sent: rank 0 alone may call it.
    if rank == 0 and poison < 0:
        result["eval"] = float(local.eval()([student], [teacher], matches, teacher_temp=0.2))
        with torch.no_grad():
            result["alone"] = float(local.train()([student], [teacher], matches, teacher_temp=0.2))
    return result


if __name__ == "__main__":
    main()
