"""One rank of test_sinkhorn_knopp.py: its share of each batch, over gloo on the loopback."""

import json
import os
import sys

import torch
import torch.distributed as dist

from local_distill.targets import SinkhornKnopp

C, TEMP = 5, 0.1


def batch(total, scale):
    """The whole batch, the same on every rank: two teacher views, and which tokens count."""
    g = torch.Generator().manual_seed(total)
    logits = [scale * torch.randn(total, n, C, generator=g, dtype=torch.float64) for n in (6, 3)]
    valid = [torch.rand(total, 6, generator=g) > 0.3, None]
    if total:
        logits[1][0, 0, 2] = torch.nan  # on one rank alone
    return logits, valid


def offset_of(targets, logits, valid):
    return targets(logits, teacher_temp=TEMP, valid=valid)[0].offset


def part_of(logits, valid, sizes, ranks):
    """The images that these ranks hold."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    mine = torch.isin(owner, torch.tensor(list(ranks)))
    return [view[mine] for view in logits], [valid[0][mine], None]


def share_of(logits, valid, sizes, ranks):
    """The offset, in one process, of what these ranks hold."""
    return offset_of(SinkhornKnopp(C), *part_of(logits, valid, sizes, ranks)).tolist()


def main() -> None:
    settings = json.loads(sys.argv[1])
    rank = settings["rank"]
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=settings["meeting"], rank=rank, world_size=settings["ranks"]
    )
    results = []
    for sizes, scale in settings["cases"]:
        logits, valid = batch(sum(sizes), scale)
        logits, valid = part_of(logits, valid, sizes, [rank])
        targets = SinkhornKnopp(C)
        result = {"together": offset_of(targets, logits, valid).tolist(), "alone": []}
        # One rank after the other: whatever waited for another rank would wait for ever.
        for turn in range(settings["ranks"]):
            if turn == rank:
                with torch.no_grad():
                    result["alone"].append(offset_of(targets, logits, valid).tolist())
                result["alone"].append(offset_of(targets.eval(), logits, valid).tolist())
            dist.barrier()
        results.append(result)
    # Ranks 0 and 1 among themselves; the others do not take part, nor are they waited for.
    group = dist.new_group([0, 1])
    if rank in (0, 1):
        pair = SinkhornKnopp(C, process_group=group)
        results[-1]["pair"] = offset_of(pair, logits, valid).tolist()
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
