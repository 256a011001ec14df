import errno
import json
import os
import re
from hashlib import sha256

import pytest
import torch
from torch import nn

from local_distill import ConfigError, DataError
from local_distill.training.checkpoints import CheckpointStore, CheckpointWriteError


def state(step):
    return {"step": step, "w": torch.arange(50) + step}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def warnings(caplog):
    return [record.getMessage() for record in caplog.records]


def test_the_last_ones_are_kept_and_the_manifest_says_their_bytes(tmp_path):
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2)
    assert store.load() is None
    assert store.steps() == []
    for step in (3, 6, 9):
        path = store.save(step, state(step))
    assert path == store.folder / "step-00000009.ckpt"
    assert names(store.folder) == ["manifest.json", "step-00000006.ckpt", "step-00000009.ckpt"]
    assert store.steps() == [6, 9]
    listed = json.loads((store.folder / "manifest.json").read_text())["checkpoints"]
    for entry in listed:
        content = (store.folder / entry["file"]).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(content), sha256(content).hexdigest())
    saved = store.load()
    assert (saved.step, saved.path) == (9, path)
    assert torch.equal(saved.state["w"], state(9)["w"])


def test_a_whole_training_state_there_and_back(tmp_path):
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    store = CheckpointStore(tmp_path)
    store.save(
        1,
        {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "teacher": None,
        },
    )
    draw = torch.rand(3)
    loaded = store.load().state
    torch.set_rng_state(loaded["rng"])
    assert torch.equal(torch.rand(3), draw)
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    other.load_state_dict(loaded["network"])
    assert loaded["network"]._metadata == network.state_dict()._metadata
    again = torch.optim.AdamW(other.parameters())
    again.load_state_dict(loaded["optimizer"])
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(optimizer.state[one]["exp_avg"], again.state[two]["exp_avg"])


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    calls, opened = [], {}
    real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "unlink")}

    def open_(path, *rest, **more):
        descriptor = real["open"](path, *rest, **more)
        opened[descriptor] = os.path.basename(path)
        return descriptor

    def replace(one, other):
        calls.append(("rename", os.path.basename(one), os.path.basename(other)))
        real["replace"](one, other)

    def unlink(path, **more):
        calls.append(("remove", os.path.basename(path)))
        real["unlink"](path, **more)

    def fsync(descriptor):
        calls.append(("sync", opened[descriptor]))
        real["fsync"](descriptor)

    store = CheckpointStore(tmp_path / "c", keep=1)
    store.save(1, state(1))
    for call in (open_, fsync, replace, unlink):
        monkeypatch.setattr(os, call.__name__.strip("_"), call)
    store.save(2, state(2))
    assert calls == [
        ("sync", ".step-00000002.ckpt.tmp"),
        ("sync", ".manifest.json.tmp"),
        ("rename", ".step-00000002.ckpt.tmp", "step-00000002.ckpt"),
        ("sync", "c"),
        ("rename", ".manifest.json.tmp", "manifest.json"),
        ("sync", "c"),
        ("remove", "step-00000001.ckpt"),
    ]


def test_leftovers_of_a_crash_are_removed_and_other_files_are_not(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, state(1))
    for name in (".step-00000002.ckpt.tmp", ".manifest.json.tmp", ".without-manifest.json.tmp"):
        (tmp_path / name).write_bytes(b"half")
    kept = (".mine.tmp", "step-2.ckpt", "notes.txt", "step-00000002.ckpt.tmp")
    for name in kept:
        (tmp_path / name).write_bytes(b"mine")
    store.save(3, state(3))
    assert names(tmp_path) == sorted(
        [*kept, "manifest.json", "step-00000001.ckpt", "step-00000003.ckpt"]
    )


def test_a_step_saved_again_is_replaced(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, state(step))
    store.save(2, {"w": "other"})
    assert store.steps() == [1, 2]
    assert store.load().state == {"w": "other"}


def test_after_a_fall_back_the_newest_is_the_last_one_saved(tmp_path, caplog):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20, 30):
        store.save(step, state(step))
    (tmp_path / "step-00000030.ckpt").write_bytes(b"cut")
    assert store.load().step == 20
    store.save(25, state(25))
    assert store.load().step == 25
    store.save(26, state(26))
    assert names(tmp_path) == ["manifest.json", "step-00000025.ckpt", "step-00000026.ckpt"]


def test_one_that_was_renamed_and_not_listed_is_used_and_adopted(tmp_path, caplog):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, state(1))
    before = (tmp_path / "manifest.json").read_bytes()
    store.save(2, state(2))
    (tmp_path / "manifest.json").write_bytes(before)
    assert store.steps() == [1]
    assert store.load().step == 2
    assert "step-00000002.ckpt is not listed in manifest.json" in warnings(caplog)[0]
    store.save(3, state(3))
    assert store.steps() == [2, 3]
    assert names(tmp_path) == ["manifest.json", "step-00000002.ckpt", "step-00000003.ckpt"]


