"""What the dense contrast of one DenseCL step costs, forward and backward: memory and time.

32 images, 7 × 7 tokens of 128 channels, one view through the student and the other through the
teacher, matches of one candidate a token, and a queue of 65,536 keys.

- plain: **the reference**, the form of the published code: all tokens times all keys in one table,
  the positive beside them, and `cross_entropy`;
- ours: `DenseContrastiveLoss`, in evaluation, so that neither side updates a queue.

The ways take turns within each repeat, in random order; times are medians, ratios those of each
repeat. Peak memory is the highest sum of what torch's CPU allocator has handed out since the call
began, gradients included on both sides, features and queue not, from torch.profiler's record. That
both give the same loss and gradient is checked first. Prints a table and a line of JSON, which
--json also writes to a file.

    python benchmarks/dense_contrast.py --repeats 7 --threads 1
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
from torch import Tensor, nn
from tqdm import tqdm

from local_distill import DenseContrastiveLoss, Matches, NegativeQueue
from local_distill.benchmarking.memory import peak_bytes

TEMP = 0.2


def plain(student: Tensor, teacher: Tensor, matches: Matches, keys: Tensor) -> Tensor:
    x = nn.functional.normalize(student, dim=-1)
    y = nn.functional.normalize(teacher, dim=-1)
    answer = y.gather(1, matches.teacher_index.expand(-1, -1, y.shape[-1]))
    positive = (x * answer).sum(-1, keepdim=True).flatten(0, 1)
    scores = torch.cat((positive, x.flatten(0, 1) @ keys.mT), 1) / TEMP
    return nn.functional.cross_entropy(scores, scores.new_zeros(len(scores), dtype=torch.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--tokens", type=int, default=49)
    parser.add_argument("--keys", type=int, default=65_536)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--json", type=Path, help="where to write the line of JSON as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = (args.batch, args.tokens, args.dim)
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    index = torch.randint(0, args.tokens, (*shape[:2], 1))
    matches = Matches(index, torch.ones(*shape[:2], 1), torch.zeros(shape[:2]))
    loss = DenseContrastiveLoss(NegativeQueue(args.keys, args.dim), temp=TEMP).eval()
    loss.queue.update(torch.randn(args.keys, args.dim))

    def trained(way: Callable[[], Tensor]) -> float:
        student.grad = None
        value = way()
        value.backward()
        return float(value.detach())

    ways: dict[str, Callable[[], float]] = {
        "plain": lambda: trained(lambda: plain(student, teacher, matches, loss.queue.keys)),
        "ours": lambda: trained(lambda: loss([student], [teacher], {(0, 0): matches})),
    }
    expected = ways["plain"]()
    wanted = student.grad
    difference = abs(ways["ours"]() - expected) / abs(expected)
    torch.testing.assert_close(student.grad, wanted, rtol=1e-4, atol=1e-9)
    if difference > 1e-5:
        raise AssertionError(f"the losses differ by {difference}")
    del wanted
    taken: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    for repeat in tqdm(range(args.repeats + 1), leave=False):
        for name in order.sample(list(ways), len(ways)):
            start = time.perf_counter()
            ways[name]()
            if repeat:  # the first one warms up
                taken[name].append(time.perf_counter() - start)
    peaks = {}
    for name, run in ways.items():
        student.grad = None  # what is freed during the record would count against its peak
        peaks[name] = peak_bytes(run, torch.device("cpu"))
    print(
        f"b = {args.batch}, {args.tokens} tokens, d = {args.dim}, {args.keys} keys, "
        f"{args.threads} threads, {torch.__version__}"
    )
    print(f"{'way':<8}{'s':>8}{'of plain':>10}{'10–90 %':>14}{'peak MiB':>10}{'of plain':>10}")
    rows = {}
    for name in ways:
        shares = [o / p for o, p in zip(taken[name], taken["plain"], strict=True)]
        tenths = statistics.quantiles(shares, n=10)
        rows[name] = {
            "seconds": round(statistics.median(taken[name]), 4),
            "time_of_plain": round(statistics.median(shares), 3),
            "band": [round(tenths[0], 3), round(tenths[-1], 3)],
            "peak_bytes": peaks[name],
            "memory_of_plain": round(peaks[name] / peaks["plain"], 4),
        }
        row = rows[name]
        band = "{:.2f}–{:.2f}".format(*row["band"])
        print(
            f"{name:<8}{row['seconds']:>8.3f}{row['time_of_plain']:>10.2f}{band:>14}"
            f"{peaks[name] / 2**20:>10.1f}{row['memory_of_plain']:>10.4f}"
        )
    line = json.dumps(
        {
            "benchmark": "dense_contrast",
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "threads": args.threads,
            "batch": args.batch,
            "tokens": args.tokens,
            "keys": args.keys,
            "dim": args.dim,
            "repeats": args.repeats,
            "ways": rows,
        }
    )
    print(line)
    if args.json is not None:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
