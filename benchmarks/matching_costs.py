"""What each matcher costs for one DINO step, beside one plain reference, in the same run.

A step is 2 global and 8 local views through ViT-S/16 (14 × 14 and 6 × 6 tokens, 384 features), 18
pairs of views, b images; all views are crops. The reference is the plain similarity match: for each
pair normalise both sides, multiply, take each row's maximum (`matching_similarity.plain`).

Ways take turns in random order within each repeat; what is compared are medians over the repeats of
each repeat's ratio. Peak memory is the highest sum of what torch's CPU allocator has handed out
since the call began, results included.

    python benchmarks/matching_costs.py --batch 8
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matching_geometry import dino_step, seconds
from matching_similarity import peak_bytes, plain
from tqdm import tqdm

from local_distill import Tokens, matching
from local_distill.matching import cross_view_pairs, match_views

FEATURES = 384
WARM_UP = 1
MATCHERS = {
    "Nearest": matching.NearestMatcher(),
    "Nearest, search": matching.NearestMatcher(method="search"),
    "Bilinear": matching.BilinearMatcher(),
    "Overlap": matching.OverlapMatcher(),
    "Overlap, clip": matching.OverlapMatcher(method="clip"),
    "Radius": matching.RadiusMatcher(),
    "Similarity": matching.SimilarityMatcher(),
    "Similarity, l2": matching.SimilarityMatcher("l2"),
    "SoftSimilarity": matching.SoftSimilarityMatcher(),
    "Sinkhorn": matching.SinkhornMatcher(),
    "GatedSimilarity": matching.GatedSimilarityMatcher(),
    "Mutual(Similarity)": matching.Mutual(matching.SimilarityMatcher()),
    "KeepBest(Nearest)": matching.KeepBest(matching.NearestMatcher(), count=20),
}


def plain_similarity(views: list[Tokens]) -> Any:
    features = [view.features for view in views]
    return plain(features, features[:2], cross_view_pairs(len(views), 2))


def by_matcher(matcher: Any, views: list[Tokens]) -> Any:
    return match_views(matcher, views, views[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="torch's")
    parser.add_argument("--matchers", nargs="*", choices=list(MATCHERS), default=list(MATCHERS))
    parser.add_argument("--json", type=Path, help="where to write the line of JSON as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    views = [
        view._replace(features=torch.randn(args.batch, view.num_tokens, FEATURES))
        for view in dino_step("S/16", args.batch)
    ]
    ways: dict[str, Callable[[list[Tokens]], Any]] = {"plain similarity": plain_similarity}
    ways |= {name: functools.partial(by_matcher, MATCHERS[name]) for name in args.matchers}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    order = random.Random(0)
    for repeat in tqdm(range(args.repeats + WARM_UP), leave=False):
        for name in order.sample(list(ways), len(ways)):
            wall, _ = seconds(ways[name], views)
            if repeat >= WARM_UP:
                taken[name].append(wall)
    reference = taken["plain similarity"]
    rows: dict[str, Any] = {}
    print(f"b = {args.batch}, {args.threads} threads, torch {torch.__version__}")
    print(f"{'way':<20}{'ms':>10}{'of plain':>10}{'10–90 %':>16}{'peak MiB':>10}")
    for name, values in taken.items():
        ratios = [one / other for one, other in zip(values, reference, strict=True)]
        low, *_, high = statistics.quantiles(ratios, n=10)
        median, ms = statistics.median(ratios), statistics.median(values) * 1e3
        peak = peak_bytes(functools.partial(ways[name], views))
        print(
            f"{name:<20}{ms:>10.2f}{median:>10.3f}{f'{low:.3f}–{high:.3f}':>16}"
            f"{peak / 2**20:>10.1f}",
            flush=True,
        )
        rows[name] = {"ms": ms, "of_plain": median, "band": [low, high], "peak_bytes": peak}
    line = json.dumps({"benchmark": "matching_costs", "batch": args.batch, "ways": rows})
    print(line)
    if args.json is not None:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
