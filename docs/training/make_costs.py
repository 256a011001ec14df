"""Prints the tables of docs/training/processes.md: python docs/training/make_costs.py."""

from typing import NamedTuple

import torch

from local_distill import ProjectionHead
from local_distill.training import methods
from local_distill.training.cost_formulas import NetworkCounts, held_bytes, sent_bytes
from local_distill.training.options import BackboneOptions, HeadOptions

MIB, GIB = 2**20, 2**30


class Run(NamedTuple):
    method: methods.Method
    backbone: str
    batch: int  # images on each GPU
    views: tuple[tuple[int, int], ...]  # how many, of which side
    passes: tuple[int, int]  # of the student's and the teacher's backbone in a step
    gathered: int  # numbers of a process that all others get


GLSD = methods.Glsd(HeadOptions(65_536, frozen_magnitude=False))
RUNS = {
    "GLSD, Swin-T": Run(GLSD, "swin_tiny_patch4_window7_224", 32, ((2, 224), (8, 96)), (2, 1), 0),
    # two views' keys of 256 numbers
    "SDSSL (MoCo v3), ViT-S": Run(
        methods.SdsslMoco(), "vit_small_patch16_224", 128, ((2, 224),), (2, 2), 2 * 128 * 256
    ),
    "SDSSL (MoCo v3), ViT-B": Run(
        methods.SdsslMoco(), "vit_base_patch16_224", 128, ((2, 224),), (2, 2), 2 * 128 * 256
    ),
}


def build(run):
    backbone = BackboneOptions(run.backbone).build(layers=run.method.wants_layers)
    network, criterion = run.method.build(backbone, 1_281_167)
    return backbone, network, criterion


def activation_bytes(backbone, views, dtype):
    """What a pass keeps for the way back for each image, by autograd's own account."""
    # From the difference of two batches: copies of the weights in bfloat16 are kept once.
    less, more = (_kept(backbone, views, dtype, images) for images in (1, 3))
    return (more - less) / 2


def _kept(backbone, views, dtype, images):
    held = {}

    def keep(value):
        storage = value.untyped_storage()
        # the value too, or its memory is given away and counted as another's
        held[storage.data_ptr()] = storage.nbytes(), value
        return value

    outputs = []
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        for count, side in views:
            outputs.append(backbone(torch.randn(images * count, 3, side, side)))
    return sum(size for size, _ in held.values())


def main():
    for name, run in RUNS.items():
        backbone, network, criterion = build(run)
        counts = NetworkCounts.of(network)
        del criterion
        print(f"\n### {name}\n")
        print(
            f"{counts.total / 1e6:.1f} M parameters: {counts.blocks / 1e6:.1f} M in blocks, "
            f"{counts.rest / 1e6:.1f} M beside them, {counts.whole / 1e6:.1f} M in heads that "
            "stay whole.\n"
        )
        centers = [m.num_prototypes for m in network.modules() if isinstance(m, ProjectionHead)]
        print("| GPUs | | student | gradients | AdamW | teacher | together | sent in a step |")
        print("|---:|---|---:|---:|---:|---:|---:|---:|")
        for gpus in (8, 64, 512):
            for sharded in (False, True):
                held = held_bytes(counts, processes=gpus, sharded=sharded)
                sent = sent_bytes(
                    counts,
                    processes=gpus,
                    sharded=sharded,
                    student_passes=run.passes[0],
                    teacher_passes=run.passes[1],
                    center_sizes=tuple(centers),
                    gathered=run.gathered,
                )
                parts = (held.parameters, held.gradients + held.buckets, held.moments, held.teacher)
                print(
                    f"| {gpus} | {'FSDP2' if sharded else 'DDP'} | "
                    + " | ".join(f"{part / MIB:,.0f} MiB" for part in parts)
                    + f" | {held.total / MIB:,.0f} MiB | {sent.total / MIB:,.0f} MiB |"
                )
        print(
            f"\nCenters: {sent.centers / MIB:.2f} MiB of what 512 GPUs send; keys: "
            f"{sent.keys / MIB:.0f} MiB."
        )
        for dtype in (torch.float32, torch.bfloat16):
            each = activation_bytes(backbone, run.views, dtype)
            print(
                f"Activations of the backbone, {str(dtype).removeprefix('torch.')}: "
                f"{each / MIB:,.0f} MiB an image, {run.batch * each / GIB:.1f} GiB at "
                f"{run.batch} images."
            )
        if centers:
            tokens = sum(count * tokens_of(backbone, side) for count, side in run.views)
            table = run.batch * (tokens + sum(count for count, _ in run.views)) * centers[0]
            head = next(m for m in network.modules() if isinstance(m, ProjectionHead))
            thin = head.prototypes.weight.shape[1] * table // centers[0]
            print(
                f"The student's logits multiplied out: {4 * table / GIB:.1f} GiB in float32; as "
                f"PrototypeLogits: {4 * thin / MIB:.0f} MiB."
            )


def tokens_of(backbone, side):
    return backbone.token_grid((side, side)).num_tokens


if __name__ == "__main__":
    main()
