"""NeCo's consistency of order in float64: number by number, swap by swap, differentiable."""

import math

import torch

from helpers.feature_oracles import answers, unit


def comparators(network, size):
    """(layer, low, high) of every comparator, by another way than the code's: by recursion."""
    if network == "odd_even":
        return [(layer, i, i + 1) for layer in range(size) for i in range(layer % 2, size - 1, 2)]
    full = 1
    while full < size:
        full *= 2
    found, layers = [], []

    def merge(first, length, up, at):
        if length == 1:
            return
        half = length // 2
        found.extend(
            (at, i, i + half) if up else (at, i + half, i) for i in range(first, first + half)
        )
        merge(first, half, up, [*at, 0])
        merge(first + half, half, up, [*at, 0])

    def sort(first, length, up):
        if length == 1:
            return
        sort(first, length // 2, True)
        sort(first + length // 2, length // 2, False)
        merge(first, length, up, [length])

    sort(0, full, True)
    layers = sorted({tuple(at) for at, _, _ in found}, key=lambda at: (at[0], len(at)))
    missing = full - size
    return [
        (layers.index(tuple(at)), low - missing, high - missing)
        for at, low, high in found
        if low >= missing and high >= missing
    ]


def soft_places(scores, steepness, network):
    """[place][number]: how much of each number stands where."""
    x = list(scores.unbind())
    table = list(torch.eye(len(x), dtype=scores.dtype))
    for _, low, high in sorted(comparators(network, len(x))):
        keep = torch.atan(steepness * (x[high] - x[low])) / math.pi + 0.5
        for rows in (x, table):
            rows[low], rows[high] = (
                keep * rows[low] + (1 - keep) * rows[high],
                (1 - keep) * rows[low] + keep * rows[high],
            )
    return torch.stack(table)


def patch_order(student, teacher, references, matches, steepness=100.0, network="bitonic"):
    """The mean over matched tokens, by mass, of the cross-entropy of places."""
    anchors = torch.stack([unit(row) for row in references])
    total, masses = 0 * student.sum(), 0.0
    for image, tokens in enumerate(student):
        for i, mass, index, weight in answers(matches, image):
            parts = [w * teacher[image, j] for j, w in zip(index, weight, strict=True)]
            theirs = soft_places(anchors @ unit(sum(parts)), steepness, network)
            ours = soft_places(anchors @ unit(tokens[i]), steepness, network)
            total = total - mass * (theirs.detach() * ours.log()).sum()
            masses += mass * len(anchors)
    return total / masses
