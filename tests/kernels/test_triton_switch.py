"""Which form runs: the switch, the environment, a machine without Triton, a GPU it fails on."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers.compiled import compiled_launches
from helpers.interpreted import needs_triton

from local_distill.errors import ConfigError
from local_distill.kernels import triton_switch, use_triton
from local_distill.kernels.triton_switch import triton_serves

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""

STEP = """
import torch
import local_distill as ld
torch.manual_seed(0)
grid = ld.TokenGrid.tiling(2, 3, (16, 24))
crop = ld.from_box(torch.tensor([[0.0, 0, 24, 16]] * 2), (16, 24), (16, 24))
tokens = ld.Tokens(torch.eye(6).expand(2, 6, 6), crop, grid)
nearest = ld.NearestMatcher()(tokens, tokens)
similar = ld.SimilarityMatcher()(tokens, tokens)
logits = torch.randn(2, 6, 6, requires_grad=True)
loss = ld.LocalDistillationLoss(ld.Centering(6))
value = loss([logits] * 2, [tokens.features], {(1, 0): similar}, teacher_temp=0.1)
value.backward()
found = [nearest.teacher_index.sum().item(), round(value.item(), 5)]
assert logits.grad.isfinite().all()
"""


def said(code, **environment):
    """What code prints as JSON in a fresh process."""
    clean = {k: v for k, v in os.environ.items() if "TRITON" not in k}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=clean | environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_cpu_takes_the_plain_form_and_does_not_load_triton():
    code = """
import sys, json
before = "triton" in sys.modules
"""
    code += STEP
    loaded, found = said(code + 'print(json.dumps(["triton" in sys.modules, found]))')
    assert not loaded
    # no more is there without Triton, whatever the switch says
    for value in ("1", "auto"):
        again = said(
            BLOCKER + STEP + "import json; print(json.dumps(found))",
            LOCAL_DISTILL_TRITON=value,
            TRITON_INTERPRET="1",
        )
        assert again == found


def test_files_that_hold_kernels_can_be_imported_without_triton():
    code = """
import json, pathlib, importlib
import local_distill.kernels as kernels
names = [path.stem for path in pathlib.Path(kernels.__path__[0]).glob("*triton_*.py")]
for name in names:
    importlib.import_module(f"local_distill.kernels.{name}")
print(json.dumps(len(names)))
"""
    assert said(BLOCKER + code) >= 5


@pytest.mark.parametrize(("value", "says"), [("0", False), ("1", True), ("auto", "auto")])
def test_the_environment_sets_the_start(value, says):
    with (
        mock.patch.object(use_triton, "_setting", None),
        mock.patch.dict("os.environ", LOCAL_DISTILL_TRITON=value),
    ):
        assert triton_switch._setting() is says or triton_switch._setting() == says


def test_a_wrong_value_is_named():
    with (
        mock.patch.object(use_triton, "_setting", None),
        mock.patch.dict("os.environ", LOCAL_DISTILL_TRITON="yes"),
        pytest.raises(ConfigError, match=r"LOCAL_DISTILL_TRITON must be 0, 1 or auto, got 'yes'"),
    ):
        triton_serves(torch.zeros(1))
    with pytest.raises(ConfigError, match="`enabled`"):
        use_triton("on")


@pytest.mark.parametrize(("interprets", "setting", "serves"), [
    ("1", True, True), ("1", "auto", False), ("1", False, False), ("0", True, False),
])  # fmt: skip
def test_a_cpu_takes_the_kernels_only_where_triton_interprets(interprets, setting, serves):
    with (
        mock.patch.dict("os.environ", TRITON_INTERPRET=interprets),
        mock.patch.object(triton_switch, "_is_installed", return_value=True),
        use_triton(setting),
    ):
        assert triton_serves(torch.zeros(1)) is serves


def test_it_is_a_function_and_a_context():
    before = triton_switch._setting()
    with use_triton(True):
        assert triton_switch._setting() is True
        with use_triton(False):
            assert triton_switch._setting() is False
        assert triton_switch._setting() is True
        use_triton("auto")  # from here on
        assert triton_switch._setting() == "auto"
    assert triton_switch._setting() == before


def gpu():
    """Looks like a tensor on a GPU, to the switch."""
    return SimpleNamespace(device=torch.device("cuda", 0))


@pytest.fixture
def a_gpu():
    triton_switch._runs_on.cache_clear()
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)) as capability,
        mock.patch.object(triton_switch, "_has_memory", return_value=True),
        mock.patch.object(triton_switch, "_is_installed", return_value=True),
        mock.patch("local_distill.kernels.triton_trial.try_triton") as trial,
    ):
        yield capability, trial
    triton_switch._runs_on.cache_clear()


def test_tensors_on_a_gpu_take_the_kernels(a_gpu):
    with use_triton("auto"):
        assert triton_serves(gpu(), gpu())
        assert not triton_serves(gpu(), torch.zeros(1))
        assert not triton_serves(torch.zeros(1))
        with use_triton(False):
            assert not triton_serves(gpu())
        with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
            assert not triton_serves(gpu())


def test_tensors_that_are_not_what_they_seem_take_the_plain_form():
    class Wrapped(torch.Tensor):
        pass

    seen = [torch.zeros(1), torch.nn.Parameter(torch.zeros(1)), torch.zeros(1).as_subclass(Wrapped)]
    assert [triton_switch._has_memory(one) for one in seen] == [True, True, False]
    torch.vmap(lambda one: seen.append(triton_switch._has_memory(one)) or one)(torch.zeros(2))
    assert seen[-1] is False


def test_an_old_gpu_takes_them_when_asked(a_gpu):
    a_gpu[0].return_value = (7, 5)
    with use_triton("auto"):
        assert not triton_serves(gpu())
    with use_triton(True):
        assert triton_serves(gpu())


def test_where_triton_fails_a_warning_says_so_once(a_gpu):
    a_gpu[1].side_effect = RuntimeError("no C compiler")
    with use_triton("auto"):
        with pytest.warns(RuntimeWarning, match="no C compiler"):
            assert not triton_serves(gpu())
        assert not triton_serves(gpu())
    assert a_gpu[1].call_count == 1


@needs_triton
def test_the_trial_compiles_without_a_warning(tmp_path):
    from local_distill.kernels import triton_trial

    # nothing is run, so that there are no results to look at
    looked_at = mock.patch.object(triton_trial, "check_kernels")
    with compiled_launches(tmp_path) as launches, looked_at:
        triton_trial.try_triton(torch.device("cpu"))
    assert [one.metadata.name for one in launches] == ["_one_kernel"]


def test_without_triton_a_gpu_takes_the_plain_form(a_gpu):
    with mock.patch.object(triton_switch, "_is_installed", return_value=False), use_triton(True):
        assert not triton_serves(gpu())
