"""What the core and each extra promise, tried in an environment that holds nothing else.

Usage: python -W error check_promises.py core|vision|train, from an empty folder.
"""

import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

import local_distill as ld

# What an extra brings, by the names that are imported. Nothing else may bring it.
BROUGHT = {
    "vision": {"torchvision", "PIL"},
    "train": {
        "jsonargparse",
        "lightning_fabric",
        "matplotlib",
        "safetensors",
        "sklearn",
        "tensorboard",
        "timm",
        "tqdm",
        "yaml",
    },
    "testing": {"hypothesis", "pytest"},
}
HELD = {"core": (), "vision": ("vision",), "train": ("vision", "train")}
NEED_VISION = {"MultiCrop", "MultiView", "assert_tracks", "track", "upgrade"}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the installed script ``local-distill``."""
    script = Path(sys.executable).with_name("local-distill")
    return subprocess.run(
        [script, *arguments], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )


def said(error: Exception, extra: str) -> bool:
    """Whether the error says how to install the extra."""
    return f'pip install "local-distill[{extra}]"' in str(error)


def check_installation(extra: str) -> None:
    """The package is the installed one, typed, and beside it stands what the extra brings."""
    home = Path(ld.__file__)
    assert home.is_relative_to(sys.prefix), f"{home} is not the installed package"
    assert home.with_name("py.typed").is_file(), "py.typed is missing"
    installed = importlib.metadata.version("local-distill")
    assert installed == ld.__version__, f"metadata say {installed}, the package {ld.__version__}"
    for owner, modules in BROUGHT.items():
        for module in sorted(modules):
            there = importlib.util.find_spec(module) is not None
            assert there == (owner in HELD[extra]), f"{module} is {'' if there else 'not '}there"


def check_names(extra: str) -> None:
    """Every public name is there, or says which extra brings it."""
    refused = set()
    for name in ld.__all__:
        try:
            assert getattr(ld, name) is not None
        except ld.MissingExtraError as error:
            refused.add(name if said(error, "vision") else f"{name}: {error}")
    assert refused == (NEED_VISION if extra == "core" else set()), refused


def check_core() -> None:
    """Match by geometry and by features, take a step, move the teacher."""
    grid = ld.TokenGrid.tiling(2, 3, view_size=(16, 24))
    crop = ld.from_box(torch.tensor([[0.0, 0, 24, 16]] * 2), (16, 24), (16, 24))
    head = ld.ProjectionHead(6, 5, hidden_dim=8, bottleneck_dim=4)
    teacher = ld.EmaTeacher(head)
    features = torch.eye(6).expand(2, 6, 6)
    tokens = [ld.Tokens(features, crop, grid)] * 2
    for matcher in (ld.NearestMatcher(), ld.SimilarityMatcher()):
        matches = ld.match_views(matcher, tokens, tokens)
        assert matches[1, 0].teacher_index[1, :, 0].tolist() == list(range(6))
    loss = ld.LocalDistillationLoss(ld.Centering(5))
    value = loss([head(features)] * 2, [teacher(features)] * 2, matches, teacher_temp=0.04)
    value.backward()
    gradients = [parameter.grad for parameter in head.parameters() if parameter.requires_grad]
    assert value > 0
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    teacher.update(head, momentum=0.9)
    helped = command("bench", "--help")
    assert helped.returncode == 0, helped.stderr


def check_vision() -> None:
    """Views with their geometry, of a pipeline of one's own and by multi-crop."""
    import PIL.Image
    from torchvision.transforms import v2

    pipeline = ld.track(v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip()]))
    ld.assert_tracks(pipeline, seeds=1)
    views, geometries = ld.MultiCrop(global_size=32, local_size=16)(
        PIL.Image.new("RGB", (60, 40), "teal")
    )
    assert [view.shape[-1] for view in views] == [32] * 2 + [16] * 8
    assert geometries[0].source_size.tolist() == [40, 60]


def check_refusal() -> None:
    """Without the trainer's parts, the trainer names the extra that brings them."""
    try:
        ld.TimmBackbone("vit_tiny_patch16_224")
        named = False
    except ld.MissingExtraError as error:
        named = said(error, "train")
    assert named, "TimmBackbone without timm does not name the extra"
    refused = command("demo")
    assert refused.returncode == 2, refused
    assert 'pip install "local-distill[train]"' in refused.stderr, refused.stderr


def check_train() -> None:
    """Train two steps by the command line, evaluate, draw."""
    done = command(
        *("demo", "--steps=2", "--train_count=16", "--test_count=8", "--workers=0"),
        "--output=run",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(Path("run/results.json").read_text("utf-8"))
    assert results, "no results"
    drawn = {path.name for path in Path("run").glob("*.png")}
    assert drawn == {"losses.png", "matches.png"}, drawn
    assert list(Path("run").rglob("*.ckpt")), "no checkpoint"


def main() -> None:
    """Try what the named extra promises, and that no other has to be there for it."""
    extra = sys.argv[1]
    check_installation(extra)
    check_names(extra)
    check_core()
    if "vision" in HELD[extra]:
        check_vision()
    if "train" in HELD[extra]:
        check_train()
    else:
        check_refusal()
    print(
        f"{extra}: local-distill {ld.__version__} keeps its promises on "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
