"""What the local loss of one DINO step costs, forward and backward, from logits: memory and time.

8 images, 2 global views of 49 tokens and 8 local ones of 9 (Swin at 224 and 96 px), 65,536
prototypes, 18 pairs of different views with matches of one candidate a token.

- plain: **the reference**, the form of the published codes: the teacher's softmax once a view, then
  for each pair of views one ``log_softmax`` of the student and one ``gather`` of the teacher;
- ours: `LocalDistillationLoss`, targets and their update included.

The ways take turns within each repeat, in random order; times are medians, ratios those of each
repeat. Peak memory is the highest sum of what torch's CPU allocator has handed out since the call
began, gradients included on both sides, the logits themselves not, from torch.profiler's record.
That both give the same loss and gradient is checked first. Prints a table and a line of JSON, which
--json also writes to a file.

    python benchmarks/local_loss.py --repeats 7 --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from local_distill import Centering, LocalDistillationLoss, Matches
from local_distill.benchmarking.memory import peak_bytes
from local_distill.matching import cross_view_pairs

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
MOST_MEMORY, MOST_TIME = 1 / 3.4, 0.4  # the goals, as shares of plain's


def step(b: int, c: int) -> tuple[list[Tensor], list[Tensor], dict[tuple[int, int], Matches]]:
    counts = [49] * 2 + [9] * 8
    student = [torch.randn(b, s, c) for s in counts]
    teacher = [torch.randn(b, s, c) for s in counts[:2]]
    matches = {}
    for v, q in cross_view_pairs(len(counts), 2):
        index = torch.randint(0, counts[q], (b, counts[v], 1))
        keep = torch.rand(b, counts[v]) < 0.8
        cost = torch.where(keep, 0.0, torch.inf)
        matches[v, q] = Matches(index, keep[..., None].float(), cost)
    return student, teacher, matches


def plain(
    student: list[Tensor], teacher: list[Tensor], matches: dict[tuple[int, int], Matches]
) -> Tensor:
    probs = [(logits / TEACHER_TEMP).softmax(-1) for logits in teacher]
    total = torch.zeros(())
    for (v, q), found in matches.items():
        index = found.teacher_index.expand(-1, -1, probs[q].shape[-1])
        target = probs[q].gather(1, index)
        cross = -(target * (student[v] / STUDENT_TEMP).log_softmax(-1)).sum(-1)
        weight = found.weight[..., 0]
        total = total + (cross * weight).sum() / weight.sum()
    return total / len(matches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--prototypes", type=int, default=65_536)
    parser.add_argument("--json", type=Path, help="where to write the line of JSON as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    student, teacher, matches = step(args.batch, args.prototypes)
    student = [logits.requires_grad_() for logits in student]
    loss = LocalDistillationLoss(Centering(args.prototypes), student_temp=STUDENT_TEMP)

    def ours() -> Tensor:
        value: Tensor = loss(student, teacher, matches, teacher_temp=TEACHER_TEMP)
        return value

    def trained(way: Callable[[], Tensor]) -> float:
        for logits in student:
            logits.grad = None
        value = way()
        value.backward()
        return float(value.detach())

    ways: dict[str, Callable[[], float]] = {
        "plain": lambda: trained(lambda: plain(student, teacher, matches)),
        "ours": lambda: trained(ours),
    }
    loss.eval()  # centers that stay zero, as plain has none
    expected = ways["plain"]()
    gradients = [logits.grad for logits in student]
    difference = abs(ways["ours"]() - expected) / abs(expected)
    for logits, wanted in zip(student, gradients, strict=True):
        torch.testing.assert_close(logits.grad, wanted, rtol=1e-4, atol=1e-9)
    if difference > 1e-5:
        raise AssertionError(f"the losses differ by {difference}")
    del gradients
    loss.train()
    taken: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    for repeat in tqdm(range(args.repeats + 1), leave=False):
        for name in order.sample(list(ways), len(ways)):
            start = time.perf_counter()
            ways[name]()
            if repeat:  # the first one warms up
                taken[name].append(time.perf_counter() - start)
    rows = {}
    peaks = {}
    for name, run in ways.items():
        for logits in student:  # what is freed during the record would count against its peak
            logits.grad = None
        peaks[name] = peak_bytes(run, torch.device("cpu"))
    print(f"b = {args.batch}, c = {args.prototypes}, {args.threads} threads, {torch.__version__}")
    print(f"{'way':<8}{'s':>8}{'of plain':>10}{'10–90 %':>14}{'peak MiB':>10}{'of plain':>10}")
    for name in ways:
        shares = [o / p for o, p in zip(taken[name], taken["plain"], strict=True)]
        tenths = statistics.quantiles(shares, n=10)
        rows[name] = {
            "seconds": round(statistics.median(taken[name]), 4),
            "time_of_plain": round(statistics.median(shares), 3),
            "band": [round(tenths[0], 3), round(tenths[-1], 3)],
            "peak_bytes": peaks[name],
            "memory_of_plain": round(peaks[name] / peaks["plain"], 3),
        }
        row = rows[name]
        band = "{:.2f}–{:.2f}".format(*row["band"])
        print(
            f"{name:<8}{row['seconds']:>8.3f}{row['time_of_plain']:>10.2f}{band:>14}"
            f"{peaks[name] / 2**20:>10.0f}{row['memory_of_plain']:>10.3f}"
        )
    met = (
        rows["ours"]["memory_of_plain"] <= MOST_MEMORY,
        rows["ours"]["time_of_plain"] <= MOST_TIME,
    )
    print(f"memory at most 1/3.4 of plain's: {met[0]}; time at most 0.4 of plain's: {met[1]}")
    line = json.dumps(
        {
            "benchmark": "local_loss",
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "threads": args.threads,
            "batch": args.batch,
            "prototypes": args.prototypes,
            "repeats": args.repeats,
            "ways": rows,
        }
    )
    print(line)
    if args.json is not None:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
