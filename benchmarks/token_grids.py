"""Where the tokens of the timm families lie, each by three ways that know nothing of each other.

- formula: from the kernels, strides and paddings of the model's layers; no forward pass.
- gradients: `measure_token_grid`, for models without a formula: redrawn random weights, the whole
  network, one symmetric curve fitted to the gradients of all tokens.
- averages: the network made linear. Every convolution and pooling becomes the plain mean of its
  window, norms and activations become nothing, attention, gates and gated MLPs are left out. The
  gradient of a token is then symmetric about its centre as long as its window does not reach the
  edge; so its centroid in a view that is large enough *is* the centre. Shortcuts, merges and
  branches count: where they disagree, the centroid lies between them.

Weights are random, nothing is downloaded. One thread, ten minutes and more for all. The gradients
are slow, so they are looked at for the last view size alone and with fewer networks than
`TimmBackbone` takes. Prints a table, then one line of JSON; docs/token-grids.md holds the output.

    python benchmarks/token_grids.py                      # all
    python benchmarks/token_grids.py resnet18 pvt_v2_b0   # some
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from local_distill.backbones import TimmBackbone, measure_token_grid
from local_distill.structures import TokenGrid

Size = tuple[int, int]
MODELS = (
    "vit_small_patch16_224",
    "deit_small_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "eva02_tiny_patch14_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "convnext_tiny",
    "convnextv2_atto",
    "convnext_atto_ols",
    "resnet18",
    "resnet50",
    "resnet50d",
    "regnetx_004",
    "regnety_008",
    "efficientnet_b0",
    "tf_efficientnet_b0",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "pvt_v2_b0",
    "ghostnet_100",
)
SIZES: tuple[Size, ...] = ((224, 224), (96, 96), (97, 131))
# How much longer views are made, until a token sees nothing of the ends. Multiples of every stride:
# the remainder of the size, on which TensorFlow's padding depends, stays.
MORE = (320, 640, 1280, 2560)
UNSEEN = 1e-9  # part of a token's gradient that may lie in the last 32 px of both ends


class Nothing(nn.Module):
    """Stands for a branch that shall not count."""

    def forward(self, values: Tensor, *_: Any, **__: Any) -> Tensor:
        """Zeros."""
        return torch.zeros_like(values)


class Same(nn.Module):
    """Stands for a layer that shall not change a thing, whatever else it is called with."""

    def forward(self, values: Tensor, *_: Any, **__: Any) -> Tensor:
        """What came."""
        return values


def make_averages(model: nn.Module) -> None:
    """Turn a timm model into a linear one in which every window is averaged, in place."""
    for name, child in list(model.named_children()):
        kind = type(child)
        if name == "attn" or "GLU" in kind.__name__.upper():  # products are not linear
            setattr(model, name, Nothing())
        elif (
            name == "se"
            or "Norm" in kind.__name__.replace("ConvNorm", "Conv")
            or kind.__module__.startswith(
                ("torch.nn.modules.activation", "timm.layers.activations")
            )
        ):
            setattr(model, name, Same())
        elif isinstance(child, nn.MaxPool2d):
            pool = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
            setattr(model, name, pool)
        else:
            make_averages(child)
    with torch.no_grad():
        for own_name, weight in model.named_parameters(recurse=False):
            if own_name == "bias" or weight.dim() == 0:
                weight.zero_()
            elif isinstance(model, (nn.Conv2d, nn.Linear)):
                weight.fill_(1 / weight[0].numel())
            else:
                weight.fill_(1.0)  # layer scales


def token_table(backbone: TimmBackbone, model: Any, images: Tensor) -> Tensor:
    """(rows, cols, d) of one image, counted by the model itself: the formula is on trial."""
    height, width = images.shape[-2:]
    multiple_y, multiple_x = backbone._multiple
    counted: list[Size] = []
    if hasattr(model, "patch_embed"):
        proj = model.patch_embed.proj
        hook = proj.register_forward_hook(lambda *call: counted.append(call[-1].shape[-2:]))
    features = model.forward_features(
        images[..., : height - height % multiple_y, : width - width % multiple_x]
    )
    if hasattr(model, "patch_embed"):
        hook.remove()
    if features.dim() == 3:
        rows, cols = counted[0]
        return features[0, backbone._prefix :].reshape(rows, cols, -1)
    table: Tensor = features[0]
    return table if backbone._channels_last else table.movedim(0, -1)


def centroids(backbone: TimmBackbone, view_size: Size, axis: int) -> tuple[float, float]:
    """(offset, stride) along y (axis 0) or x (1), from two tokens in the middle of a long view."""
    model = copy.deepcopy(backbone.model).double().eval().requires_grad_(False)
    make_averages(model)
    for more in MORE:
        size = [side + 64 for side in view_size]
        size[axis] += more
        images = torch.ones(1, backbone._in_chans, *size, dtype=torch.float64, requires_grad=True)
        table = token_table(backbone, model, images)
        rows, cols = table.shape[:2]
        middle = (rows, cols)[axis] // 2
        found, seen = [], 0.0
        for index in (middle, middle + 1):
            line = table[index, cols // 2] if axis == 0 else table[rows // 2, index]
            (gradient,) = torch.autograd.grad(line.sum(), images, retain_graph=True)
            profile = gradient.sum((0, 1, 3 - axis))
            profile /= profile.sum()
            pixels = torch.arange(size[axis], dtype=torch.float64) + 0.5
            found.append(float((profile * pixels).sum()))
            seen = max(seen, float(profile[:32].sum() + profile[-32:].sum()))
        if seen < UNSEEN:
            stride = found[1] - found[0]
            return found[0] - stride * middle, stride
    raise ValueError(f"the window reaches the ends of {MORE[-1]} px more: {seen:.1e} of it")


def grid_by_averages(backbone: TimmBackbone, view_size: Size) -> TokenGrid:
    """The grid of a view from `centroids`, with the model's own count of tokens."""
    (y, stride_y), (x, stride_x) = (centroids(backbone, view_size, axis) for axis in (0, 1))
    with torch.no_grad():
        rows, cols = token_table(backbone, backbone.model, zeros(backbone, view_size)).shape[:2]
    return TokenGrid(rows, cols, (stride_x, stride_y), (x, y))


