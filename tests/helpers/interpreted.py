"""Runs tests in a process of their own, in which Triton interprets its kernels on the CPU.

Triton looks at ``TRITON_INTERPRET`` when a kernel's file is imported, so that it can't be set for a
test alone. One process serves all tests of a session.
"""

import functools
import importlib.util
import os
import pickle
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest

HERE = os.environ.get("TRITON_INTERPRET") == "1"
TESTS = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def interpreted(test):
    """A test that the other process runs; its arguments must be such as can be pickled."""
    if HERE:
        return test

    @functools.wraps(test)
    def asked(**arguments):
        failure = _worker().run(test.__code__.co_filename, test.__name__, arguments)
        assert failure is None, failure

    return needs_triton(asked)


class Worker:
    """The other process."""

    def __init__(self):
        path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        )

    def run(self, file, name, arguments):
        """None, or what went wrong."""
        pickle.dump((file, name, arguments), self.process.stdin)
        self.process.stdin.flush()
        return pickle.load(self.process.stdout)


@functools.cache
def _worker():
    return Worker()  # ends when this process does: its input is then at an end


def _serve():
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what tests print must not come between the answers
    warnings.simplefilter("error")
    # Triton's interpreter works with numpy, which warns where a GPU gives infinity or NaN; and old
    # Triton in a way that numpy does not like.
    for kind in (RuntimeWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=kind, module=r"triton\.")
    modules = {}
    while True:
        try:
            file, name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            if file not in modules:
                found = importlib.util.spec_from_file_location(Path(file).stem, file)
                module = importlib.util.module_from_spec(found)
                found.loader.exec_module(module)
                modules[file] = module
            _fresh()
            getattr(modules[file], name)(**arguments)
            failure = None
        except BaseException:
            failure = traceback.format_exc()
        pickle.dump(failure, answers)
        answers.flush()


def _fresh():
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)


if __name__ == "__main__":
    _serve()
