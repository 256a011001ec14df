"""Views of waves for the golden numbers of the recipes: the same on every machine and forever."""

import torch

from local_distill import TokenGrid, Tokens, ViewOutput, from_box

SOURCE = (96, 128)  # (height, width)
# Crops of whole pixels, as torchvision draws them: (left, top, right, bottom), and if mirrored.
CROPS = (
    (((3, 5, 99, 90), (10, 0, 121, 96)), (False, True)),
    (((14, 2, 110, 79), (0, 9, 101, 92)), (True, False)),
    (((40, 20, 80, 63), (5, 31, 60, 77)), (True, True)),
    (((22, 37, 71, 86), (60, 8, 99, 55)), (False, True)),
)
SIDES = (128, 128, 96, 96)  # of the views, of tokens of 32 pixels


def wave(*shape, phase=0.0, scale=1.0, offset=0.0):
    """Numbers without a pattern that a loss could see, in float64."""
    place = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (offset + scale * torch.sin(place * place * 0.37 + place * 1.3 + phase)).view(shape)


def placed(view, batch=2, features=None):
    """`Tokens` of a view of `CROPS`."""
    boxes, mirrored = CROPS[view]
    side = SIDES[view]
    geometry = from_box(
        torch.tensor(boxes[:batch], dtype=torch.float64),
        (side, side),
        SOURCE,
        hflip=torch.tensor(mirrored[:batch]),
    )
    return Tokens(features, geometry, TokenGrid.tiling(side // 32, side // 32, (side, side)))


def views(count, c, d=5, phase=0.0, scale=3.0, offset=0.0, grad=False, batch=2):
    """``count`` views with logits of c prototypes and features of d dimensions."""
    found = []
    for view in range(count):
        n = (SIDES[view] // 32) ** 2
        start = phase + 10 * view
        logits = [
            wave(batch, c, phase=start, scale=scale, offset=offset),
            wave(batch, n, c, phase=start + 3, scale=scale, offset=offset),
        ]
        for tensor in logits:
            tensor.requires_grad_(grad)
        features = wave(batch, n, d, phase=start + 6)
        found.append(ViewOutput(*logits, placed(view, batch, features)))
    return found


def leaves(outputs):
    """The logits of some views, in order: what has a gradient."""
    return [x for view in outputs for x in view[:2] if x is not None]


def gradient_numbers(tensors):
    """For each tensor its gradient's product with a wave, which sees every entry; 0 if none."""
    return [
        0.0 if x.grad is None else float((x.grad * wave(*x.shape, phase=0.5)).sum())
        for x in tensors
    ]