def farthest(one: TokenGrid, two: TokenGrid) -> float:
    """Largest distance along an axis between the two places of a token, in pixels."""
    if not all(math.isfinite(value) for grid in (one, two) for value in grid.offset + grid.stride):
        raise ValueError(f"a grid that is none: {one}, {two}")
    if (one.rows, one.cols) != (two.rows, two.cols):
        return float("inf")
    return max(
        abs(one.offset[a] - two.offset[a] + i * (one.stride[a] - two.stride[a]))
        for a, count in ((0, one.cols), (1, one.rows))
        for i in range(count)
    )


def build(name: str) -> TimmBackbone:
    torch.manual_seed(0)
    # A position embedding for 518 px is of no use here; views of any size are taken anyway.
    return TimmBackbone(name, **({"img_size": 224} if "dinov2" in name else {})).eval()


def by_gradients(backbone: TimmBackbone, view_size: Size, networks: int) -> TokenGrid:
    """The measured grid; where tokens are few, on a larger view, as `TimmBackbone` does it."""
    with torch.no_grad():
        rows, cols = token_table(backbone, backbone.model, zeros(backbone, view_size)).shape[:2]
        height, width = (
            side + 128 * (count < 6) for side, count in zip(view_size, (rows, cols), strict=True)
        )
        shape = token_table(backbone, backbone.model, zeros(backbone, (height, width))).shape[:2]
    found = measure_token_grid(backbone, (height, width), shape=shape, networks=networks)
    return found._replace(rows=rows, cols=cols)


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    backbone = build(name)
    rows = []
    for size in SIZES:
        row: dict[str, Any] = {"model": name, "view": size}
        formula = grid_formula(backbone, size)
        row["formula"] = formula
        with torch.no_grad():
            row["tokens"] = token_table(backbone, backbone.model, zeros(backbone, size)).shape[:2]
        if formula is not None and (formula.rows, formula.cols) != tuple(row["tokens"]):
            raise ValueError(f"{name} gives {row['tokens']} tokens, its formula says {formula}")
        reference = formula
        if not options.without_averages:
            row["averages"] = grid_by_averages(backbone, size)
            if formula is not None:
                row["averages_off"] = farthest(formula, row["averages"])
            reference = reference or row["averages"]
        if options.networks and size == SIZES[-1]:
            start = time.perf_counter()
            row["gradients"] = by_gradients(backbone, size, options.networks)
            row["seconds"] = time.perf_counter() - start
            if reference is not None:
                row["gradients_off"] = farthest(row["gradients"], reference)
        rows.append(row)
        print(" | ".join(cells(row)), file=sys.stderr, flush=True)
    return rows


def zeros(backbone: TimmBackbone, view_size: Size) -> Tensor:
    return torch.zeros(1, backbone._in_chans, *view_size)


def grid_formula(backbone: TimmBackbone, size: Size) -> TokenGrid | None:
    return None if backbone._steps is None else backbone.token_grid(size)


def cells(row: dict[str, Any]) -> list[str]:
    told = [f"`{row['model']}`", *("{} × {}".format(*row[key]) for key in ("view", "tokens"))]
    for way in ("formula", "averages", "gradients"):
        found = row.get(way)
        told.append("–" if found is None else f"{pair(found.stride)}; {pair(found.offset)}")
        if way != "formula":
            off = row.get(f"{way}_off")
            told.append("–" if off is None else f"{off:.2f}" if off >= 0.005 else "0")
    return told


def pair(values: tuple[float, float]) -> str:
    x, y = (f"{round(value, 2) + 0.0:g}" for value in values)
    return x if x == y else f"{x}, {y}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--networks", type=int, default=2, help="redrawn copies; 0: no gradients")
    parser.add_argument("--without-averages", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in options.models for row in measure(name, options)]
    head = ["model", "view", "tokens", "formula", "averages", "off", "gradients", "off"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(cells(row)) + " |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
