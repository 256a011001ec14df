"""How far tracked geometry lies from the pixels: whole random torchvision v2 pipelines.

Draws pipelines of up to eight transforms in any order and nesting, sends coordinate ramps through
each (PIL mode F, float32 and float64 tensors; sources from 1 to 60 px) and compares the source
position that every pixel shows with the one that its geometry says. Groups:

- exact: crops, flips, pads, quarter turns;
- affine, perspective (both bilinear), cubic (both, as PIL interpolates them; tensors can't),
  nearest (both), resize (antialiased): one of these among exact ones, so that the error is of one
  step, in px of that step's input;
- mixed: all but cubic and nearest in any number; the error is given as a share of the bound that
  the steps' errors add up to (1e-3 px for affine and perspective, 0.1 px for a resize, each in px
  of its own input).

Prints a table, then one line of JSON.

    python benchmarks/tracking_error.py --pipelines 2500 --seed 0
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers import pipelines
from helpers.ramps import error_bounds, send_ramp

from local_distill.errors import GeometryError

PER_STEP = {"exact": 1e-4, "affine": 1e-3, "perspective": 1e-3, "resize": 0.1}
GROUPS = ("exact", "affine", "perspective", "cubic", "nearest", "resize", "mixed")
IMAGES = ("PIL F", "float32", "float64")


def draw(rng: random.Random, group: str, pil: bool) -> Callable[[Any], Any]:
    filters = pipelines.FILTERS if pil else pipelines.resize_filters()
    pick, whole = rng.choice, rng.randint
    if group in ("exact", "mixed"):
        kinds = ("exact",) if group == "exact" else ("exact", "affine", "perspective", "resize")
        return pipelines.pipeline(pick, whole, kinds, filters)
    before, after = (pipelines.pipeline(pick, whole, ("exact",), most=whole(1, 4)) for _ in "ab")
    made = {
        "affine": lambda: pipelines.affine(pick, whole),
        "perspective": lambda: pipelines.perspective(pick, whole),
        "cubic": lambda: pipelines.warp(pick, whole, InterpolationMode.BICUBIC),
        "nearest": lambda: pipelines.warp(pick, whole, InterpolationMode.NEAREST),
        "resize": lambda: pipelines.resize(pick, whole, filters),
    }[group]()
    return v2.Compose([before, pipelines.SpoilRing(), made, after])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipelines", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(args.seed)
    rows = {
        (group, image): {"pipelines": 0, "refused": 0, "pixels": 0, "max": 0.0, "sum": [0.0, 0.0]}
        for group in GROUPS
        for image in IMAGES
        if group != "cubic" or image == "PIL F"
    }
    for _ in tqdm(range(args.pipelines), desc="pipelines", unit="", mininterval=5):
        group, image = rng.choice(list(rows))
        row, pil = rows[group, image], image == "PIL F"
        smallest = rng.choice([1, 5, 20])
        height, width = rng.randint(smallest, 60), rng.randint(smallest, 60)
        pipeline = draw(rng, group, pil)
        dtype = torch.float32 if image == "float32" else torch.float64
        row["pipelines"] += 1
        try:
            sent = send_ramp(
                pipeline, height, width, pil=pil, seed=rng.randint(0, 2**31), dtype=dtype
            )
        except (GeometryError, torch.linalg.LinAlgError):  # no pixels left; perspective of a point
            row["refused"] += 1
            continue
        seen = sent.predicted.isfinite().all(-1)
        error = sent.error[seen]
        if not len(error):
            continue
        row["pixels"] += len(error)
        if group == "mixed":
            error = error / error_bounds(sent, PER_STEP)[seen]
        row["max"] = max(row["max"], float(error.abs().max()))
        row["sum"] = [one + float(part) for one, part in zip(row["sum"], error.sum(0), strict=True)]
    print(
        f"{'group':<12}{'image':<9}{'pipelines':>10}{'refused':>9}{'pixels':>11}"
        f"{'largest':>11}{'bias x':>11}{'bias y':>11}"
    )
    found = []
    for (group, image), row in rows.items():
        bias = [value / max(1, row["pixels"]) for value in row.pop("sum")]
        unit = "share of bound" if group == "mixed" else "px"
        found.append({"group": group, "image": image, **row, "bias": bias, "unit": unit})
        print(
            f"{group:<12}{image:<9}{row['pipelines']:>10}{row['refused']:>9}{row['pixels']:>11,}"
            f"{row['max']:>11.2e}{bias[0]:>11.1e}{bias[1]:>11.1e}"
        )
    print(
        json.dumps(
            {
                "benchmark": "tracking_error",
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "pillow": PIL.__version__,
                "seed": args.seed,
                "pipelines": args.pipelines,
                "bound_per_step_px": PER_STEP,
                "rows": found,
            }
        )
    )


if __name__ == "__main__":
    main()
