"""A loader's worker that is killed, and errors that come out of one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from local_distill import DataError
from local_distill.training.data import ImageFiles, named_worker_failures


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
