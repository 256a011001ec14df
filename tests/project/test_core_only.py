"""The core needs torch, einops and numpy alone; a missing extra says which to install."""

import json
import subprocess
import sys

import pytest

OPTIONAL = [
    "torchvision",
    "timm",
    "matplotlib",
    "sklearn",
    "lightning",
    "lightning_fabric",
    "jsonargparse",
    "PIL",
    "tqdm",
    "tensorboard",
    "hypothesis",
    "skimage",
]

BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run(code):
    """What the code prints as JSON, from a fresh interpreter in which warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_loads_no_optional_dependency():
    loaded = run(
        f"""
import json, sys
import torch, einops, numpy
before = set(sys.modules)
import local_distill
after = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted(after & set({OPTIONAL!r}))))
"""
    )
    assert loaded == []


def test_the_core_works_where_no_extra_is_installed():
    matched = run(
        BLOCKER
        + """
import json, torch
import local_distill as ld
grid = ld.TokenGrid.tiling(2, 3, (16, 24))
crop = ld.from_box(torch.tensor([[0.0, 0, 24, 16]] * 2), (16, 24), (16, 24))
tokens = ld.Tokens(torch.eye(6).expand(2, 6, 6), crop, grid)
nearest = ld.NearestMatcher()(tokens, tokens)
similar = ld.SimilarityMatcher()(tokens, tokens)
loss = ld.LocalDistillationLoss(ld.Centering(6))
value = loss([tokens.features] * 2, [tokens.features], {(1, 0): nearest}, teacher_temp=0.1)
print(json.dumps([nearest.teacher_index[1, :, 0].tolist(), similar.teacher_index[1, :, 0].tolist(),
                  bool(value.isfinite())]))
"""
    )
    assert matched == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], True]


@pytest.mark.parametrize(
    ("use", "extra"),
    [
        ("local_distill.MultiCrop()", "vision"),
        ("local_distill.track([])", "vision"),
        ("local_distill.TimmBackbone('vit_tiny_patch16_224')", "train"),
        ("from local_distill.viz import new_figure; new_figure(1, 1)", "train"),
    ],
)
def test_a_missing_extra_says_which_to_install(use, extra):
    message, kinds = run(
        BLOCKER
        + f"""
import json
import local_distill
try:
    {use}
except ImportError as error:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    print(json.dumps([str(error), kinds]))
"""
    )
    assert f'pip install "local-distill[{extra}]"' in message
    assert "MissingExtraError" in kinds
    assert "LocalDistillError" in kinds


def test_measuring_a_token_grid_needs_no_extra():
    rows = run(
        BLOCKER
        + """
import json, inspect
import local_distill
print(json.dumps(list(inspect.signature(local_distill.measure_token_grid).parameters)))
"""
    )
    assert rows


def test_listing_the_names_loads_nothing():
    listed = run(
        f"""
import json, sys
import torch
import local_distill
dir(local_distill), local_distill.__all__
loaded = sorted(set({OPTIONAL!r}) & set(sys.modules))
print(json.dumps([("MultiCrop" in dir(local_distill)), "timm" in loaded, "torchvision" in loaded]))
"""
    )
    assert listed == [True, False, False]
