"""What it costs to know where the pixels of a multi-crop sample lie: geometry or position maps.

Three ways to the same knowledge, for the same boxes and flips (DINO's 2 × 224 + 8 × 96 px views):

- geometry: what `MultiCrop` does, a 3 × 3 matrix and two sizes per view;
- tracked: the same through torchvision's dispatch, as `track` does for any pipeline;
- position map: a two-channel float map of the source's pixel positions, cropped, resized and
  flipped like the image (bilinear, antialiased). Making the map once per source size is left out.

The ways take turns within each repeat, so that a machine's slow moments hit all of them; what is
compared are the medians over the repeats. One thread. Prints a table, then one line of JSON.

    python benchmarks/geometry_cost.py --repeats 50 --height 375 --width 500
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from local_distill import to_source
from local_distill.structures import CropGeometry
from local_distill.transforms import GeometryTensor, MultiCrop
from local_distill.transforms.crop_boxes import CropBox, box_geometries, sample_box

Size = tuple[int, int]
INNER = 20  # geometry is too quick to time once


def draw_boxes(multi_crop: MultiCrop, source: Size) -> list[CropBox]:
    scales = [multi_crop.global_scale] * multi_crop.num_global
    scales += [multi_crop.local_scale] * (multi_crop.num_views - multi_crop.num_global)
    rows = torch.rand(len(scales), 24).tolist()
    return [
        sample_box(iter(row), source, scale, multi_crop.ratio)._replace(hflip=row[-1] < 0.5)
        for scale, row in zip(scales, rows, strict=True)
    ]


def position_map(source: Size) -> Tensor:
    y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in source), indexing="ij")
    return torch.stack((x, y))


def carry_map(positions: Tensor, boxes: list[CropBox], views: list[Size]) -> list[Tensor]:
    maps = []
    for box, size in zip(boxes, views, strict=True):
        view = F.resized_crop_image(
            positions, *box[:4], size=list(size), interpolation=InterpolationMode.BILINEAR
        )
        maps.append(F.horizontal_flip_image(view) if box.hflip else view)
    return maps


def carry_tracked(source: Size, boxes: list[CropBox], views: list[Size]) -> list[CropGeometry]:
    geometries = []
    for box, size in zip(boxes, views, strict=True):
        geometry = F.resized_crop(GeometryTensor.identity(*source), *box[:4], size=list(size))
        if box.hflip:
            geometry = F.horizontal_flip(geometry)
        geometries.append(geometry.crop_geometry())
    return geometries


def disagreement(maps: list[Tensor], geometries: list[CropGeometry]) -> float:
    """The largest distance of a map from its geometry, at the middle of each view, in source px."""
    worst = 0.0
    for view, geometry in zip(maps, geometries, strict=True):
        row, col = view.shape[1] // 2, view.shape[2] // 2
        predicted = to_source(geometry, torch.tensor([[col + 0.5, row + 0.5]]))[0]
        worst = max(worst, float((view[:, row, col] - predicted).abs().max()))
    return worst


def microseconds(run: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times * 1e6


def nbytes(geometries: list[CropGeometry]) -> int:
    return sum(part.nbytes for geometry in geometries for part in geometry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=50, help="images, each measured once a way")
    parser.add_argument("--height", type=int, default=375, help="of the source, px")
    parser.add_argument("--width", type=int, default=500, help="of the source, px")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    source = (args.height, args.width)
    multi_crop = MultiCrop()
    views = multi_crop.view_sizes
    positions = position_map(source)
    taken: dict[str, list[float]] = {"geometry": [], "tracked": [], "position map": []}
    worst = 0.0
    for repeat in range(args.repeats + 3):
        boxes = draw_boxes(multi_crop, source)
        times = {
            "geometry": microseconds(lambda b=boxes: box_geometries(b, views, source), INNER),
            "tracked": microseconds(lambda b=boxes: carry_tracked(source, b, views), INNER),
            "position map": microseconds(lambda b=boxes: carry_map(positions, b, views), 1),
        }
        maps, geometries = carry_map(positions, boxes, views), box_geometries(boxes, views, source)
        worst = max(worst, disagreement(maps, geometries))
        if repeat >= 3:  # the first ones warm up
            for name, value in times.items():
                taken[name].append(value)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    spread = {name: statistics.quantiles(values, n=10) for name, values in taken.items()}
    sizes = {
        "geometry": nbytes(geometries),
        "tracked": nbytes(carry_tracked(source, boxes, views)),
        "position map": sum(view.nbytes for view in maps),
    }
    print(f"{'way':<14}{'µs/image':>12}{'10–90 %':>20}{'bytes/image':>14}{'map costs':>12}")
    for name, value in medians.items():
        band = f"{spread[name][0]:.1f}–{spread[name][-1]:.1f}"
        ratio = medians["position map"] / value
        print(f"{name:<14}{value:>12.1f}{band:>20}{sizes[name]:>14,}{ratio:>11.0f}×")
    print(f"map and geometry differ by at most {worst:.3f} source px at the views' middles")
    print(
        json.dumps(
            {
                "benchmark": "geometry_cost",
                "machine": platform.node(),
                "processor": platform.processor() or platform.machine(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
                "threads": 1,
                "source": source,
                "views": views,
                "repeats": args.repeats,
                "microseconds": {name: round(value, 2) for name, value in medians.items()},
                "bytes": sizes,
                "times_cheaper_than_map": {
                    name: round(medians["position map"] / medians[name], 1)
                    for name in ("geometry", "tracked")
                },
                "bytes_fewer_than_map": round(sizes["position map"] / sizes["geometry"], 1),
                "largest_disagreement_px": round(worst, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
