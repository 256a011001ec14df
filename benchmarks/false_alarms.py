"""How close `assert_tracks` comes to a false alarm on recipes whose geometry is right.

Each recipe is checked with many seeds, 20 a call. Printed per recipe: calls that gave an alarm
(there should be none), the largest median error and the largest error of any view, the share of the
pixels that could be judged, and the time. Then one line of JSON.

    python benchmarks/false_alarms.py --seeds 200
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFilter
import torch
import torchvision
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from local_distill.structures import CropGeometry
from local_distill.transforms import MultiCrop, Tracked, track
from local_distill.transforms.verification import TrackingError, assert_tracks

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
NORMALIZE = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RUN = 20  # seeds of one call, assert_tracks's default
FLOAT = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]


class PilBlur:
    """PIL's blur of a random radius, drawn from Python's or numpy's generator."""

    def __init__(self, p: float, sigma: tuple[float, float] = (0.1, 2.0), numpy: bool = False):
        self.p, self.sigma = p, sigma
        draws: Any = np.random if numpy else random
        self.draw, self.uniform = draws.random, draws.uniform

    def __call__(self, image: Any) -> Any:
        """Blur, or not."""
        if self.draw() >= self.p:
            return image
        tensor = isinstance(image, Tensor)
        picture = F.to_pil_image(image) if tensor else image
        blurred = picture.filter(PIL.ImageFilter.GaussianBlur(self.uniform(*self.sigma)))
        return F.pil_to_tensor(blurred) if tensor else blurred


class PilJpeg:
    """Saves as JPEG of a random quality and opens again."""

    def __init__(self, quality: tuple[int, int]) -> None:
        self.quality = quality

    def __call__(self, image: Any) -> Any:
        """An image of the kind that came."""
        tensor = isinstance(image, Tensor)
        file = io.BytesIO()
        picture = F.to_pil_image(image) if tensor else image
        picture.save(file, "JPEG", quality=random.randint(*self.quality))
        opened = PIL.Image.open(file).convert("RGB")
        return F.pil_to_tensor(opened) if tensor else opened


class Views:
    """Several tracked pipelines: image → (list of views, list of geometries)."""

    def __init__(self, pipelines: Sequence[Callable[..., Any]]) -> None:
        self.tracked = [track(pipeline, trust=[PilBlur]) for pipeline in pipelines]

    def __call__(self, image: Any) -> tuple[list[Any], list[CropGeometry]]:
        """All views of one image."""
        views, geometries = zip(*(tracked(image) for tracked in self.tracked), strict=True)
        return list(views), list(geometries)


def recipe(
    size: int,
    scale: tuple[float, float],
    jitter: Sequence[float],
    *,
    blur: Callable[..., Any] | None = None,
    solarize_p: float = 0.0,
    interpolation: InterpolationMode = BICUBIC,
) -> nn.Module:
    """Crop, flip, colour jitter, greyscale, blur, solarise, normalise."""
    parts: list[Any] = [
        v2.RandomResizedCrop(size, scale=scale, interpolation=interpolation),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(*jitter)], p=0.8),
        v2.RandomGrayscale(0.2),
    ]
    if blur is not None:
        parts.append(blur)
    parts.append(v2.RandomSolarize(128, p=solarize_p))
    return v2.Compose([*parts, *FLOAT, NORMALIZE])


def blurred(p: float, kernel: int, sigma: tuple[float, float] = (0.1, 2.0)) -> nn.Module:
    return v2.RandomApply([v2.GaussianBlur(kernel, sigma)], p=p)


def dino(size: int = 224, local_size: int = 96, local_count: int = 2) -> Views:
    """DINO's code, with two of its like local views: PIL's blur, drawn from Python's generator."""
    jitter = (0.4, 0.4, 0.2, 0.1)
    return Views(
        [
            recipe(size, (0.4, 1.0), jitter, blur=PilBlur(1.0)),
            recipe(size, (0.4, 1.0), jitter, blur=PilBlur(0.1), solarize_p=0.2),
            *[recipe(local_size, (0.05, 0.4), jitter, blur=PilBlur(0.5))] * local_count,
        ]
    )


def dinov2(size: int = 224, local_size: int = 98, local_count: int = 2, most: float = 2.0) -> Views:
    """DINOv2's; its kernel is 9 px wide whatever sigma, which is at `most` 2 there."""
    jitter, sigma = (0.4, 0.4, 0.2, 0.1), (0.1, most)
    return Views(
        [
            recipe(size, (0.32, 1.0), jitter, blur=blurred(1.0, 9, sigma)),
            recipe(size, (0.32, 1.0), jitter, blur=blurred(0.1, 9, sigma), solarize_p=0.2),
            *[recipe(local_size, (0.05, 0.32), jitter, blur=blurred(0.5, 9, sigma))] * local_count,
        ]
    )


