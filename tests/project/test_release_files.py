"""What a release repeats from pyproject.toml and the package says the same."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import local_distill

ROOT = Path(__file__).parents[2]
RECIPE = yaml.safe_load((ROOT / "packaging/conda/recipe.yaml").read_text("utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# conda-forge's names, and what stands there for [signatures]
NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
SIGNATURES = {"docstring_parser": "", "typeshed-client": ""}


def test_every_file_says_the_same_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == local_distill.__version__
    assert RECIPE["context"]["version"] == local_distill.__version__
    assert citation["license"] == PROJECT["license"]


@pytest.mark.parametrize("package", RECIPE["outputs"], ids=lambda one: one["package"]["name"])
def test_the_recipe_asks_for_the_same_releases(package):
    name = package["package"]["name"].removeprefix("local-distill").strip("-")
    lines = PROJECT["optional-dependencies"][name] if name else PROJECT["dependencies"]
    wanted = dict(re.fullmatch(r"([\w-]+)(?:\[\w+\])?(.*)", line).groups() for line in lines)
    # torch comes with the core, and each package names the one before it
    wanted = {
        NAMES.get(key, key): bound
        for key, bound in wanted.items()
        if key != "local-distill" and not (name and key == "torch")
    }
    if "jsonargparse" in wanted:
        wanted |= SIGNATURES
    asked = dict((line + " ").split(" ", 1) for line in package["requirements"]["run"])
    asked = {
        key: bound.strip() for key, bound in asked.items() if key not in ("python", "$" + "{{")
    }
    assert asked == wanted
