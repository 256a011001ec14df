"""The trials of benchmarks/checkpoint_crashes.py, fewer of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

# A disk in memory where there is one: what a killed process wrote is as safe there, and sooner.
MEMORY = Path("/dev/shm")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "checkpoint_crashes.py"


def trials(*arguments):
    if os.access(MEMORY, os.W_OK):
        arguments = (*arguments, "--folder", str(MEMORY))
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [failure for result in results for failure in result["failures"]] == []
    assert done.returncode == 0, done.stderr
    return results


def test_nothing_acknowledged_is_lost_by_kills_and_full_disks():
    # one process for all of them: what takes longest is to import torch
    killed, stepped, limited, counted, closed = trials(
        "--kills=50",
        "--operations=7",
        "--full-disks=25",
        "--ways",
        "limit",
        "counted",
        "--closed-folder",
    )
    assert killed["kills"] == 50
    assert killed["acknowledged"] > 0  # how many depends on how busy the machine is
    assert killed["while"]["writing the file"] > 0
    assert stepped["of which"].keys() >= {"open", "write", "fsync", "replace", "unlink", "mkdir"}
    for full in (limited, counted):
        assert full["full_disks"] == 25
        assert full["acknowledged"] > 0
    ((_, last_good, message),) = closed["closed_folder"]
    assert last_good == 2
    assert "make the folder writable" in message
