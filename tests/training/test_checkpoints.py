import pickle
import shutil

import pytest
import torch

from local_distill import ConfigError, DataError
from local_distill.training.checkpoints import (
    CheckpointStore,
    check_same_config,
    load_checkpoint,
)


def test_the_newest_of_a_run_by_file_folder_or_run(tmp_path):
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    older, newer = store.save(4, {"step": 4}), store.save(8, {"step": 8})
    assert load_checkpoint(tmp_path / "run") == {"step": 8}
    assert load_checkpoint(str(store.folder)) == {"step": 8}
    assert load_checkpoint(older) == {"step": 4}
    moved = shutil.move(newer, tmp_path / "best.ckpt")  # away from its manifest
    assert load_checkpoint(moved) == {"step": 8}


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.ckpt"):
        load_checkpoint("nowhere.ckpt")
    with pytest.raises(DataError, match="a folder without checkpoints"):
        load_checkpoint(tmp_path)


class Code:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("form", ["torch's zip", "torch's old form", "a bare pickle", "listed"])
def test_code_in_a_file_never_runs(tmp_path, form):
    proof, path = tmp_path / "the code ran", tmp_path / "step-00000001.ckpt"
    state = {"format": "local-distill-2", "step": 1, "state": Code(proof)}
    if form == "listed":  # as an attacker would who can write the manifest as well
        store = CheckpointStore(tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("local_distill.training.checkpoint_store.check_storable", lambda _: 0)
            store.save(1, {"code": Code(proof)})
        with pytest.raises(DataError, match=r"step-00000001\.ckpt.*[Ww]eights"):
            store.load()
    elif form == "a bare pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "torch's zip")
    with pytest.raises(DataError, match=r"step-00000001\.ckpt"):
        load_checkpoint(path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Code(proof))).close()  # it would have, otherwise
    assert proof.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", bytes(300)])
def test_a_file_of_something_else(tmp_path, content):
    path = tmp_path / "other.ckpt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"other\.ckpt.*format local-distill-2"):
        load_checkpoint(path)


def test_a_file_of_another_version(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("local_distill.training.checkpoint_store._FORMAT", "local-distill-99")
        path = CheckpointStore(tmp_path).save(1, {"step": 1})
    with pytest.raises(DataError, match="not written by this version"):
        load_checkpoint(path)


def test_other_settings_are_named():
    saved = {"optim": {"lr": 0.1, "clip": 3}, "steps": 5, "output": "a", "gone": 1}
    now = {"optim": {"lr": 0.2, "clip": 3}, "steps": 5, "output": "b", "new": (1, 2)}
    with pytest.raises(ConfigError) as caught:
        check_same_config(saved, now, frozenset({"output"}))
    text = str(caught.value)
    assert "optim.lr: 0.1 in the checkpoint, 0.2 now" in text
    assert "gone: 1 in the checkpoint, 'absent' now" in text
    assert "clip" not in text
    assert "output:" not in text
    check_same_config(saved, saved, frozenset())
