"""The settings that come with the repository are those of the papers, and they run."""

import json
from pathlib import Path

import pytest
import yaml

from local_distill.training.cli import build_parser, main

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = sorted(path.name for path in CONFIGS.glob("*.yaml"))
SMALL = sorted(path.name for path in (CONFIGS / "cpu").glob("*.yaml"))


@pytest.fixture(scope="module")
def parser():
    return build_parser()[0]


def opened(parser, path):
    return parser.instantiate(parser.parse_args(["train", "--config", str(path)])).train


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(parser, name):
    settings = opened(parser, CONFIGS / name)
    assert name.removesuffix(".yaml") == Path(settings.output).name
    assert settings.data == "path/to/imagenet/train"
    assert settings.epochs in (100, 200, 300, 800)
    assert settings.optim.lr_batch == 256
    head = getattr(settings.method, "head", None)
    if head is not None:  # nothing of the demo's small ones has come in
        assert head.num_prototypes in (8_192, 65_536)
        assert (head.hidden_dim, head.bottleneck_dim) == (2_048, 256)
    assert (CONFIGS / name).read_text().startswith("# ")


def test_glsds_and_sdssls_numbers(parser):
    glsd = opened(parser, CONFIGS / "glsd-swin-tiny.yaml")
    assert glsd.backbone.name == "swin_tiny_patch4_window7_224"
    assert (glsd.epochs, glsd.batch_size * glsd.devices) == (300, 256)
    temps = glsd.method.temps
    assert (temps.student, temps.teacher_start, temps.teacher, temps.teacher_warmup) == (
        0.1, 0.04, 0.07, 30
    )  # fmt: skip
    assert glsd.method.normalize == "all"
    assert type(glsd.method.matcher).__name__ == "NearestMatcher"
    assert not glsd.method.head.frozen_magnitude
    optim = glsd.optim
    assert (optim.lr, optim.lr_end, optim.warmup) == (5e-4, 1e-6, 10)
    assert (optim.weight_decay, optim.weight_decay_end) == (0.04, 0.4)
    assert (optim.clip, optim.clip_each, optim.freeze_last) == (3.0, True, 1)
    assert (glsd.teacher.momentum, glsd.teacher.momentum_end) == (0.996, 1.0)
    for method, lr, ratio in (
        ("moco", 1.5e-4, 1.0),
        ("byol", 1.5e-4, 0.8),
        ("simclr", 1.3e-4, 0.8),
    ):
        for size in ("small", "base"):
            sdssl = opened(parser, CONFIGS / f"sdssl-{method}-vit-{size}.yaml")
            assert sdssl.backbone.name == f"vit_{size}_patch16_224"
            assert (sdssl.optim.lr, sdssl.method.ratio, sdssl.epochs) == (lr, ratio, 300)
            assert (sdssl.optim.warmup, sdssl.optim.weight_decay) == (40, 0.1)
            assert sdssl.optim.weight_decay_end == 0.1
            assert sdssl.optim.clip == 0.0
            assert sdssl.backbone.frozen == ["patch_embed"]  # as in MoCo v3
            heads = {"num_heads": 12} if size == "small" else {}  # timm's has 6
            assert sdssl.backbone.kwargs == {"weight_init": "moco", **heads}
            assert (sdssl.teacher.momentum, sdssl.teacher.momentum_end) == (0.996, 1.0)


def images_per_step(settings):
    return settings.batch_size * settings.accumulate * settings.devices * settings.num_nodes


def test_numbers_of_the_other_methods(parser):
    """Read in the published commands and defaults of their parsers, file by file."""
    runs = {name.removesuffix(".yaml"): opened(parser, CONFIGS / name) for name in PUBLISHED}
    images = {name: images_per_step(settings) for name, settings in runs.items()}
    assert {name: count for name, count in images.items() if not name.startswith("sdssl")} == {
        "densecl-resnet50": 256, "dino-vit-small": 1024, "esvit-swin-tiny": 512,
        "glsd-swin-tiny": 256, "ibot-vit-small": 1024, "pixpro-resnet50": 1024,
        "vicregl-resnet50": 512,
    }  # fmt: skip
    for name in ("dino-vit-small", "esvit-swin-tiny", "glsd-swin-tiny", "ibot-vit-small"):
        settings = runs[name]
        temps, optim = settings.method.temps, settings.optim
        assert (temps.teacher_start, temps.teacher, temps.teacher_warmup) == (0.04, 0.07, 30)
        assert temps.whole_epochs
        assert (optim.lr, optim.lr_end, optim.warmup) == (5e-4, 1e-6, 10)
        assert (optim.clip, optim.clip_each, optim.freeze_last) == (3.0, True, 1)
        assert settings.backbone.kwargs == {"drop_path_rate": 0.1}
        assert not settings.method.head.frozen_magnitude  # --norm_last_layer false
    ibot = runs["ibot-vit-small"]
    assert (ibot.epochs, ibot.method.head.num_prototypes, ibot.method.shared_head) == (
        800, 8192, True
    )  # fmt: skip
    assert ibot.method.mask_ratios == ((0.0, 0.0), (0.1, 0.5))
    densecl, pixpro, vicregl = (
        runs[f"{name}-resnet50"].optim for name in ("densecl", "pixpro", "vicregl")
    )
    assert (densecl.lr, densecl.weight_decay, densecl.decay_vectors) == (0.03, 1e-4, True)
    assert (pixpro.lr, pixpro.lr_end, pixpro.warmup, pixpro.weight_decay) == (1.0, 1e-6, 5, 1e-5)
    # 0.3 · 512 / 256 · 0.001: its end is scaled with the batch, ours is not.
    assert (vicregl.lr, vicregl.lr_end, vicregl.warmup, vicregl.weight_decay) == (
        0.3, 6e-4, 10, 1e-6
    )  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_small_settings_train(tmp_path, name):
    arguments = ["--output", tmp_path, "--steps", 2, "--batch_size", 4, "--scenes.count", 8,
                 "--workers", 0, "--pictures", "false", "--log_every", 1]  # fmt: skip
    config = CONFIGS / "cpu" / name
    assert main(["train", "--config", str(config), *map(str, arguments)]) == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert yaml.safe_load(config.read_text())["output"] == f"runs/{name.removesuffix('.yaml')}"


def test_every_method_has_small_settings():
    from local_distill.training import methods

    used = {
        yaml.safe_load((CONFIGS / "cpu" / name).read_text())["method"]["class_path"].split(".")[-1]
        for name in SMALL
    }
    concrete = set(methods.__all__) - {"Method", "Models", "StepTerms"}
    assert used == concrete
