import json
import zipfile
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from local_distill.training.checkpoints import CheckpointStore


def state(step):
    return {"step": step, "w": torch.arange(20) + step, "c": {"lr": 0.1 * step, "n": f"run {step}"}}


def is_right(saved):
    wanted = state(saved.step)
    return (
        saved.state["step"] == saved.step
        and torch.equal(saved.state["w"], wanted["w"])
        and saved.state["c"] == wanted["c"]
    )


class Pair(NamedTuple):
    store: CheckpointStore
    newest: bytes
    manifest: bytes

    def damaged(self, content, manifest):
        """The store with these bytes in the newest file and this manifest, None: without one."""
        (self.store.folder / "step-00000002.ckpt").write_bytes(content)
        path = self.store.folder / "manifest.json"
        path.unlink(missing_ok=True)
        if manifest is not None:
            path.write_bytes(manifest)
        return self.store


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Steps 1 and 2, some 2 kB each."""
    store = CheckpointStore(tmp_path_factory.mktemp("pair"))
    newest = [store.save(step, state(step)) for step in (1, 2)][-1]
    return Pair(store, newest.read_bytes(), (store.folder / "manifest.json").read_bytes())


FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1)


def flipped(content, flips):
    changed = bytearray(content)
    for place, mask in flips:
        changed[int(place * len(content))] ^= mask
    return bytes(changed)


@given(flips=FLIPS, listed=st.booleans())
@example(flips=[(0.86, 255)], listed=False)  # in the zip's directory, which no CRC-32 covers
def test_flipped_bytes_are_seen_and_the_one_before_is_used(pair, flips, listed):
    content = flipped(pair.newest, flips)
    if content == pair.newest:  # flips that undid each other
        return
    saved = pair.damaged(content, pair.manifest if listed else None).load()
    assert saved.step == 1
    assert is_right(saved)


def test_every_byte_of_the_zips_directory(pair):
    start = pair.newest.index(b"PK\x01\x02")
    for place in range(start, len(pair.newest)):
        content = flipped(pair.newest, [(place / len(pair.newest) + 1e-9, 255)])
        assert pair.damaged(content, None).load().step == 1


def places(content):
    """Where a file can be cut: its ends, its records, its directory, its sha256."""
    cuts = {0, 1, 22, len(content) - 1, len(content) // 2, len(content) - 86, len(content) - 87}
    signs = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\nlocal-distill")
    for sign in signs:
        start = -1
        while (start := content.find(sign, start + 1)) >= 0:
            cuts |= {start, start + 1, start + 30}
    return sorted(cut for cut in cuts if 0 <= cut < len(content))


@pytest.mark.parametrize("listed", [True, False])
def test_cut_anywhere_and_the_one_before_is_used(pair, listed):
    cuts = places(pair.newest)
    assert len(cuts) > 40
    for cut in cuts:
        for rest in (b"", bytes(len(pair.newest) - cut)):  # cut off, or never written
            content = pair.newest[:cut] + rest
            if content != pair.newest:
                saved = pair.damaged(content, pair.manifest if listed else None).load()
                assert saved.step == 1, cut


def test_bytes_that_were_added_are_seen(pair):
    assert pair.damaged(pair.newest + b"\0", pair.manifest).load().step == 1
    assert pair.damaged(pair.newest + b"\0", None).load().step == 1


def test_the_log_says_which_file_and_why(pair, caplog):
    store = pair.damaged(flipped(pair.newest, [(0.5, 1)]), pair.manifest)
    store.load()
    store = pair.damaged(pair.newest[:500], pair.manifest)
    store.load()
    flip, cut = [record.getMessage() for record in caplog.records]
    assert "step-00000002.ckpt' is damaged: its sha256 is" in flip
    assert "step-00000002.ckpt' is damaged: it has 500 bytes, manifest.json says" in cut
    assert cut.endswith("trying another")


@pytest.mark.parametrize("mask", [1, 255])
def test_a_flip_anywhere_in_the_manifest_loses_nothing(pair, mask):
    for place in range(len(pair.manifest)):
        manifest = bytearray(pair.manifest)
        manifest[place] ^= mask
        saved = pair.damaged(pair.newest, bytes(manifest)).load()
        assert saved.step == 2, place
        assert is_right(saved)


@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@example(content=b"[" * 100_000)
@example(content=b"[]")
@example(content=b"null")
@example(content=b'{"format": "local-distill-manifest-1"}')
@example(content=b'{"format": "local-distill-manifest-99", "checkpoints": [], "sha256": ""}')
def test_anything_in_place_of_the_manifest_loses_nothing(pair, content):
    saved = pair.damaged(pair.newest, content).load()
    assert saved.step == 2
    assert is_right(saved)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "step-2.ckpt", "manifest.json", 3])
def test_a_manifest_that_points_elsewhere_is_not_followed(pair, name):
    from local_distill.training import checkpoint_manifest

    listed = [{"file": name, "size": 3, "sha256": "ab"}]
    digest = checkpoint_manifest._digest(listed)
    whole = {"format": "local-distill-manifest-1", "checkpoints": listed, "sha256": digest}
    assert pair.damaged(pair.newest, json.dumps(whole).encode()).load().step == 2


def test_other_tools_can_check_a_file(pair):
    store = pair.damaged(pair.newest, pair.manifest)
    with zipfile.ZipFile(store.folder / "step-00000002.ckpt") as archive:
        assert archive.testzip() is None
    whole = torch.load(store.folder / "step-00000002.ckpt", weights_only=True)
    assert whole["state"]["step"] == whole["step"] == 2
