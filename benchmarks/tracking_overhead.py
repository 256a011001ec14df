"""What knowing where the views lie adds to DINO's augmentation of one JPEG.

Every way begins with the same JPEG in memory (decoded by PIL, as ImageFolder does), draws from the
same seed, and ends in DINO's ten normalised views (2 × 224 + 8 × 96 px):

- reference: a torchvision v2 pipeline per view, no geometry; once more as "reference again", whose
  ratio to the first is what the machine's noise makes of no difference at all;
- tracked: the same pipelines under `track`, through `MultiView`; the pixels are compared;
- multi-crop: `MultiCrop`; "no geometry" is the same with the sum of the geometries left out;
- constrained: `MultiCrop` with local views inside all global ones, and these overlapping by half.

Two kinds of input: the PIL image goes into the pipelines, or a uint8 tensor made of it once.

The ways take turns within each repeat, in random order, and what is compared are medians over the
repeats of each repeat's ratio, so that slow moments hit all of them. Times are the
process's CPU times, one thread: another process on the machine does not count. Prints a table a
kind of input, whether the geometry stays within 5 %, then one line of JSON.

    python benchmarks/tracking_overhead.py --repeats 100
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import PIL.Image
import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from local_distill.transforms import MultiCrop
from local_distill.transforms import multi_crop as multi_crop_module
from local_distill.transforms.multi_crop import IMAGENET_MEAN, IMAGENET_STD
from local_distill.transforms.multi_view import MultiView

ALLOWED = 1.05
WARM_UP = 3
# (way, what it is compared with, whether the ratio is held to ALLOWED)
COMPARED = [
    ("reference again", "reference", False),
    ("tracked", "reference", True),
    ("multi-crop", "no geometry", True),
    ("multi-crop", "reference", False),
    ("constrained", "multi-crop", False),
]


def photograph(height: int, width: int, seed: int) -> bytes:
    """A JPEG of clouds at many scales, about as hard to decode as a photograph."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(3, height, width)
    for octave in range(1, 9):
        side = min(2**octave, height, width)
        noise = torch.rand(1, 3, side, side, generator=generator)
        smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic")
        image += smooth[0] * 0.8**octave
    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    stream = io.BytesIO()
    pixels = ((image - low) / (high - low) * 255).to(torch.uint8)
    F.to_pil_image(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def dino_pipeline(
    size: int, scale: tuple[float, float], blur_p: float, solarize_p: float
) -> v2.Compose:
    bicubic = v2.InterpolationMode.BICUBIC
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=scale, interpolation=bicubic, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=blur_p),
            v2.RandomSolarize(128, p=solarize_p),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def dino_pipelines() -> list[v2.Compose]:
    return [
        dino_pipeline(224, (0.4, 1.0), 1.0, 0.0),
        dino_pipeline(224, (0.4, 1.0), 0.1, 0.2),
        *[dino_pipeline(96, (0.05, 0.4), 0.5, 0.0) for _ in range(8)],
    ]


def ways() -> dict[str, Callable[[Any], list[Tensor]]]:
    """Each from an image to its views."""
    pipelines = dino_pipelines()
    tracked = MultiView(pipelines, num_global=2)
    plain = MultiCrop()
    constrained = MultiCrop(local_inside=True, overlap_with="all", min_global_overlap=0.5)

    def reference(image: Any) -> list[Tensor]:
        return [pipeline(image) for pipeline in pipelines]

    return {
        "reference": reference,
        "reference again": reference,
        "tracked": lambda image: tracked(image)[0],
        "multi-crop": lambda image: plain(image)[0],
        "no geometry": lambda image: plain(image)[0],
        "constrained": lambda image: constrained(image)[0],
    }


def leave_out(*_: Any) -> list[Any]:
    """In place of `box_geometries`."""
    return []