def simclr(size: int = 224) -> nn.Module:
    kernel = size // 20 * 2 + 1  # a tenth of the view, and odd
    return recipe(
        *(size, (0.08, 1.0), (0.8, 0.8, 0.8, 0.2)),
        blur=blurred(0.5, kernel),
        interpolation=BILINEAR,
    )


def lightly_dino(size: int = 224, local_size: int = 96, local_count: int = 2) -> Views:
    """The parameters of lightly's DINOTransform: PIL's blur, drawn from numpy's generator."""
    jitter = (0.4, 0.4, 0.2, 0.1)
    return Views(
        [
            recipe(size, (0.4, 1.0), jitter, blur=PilBlur(1.0, numpy=True)),
            recipe(size, (0.4, 1.0), jitter, blur=PilBlur(0.1, numpy=True), solarize_p=0.2),
            *[recipe(local_size, (0.05, 0.4), jitter, blur=PilBlur(0.5, numpy=True))] * local_count,
        ]
    )


def lightly_simclr(size: int = 224) -> Views:
    """The parameters of lightly's SimCLRTransform."""
    blur = PilBlur(0.5, numpy=True)
    view = recipe(size, (0.08, 1.0), (0.8, 0.8, 0.8, 0.2), blur=blur, interpolation=BILINEAR)
    return Views([view] * 2)


def lightly_moco(size: int = 224) -> Views:
    """The parameters of lightly's MoCoV1Transform (no blur) and MoCoV2Transform."""
    blur = PilBlur(0.5, numpy=True)
    first = recipe(size, (0.2, 1.0), (0.4, 0.4, 0.4, 0.4), interpolation=BILINEAR)
    second = recipe(size, (0.2, 1.0), (0.4, 0.4, 0.4, 0.1), blur=blur, interpolation=BILINEAR)
    return Views([first, second])


def harsh(size: int = 96, scale: tuple[float, float] = (0.1, 1.0)) -> Tracked:
    """What recipes of other kinds do to colours, each often."""
    colours = [
        v2.RandomEqualize(1.0),
        v2.RandomAutocontrast(1.0),
        v2.RandomPosterize(3, 1.0),
        v2.RandomInvert(1.0),
        v2.RandomSolarize(64, 1.0),
        v2.RandomAdjustSharpness(4.0, 1.0),
        v2.RandomPhotometricDistort(p=1.0),
        PilJpeg((10, 50)),
        v2.RandomChannelPermutation(),
    ]
    pipeline = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=scale),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.RandomChoice(colours),
            v2.RandomApply([v2.RandomChoice(colours)], p=0.3),
            *FLOAT,
            v2.GaussianNoise(sigma=0.05),
            v2.RandomErasing(0.5),
            NORMALIZE,
        ]
    )
    return track(pipeline, trust=[PilJpeg])


RECIPES: dict[str, Callable[[], Callable[..., Any]]] = {
    "DINO": dino,
    "DINOv2": dinov2,
    "DINOv2, blur to 5": functools.partial(dinov2, most=5.0),
    "SimCLR": simclr,
    "lightly DINO": lightly_dino,
    "lightly SimCLR": lightly_simclr,
    "lightly MoCo v1, v2": lightly_moco,
    "MultiCrop": functools.partial(MultiCrop, local_count=2),
    "harsh colours": harsh,
}


def main() -> None:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=200, help="per recipe")
    parser.add_argument("--only", nargs="*", choices=list(RECIPES), help="recipes, all by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(
        f"{'recipe':<22}{'alarms':>8}{'views':>8}{'median':>9}{'largest':>9}{'judged':>9}{'s':>8}"
    )
    for name in args.only or RECIPES:
        pipeline = RECIPES[name]()
        row = {"recipe": name, "seeds": args.seeds, "alarms": 0, "views": 0}
        row |= {"largest_median_px": 0.0, "largest_px": 0.0, "judged": 0.0}
        start = time.perf_counter()
        judged = []
        for first in tqdm(range(0, args.seeds, RUN), desc=name, leave=False):
            seeds = range(first, min(first + RUN, args.seeds))
            try:
                report = assert_tracks(pipeline, seeds=seeds)
            except TrackingError as error:
                row["alarms"] += 1
                tqdm.write(f"{name}: {error}")
                continue
            row["views"] += report.views
            row["largest_median_px"] = max(row["largest_median_px"], report.largest_median)
            row["largest_px"] = max(row["largest_px"], report.largest)
            judged.append(report.judged)
        row["judged"] = sum(judged) / max(1, len(judged))
        row["seconds"] = round(time.perf_counter() - start, 1)
        rows.append(row)
        print(
            f"{row['recipe']:<22}{row['alarms']:>8}{row['views']:>8}{row['largest_median_px']:>9.3f}"
            f"{row['largest_px']:>9.3f}{row['judged']:>9.3f}{row['seconds']:>8.1f}",
            flush=True,
        )
    print("largest errors in source px; allowed: 0.75 + 0.1 · scale (median), twice that (largest)")
    print(
        json.dumps(
            {
                "benchmark": "false_alarms",
                "machine": platform.node(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "threads": 1,
                "recipes": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
