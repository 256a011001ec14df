"""The loop itself: what it learns, keeps, skips and refuses."""

import json
import os
import signal
import threading

import pytest
import torch
from helpers.training_cases import HEAD, small_views, train_small

from local_distill import ConfigError, LocalDistillError, MultiCrop
from local_distill.training import SyntheticScenes, methods
from local_distill.training.checkpoints import load_checkpoint
from local_distill.training.options import OptimOptions, TeacherOptions, TemperatureOptions


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def parts_of(folder):
    state = load_checkpoint(folder)
    return {part: state[part] for part in ("network", "teacher", "criterion")}


@pytest.mark.parametrize("name", ["glsd", "esvit", "dino"])
def test_it_trains_and_tells(tmp_path, name):
    result = train_small(tmp_path, name)
    assert result.step == 6
    assert not result.interrupted
    lines = _lines(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 3, 1.0, 5 / 3])
    for line in lines:
        assert 0 < line["teacher_entropy"] <= torch.tensor(16.0).log().item() + 1e-6
        assert ("local_loss" in line) is (name != "dino")
        if name != "dino":
            assert 0 < line["coverage"] <= 1
            assert line["loss"] == pytest.approx((line["global_loss"] + line["local_loss"]) / 2)
    assert list(tmp_path.glob("events.out.tfevents.*"))
    center = parts_of(tmp_path)["criterion"]
    assert max(float(v.abs().max()) for k, v in center.items() if k.endswith("center")) > 0


class Stopping(SyntheticScenes):
    """Sends a signal while it is read, as Ctrl-C does: in the middle of a step."""

    def __init__(self, count, size, after):
        super().__init__(count, size)
        self.left = after

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


def test_ctrl_c_finishes_the_step_and_saves(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    # one image is read before the first step, to know the views' sizes
    result = train_small(tmp_path, images=Stopping(12, 32, after=2 * 4))
    assert result.interrupted
    assert result.step == 2
    assert load_checkpoint(tmp_path)["step"] == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_it_runs_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(train_small(tmp_path, steps=1)))
    thread.start()
    thread.join()
    assert results[0].step == 1


class Poison(MultiCrop):
    """Some of its images are not finite."""

    def __init__(self, bad):
        super().__init__(global_size=24, local_size=16, local_count=2)
        self.bad, self.calls = bad, -1  # one image is seen before the first step

    def forward(self, image):
        self.calls += 1
        views, geometries = super().forward(image)
        if self.bad(self.calls):
            views[0] = views[0] * torch.nan
        return views, geometries


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nan_image_costs_a_step_and_no_state(tmp_path, capsys, accumulate):
    sixth = Poison(lambda number: number == 6)  # in the second micro-batch
    train_small(tmp_path, views=sixth, steps=3, log_every=1, accumulate=accumulate)
    step = {1: 2, 2: 1}[accumulate]
    assert f"step {step}: the gradient is not finite, skipped" in capsys.readouterr().out
    for part in parts_of(tmp_path).values():
        assert all(value.isfinite().all() for value in part.values())
    criterion = parts_of(tmp_path)["criterion"]
    skipped = [int(v) for k, v in criterion.items() if k.endswith("skipped")]
    assert skipped == [1, 1]


def test_a_run_that_cannot_recover_is_stopped(tmp_path):
    with pytest.raises(LocalDistillError, match="50 steps in a row, up to step 50"):
        train_small(tmp_path, "dino", views=Poison(lambda number: True), steps=60)
    assert _lines(tmp_path)[-1]["skipped_steps"] == 48


@pytest.mark.parametrize("name", ["glsd", "dino"])
def test_the_student_learns_a_teacher_that_stands_still(tmp_path, name):
    # with a moving one the loss may rise: what is to be learned grows with what was learned
    temps = TemperatureOptions(teacher=0.1, teacher_start=0.1)
    method = {"glsd": methods.Glsd, "dino": methods.Dino}[name](HEAD, temps, center_momentum=0.999)
    train_small(tmp_path, name, method=method, steps=40, images=SyntheticScenes(40, 32),
                batch_size=8, log_every=1, optim=OptimOptions(lr=5e-3, warmup=4),
                teacher=TeacherOptions(momentum=1.0))  # fmt: skip
    # the cross-entropy cannot fall below the teacher's entropy: the gap between them can
    gaps = [line["global_loss"] - line["teacher_entropy"] for line in _lines(tmp_path)]
    assert sum(gaps[-5:]) < 0.75 * sum(gaps[:5])


