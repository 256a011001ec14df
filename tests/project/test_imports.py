"""Imports run one way through the package: a checker, tests of the checker, and the package."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

import local_distill

PACKAGE = "local_distill"

# Imports run from a later line to an earlier one. Rooms on one line do not import each other.
LAYERS = (
    ("errors",),
    ("_check", "_finite_sequential", "_lazy", "_precision"),
    ("structures",),
    ("_logits",),
    ("geometry",),
    ("_geometric_inputs",),
    ("footprints",),
    ("distributed",),
    ("transforms", "kernels", "masking"),
    ("matching", "targets", "heads", "layer_heads", "neighbour_sampler", "teacher", "schedules"),
    ("losses",),
    ("recipes",),
    ("_token_grids",),  # a part of backbones in a file of its own
    ("backbones", "viz", "token_tap", "view_splits"),
    ("",),  # the package itself, that is __init__.py
    ("benchmarking",),
    ("training",),
    ("__main__",),
)
# `testing` may import all but `training`; nothing imports it.
TESTING, TRAINING = "testing", "training"


def read_package(root: Path) -> dict[str, str]:
    """{dotted name: source} of every module below the package's folder."""
    sources = {}
    for path in sorted(root.rglob("*.py")):
        parts = (PACKAGE, *path.relative_to(root).with_suffix("").parts)
        name = ".".join(part for part in parts if part != "__init__")
        sources[name + (".__init__" if parts[-1] == "__init__" else "")] = path.read_text("utf-8")
    return sources


def violations(sources: Mapping[str, str]) -> list[str]:
    """What breaks the order, one line each; empty if all is well."""
    rank = {room: place for place, rooms in enumerate(LAYERS) for room in rooms}
    known = {name.removesuffix(".__init__") for name in sources}
    found = []
    for name, source in sources.items():
        room = _room(name.removesuffix(".__init__"))
        if room not in rank and room != TESTING:
            found.append(f"{name}: `{room}` has no place in LAYERS")
            continue
        for line, target in _imports(name, source, known):
            other = _room(target)
            if other == room:
                continue
            if other not in rank and other != TESTING:
                found.append(f"{name}:{line}: imports `{other}`, which has no place in LAYERS")
            elif other == TESTING:
                found.append(f"{name}:{line}: imports `testing`, which is for tests alone")
            elif room == TESTING:
                if other == TRAINING:
                    found.append(f"{name}:{line}: `testing` imports `training`")
            elif rank[other] >= rank[room]:
                found.append(f"{name}:{line}: `{room or PACKAGE}` imports `{other or PACKAGE}`")
    return found


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def _imports(name: str, source: str, known: set[str]) -> list[tuple[int, str]]:
    """(line, module) of every import of the package, wherever in the file it stands."""
    package = name.rpartition(".")[0] if "." in name else name
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source, name)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                # `from local_distill import viz` means the module, if there is one of that name
                found.append((node.lineno, submodule if submodule in known else base))
        elif isinstance(node, ast.Call):
            found += [(node.lineno, text) for text in _named_modules(node)]
    return [(line, module) for line, module in found if module.split(".")[0] == PACKAGE]


def _named_modules(call: ast.Call) -> list[str]:
    """What ``import_module("a.b")``, ``__import__("a.b")`` or ``require_extra("a.b")`` names."""
    function = call.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if called not in ("import_module", "__import__", "require_extra") or not call.args:
        return []
    first = call.args[0]
    text = first.value if isinstance(first, ast.Constant) else None
    return [text] if isinstance(text, str) else []


def test_the_package_keeps_the_order():
    sources = read_package(Path(local_distill.__file__).parent)
    assert len(sources) > 15  # the walk did find the package
    assert violations(sources) == []


def test_every_place_of_the_walk_is_a_module():
    sources = read_package(Path(local_distill.__file__).parent)
    assert {"local_distill.__init__", "local_distill.structures"} <= set(sources)
    assert any(name.startswith("local_distill.training.") for name in sources)


GOOD = {
    "local_distill.__init__": "from local_distill.viz import draw",
    "local_distill.errors": "import math",
    "local_distill.structures": "from local_distill.errors import E",
    "local_distill.matching.__init__": "from .nearest import nearest",
    "local_distill.matching.nearest": "from local_distill import structures\nfrom .. import errors",
    "local_distill.losses.__init__": "from local_distill.matching import nearest",
    "local_distill.viz": "def f():\n    from local_distill.losses import g",
    "local_distill.training.__init__": "from local_distill import __version__",
    "local_distill.testing.__init__": "import local_distill.viz, local_distill",
}


def test_a_package_in_order_passes():
    assert violations(GOOD) == []


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("structures", "from local_distill.geometry import x", "`structures` imports `geometry`"),
        ("errors", "import local_distill.structures", "`errors` imports `structures`"),
        ("matching.nearest", "from local_distill import losses", "`matching` imports `losses`"),
        ("matching.nearest", "from ..losses import x", "`matching` imports `losses`"),
        ("matching.nearest", "from .. import losses", "`matching` imports `losses`"),
        ("matching.nearest", "from local_distill import viz as v", "`matching` imports `viz`"),
        ("matching.__init__", "from ..losses import x", "`matching` imports `losses`"),
        ("targets", "from local_distill.heads import x", "`targets` imports `heads`"),
        ("kernels.a", "import local_distill.transforms", "`kernels` imports `transforms`"),
        ("viz", "from local_distill import from_box", "`viz` imports `local_distill`"),
        ("viz", "def f():\n    import local_distill.training.cli", "`viz` imports `training`"),
        ("viz", "if TYPE_CHECKING:\n    import local_distill.training", "`viz` imports `training`"),
        ("viz", "importlib.import_module('local_distill.training')", "`viz` imports `training`"),
        ("__init__", "import local_distill.training", "`local_distill` imports `training`"),
        ("losses.__init__", "import local_distill.testing", "for tests alone"),
        ("training.cli", "from local_distill import testing", "for tests alone"),
        ("testing.a", "import local_distill.training", "`testing` imports `training`"),
        ("helpers", "", "`helpers` has no place"),
        ("training.cli", "import local_distill.helpers", "imports `helpers`, which has no place"),
    ],
)
def test_the_checker_sees(module, source, message):
    sources = {**GOOD, "local_distill.testing.__init__": "", f"local_distill.{module}": source}
    found = violations(sources)
    assert len(found) == 1, found
    assert message in found[0]
    assert found[0].startswith(f"local_distill.{module}:")