def timed(
    name: str, way: Callable[[Any], list[Tensor]], jpeg: bytes, as_tensor: bool, seed: int
) -> tuple[float, list[Tensor]]:
    """CPU milliseconds from the JPEG to the views, and the views."""
    without = mock.patch.object(multi_crop_module, "box_geometries", new=leave_out)
    with without if name == "no geometry" else nullcontext():
        torch.manual_seed(seed)
        start = time.process_time_ns()
        image: Any = PIL.Image.open(io.BytesIO(jpeg)).convert("RGB")
        views = way(F.pil_to_tensor(image) if as_tensor else image)
        return (time.process_time_ns() - start) / 1e6, views


def measure(jpegs: list[bytes], repeats: int, as_tensor: bool) -> dict[str, list[float]]:
    made = ways()
    names = list(made)
    taken: dict[str, list[float]] = {name: [] for name in names}
    label = "tensor" if as_tensor else "PIL"
    order = random.Random(0)  # a fixed order would always give the same way warm caches
    for repeat in tqdm(range(repeats + WARM_UP), desc=label, leave=False):
        views = {}
        for name in order.sample(names, len(names)):
            jpeg = jpegs[repeat % len(jpegs)]
            value, views[name] = timed(name, made[name], jpeg, as_tensor, repeat)
            if repeat >= WARM_UP:
                taken[name].append(value)
        for one, other in (("tracked", "reference"), ("no geometry", "multi-crop")):
            for a, b in zip(views[one], views[other], strict=True):
                if not torch.equal(a, b):
                    raise AssertionError(f"{one} and {other} do not make the same pixels")
    return taken


def compare(taken: dict[str, list[float]], way: str, base: str) -> dict[str, float]:
    """Median ratio, its 10 % and 90 % over the repeats, and the 95 % interval of the median."""
    ratios = sorted(a / b for a, b in zip(taken[way], taken[base], strict=True))
    count = len(ratios)
    reach = 0.98 * count**0.5  # of the order statistics around the middle one
    return {
        "median": statistics.median(ratios),
        "low": ratios[int(0.1 * count)],
        "high": ratios[min(count - 1, int(0.9 * count))],
        "sure_low": ratios[max(0, int(count / 2 - reach))],
        "sure_high": ratios[min(count - 1, int(count / 2 + reach))],
    }


def report(label: str, taken: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in taken.items()}
    print(f"\n{label} input, CPU ms per image: ", end="")
    print(", ".join(f"{name} {value:.1f}" for name, value in medians.items()))
    print(f"{'way':<17}{'compared with':<14}{'ratio':>8}{'median, 95 %':>17}{'10–90 %':>17}")
    found = {}
    for way, base, held in COMPARED:
        r = compare(taken, way, base)
        sure, band = (
            f"{r[a]:.3f}–{r[b]:.3f}" for a, b in (("sure_low", "sure_high"), ("low", "high"))
        )
        verdict = ""
        if held:
            verdict = "within 5 %" if r["median"] <= ALLOWED else "MORE THAN 5 %"
        print(f"{way:<17}{base:<14}{r['median']:>8.4f}{sure:>17}{band:>17}  {verdict}")
        found[f"{way} / {base}"] = {key: round(value, 4) for key, value in r.items()}
    return {"ms": {name: round(value, 3) for name, value in medians.items()}, "ratios": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=100, help="images, each measured once a way")
    parser.add_argument("--height", type=int, default=375, help="of the JPEG, px")
    parser.add_argument("--width", type=int, default=500, help="of the JPEG, px")
    args = parser.parse_args()
    torch.set_num_threads(1)
    jpegs = [photograph(args.height, args.width, seed) for seed in range(16)]
    size = statistics.mean(map(len, jpegs)) / 1000
    print(f"JPEGs of {args.width} × {args.height} px, {size:.0f} kB on average")
    results = {
        label: report(label, measure(jpegs, args.repeats, label == "tensor"))
        for label in ("PIL", "tensor")
    }
    print(
        json.dumps(
            {
                "benchmark": "tracking_overhead",
                "machine": platform.node(),
                "processor": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "threads": 1,
                "source": [args.height, args.width],
                "jpeg_kB": round(size, 1),
                "repeats": args.repeats,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