def test_accumulation_is_a_larger_batch(tmp_path):
    """Where the loss is a mean over images, two micro-batches are one batch, centers included."""
    from lightning_fabric import Fabric

    runs = {}
    for name, settings in (("whole", {"batch_size": 4}), ("parts", {"batch_size": 2})):
        train_small(tmp_path / name, "glsd_tables", steps=5, fabric=Fabric(devices=1,
                    precision="64-true", accelerator="cpu"), accumulate=4 // settings["batch_size"],
                    optim=OptimOptions(warmup=2, freeze_last=2), **settings)  # fmt: skip
        runs[name] = parts_of(tmp_path / name)
    for part, values in runs["whole"].items():
        for key, value in values.items():
            torch.testing.assert_close(runs["parts"][part][key], value, rtol=0, atol=1e-6)


def test_epochs_are_the_unit_where_a_run_is_given_in_epochs(tmp_path):
    optim = OptimOptions(lr=1.0, warmup=1, lr_end=0.0, clip=0.0, freeze_last=99)
    result = train_small(tmp_path, steps=None, epochs=2, log_every=1, optim=optim)
    assert result.step == 6  # 12 images, 4 a step
    rates = [line["lr"] for line in _lines(tmp_path)]
    assert rates[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"batch_size": 13}, "`batch_size` is 13.*12 images: lower it to at most 12"),
        ({"steps": 0}, "`steps`"),
        ({"log_every": 0}, "`log_every`"),
        ({"accumulate": 0}, "`accumulate`"),
        ({"keep": 0}, "`keep`"),
        ({"epochs": 3.0}, "either `steps` or `epochs`"),
        ({"steps": None}, "either `steps` or `epochs`"),
        ({"steps": None, "epochs": -1.0}, "`epochs`"),
    ],
)
def test_settings_that_cannot_work(tmp_path, change, text):
    with pytest.raises(ConfigError, match=text):
        train_small(tmp_path / "new", **change)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_run_is_never_overwritten_or_resumed_otherwise(tmp_path):
    first = train_small(tmp_path, steps=2, config={"steps": 2, "optim": {"lr": 1.0}})
    before = first.checkpoint.read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        train_small(tmp_path, steps=2)
    with pytest.raises(ConfigError, match=r"optim\.lr: 1\.0 in the checkpoint, 2\.0 now"):
        train_small(tmp_path, steps=2, resume=True, config={"steps": 2, "optim": {"lr": 2.0}})
    assert first.checkpoint.read_bytes() == before


def test_only_the_last_checkpoints_are_kept_and_drawn(tmp_path):
    drawn = []
    train_small(tmp_path, steps=6, save_every=1, keep=2,
                draw=lambda step, backbone: drawn.append((step, backbone.embed_dim)))  # fmt: skip
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.ckpt"))
    assert names == ["step-00000005.ckpt", "step-00000006.ckpt"]
    assert drawn == [(step, 24) for step in range(1, 7)]


def test_a_teacher_sees_everything(tmp_path):
    """Stochastic depth is the student's alone, as in the published codes."""
    from timm.layers import DropPath

    from local_distill.training.options import BackboneOptions

    kwargs = {"img_size": 24, "width": 24, "depth": 2, "drop_path_rate": 0.5}
    seen = {}

    class Watching(methods.Dino):
        def step(self, models, batch, now):
            for side, module in (("student", models.student), ("teacher", models.teacher)):
                seen[side] = {m.drop_prob for m in module.modules() if isinstance(m, DropPath)}
                assert module.training
            return super().step(models, batch, now)

    train_small(tmp_path, method=Watching(HEAD), steps=1, views=small_views(),
                build_backbone=BackboneOptions(kwargs=kwargs).build)  # fmt: skip
    assert seen == {"student": {0.5}, "teacher": {0.0}}


def test_mixed_precision_keeps_state_and_geometry_in_float32(tmp_path):
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    train_small(tmp_path, steps=2, fabric=fabric)
    for part in parts_of(tmp_path).values():
        assert {value.dtype for value in part.values()} <= {torch.float32, torch.int64}
    train_small(tmp_path / "plain", steps=2)
    mixed, exact = _lines(tmp_path)[0], _lines(tmp_path / "plain")[0]
    # the matches come from geometry alone: what is learned may differ, they may not
    assert mixed["coverage"] == exact["coverage"]
    assert mixed["loss"] == pytest.approx(exact["loss"], rel=0.1)
