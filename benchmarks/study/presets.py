"""The sizes that the study comes in."""

from __future__ import annotations

import dataclasses

from benchmarks.study.settings import Evaluating, Preset, Recipe, Study
from benchmarks.study.variants import LAYERS, MATCHING

__all__ = ["PRESETS"]

# Mild, as in the demo: what tells the scenes' classes is shape, texture and a little hue.
_COLOURS = {
    "global_scale": (0.35, 1.0),
    "color_jitter": (0.4, 0.4, 0.2, 0.03),
    "grayscale_p": 0.1,
    "blur_p": (0.0, 0.0, 0.0),
    "solarize_p": 0.0,
}
_VIEWS = {
    **_COLOURS,
    "global_size": 40,
    "local_size": 24,
    "local_count": 2,
    "local_scale": (0.08, 0.35),
}
_PAIRS = {**_COLOURS, "global_size": 40, "local_count": 0}

_CPU_RECIPE = Recipe(
    backbone={
        "kwargs": {
            "img_size": 40,
            "patch_size": 8,
            "width": 64,
            "depth": 2,
            "num_heads": 2,
            "mlp_ratio": 2.0,
        }
    },
    views=_VIEWS,
    head={"num_prototypes": 128, "hidden_dim": 128, "bottleneck_dim": 32},
    steps=1000,
    batch_size=32,
    optim={"kwargs": {"fused": True}, "warmup": 100},
    teacher={"momentum": 0.97},
)
_CPU_MATCHING = Study(
    name="matching",
    variants=MATCHING,
    # Smaller heads and a faster teacher collapse with every other seed, without a local loss at all
    # settings: see "Rounds before" in docs/training/study.md.
    recipe=dataclasses.replace(
        _CPU_RECIPE,
        head={"num_prototypes": 256, "hidden_dim": 256, "bottleneck_dim": 64},
        teacher={"momentum": 0.99},
    ),
    shares=(0.01, 0.1, 0.5, 1.0),
    seeds=(0, 1, 2, 3, 4),
    rates=(3e-3, 6e-3, 1.2e-2),
    temps=(0.02, 0.04),
    extensions=3,
    tuned_on=((0.01, 101), (1.0, 104)),
    criterion=("knn", "miou"),
)
_CPU_LAYERS = Study(
    name="layers",
    variants=LAYERS,
    recipe=dataclasses.replace(
        _CPU_RECIPE,
        backbone={"kwargs": {**_CPU_RECIPE.backbone["kwargs"], "depth": 4}},
        views=_PAIRS,
        head={"hidden_dim": 96, "last_hidden_dim": 96, "out_dim": 32},
    ),
    shares=(1.0,),
    seeds=(0, 1, 2, 3, 4),
    rates=(1.5e-3, 3e-3, 6e-3),
    temps=(0.2, 0.1, 0.4),
    extensions=3,
    tuned_on=((1.0, 100),),
    criterion=("knn",),
)
_CPU = Preset(
    name="cpu",
    scenes=4000,
    size=64,
    evaluating=Evaluating(voters=1500, tested=1000, pairs=200, tokens=6000, pair_size=40),
    studies=(_CPU_MATCHING, _CPU_LAYERS),
)


def _smoke() -> Preset:
    """The CPU's with next to nothing of everything."""
    tiny = {"img_size": 16, "patch_size": 8, "width": 16, "depth": 2, "num_heads": 2}
    few = {"shares": (0.25, 1.0), "seeds": (0, 1), "tuned_on": ((1.0, 100),), "extensions": 0}
    studies = []
    for study in (_CPU_MATCHING, _CPU_LAYERS):
        views = {**study.recipe.views, "global_size": 16}
        if views["local_count"]:
            views["local_size"] = 8
        recipe = dataclasses.replace(
            study.recipe,
            backbone={"kwargs": tiny},
            views=views,
            steps=6,
            batch_size=8,
            optim={"warmup": 1},
        )
        few.update(rates=study.rates[:2], temps=study.temps[:1])
        studies.append(dataclasses.replace(study, recipe=recipe, **few))
    return Preset(
        name="smoke",
        scenes=32,
        size=32,
        evaluating=Evaluating(voters=60, tested=30, pairs=8, tokens=400, pair_size=16),
        studies=tuple(studies),
    )


def _gpu() -> Preset:
    """A ViT-Ti of 12 blocks on 20,000 scenes of 96 px, 4,000 steps: half a day on one device."""
    views = {**_VIEWS, "global_size": 80, "local_size": 40, "local_count": 4}
    recipe = Recipe(
        backbone={
            "name": "vit_tiny_patch16_224",
            "kwargs": {"img_size": 80, "patch_size": 8},
        },
        views=views,
        head={"num_prototypes": 1024, "hidden_dim": 512, "bottleneck_dim": 128},
        steps=4000,
        batch_size=128,
        optim={"warmup": 400, "weight_decay_end": 0.4},
        teacher={"momentum": 0.99},
    )
    pairs = {**views, "local_count": 0}
    layer_head = {"hidden_dim": 512, "last_hidden_dim": 1024, "out_dim": 128}
    return Preset(
        name="gpu",
        scenes=20_000,
        size=96,
        evaluating=Evaluating(voters=5000, tested=2000, pairs=500, tokens=20_000, pair_size=80),
        studies=(
            dataclasses.replace(
                _CPU_MATCHING,
                recipe=recipe,
                rates=(5e-4, 1e-3, 2e-3),
                temps=(0.04, 0.02),
            ),
            dataclasses.replace(
                _CPU_LAYERS,
                recipe=dataclasses.replace(recipe, views=pairs, head=layer_head),
                rates=(5e-4, 1e-3, 2e-3),
            ),
        ),
        workers=12,
    )


PRESETS = {preset.name: preset for preset in (_CPU, _smoke(), _gpu())}
