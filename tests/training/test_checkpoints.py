import pickle

import pytest
import torch

from local_distill import ConfigError, DataError
from local_distill.training.checkpoints import (
    check_same_config,
    load_checkpoint,
    save_checkpoint,
)


def test_there_and_back(tmp_path):
    path = tmp_path / "deep" / "last.ckpt"
    save_checkpoint(path, {"step": 1, "weights": {"a": torch.arange(3)}})
    save_checkpoint(path, {"step": 2, "weights": {"a": torch.arange(4)}})
    state = load_checkpoint(path)
    assert state["step"] == 2
    assert torch.equal(state["weights"]["a"], torch.arange(4))
    assert [entry.name for entry in path.parent.iterdir()] == ["last.ckpt"]


def test_a_crash_while_writing_leaves_the_old_one(tmp_path, monkeypatch):
    path = save_checkpoint(tmp_path / "last.ckpt", {"step": 1})

    def full_disk(state, stream):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


class Code:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "code", "other", "pickle"])
def test_damaged_files_are_refused_and_code_never_runs(tmp_path, damage, capsys):
    path = save_checkpoint(tmp_path / "last.ckpt", {"step": 1, "a": torch.zeros(1000)})
    whole = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        whole[60:90] = bytes(byte ^ 0xFF for byte in whole[60:90])
        path.write_bytes(whole)
    elif damage == "text":
        path.write_text("hello")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "code":
        torch.save({"step": Code()}, path)
    elif damage == "pickle":
        path.write_bytes(pickle.dumps(Code(), protocol=2))
    else:
        torch.save({"step": 1}, path)
    with pytest.raises(DataError, match=r"last\.ckpt"):
        load_checkpoint(path)
    assert "never run" not in capsys.readouterr().out


def test_a_missing_file():
    with pytest.raises(DataError, match=r"nowhere\.ckpt"):
        load_checkpoint("nowhere.ckpt")


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
