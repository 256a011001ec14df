"""A loader's worker that is killed, and errors that come out of one."""

import os
import signal

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from local_distill import DataError
from local_distill.training.data import ImageFiles, named_worker_failures


def go_through(batches, act=lambda batch: None):
    with named_worker_failures():
        for batch in batches:
            act(batch)


def size(image):
    return torch.tensor(image.size)


@pytest.fixture
def images(tmp_path):
    for i in range(40):
        Image.new("RGB", (4, 3)).save(tmp_path / f"{i}.png")
    return ImageFiles(tmp_path, transform=size)


def test_a_killed_worker_is_named(images):
    loader = DataLoader(
        images, batch_size=1, num_workers=2, sampler=[0] * 10_000, multiprocessing_context="fork"
    )
    batches = iter(loader)

    def kill(batch):
        assert batch[0].tolist() == [[4, 3]]
        os.kill(batches._workers[0].pid, signal.SIGKILL)

    # torch learns of it by a signal, or as it waits for the worker's queue: whichever comes first
    told = r"a worker that loads images died: .*(Killed|exited unexpectedly)\. Likely causes"
    with pytest.raises(DataError, match=told) as error:
        go_through(batches, kill)
    assert "/dev/shm" in str(error.value)
    assert "last checkpoint" in str(error.value)


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
