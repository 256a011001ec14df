"""Nothing that this package asks for, on whatever way, is under a licence that binds its users."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Affero: whoever serves a model over a network would have to publish their code.
BINDING = re.compile(
    r"AGPL|Affero|Non-?Commercial|CC-BY-NC|Server Side Public|SSPL|Business Source", re.IGNORECASE
)


def licence(name):
    """What the installed package says of its own licence, in all the places where it may."""
    about = distribution(name).metadata
    said = [about.get("License-Expression") or "", (about.get("License") or "")[:2000]]
    said += [one for one in about.get_all("Classifier") or [] if one.startswith("License")]
    return " | ".join(part for part in said if part)


def closure(requirements):
    """{package} of everything installed that these lead to."""
    found, waiting = set(), [Requirement(text) for text in requirements]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name == "local-distill" or name in found:
            continue
        try:
            asked = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # for another platform, or an extra that is not installed here
        found.add(name)
        for text in asked:
            requirement = Requirement(text)
            marker = requirement.marker
            extras = wanted.extras or {""}
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(requirement)
    return found


def named(extra):
    """The requirements of an extra and of the extras of ours that it names."""
    for text in EXTRAS[extra]:
        requirement = Requirement(text)
        if requirement.name == "local-distill":
            for other in requirement.extras:
                yield from named(other)
        else:
            yield text


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_no_dependency_binds_the_users_of_this_package(extra):
    packages = closure(PROJECT["dependencies"] if not extra else named(extra))
    binding = {name: licence(name)[:200] for name in packages if BINDING.search(licence(name))}
    assert binding == {}
    assert "torch" in packages or extra in {"testing", "docs"}


def test_albumentations_stays_below_its_affero_successor():
    # albumentations is MIT up to its last release, 2.0; what came after it, under another name, is
    # AGPL or paid for.
    asked = [Requirement(text) for text in named("dev")]
    (ours,) = [one for one in asked if canonicalize_name(one.name) == "albumentations"]
    assert "3.0" not in ours.specifier
    assert not any(canonicalize_name(one.name) == "albumentationsx" for one in asked)
    assert "MIT" in licence("albumentations")
    assert not BINDING.search(licence("albumentations"))


def test_the_pattern_knows_a_binding_licence():
    assert BINDING.search("License :: OSI Approved :: GNU Affero General Public License v3")
    assert BINDING.search("AGPL-3.0-only")
    assert not BINDING.search("Apache-2.0 | BSD-3-Clause | MIT")
