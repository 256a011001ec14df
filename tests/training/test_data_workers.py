"""A loader's worker that is killed, and errors that come out of one."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from local_distill import DataError
from local_distill.training.checkpoints import CheckpointStore
from local_distill.training.data import ImageFiles, named_worker_failures
from local_distill.training.stop_signal import StopSignal, leave_stopping_to_the_parent


def go_through(loader):
    with named_worker_failures():
        for _ in loader:
            continue


def size(image):
    return torch.tensor(image.size)


@pytest.fixture
def images(tmp_path):
    for i in range(40):
        Image.new("RGB", (4, 3)).save(tmp_path / f"{i}.png")
    return ImageFiles(tmp_path, transform=size)


@pytest.mark.parametrize("how", ["killed", "both killed", "cut off"])
def test_a_killed_worker_is_named(how, images):
    # in a process of its own: torch raises from a signal, which here could be anywhere in pytest
    script = Path(__file__).with_name("killed_workers.py")
    done = subprocess.run(
        [sys.executable, script, str(images.root), how], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    kind, message = json.loads(done.stdout)
    assert kind == "DataError"
    # torch learns of it by a signal, or as it waits for the worker's queue: whichever comes first
    told = r"a worker that loads images died: .*(Killed|exited unexpectedly)\. Likely causes"
    assert re.match(told, message)
    assert "/dev/shm" in message
    assert "last checkpoint" in message


def test_other_errors_of_connections_pass_at_once():
    with pytest.raises(ConnectionResetError), named_worker_failures():
        raise ConnectionResetError("by the peer")
    with pytest.raises(FileNotFoundError), named_worker_failures():
        Path("/no/such/file").read_bytes()


def test_a_workers_own_error_is_bare(images, tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(b"")
    loader = DataLoader(images, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(DataError) as error:
        go_through(loader)
    assert str(error.value).startswith("40 of 40 images looked at are bad (100.0%)")
    assert "Traceback" not in str(error.value)


def raise_with_a_cause(_):
    raise DataError("3 are bad (DataError: the row has no image); mend them")


def test_a_message_that_quotes_another_is_kept_whole(images):
    loader = DataLoader(
        ImageFiles(images.root, transform=raise_with_a_cause),
        num_workers=1,
        multiprocessing_context="fork",
    )
    with pytest.raises(DataError, match=r"^3 are bad \(DataError: the row") as error:
        go_through(loader)
    assert str(error.value).endswith("mend them")


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), DataError("no such folder")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as raised, named_worker_failures():
        raise error
    assert raised.value is error


def test_a_signal_to_all_processes_stops_the_run_and_is_no_failure_of_a_worker(tmp_path):
    script = Path(__file__).with_name("stopped_group.py")
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHONPATH": path}, start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    patient, hasty = json.loads(done.stdout.splitlines()[-1])
    # the workers go on until the step is done and saved
    step = patient["step"]
    assert patient == {
        "step": step, "interrupted": True, "checkpoint": f"step-{step:08}.ckpt", "workers": 0
    }  # fmt: skip
    assert 1 <= step < 500
    assert CheckpointStore(tmp_path / "patient" / "checkpoints").steps() == [step]
    # where they can't, the run ends as a stopped one all the same
    assert hasty["raised"] == "KeyboardInterrupt"
    assert "--resume true" in hasty["message"]
    assert hasty["workers"] == 0


def stay(ready):
    leave_stopping_to_the_parent()
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="who sent a signal cannot be told")
def test_a_worker_is_ended_by_its_parent_alone():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=stay, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(20)
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)  # not by this process
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


@pytest.mark.parametrize("asked", [True, False])
def test_a_dead_worker_is_a_stop_where_one_was_asked_for(asked):
    stop = StopSignal()
    stop.asked = asked
    wanted = KeyboardInterrupt if asked else DataError
    with pytest.raises(wanted, match="a worker that loads images"), named_worker_failures(stop):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")
