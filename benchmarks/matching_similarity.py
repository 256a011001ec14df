"""What the similarity match costs, beside the plain way, in the same run.

- plain: for each pair of views normalise both sides, multiply, take the maximum of each row;
- ours: `SimilarityMatcher`, which also finds out which tokens may be matched, works at any scale of
  the features and gives whole `Matches`.

Sizes are those of DINO's step (2 global views, 8 local ones) through ViT-S/16, ViT-S/8, Swin with a
7 × 7 and a 3 × 3 grid, and ViT-L/14; b images. For each: a pair of global views, a local view with
a global one, and all 18 pairs through `match_views`.

Both ways take turns within each repeat, so that a machine's slow moments hit both; the ratio is
that of the medians, and the band the 10th to 90th percentile of the ratio within one repeat. With
--clock cpu the process's time is taken, which other processes' load disturbs less. Memory is the
highest sum of what torch's CPU allocator has handed out since the call began, results included on
both sides, from torch.profiler's record of allocations; buffers inside the BLAS do not go through
it. Prints a line for each, then one line of JSON, which --json also writes to a file.

    python benchmarks/matching_similarity.py --threads 2 --batches 32 8 2
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of each start and stop

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from local_distill.matching.match_views import cross_view_pairs, match_views
from local_distill.matching.similarity import SimilarityMatcher
from local_distill.structures import Tokens

Pair = tuple[int, int]


class Size(NamedTuple):
    """Tokens of a global and of a local view, and features of a token."""

    name: str
    global_tokens: int
    local_tokens: int
    features: int


SIZES = (
    Size("S/16", 196, 36, 384),
    Size("S/8", 784, 144, 384),
    Size("Swin", 49, 9, 768),
    Size("L/14", 256, 49, 1024),
)
CASES: dict[str, list[Pair]] = {
    "global-global": [(0, 1)],
    "local-global": [(2, 0)],
    "18 pairs": cross_view_pairs(10, 2),
}


def plain(students: Sequence[Tensor], teachers: Sequence[Tensor], pairs: Sequence[Pair]) -> Any:
    found = {}
    for v, q in pairs:
        f, g = F.normalize(students[v], dim=-1), F.normalize(teachers[q], dim=-1)
        score, index = torch.bmm(f, g.mT).max(-1)
        found[v, q] = (index, 1 - score)
    return found


def peak_bytes(run: Callable[[], Any]) -> int:
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    del kept
    return peak


def percentiles(values: list[float]) -> tuple[float, float]:
    cuts = statistics.quantiles(values, n=10)
    return cuts[0], cuts[-1]


def measure(
    size: Size, b: int, case: str, seconds: float, least: int, clock: Callable[[], float]
) -> dict[str, Any]:
    views = [torch.randn(b, size.global_tokens, size.features) for _ in range(2)]
    views += [torch.randn(b, size.local_tokens, size.features) for _ in range(8)]
    teachers = [torch.randn_like(view) for view in views[:2]]
    students = [Tokens(view) for view in views]
    targets = [Tokens(view) for view in teachers]
    pairs, matcher = CASES[case], SimilarityMatcher()
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(views, teachers, pairs),
        "ours": lambda: match_views(matcher, students, targets, pairs),
    }
    differing = worst = 0.0
    expected, found = ways["plain"](), ways["ours"]()
    for pair, (index, cost) in expected.items():
        differing += float((found[pair].teacher_index[..., 0] != index).sum())
        worst = max(worst, float((found[pair].cost - cost).abs().max()))
    del expected, found
    taken: dict[str, list[float]] = {name: [] for name in ways}
    begin = time.perf_counter()
    repeats = 0
    while repeats < least + 2 or time.perf_counter() - begin < seconds:
        for name in ways if repeats % 2 else reversed(ways):
            start = clock()
            ways[name]()
            taken[name].append((clock() - start) * 1e3)
        repeats += 1
    taken = {name: values[2:] for name, values in taken.items()}  # the first ones warm up
    medians = {name: statistics.median(values) for name, values in taken.items()}
    ratios = [p / o for p, o in zip(taken["plain"], taken["ours"], strict=True)]
    memory = {name: peak_bytes(run) for name, run in ways.items()}
    return {
        "size": size.name,
        "b": b,
        "case": case,
        "repeats": len(ratios),
        "ms": {name: round(value, 3) for name, value in medians.items()},
        "times_faster": round(medians["plain"] / medians["ours"], 3),
        "band": [round(value, 3) for value in percentiles(ratios)],
        "peak_bytes": memory,
        "memory_ratio": round(memory["ours"] / memory["plain"], 3),
        "other_indices": int(differing),
        "largest_cost_difference": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 8, 2])
    parser.add_argument("--sizes", nargs="+", default=[size.name for size in SIZES])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each line")
    parser.add_argument("--repeats", type=int, default=7, help="at least, for each line")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", type=Path, help="where to write the line of JSON as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    rows = []
    print(f"{args.threads} threads, {args.clock} time, torch {torch.__version__}")
    print(
        f"{'size':<6}{'b':>4} {'case':<14}{'plain ms':>10}{'ours ms':>10}{'faster':>9}"
        f"{'10–90 %':>14}{'plain MiB':>11}{'ours MiB':>10}{'memory':>8}"
    )
    for size in SIZES:
        for b in args.batches if size.name in args.sizes else []:
            for case in args.cases:
                row = measure(size, b, case, args.seconds, args.repeats, clock)
                rows.append(row)
                band = "{:.2f}–{:.2f}".format(*row["band"])
                mib = {name: value / 2**20 for name, value in row["peak_bytes"].items()}
                print(
                    f"{size.name:<6}{b:>4} {case:<14}{row['ms']['plain']:>10.2f}"
                    f"{row['ms']['ours']:>10.2f}{row['times_faster']:>8.2f}×{band:>14}"
                    f"{mib['plain']:>11.1f}{mib['ours']:>10.1f}{row['memory_ratio']:>8.2f}",
                    flush=True,
                )
    print(
        f"other indices than the plain way: {sum(row['other_indices'] for row in rows)}; costs "
        f"differ by at most {max(row['largest_cost_difference'] for row in rows):.1e}"
    )
    line = json.dumps(
        {
            "benchmark": "matching_similarity",
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "threads": args.threads,
            "clock": args.clock,
            "dtype": "float32",
            "rows": rows,
        }
    )
    print(line)
    if args.json is not None:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
