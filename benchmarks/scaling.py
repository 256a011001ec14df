"""How time and memory grow with tokens, prototypes, views and images.

Four sweeps, each with the others held at DINO's sizes for Swin (2 global views of 7 × 7 tokens, 8
local ones of 3 × 3, 256 features before the prototypes); ways take turns in each repeat:

- tokens: one pair of global views, n tokens each, 4 images: the closed form (`NearestMatcher`),
  the search, similarity, and the plain table of distances (reference);
- prototypes: forward and backward of the local loss from features to the gradients of features and
  prototypes, 4 images: `PrototypeLogits`, and product + plain form (reference);
- images: the same over the batch, with 16,384 prototypes;
- views: a step's match and its local loss over the number of views, 2 of them global, 4 images,
  4,096 prototypes.

Peak memory is what one call has at most from torch's allocator, results included. Ends with the
exponents: the slope of the last points in log-log, 1 for linear, 0 for flat.

    python benchmarks/scaling.py --json scaling.json --plot scaling.png
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from local_distill import (
    Centering,
    LocalDistillationLoss,
    Matches,
    NearestMatcher,
    PrototypeLogits,
    SimilarityMatcher,
    TokenGrid,
    Tokens,
    from_box,
    match_views,
)
from local_distill.benchmarking.machine import describe_machine
from local_distill.benchmarking.memory import peak_bytes
from local_distill.benchmarking.plain_forms import plain_distances, plain_local_loss
from local_distill.benchmarking.timing import device_clock, spread, take_turns
from local_distill.matching import cross_view_pairs

DEVICE = torch.device("cpu")
FEATURES = 256
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
# Above so many bytes the reference is not run: its tables are several times the logits.
MOST_LOGIT_BYTES = 1.2e9

Way = Callable[[], object]


def view(side: int, batch: int, seed: int, scale: tuple[float, float] = (0.4, 1.0)) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    share = scale[0] + (scale[1] - scale[0]) * torch.rand(batch, 1, generator=generator)
    sides = share.sqrt() * torch.tensor([500.0, 375.0])
    low = torch.rand(batch, 2, generator=generator) * (torch.tensor([500.0, 375.0]) - sides)
    pixels = 16 * side
    geometry = from_box(torch.cat((low, low + sides), 1), (pixels, pixels), (375, 500))
    features = torch.randn(batch, side * side, 384, generator=generator)
    return Tokens(features, geometry, TokenGrid.tiling(side, side, (pixels, pixels)))


def plain_nearest(student: Tokens, teacher: Tokens) -> Tensor:
    return plain_distances(student, teacher).argmin(-1)


def token_ways(side: int) -> dict[str, Way]:
    student, teacher = view(side, 4, 0), view(side, 4, 1)
    matchers = {
        "closed form": NearestMatcher(),
        "search": NearestMatcher(method="search"),
        "similarity": SimilarityMatcher(),
    }
    ways: dict[str, Way] = {
        name: functools.partial(matcher, student, teacher) for name, matcher in matchers.items()
    }
    return {"plain": functools.partial(plain_nearest, student, teacher)} | ways


def step_matches(sides: list[int], batch: int) -> tuple[list[Tokens], dict[Any, Matches]]:
    views = [
        view(side, batch, seed, (0.4, 1.0) if seed < 2 else (0.05, 0.4))
        for seed, side in enumerate(sides)
    ]
    return views, match_views(NearestMatcher(), views, views[:2])


def loss_ways(sides: list[int], batch: int, prototypes: int) -> dict[str, Way]:
    _, matches = step_matches(sides, batch)
    torch.manual_seed(0)
    unit = functools.partial(torch.nn.functional.normalize, dim=-1)
    features = [unit(torch.randn(batch, side**2, FEATURES)).requires_grad_() for side in sides]
    weight = unit(torch.randn(prototypes, FEATURES)).requires_grad_()
    teacher_weight = unit(torch.randn(prototypes, FEATURES))
    teacher = [one.detach() for one in features[:2]]
    loss = LocalDistillationLoss(Centering(prototypes), student_temp=STUDENT_TEMP)

    def ours() -> Any:
        value = loss(
            [PrototypeLogits(one, weight) for one in features],
            [PrototypeLogits(one, teacher_weight) for one in teacher],
            matches,
            teacher_temp=TEACHER_TEMP,
        )
        return torch.autograd.grad(value, [*features, weight])

    def plain() -> Any:
        logits = [one @ weight.T for one in features]
        targets = [one @ teacher_weight.T for one in teacher]
        value = plain_local_loss(logits, targets, matches, STUDENT_TEMP, TEACHER_TEMP)
        return torch.autograd.grad(value, [*features, weight])

    rows = batch * sum(side**2 for side in [*sides, *sides[:2]])
    ways: dict[str, Way] = {"PrototypeLogits": ours}
    return ({"plain": plain} if 4 * rows * prototypes <= MOST_LOGIT_BYTES else {}) | ways


def view_ways(count: int) -> dict[str, Way]:
    sides = [7, 7, *[3] * (count - 2)]
    views, _ = step_matches(sides, 4)
    pairs = cross_view_pairs(count, 2)
    ways: dict[str, Way] = {
        "match, closed form": functools.partial(
            match_views, NearestMatcher(), views, views[:2], pairs
        ),
        "match, similarity": functools.partial(
            match_views, SimilarityMatcher(), views, views[:2], pairs
        ),
    }
    losses = loss_ways(sides, 4, 4096)
    return ways | {f"loss, {name}": way for name, way in losses.items()}


SWIN = [7, 7, *[3] * 8]
SWEEPS: dict[str, tuple[list[int], Callable[[int], dict[str, Way]]]] = {
    "tokens": ([7, 14, 28, 37, 64], token_ways),  # along a side
    "prototypes": (
        [1024, 4096, 16384, 65536, 262144],
        lambda c: loss_ways(SWIN, 4, c),
    ),
    "images": ([2, 4, 8, 16, 32], lambda b: loss_ways(SWIN, b, 16384)),
    "views": ([2, 4, 8, 10, 16], view_ways),
}


def sweep(name: str, repeats: int, quick: bool) -> list[dict[str, Any]]:
    points, make = SWEEPS[name]
    rows = []
    for point in tqdm(points[:2] if quick else points, desc=name, leave=False):
        ways = make(point)
        for way in ways.values():
            way()
        taken = take_turns(ways, repeats=repeats, clock=device_clock(DEVICE))
        for title, way in ways.items():
            rows.append(
                {
                    "sweep": name,
                    "at": point**2 if name == "tokens" else point,
                    "way": title,
                    "seconds": spread(taken[title])._asdict(),
                    "peak_bytes": peak_bytes(way, DEVICE),
                }
            )
    return rows


def exponent(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    """Slope of the last two points in log-log."""
    one, other = rows[-2:]
    return math.log(value(other) / value(one)) / math.log(other["at"] / one["at"])


def report(rows: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["sweep"] for row in rows):
        found = [row for row in rows if row["sweep"] == name]
        print(f"\n{name}")
        for way in dict.fromkeys(row["way"] for row in found):
            line = [row for row in found if row["way"] == way]
            cells = [
                f"{row['at']:>9,}: {row['seconds']['median'] * 1e3:>9.2f} ms "
                f"{row['peak_bytes'] / 2**20:>8.1f} MiB"
                for row in line
            ]
            slopes = ""
            if len(line) > 1:
                time = exponent(line, lambda row: row["seconds"]["median"])
                memory = exponent(line, lambda row: row["peak_bytes"])
                slopes = f"   grows as ^{time:.2f} in time, ^{memory:.2f} in memory"
            print(f"  {way}{slopes}")
            for cell in cells:
                print("    " + cell)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["sweep"] for row in rows))
    figure = Figure(figsize=(3.6 * len(names), 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        found = [row for row in rows if row["sweep"] == name]
        for way in dict.fromkeys(row["way"] for row in found):
            line = [row for row in found if row["way"] == way]
            at = [row["at"] for row in line]
            times = [row["seconds"]["median"] * 1e3 for row in line]
            low = [row["seconds"]["low"] * 1e3 for row in line]
            high = [row["seconds"]["high"] * 1e3 for row in line]
            (drawn,) = axes[0, column].plot(at, times, marker="o", label=way)
            axes[0, column].fill_between(at, low, high, alpha=0.2, color=drawn.get_color())
            memory = [row["peak_bytes"] / 2**20 for row in line]
            axes[1, column].plot(at, memory, marker="o", label=way)
        for row, title in ((0, "ms a call"), (1, "peak MiB")):
            axis = axes[row, column]
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xlabel(name)
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(title)
        axes[0, column].legend(fontsize=7)
        axes[0, column].set_title(name)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", nargs="*", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch's")
    parser.add_argument("--quick", action="store_true", help="the first two points of each sweep")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [row for name in args.sweeps for row in sweep(name, args.repeats, args.quick)]
    report(rows)
    if args.json is not None:
        machine = describe_machine(DEVICE)._asdict()
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    if args.plot is not None:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
