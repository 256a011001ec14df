"""How long `import local_distill` takes, as a ratio to `import torch`, each in a fresh interpreter.

The two take turns, in random order within each repeat; the ratio is the median over the repeats of
each repeat's ratio. The first repeat warms the disk's cache and is not counted.

    python benchmarks/import_time.py --repeats 15
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

MODULES = ("torch", "local_distill")
GOAL = 1.3


def seconds(module: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where to write the line of JSON as well")
    args = parser.parse_args()
    taken: dict[str, list[float]] = {module: [] for module in MODULES}
    order = random.Random(0)
    for repeat in range(args.repeats + 1):
        for module in order.sample(MODULES, len(MODULES)):
            wall = seconds(module)
            if repeat:
                taken[module].append(wall)
    ratios = [ours / theirs for theirs, ours in zip(*taken.values(), strict=True)]
    low, *_, high = statistics.quantiles(ratios, n=10)
    ratio = statistics.median(ratios)
    print(f"import torch: {statistics.median(taken['torch']):.2f} s")
    print(f"import local_distill: {ratio:.3f} × as long (10–90 %: {low:.3f}–{high:.3f})")
    print(f"below {GOAL}: {ratio < GOAL}")
    line = json.dumps({"benchmark": "import_time", "ratio": ratio, "band": [low, high]})
    print(line)
    if args.json is not None:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
