"""The command in processes of its own: with core dependencies alone, and from the repository."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CORE_ALONE = """
import json, sys
OPTIONAL = {"torchvision", "timm", "matplotlib", "sklearn", "lightning_fabric", "jsonargparse",
            "PIL", "tqdm", "tensorboard", "hypothesis", "kornia", "lightly"}

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import torch._inductor  # asks for specs of some, and does not expect this blocker
for name in [name for name in sys.modules if name.partition(".")[0] in OPTIONAL]:
    del sys.modules[name]
sys.meta_path.insert(0, Blocker())
from local_distill.training.cli import main
found = [main(["bench", "matchers", "--quick", "--repeats", "1"])]
for arguments in (["bench", "matchers", "--quick", "--plot", "a.png"],
                  ["bench", "transforms", "--quick"], ["bench", "step", "--quick"], ["demo"]):
    found.append(main(arguments))
print(json.dumps(found))
"""


def test_core_dependencies_are_enough():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CORE_ALONE],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 2, 2, 2, 2]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [line.partition("local-distill[")[2] for line in errors] == [
        'train]"', 'vision]"', 'train]"', 'train]"'
    ]  # fmt: skip
    assert "measuring Swin, b = 2: by place" in done.stderr


def test_the_repository_has_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "compare", "a.json", "b.json"],
        capture_output=True, text=True, check=False, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == "error: a.json cannot be read: No such file or directory"