def test_a_crash_while_old_ones_are_removed_leaves_them_to_the_next_save(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, state(1))
    old = (tmp_path / "step-00000001.ckpt").read_bytes()
    for step in (2, 3):
        store.save(step, state(step))
    (tmp_path / "step-00000001.ckpt").write_bytes(old)
    assert store.load().step == 3
    store.save(4, state(4))
    assert names(tmp_path) == ["manifest.json", "step-00000003.ckpt", "step-00000004.ckpt"]


def test_without_a_manifest_the_files_speak_for_themselves(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        store.save(step, state(step))
    (tmp_path / "manifest.json").unlink()
    whole = (tmp_path / "step-00000003.ckpt").read_bytes()
    (tmp_path / "step-00000003.ckpt").write_bytes(whole[:-1])
    assert store.load().step == 2
    assert "step-00000003.ckpt' is damaged" in warnings(caplog)[0]
    store.save(4, state(4))
    assert store.steps() == [1, 2, 4]
    assert "step-00000003.ckpt.bad" in names(tmp_path)
    caplog.clear()
    assert store.load().step == 4
    assert warnings(caplog) == []


def test_a_vanished_one_is_named(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, state(step))
    (tmp_path / "step-00000002.ckpt").unlink()
    assert store.steps() == [1]
    assert store.load().step == 1
    (line,) = warnings(caplog)
    assert re.search(r"step-00000002\.ckpt' .*vanished; trying another", line)
    store.save(3, state(3))
    assert store.steps() == [1, 3]


def test_where_none_is_good_all_are_named(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        (store.save(step, state(step))).write_bytes(b"gone")
    with pytest.raises(DataError, match=r"(?s)step-00000002.*step-00000001.*[Rr]estore"):
        store.load()
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"(?s)manifest\.json.*step-00000002.*step-00000001"):
        store.load()


def test_files_that_swapped_names_are_refused(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, state(step))
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "step-00000002.ckpt").rename(tmp_path / "step-00000009.ckpt")
    assert store.load().step == 1


def test_a_disk_that_fills_up_is_told_and_leaves_what_was(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path / "c")
    store.save(1, state(1))
    before = names(store.folder)
    real = os.write
    with monkeypatch.context() as patch:
        left = [700]

        def write(descriptor, data):
            if not left[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = real(descriptor, data[: left[0]])
            left[0] -= written
            return written

        patch.setattr(os, "write", write)
        with pytest.raises(CheckpointWriteError) as caught:
            store.save(2, state(2))
    error = caught.value
    assert (error.errno, error.last_good, error.wanted) == (errno.ENOSPC, 1, 400)
    assert error.path == store.folder / "step-00000002.ckpt"
    assert error.free > 0
    for part in ("step-00000002.ckpt", "No space left", "400 bytes", "free some", "step 1."):
        assert part in str(error)
    assert isinstance(error, OSError)
    assert names(store.folder) == before
    store.save(2, state(2))
    assert store.steps() == [1, 2]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_ctrl_c_while_saving_leaves_what_was(tmp_path, monkeypatch, call, kind):
    store = CheckpointStore(tmp_path)
    store.save(1, state(1))

    def stopped(*args):
        raise kind

    with monkeypatch.context() as patch:
        patch.setattr(os, call, stopped)
        with pytest.raises(kind):
            store.save(2, state(2))
    assert store.load().step == 1
    store.save(3, state(3))
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


def test_an_old_one_that_cannot_be_removed_does_not_fail_the_save(tmp_path, monkeypatch, caplog):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, state(1))

    def refuse(path, **more):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        store.save(2, state(2))
    assert store.steps() == [2]
    assert "step-00000001.ckpt is no longer needed, but cannot be removed" in warnings(caplog)[0]
    store.save(3, state(3))
    assert names(tmp_path) == ["manifest.json", "step-00000003.ckpt"]


def test_arguments_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"`folder` .*file' is a file"):
        CheckpointStore(tmp_path / "file")
    with pytest.raises(ConfigError, match="keep"):
        CheckpointStore(tmp_path, keep=0)
    store = CheckpointStore(tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointWriteError, match="a file stands where a folder is wanted"):
        store.save(1, state(1))
    with pytest.raises(ConfigError, match=r"`step` is 3, but `state\['step'\]` is 1"):
        store.save(3, state(1))
    with pytest.raises(ConfigError, match="step"):
        store.save(-1, {})
