"""The room needs torchvision, and says so."""

import subprocess
import sys

import local_distill.transforms


def test_names():
    assert sorted(local_distill.transforms.__all__) == [
        "GeometryTensor",
        "MultiCrop",
        "MultiView",
        "Tracked",
        "TrackingError",
        "TrackingReport",
        "Upgraded",
        "UpgradedViews",
        "ViewRecipe",
        "assert_tracks",
        "track",
        "upgrade",
    ]
    for name in local_distill.transforms.__all__:
        assert getattr(local_distill.transforms, name).__doc__


def test_without_torchvision_the_extra_is_named():
    program = """
import sys
sys.modules["torchvision"] = None  # what an import finds where it is not installed
try:
    import local_distill.transforms
except ImportError as error:
    print(type(error).__name__, error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.startswith("MissingExtraError")
    assert 'pip install "local-distill[vision]"' in result.stdout
