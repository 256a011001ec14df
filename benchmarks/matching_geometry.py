"""What the geometric match of one DINO step costs: the closed form against tables of all pairs.

A step is 2 global views of 224 px and 8 local ones of 96 px of each of b images, random crops with
flips of 375 × 500 px sources; the teacher sees the global ones, so that 18 pairs of different views
are matched. Two sizes of tokens: ViT-S/16 (14 × 14 and 6 × 6) and stride 8 (28 × 28 and 12 × 12).

Ways, each from the same ten geometries to the 18 answers:

- lattice: `match_views` with `NearestMatcher`, which also gives weights and costs, checks its
  input, and leaves out tokens too far away or outside the source;
- search: the same with ``method="search"``;
- plain: **the reference**. Pair by pair, token centres in the source in float32, the squared
  differences of all pairs of tokens, ``(s[:, :, None] - t[:, None]).square().sum(-1)``, argmin.
  Indices alone, nothing checked;
- apart: plain, but the squares along x and y are added without an axis of 2 to sum over;
- cdist: plain, but with ``torch.cdist`` (exact mode, without the matrix product) in its place.

The ways take turns within each repeat, in random order, and what is compared are medians over the
repeats of each repeat's ratio, so that slow moments hit all of them; quick ways are called several
times and the mean is taken. The ratios are of wall time; those of the process's CPU time stand
beside them, which say more of one thread on a busy machine, and nothing of two. Peak memory is what
the resident memory of a fresh process rises by in its first call (Linux). That all ways reach the
same distances is checked first. Prints a table a size and number of threads, then one line of JSON,
which --json also writes to a file.

    python benchmarks/matching_geometry.py --repeats 15 --threads 1 2
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from local_distill import NearestMatcher, TokenGrid, Tokens, from_box, match_views
from local_distill.matching import cross_view_pairs

SOURCE = (375, 500)
SIZES = {"S/16": (14, 6, 40.0), "stride 8": (28, 12, 500.0)}  # tokens a side, and the goal
WARM_UP = 2
BUSY = 0.05  # seconds that a way is timed for at least, within a repeat


def random_views(b: int, tokens: int, side: int, scale: tuple[float, float], seed: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    height, width = SOURCE
    area = scale[0] + (scale[1] - scale[0]) * torch.rand(b, 1, generator=generator)
    aspect = torch.exp((torch.rand(b, 1, generator=generator) - 0.5) * 0.5)
    root = area.sqrt() * (height * width) ** 0.5
    sides = torch.cat((root * aspect, root / aspect), 1).clamp(max=torch.tensor([width, height]))
    low = torch.rand(b, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    flip = torch.rand(b, generator=generator) < 0.5
    box = torch.cat((low, low + sides), 1)
    geometry = from_box(box, (side, side), SOURCE, hflip=flip)
    return Tokens(None, geometry, TokenGrid.tiling(tokens, tokens, view_size=(side, side)))


def dino_step(size: str, b: int) -> list[Tokens]:
    large, small, _ = SIZES[size]
    views = [random_views(b, large, 224, (0.4, 1.0), seed) for seed in range(2)]
    return views + [random_views(b, small, 96, (0.05, 0.4), seed) for seed in range(2, 10)]


def plain_centers(view: Tokens) -> Tensor:
    grid, matrix = view.grid, view.geometry.matrix
    x = grid.offset[0] + grid.stride[0] * torch.arange(grid.cols)
    y = grid.offset[1] + grid.stride[1] * torch.arange(grid.rows)
    x, y = x.expand(grid.rows, -1), y[:, None].expand(-1, grid.cols)
    points = torch.stack((x, y, torch.ones_like(x)), -1).reshape(-1, 3)
    lifted = points @ matrix.mT
    return lifted[..., :2] / lifted[..., 2:]


def squares(s: Tensor, t: Tensor) -> Tensor:
    return (s[:, :, None] - t[:, None]).square().sum(-1)


def squares_apart(s: Tensor, t: Tensor) -> Tensor:
    x, y = (s[..., axis, None] - t[:, None, :, axis] for axis in (0, 1))
    return x.square() + y.square()


def distances(s: Tensor, t: Tensor) -> Tensor:
    return torch.cdist(s, t, compute_mode="donot_use_mm_for_euclid_dist")


def by_table(table: Callable[[Tensor, Tensor], Tensor], views: list[Tokens]) -> dict[Any, Tensor]:
    found = {}
    for v, q in cross_view_pairs(len(views), 2):
        found[v, q] = table(plain_centers(views[v]), plain_centers(views[q])).argmin(-1)
    return found


def by_matcher(matcher: NearestMatcher, views: list[Tokens]) -> dict[Any, Tensor]:
    found = match_views(matcher, views, views[:2])
    return {pair: matches.teacher_index[..., 0] for pair, matches in found.items()}


WAYS: dict[str, Callable[[list[Tokens]], dict[Any, Tensor]]] = {
    "lattice": functools.partial(by_matcher, NearestMatcher()),
    "search": functools.partial(by_matcher, NearestMatcher(method="search")),
    "plain": functools.partial(by_table, squares),
    "apart": functools.partial(by_table, squares_apart),
    "cdist": functools.partial(by_table, distances),
}
OURS = ("lattice", "search")


def farther_than_plain(views: list[Tokens]) -> dict[str, float]:
    """By how many source px each way's nearest token lies farther than plain's, at most."""
    centers = [plain_centers(view).double() for view in views]

    def reached(found: dict[Any, Tensor]) -> Tensor:
        parts = []
        for (v, q), index in found.items():
            chosen = centers[q].gather(1, index[..., None].expand(-1, -1, 2))
            parts.append(torch.linalg.vector_norm(centers[v] - chosen, dim=-1).flatten())
        return torch.cat(parts)

    plain = reached(WAYS["plain"](views))
    return {name: float((reached(way(views)) - plain).max()) for name, way in WAYS.items()}


def seconds(way: Callable[[list[Tokens]], Any], views: list[Tokens]) -> tuple[float, float]:
    """Wall and CPU time: means over as many calls as keep it busy for a while, after a first one.

    The first is not timed: it pays for the caches and the memory that the way before it took away.
    """
    way(views)
    start, cpu_start = time.perf_counter(), time.process_time()
    calls = 0
    while calls == 0 or time.perf_counter() - start < BUSY:
        way(views)
        calls += 1
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return wall / calls, cpu / calls


def measure(views: list[Tokens], repeats: int, label: str) -> dict[str, list[tuple[float, float]]]:
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    order = random.Random(0)
    for repeat in tqdm(range(repeats + WARM_UP), desc=label, leave=False):
        for name in order.sample(list(WAYS), len(WAYS)):
            values = seconds(WAYS[name], views)
            if repeat >= WARM_UP:
                taken[name].append(values)
    return taken


def peak_bytes(name: str, size: str, b: int) -> int:
    """In a fresh process: what its resident memory rises by in the first call."""
    torch.set_num_threads(1)
    views = dino_step(size, b)
    warm = dino_step("S/16", 1)
    WAYS[name](warm)  # libraries and their tables are loaded
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = _memory("VmHWM")
    WAYS[name](views)
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: peak memory needs Linux")


def peaks(size: str, b: int) -> dict[str, int]:
    context = multiprocessing.get_context("spawn")
    found = {}
    for name in WAYS:
        with context.Pool(1) as pool:
            found[name] = pool.apply(peak_bytes, (name, size, b))
    return found


def compare(taken: dict[str, list[tuple[float, float]]], way: str, clock: int) -> dict[str, float]:
    """Of plain's time over a way's: the median over the repeats, and 10 % and 90 %."""
    both = zip(taken["plain"], taken[way], strict=True)
    ratios = [plain[clock] / ours[clock] for plain, ours in both]
    tenths = statistics.quantiles(ratios, n=10)
    values = {"median": statistics.median(ratios), "low": tenths[0], "high": tenths[-1]}
    return {key: round(value, 2) for key, value in values.items()}


def report(size: str, b: int, threads: int, repeats: int, peak: dict[str, int]) -> dict[str, Any]:
    torch.set_num_threads(threads)
    taken = measure(dino_step(size, b), repeats, f"{size}, {threads} threads")
    goal = SIZES[size][2]
    rows: dict[str, Any] = {}
    load = os.getloadavg()[0]
    print(f"\n{size}, b = {b}, threads = {threads}, load average {load:.1f}")
    print(
        f"{'way':<10}{'ms/step':>10}{'plain/way':>11}{'10–90 %':>17}{'CPU time':>10}{'peak MB':>10}"
    )
    for name in WAYS:
        wall, cpu = compare(taken, name, 0), compare(taken, name, 1)
        ms = statistics.median(value for value, _ in taken[name]) * 1e3
        band = f"{wall['low']:.1f}–{wall['high']:.1f}"
        verdict = ""
        if name == "lattice":
            verdict = f"  {'at least' if wall['median'] >= goal else 'LESS THAN'} {goal:.0f}×"
        print(
            f"{name:<10}{ms:>10.3f}{wall['median']:>10.1f}×{band:>17}{cpu['median']:>9.1f}×"
            f"{peak[name] / 1e6:>10.1f}{verdict}"
        )
        rows[name] = {
            "ms": round(ms, 4),
            "plain_over_way": wall,
            "plain_over_way_cpu_time": cpu,
            "peak_bytes": peak[name],
        }
    return {"size": size, "threads": threads, "goal": goal, "load": round(load, 2), "ways": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="each way is timed once in each")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="torch's")
    parser.add_argument("--sizes", nargs="*", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--json", type=Path, help="where to write the line of JSON as well")
    args = parser.parse_args()
    results = []
    for size in args.sizes:
        farther = farther_than_plain(dino_step(size, args.batch))
        for name in OURS:
            if farther[name] > 1e-3:
                raise AssertionError(f"{name} misses the nearest token by {farther[name]} px")
        peak = peaks(size, args.batch)
        results += [report(size, args.batch, n, args.repeats, peak) for n in args.threads]
    line = json.dumps(
        {
            "benchmark": "matching_geometry",
            "machine": platform.node(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "source": SOURCE,
            "batch": args.batch,
            "repeats": args.repeats,
            "results": results,
        }
    )
    print(line)
    if args.json is not None:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
