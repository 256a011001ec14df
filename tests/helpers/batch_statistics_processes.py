"""Losses with statistics of the whole batch: what one rank does, and how the ranks are started."""

import functools
import json
import os
import sys

import torch
import torch.distributed as dist

from helpers.processes import said_by_all
from local_distill import Matches
from local_distill.losses.gram import GramAnchoringLoss
from local_distill.losses.koleo import KoLeoLoss
from local_distill.losses.local_variance_covariance import VICRegLLoss
from local_distill.losses.patch_order import PatchOrderLoss
from local_distill.losses.variance_covariance import VICRegLoss

TOKENS, DIM = (5, 4), 3

LOSSES = {
    "vicreg": VICRegLoss,
    "vicregl": VICRegLLoss,
    "koleo": KoLeoLoss,
    "koleo-across": functools.partial(KoLeoLoss, across_processes=True),
    "gram": GramAnchoringLoss,
    "gram-batch": functools.partial(GramAnchoringLoss, scope="batch"),
    "order": functools.partial(PatchOrderLoss, student_steepness=20.0),
}


def batch(total):
    """The numbers of the whole batch, the same on every rank."""
    g = torch.Generator().manual_seed(7)
    real = {"generator": g, "dtype": torch.float64}
    # far from 0 and of spread below 1, so that the mean matters and every hinge is open
    tokens = [torch.randn(total, n, DIM, **real) * 0.6 + 2 for n in TOKENS]
    matches = []
    for s, t in (TOKENS, TOKENS[::-1]):
        weight = torch.rand(total, s, 2, **real) / 2 * (torch.rand(total, s, 1, **real) > 0.3)
        index = torch.randint(0, t, (total, s, 2), generator=g)
        matches.append(Matches(index, weight, torch.rand(total, s, **real)))
    valid = torch.rand(total, **real) > 0.2
    return tokens, matches, valid, torch.randn(6, DIM, **real)


def value_of(loss, name, tokens, matches, valid, references):
    """The loss's value on some images of a `batch`."""
    forth, back = matches
    if name == "vicreg":
        return loss([tokens[0][:, 0], tokens[0][:, 1], tokens[1][:, 0]])
    if name == "vicregl":
        found = {(0, 1): forth, (1, 0): back.compact(3)}
        whole = [view[:, -1] for view in tokens]
        return loss(whole, tokens, found, [{(0, 1): forth.compact(2)}]).loss
    if name.startswith("koleo"):
        return loss([view[:, 0] for view in tokens], [valid, None])
    answers = [view.detach() for view in tokens]
    if name.startswith("gram"):
        return loss(tokens, answers[::-1], {(0, 0): forth, (1, 1): back})
    return loss(tokens[0], answers[1], references, forth)


def run(name, total, mine):
    """Value and gradients of a loss on the images ``mine`` of the batch."""
    tokens, matches, valid, references = batch(total)
    tokens = [view[mine].clone().requires_grad_() for view in tokens]
    matches = [Matches(*(part[mine] for part in found)) for found in matches]
    loss = LOSSES[name]()
    parts = (name, tokens, matches, valid[mine], references)
    value = value_of(loss, *parts)
    value.backward()
    result = {
        "value": float(value.detach()),
        "gradients": [
            (torch.zeros_like(view) if view.grad is None else view.grad).tolist() for view in tokens
        ],
    }
    # In evaluation and under no_grad nothing is sent: each rank may call it alone.
    if mine.start == 0:
        with torch.no_grad():
            result["alone"] = float(value_of(loss, *parts))
        result["eval"] = float(value_of(loss.eval(), *parts).detach())
    return result


@functools.cache  # to start processes takes longer than all that they do
def results_of(ranks, cases):
    """Of each case (loss, sizes of the ranks' batches) what every rank says."""
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
    for name, sizes in settings["cases"]:
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        results.append(run(name, sum(sizes), mine))
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
