"""FSDP2 over gloo: sharded parameters learn what whole ones do, and a checkpoint fits either."""

import json

import pytest
import torch
from helpers.training_ranks import run_case, say, train_on_processes

from local_distill import ConfigError
from local_distill.backbones import tiny_vit
from local_distill.training.checkpoints import CheckpointStore
from local_distill.training.processes import make_fabric
from local_distill.training.sharding import can_shard

pytestmark = pytest.mark.skipif(not can_shard(), reason="FSDP2 with whole heads needs torch 2.7")

SHORT = {"batch": 12, "images": 20}  # a last batch of 8, on 3 processes 3, 3 and 2
CASES = {
    "Glsd": {"method": "Glsd", **SHORT},
    "clipped": {"method": "Glsd", "optim": {"clip": 0.5, "clip_each": True}, **SHORT},
    "Ibot, twice": {"method": "Ibot", "batch": 6, "images": 18, "accumulate": 2},
    "SdsslMoco": {"method": "SdsslMoco", "optim": {"layer_decay": 0.7}, **SHORT},
    "Vicregl": {"method": "Vicregl", **SHORT},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    sharded = {"strategy": "fsdp"}
    moves = [
        # stopped sharded over two, gone on with sharded over three, on two that are not, on one
        {"run": f"{run}", "record": "before", "stop": (0, 15, "SIGTERM"), **CASES["Glsd"]} | sharded
        for run in ("to-3", "to-whole", "to-1")
    ]
    again = {"resume": True, **CASES["Glsd"]}
    groups = [
        {
            "ranks": 2,
            "cases": [
                {"run": name, "draw": name == "Glsd", **case, **sharded}
                for name, case in CASES.items()
            ]
            + moves,
        },
        {"ranks": 3, "cases": [{"run": "to-3", **again, **sharded}]},
        {"ranks": 2, "cases": [{"run": "to-whole", **again}]},
        {"ranks": 1, "cases": [{"run": "to-1", **again}]},
    ]
    train_on_processes(folder, groups)
    return folder


def last(folder):
    return CheckpointStore(folder / "checkpoints").load()


def assert_same(got, wanted):
    assert got.step == wanted.step == 5
    for part in ("network", "teacher", "criterion"):
        torch.testing.assert_close(got.state[part], wanted.state[part], rtol=0, atol=1e-6)
    # the optimiser's moments too, whole and by name
    torch.testing.assert_close(
        got.state["optimizer"]["state"], wanted.state["optimizer"]["state"], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", CASES)
def test_shares_learn_what_whole_parameters_do(folder, name):
    run_case(folder, run=f"{name}-alone", **CASES[name])
    assert_same(last(folder / name), last(folder / f"{name}-alone"))


@pytest.mark.parametrize("run", ["to-3", "to-whole", "to-1"])
def test_a_checkpoint_goes_on_in_other_shares(folder, run):
    saved = sorted(path.name for path in (folder / run / "checkpoints").glob("*.ckpt"))
    assert saved == ["step-00000003.ckpt", "step-00000005.ckpt"]
    assert_same(last(folder / run), last(folder / "Glsd"))


def test_one_process_can_draw_what_is_sharded(folder):
    state = last(folder / "Glsd").state["teacher"]
    prefix = "module.backbone."
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    backbone = tiny_vit(img_size=16, patch_size=8, width=24, depth=2).double()
    backbone.load_state_dict(own)
    drawn = torch.tensor(json.loads((folder / "Glsd-drawn.json").read_text()), dtype=torch.float64)
    torch.testing.assert_close(drawn, say(backbone))


def test_float16_and_shares_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"16-mixed.*bf16-mixed"):
        make_fabric(strategy="fsdp", precision="16-mixed")
