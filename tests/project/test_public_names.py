"""The public names are a promise: adding or dropping one means changing this list."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import local_distill

PUBLIC_NAMES = [
    "BilinearMatcher",
    "ByolObjective",
    "Centering",
    "Clusters",
    "ConfigError",
    "CropGeometry",
    "CrossImageQueue",
    "DataError",
    "DenseContrastiveLoss",
    "DistillationMonitors",
    "DistillationTerms",
    "EmaTeacher",
    "GatedSimilarityMatcher",
    "GeometryError",
    "GlobalContrastiveLoss",
    "GlobalDistillationLoss",
    "GlobalLocalDistillationLoss",
    "GramAnchoringLoss",
    "IntermediateDistillationLoss",
    "JointClusters",
    "KeepBest",
    "KoLeoLoss",
    "LayerHeads",
    "LocalDistillError",
    "LocalDistillationLoss",
    "MaskedDistillationLoss",
    "Matcher",
    "Matches",
    "MissingExtraError",
    "MocoV3Objective",
    "MultiCrop",
    "MultiView",
    "Mutual",
    "NearestMatcher",
    "NegativeQueue",
    "OverlapMatcher",
    "PatchOrderLoss",
    "PixelConsistencyLoss",
    "PixelPropagation",
    "ProjectionHead",
    "PrototypeLogits",
    "RadiusMatcher",
    "RefinedJointClusters",
    "ShapeError",
    "SimclrObjective",
    "SimilarityMatcher",
    "SinkhornKnopp",
    "SinkhornMatcher",
    "SoftSimilarityMatcher",
    "Targets",
    "TeacherTargets",
    "TimmBackbone",
    "TokenGrid",
    "TokenTap",
    "Tokens",
    "VICRegLLoss",
    "VICRegLoss",
    "ViewOutput",
    "assert_tracks",
    "bilinear_matches",
    "cell_diagonals",
    "compose",
    "distillation_monitors",
    "footprint_areas",
    "from_box",
    "from_matrix",
    "gated_similarity_matches",
    "invert",
    "keep_best",
    "local_distillation_loss",
    "match_views",
    "measure_token_grid",
    "mutual_matches",
    "nearest_matches",
    "overlap_area",
    "overlap_matches",
    "radius_matches",
    "random_block_mask",
    "similarity_matches",
    "sinkhorn_matches",
    "soft_similarity_matches",
    "source_valid",
    "to_source",
    "token_centers",
    "token_footprints",
    "track",
    "upgrade",
]

# An example would say nothing: exceptions, protocols, and tuples that other examples show.
WITHOUT_EXAMPLE = {
    "ConfigError",
    "DataError",
    "DistillationTerms",
    "GeometryError",
    "LocalDistillError",
    "Matcher",
    "MissingExtraError",
    "ShapeError",
    "Targets",
    "ViewOutput",
}

ROOT = Path(local_distill.__file__).parent
MODULES = sorted(
    ".".join(("local_distill", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    )
    for path in ROOT.rglob("*.py")
)
# `__init__` and rooms count as public, `_check` and `matching._inputs` do not.
PUBLIC_MODULES = [
    name for name in MODULES if not any(part.startswith("_") for part in name.split("."))
]


def test_all_is_this_list():
    assert local_distill.__all__ == PUBLIC_NAMES
    assert sorted(set(PUBLIC_NAMES)) == PUBLIC_NAMES


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_name_is_importable_and_listed(name):
    assert getattr(local_distill, name) is not None
    assert name in dir(local_distill)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        local_distill.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_name_has_a_docstring_with_an_example(name):
    documented = inspect.getdoc(getattr(local_distill, name)) or ""
    assert len(documented.split()) >= 5
    assert documented.split("\n")[0].endswith((".", ":", "?")) or "\n" in documented
    if name not in WITHOUT_EXAMPLE:
        assert ">>> " in documented, f"{name}: a docstring needs an example that runs"


def test_the_list_of_exceptions_is_not_stale():
    assert set(PUBLIC_NAMES) >= WITHOUT_EXAMPLE


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_public_module_says_what_is_public(module):
    path = ROOT.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text("utf-8"))
    assert ast.get_docstring(tree), f"{module} has no docstring"
    lists = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(to, ast.Name) and to.id == "__all__" for to in node.targets)
    ]
    assert len(lists) == 1, f"{module} must say __all__ once, as a plain list"
    names = ast.literal_eval(lists[0])
    assert len(names) == len(set(names))
    loaded = importlib.import_module(module)
    missing = [name for name in names if not hasattr(loaded, name)]
    assert missing == []


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_what_a_module_defines_in_public_has_a_docstring(module):
    loaded = importlib.import_module(module)
    bare = [
        name
        for name in loaded.__all__
        if (inspect.isclass(value := getattr(loaded, name)) or inspect.isfunction(value))
        and not inspect.getdoc(value)
    ]
    assert bare == []
