"""Mixed precision, the float16 scaler and compiled networks in the trainer's loop."""

import json

import pytest
import torch
from helpers.training_ranks import run_case
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from torch import nn

from local_distill import ConfigError
from local_distill.training.checkpoints import CheckpointStore
from local_distill.training.processes import make_fabric

RUN = {"batch": 6, "images": 12, "precision": "32-true"}


def saved(folder):
    return CheckpointStore(folder / "checkpoints").load().state


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["Glsd", "Ibot", "SdsslMoco"])
def test_bfloat16_keeps_state_and_geometry_in_float32(tmp_path, method):
    run_case(tmp_path, run="exact", method=method, **RUN)
    run_case(tmp_path, run="mixed", method=method, **RUN | {"precision": "bf16-mixed"})
    state = saved(tmp_path / "mixed")
    for part in ("network", "teacher", "criterion"):
        floats = [value for value in state[part].values() if value.is_floating_point()]
        assert all(value.dtype == torch.float32 for value in floats)
        assert all(value.isfinite().all() for value in floats)
    exact, mixed = lines(tmp_path / "exact"), lines(tmp_path / "mixed")
    assert mixed[0]["loss"] != exact[0]["loss"]  # it was in bfloat16
    assert mixed[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.05)
    for a, b in zip(exact, mixed, strict=True):  # geometry alone matches, and it was not rounded
        assert a.get("coverage") == b.get("coverage")


def test_float16_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match=r"16-mixed needs a GPU.*bf16-mixed"):
        make_fabric(accelerator="cpu", precision="16-mixed")


def test_the_scaler_skips_a_step_that_overflows_and_learns_from_it(tmp_path, capsys):
    # Of 2^40 at the start, every gradient in float16 overflows until it has come down.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    run_case(tmp_path, run="half", fabric=fabric, steps=30, **RUN)
    assert "step 1: the gradient is not finite, skipped" in capsys.readouterr().out
    state = saved(tmp_path / "half")
    scale = state["scaler"]["scale"]
    assert 1 < scale < 2.0**40
    skipped = [line["step"] for line in lines(tmp_path / "half") if line["gradient_norm"] > 1e30]
    for part in ("network", "teacher", "criterion"):
        assert all(value.isfinite().all() for value in state[part].values())
    moments = state["optimizer"]["state"]["backbone.model.pos_embed"]
    assert 0 < moments["step"] < 30 - len(skipped) + 1
    # and goes on from there
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    run_case(tmp_path, run="half", fabric=fabric, steps=31, resume=True, **RUN)
    assert saved(tmp_path / "half")["scaler"]["scale"] == scale


def test_compiled_networks_learn_the_same(tmp_path, monkeypatch):
    backends = []

    def compile_quickly(module, **settings):  # inductor takes minutes here
        backends.append(settings)
        module._compiled_call_impl = torch.compile(
            module._call_impl, backend="aot_eager", **settings
        )

    monkeypatch.setattr(nn.Module, "compile", compile_quickly)
    run_case(tmp_path, run="eager", steps=3, method="Dino", **RUN)
    run_case(tmp_path, run="compiled", steps=3, method="Dino", compile=True, **RUN)
    assert len(backends) == 2  # student and teacher
    eager, compiled = saved(tmp_path / "eager"), saved(tmp_path / "compiled")
    for part in ("network", "teacher", "criterion"):
        assert list(eager[part]) == list(compiled[part])
    for a, b in zip(lines(tmp_path / "eager"), lines(tmp_path / "compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    # one may go on as the other
    result = run_case(
        tmp_path, run="eager", steps=4, method="Dino", compile=True, resume=True, **RUN
    )
    assert result.step == 4
