"""On two processes the tapped tokens teach the model what they do on one."""

from pathlib import Path

import torch
from helpers.processes import said_by_all
from packaging.version import Version

# FSDP2 keeps its public name from 2.6 on, but needs 2.7 over gloo.
HAS_FSDP = Version(torch.__version__) >= Version("2.7")
CASES = [("ddp", True)]
if HAS_FSDP:
    CASES += [("fsdp", True), ("fsdp", False), ("fsdp, one unit", True)]


def test_gradients_are_those_of_one_process_with_all_images():
    said = said_by_all(Path(__file__).with_name("tap_worker.py"), 2, ranks=2, cases=CASES)
    for of_rank in said:
        assert len(of_rank) == len(CASES)
        for apart, largest in of_rank:
            assert largest > 1e-3
            assert apart < 1e-5
