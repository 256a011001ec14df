"""Are the gradients averaged, of parameters that the loop uses outside of DDP's forward?

    torchrun --nproc_per_node=2 -m benchmarks.integrations.dino_gradients CODE

CODE is DINO's code. Its wrapper, its head and our lines give the gradients of one step: once of the
whole batch in one process, once of half of it in each of two under DDP. The two must be the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill import (
    Centering,
    CropGeometry,
    LocalDistillationLoss,
    NearestMatcher,
    TokenTap,
    from_box,
    match_views,
)

BATCH, PROTOTYPES, SIZES = 8, 32, (32, 32, 16, 16)


def main() -> None:
    """Print how far the two are apart, and how far one process's own share is."""
    sys.path.insert(0, sys.argv[1])
    import utils
    from vision_transformer import DINOHead, VisionTransformer

    torch.manual_seed(0)
    networks = []
    for _ in range(2):
        vit = VisionTransformer(img_size=[32], patch_size=8, embed_dim=32, depth=2, num_heads=2)
        network = utils.MultiCropWrapper(vit, DINOHead(32, PROTOTYPES, hidden_dim=64))
        network.local_head = DINOHead(32, PROTOTYPES, hidden_dim=64)
        network.tap = TokenTap(network.backbone, "norm")
        networks.append(network)
    student, teacher = networks
    teacher.requires_grad_(False)
    views = [torch.randn(BATCH, 3, size, size) for size in SIZES]
    corners = [torch.rand(BATCH, 2) * 40 for _ in SIZES]
    geometries = [
        from_box(torch.cat([at, at + 60], 1), view_size=(size, size), source_size=(100, 100))
        for size, at in zip(SIZES, corners, strict=True)
    ]
    _step(student, student, teacher, views, geometries)
    whole = _gradients(student)

    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    share = slice(rank * BATCH // processes, (rank + 1) * BATCH // processes)
    ours = [CropGeometry(*(part[share] for part in geometry)) for geometry in geometries]
    student.zero_grad()
    _step(student, student, teacher, [view[share] for view in views], ours)
    alone = _gradients(student)
    student.zero_grad()
    wrapped = nn.parallel.DistributedDataParallel(student)
    _step(wrapped, student, teacher, [view[share] for view in views], ours)
    averaged = _gradients(student)
    found = {
        "parameters": len(whole),
        "under DDP": _apart(averaged, whole),
        "local head under DDP": _apart(_of_head(averaged), _of_head(whole)),
        "local head without DDP": _apart(_of_head(alone), _of_head(whole)),
    }
    if rank == 0:
        print(json.dumps(found))
    assert found["under DDP"] < 1e-4, found
    assert found["local head without DDP"] > 1e-2, "the comparison would find nothing"
    dist.destroy_process_group()


def _step(
    called: nn.Module,
    student: nn.Module,
    teacher: nn.Module,
    views: Sequence[Tensor],
    geometries: Sequence[CropGeometry],
) -> None:
    scores, targets = called(list(views)), teacher(list(views[:2]))
    distance = (scores.unflatten(0, (len(views), -1)) - targets[: len(views[0])]).square().mean()
    tokens = student.tap.take(geometries), teacher.tap.take(geometries[:2])
    heads = student.local_head, teacher.local_head
    logits = [[head(view.features) for view in of] for head, of in zip(heads, tokens, strict=True)]
    matches = match_views(NearestMatcher(), *tokens)
    local = LocalDistillationLoss(Centering(PROTOTYPES))
    ((distance + local(*logits, matches, teacher_temp=0.04)) / 2).backward()


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }


def _of_head(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in gradients.items() if name.startswith("local_head.")}


def _apart(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest difference of a parameter, in shares of its gradient's largest entry."""
    assert some.keys() == others.keys()
    return max(
        float((some[name] - other).abs().max() / other.abs().max())
        for name, other in others.items()
    )


if __name__ == "__main__":
    main()
