"""Every method at the size of a test."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from local_distill import GatedSimilarityMatcher, MultiCrop
from local_distill.training import SyntheticScenes, methods
from local_distill.training.options import (
    BackboneOptions,
    HeadOptions,
    OptimOptions,
    TeacherOptions,
)
from local_distill.training.trainer import TrainResult, train

HEAD = HeadOptions(num_prototypes=16, hidden_dim=24, bottleneck_dim=8)
BACKBONE = BackboneOptions(
    kwargs={"img_size": 16, "patch_size": 8, "width": 24, "depth": 2, "num_heads": 3}
)
SDSSL = {"hidden_dim": 16, "last_hidden_dim": 16, "out_dim": 8}

# name: (method, small views)
METHODS: dict[str, tuple[Any, int]] = {
    "dino": (functools.partial(methods.Dino, HEAD), 2),
    "glsd": (functools.partial(methods.Glsd, HEAD, normalize="matched"), 2),
    "glsd_gated": (functools.partial(methods.Glsd, HEAD, matcher=GatedSimilarityMatcher()), 2),
    "glsd_tables": (functools.partial(methods.Glsd, HEAD, fused=False), 2),
    "esvit": (functools.partial(methods.Esvit, HEAD), 2),
    "ibot": (functools.partial(methods.Ibot, HEAD, mask_ratios=[(0.3, 0.6)]), 2),
    "densecl": (functools.partial(methods.Densecl, 8, 16, 32), 0),
    "densecl_both": (functools.partial(methods.Densecl, 8, 16, 32, both_ways=True), 0),
    "pixpro": (functools.partial(methods.Pixpro, 8, 16), 0),
    "vicregl": (
        functools.partial(
            methods.Vicregl, 16, 16, location_counts=(3, 1), feature_counts=(3, 1)
        ),
        2,
    ),
    "sdssl_moco": (functools.partial(methods.SdsslMoco, **SDSSL), 0),
    "sdssl_byol": (functools.partial(methods.SdsslByol, **SDSSL), 0),
    "sdssl_simclr": (functools.partial(methods.SdsslSimclr, **SDSSL), 0),
    "croc": (functools.partial(methods.Croc, HEAD, HEAD), 0),
    "cribo": (
        functools.partial(methods.Cribo, HEAD, HEAD, num_clusters=3, queue_images=10), 0
    ),
    "adasim": (functools.partial(methods.Adasim, HEAD, top_k=3, votes=1), 0),
}  # fmt: skip


def small_views(local_count: int = 2) -> MultiCrop:
    return MultiCrop(global_size=24, local_size=16, local_count=local_count)


def train_small(output: Path, name: str = "glsd", **settings: Any) -> TrainResult:
    """A run of some six steps on a dozen scenes; any argument of `train` can be given."""
    make, local_count = METHODS[name]
    settings = {
        "images": SyntheticScenes(12, 32),
        "views": small_views(local_count),
        "method": make(),
        "build_backbone": BACKBONE.build,
        "num_global": 2,
        "steps": 6,
        "batch_size": 4,
        "log_every": 2,
        "seed": 1,
        "optim": OptimOptions(warmup=2, lr=1e-3),
        "teacher": TeacherOptions(momentum=0.9),
        "output": output,
    } | settings
    return train(**settings)
