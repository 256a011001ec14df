"""Looks into the built wheel and sdist, and imports the wheel with the core dependencies alone.

Usage: check_wheel.py FOLDER WHEEL SDIST; pip --target has unpacked the wheel into FOLDER.
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser

CORE = {"torch", "einops", "numpy"}
OPTIONAL = {
    "PIL",
    "hypothesis",
    "jsonargparse",
    "lightning",
    "lightning_fabric",
    "matplotlib",
    "pytest",
    "skimage",
    "sklearn",
    "tensorboard",
    "timm",
    "torchvision",
    "tqdm",
}

# In a process of its own: nothing of this one has loaded any of the names before.
IMPORT = """
import sys
folder, optional = sys.argv[1], set(sys.argv[2:])

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in optional:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, folder)
import torch
import local_distill as ld
assert ld.__file__.startswith(folder), ld.__file__
grid = ld.TokenGrid.tiling(2, 3, (16, 24))
crop = ld.from_box(torch.tensor([[0.0, 0, 24, 16]] * 2), (16, 24), (16, 24))
tokens = ld.Tokens(None, crop, grid)
matches = ld.NearestMatcher()(tokens, tokens)
assert matches.teacher_index[1, :, 0].tolist() == list(range(6))
try:
    ld.MultiCrop()
except ld.MissingExtraError as error:
    assert "local-distill[vision]" in str(error), error
else:
    raise AssertionError("MultiCrop works without torchvision: the extras are not shut out")
print("local_distill", ld.__version__, "works from", ld.__file__)
"""


def check_wheel(path: str) -> None:
    """What must be in the wheel, and what must not."""
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
        scripts = wheel.read(f"{info}/entry_points.txt").decode()
    assert "local_distill/py.typed" in names, "py.typed is missing"
    strays = [name for name in names if not name.startswith(("local_distill/", f"{info}/"))]
    assert not strays, f"the wheel holds more than the package: {strays}"
    assert not [name for name in names if "/tests/" in name or "/test_" in name]
    assert any(name.endswith("LICENSE") for name in names), "the licence is missing"
    assert "local-distill = local_distill.training.cli:main" in scripts, scripts
    assert "local_distill/training/cli.py" in names, "the entry point leads nowhere"
    requires = metadata.get_all("Requires-Dist") or []
    core = {re.split(r"[^\w.-]", line)[0] for line in requires if "extra ==" not in line}
    assert core == CORE, f"core dependencies are {sorted(core)}, wanted {sorted(CORE)}"
    extras = set(metadata.get_all("Provides-Extra") or [])
    assert extras >= {"vision", "train", "testing", "docs", "dev"}, extras
    print(f"{len(names)} files, core: {sorted(core)}, extras: {sorted(extras)}")


def check_sdist(path: str) -> None:
    """An sdist has to bring its tests and documentation."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "mkdocs.yml", "local_distill/__init__.py"}
    assert wanted <= names, f"the sdist lacks {sorted(wanted - names)}"
    assert any(name.startswith("tests/") for name in names), "the sdist has no tests"


def main() -> None:
    """Check both files, then import."""
    folder, wheel, sdist = sys.argv[1:]
    check_wheel(wheel)
    check_sdist(sdist)
    command = [sys.executable, "-W", "error", "-c", IMPORT, folder, *sorted(OPTIONAL)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
