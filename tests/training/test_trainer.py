"""The loop itself: what it learns, keeps, skips and resumes."""

import json
import os
import signal
import threading

import pytest
import torch

from local_distill import (
    ConfigError,
    LocalDistillError,
    MultiCrop,
    NearestMatcher,
    SimilarityMatcher,
)
from local_distill.backbones import tiny_vit
from local_distill.training import DistillationNetwork, SyntheticScenes
from local_distill.training.checkpoints import load_checkpoint
from local_distill.training.options import HeadOptions, LossOptions, OptimOptions
from local_distill.training.trainer import train

HEAD = HeadOptions(num_prototypes=16, hidden_dim=24, bottleneck_dim=8)


def network(local=True):
    return DistillationNetwork(
        tiny_vit(img_size=16, patch_size=8, width=24, depth=1),
        num_prototypes=16,
        local=local,
        hidden_dim=24,
        bottleneck_dim=8,
    )


def run(output, matcher="geometric", *, images=None, **settings):
    matcher = {"geometric": NearestMatcher(), "similarity": SimilarityMatcher(), None: None}[
        matcher
    ]
    settings = {"steps": 6, "batch_size": 4, "log_every": 2, "seed": 1} | settings
    return train(
        SyntheticScenes(12, 32) if images is None else images,
        lambda: network(matcher is not None),
        MultiCrop(global_size=16, local_size=8, local_count=2),
        matcher,
        num_global=2,
        output=output,
        head=HEAD,
        loss=settings.pop("loss", LossOptions()),
        optim=settings.pop("optim", OptimOptions(warmup=2)),
        **settings,
    )


def _lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def weights(path):
    state = load_checkpoint(path)
    return [state[key] for key in ("network", "teacher", "criterion")]


def same(a, b):
    return all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("matcher", ["geometric", "similarity", None])
def test_it_trains_and_tells(tmp_path, matcher):
    result = run(tmp_path, matcher)
    assert result.step == 6
    assert not result.interrupted
    lines = [json.loads(line) for line in _lines(tmp_path)]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert 0 < line["teacher_entropy"] <= torch.tensor(16.0).log().item() + 1e-6
        assert ("local_loss" in line) is (matcher is not None)
        if matcher is not None:
            assert 0 < line["coverage"] <= 1
            assert line["loss"] == pytest.approx((line["global_loss"] + line["local_loss"]) / 2)
    assert list(tmp_path.glob("events.out.tfevents.*"))
    start = network(matcher is not None).state_dict()
    torch.manual_seed(1)
    trained = load_checkpoint(result.checkpoint)["network"]
    assert trained.keys() == start.keys()
    center = load_checkpoint(result.checkpoint)["criterion"]
    assert all(value.isfinite().all() for value in center.values())
    assert max(float(v.abs().max()) for k, v in center.items() if k.endswith("center")) > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, workers):
    whole = run(tmp_path / "whole", steps=8)
    # a run that is stopped at step 3 (of 8: the schedules are of the whole)
    run_and_stop(tmp_path / "part", 3, steps=8)
    assert load_checkpoint(tmp_path / "part" / "last.ckpt")["step"] == 3
    again = run(tmp_path / "part", steps=8, resume=True, workers=workers)
    assert again.step == 8
    assert same(weights(whole.checkpoint), weights(again.checkpoint))
    lines = [
        [json.loads(line)["step"] for line in _lines(tmp_path / name)] for name in ("whole", "part")
    ]
    assert lines[0] == lines[1] == [2, 4, 6, 8]


def run_and_stop(output, step, **settings):
    """As Ctrl-C does: a signal in the middle of a step, which is then finished and saved."""

    class Stopping(SyntheticScenes):
        seen = 0

        def __getitem__(self, index):
            Stopping.seen += 1
            if Stopping.seen == 4 * step:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    result = run(output, images=Stopping(12, 32), **settings)
    assert result.interrupted
    assert result.step == step
    return result


def test_the_signal_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run_and_stop(tmp_path, 2)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_it_runs_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path, steps=1)))
    thread.start()
    thread.join()
    assert results[0].step == 1


def test_a_nan_image_costs_a_step_and_no_state(tmp_path, capsys):
    class Poison(MultiCrop):
        calls = 0

        def forward(self, image):
            Poison.calls += 1
            views, geometries = super().forward(image)
            if Poison.calls == 6:  # an image of the second step
                views[0] = views[0] * torch.nan
            return views, geometries

    result = train(
        SyntheticScenes(12, 32), network,
            Poison(global_size=16, local_size=8, local_count=2), NearestMatcher(), num_global=2,
        output=tmp_path, steps=4, batch_size=4, head=HEAD, loss=LossOptions(),
        optim=OptimOptions(warmup=2), log_every=1,
    )  # fmt: skip
    assert "step 2: the gradient is not finite, skipped" in capsys.readouterr().out
    state = load_checkpoint(result.checkpoint)
    for part in ("network", "teacher", "criterion"):
        assert all(value.isfinite().all() for value in state[part].values())
    skipped = [v for k, v in state["criterion"].items() if k.endswith("skipped")]
    assert [int(value) for value in skipped] == [1, 1]


def test_a_run_that_cannot_recover_is_stopped(tmp_path, monkeypatch):
    from local_distill.training import trainer

    monkeypatch.setattr(trainer, "_MOST_SKIPPED", 3)

    class Poison(MultiCrop):
        def forward(self, image):
            views, geometries = super().forward(image)
            return [view * torch.nan for view in views], geometries

    with pytest.raises(LocalDistillError, match="3 steps in a row"):
        train(
            SyntheticScenes(12, 32), network,
            Poison(global_size=16, local_size=8, local_count=2), None, num_global=2,
            output=tmp_path, steps=9, batch_size=4, head=HEAD, loss=LossOptions(),
            optim=OptimOptions(),
        )  # fmt: skip


@pytest.mark.parametrize("matcher", ["geometric", None])
def test_the_student_learns_a_teacher_that_stands_still(tmp_path, matcher):
    # with a moving one the loss may rise: what is to be learned grows with what was learned
    still = LossOptions(teacher_momentum=1.0, center_momentum=0.999, teacher_temp=0.1,
                        teacher_temp_start=0.1)  # fmt: skip
    run(tmp_path, matcher, steps=40, images=SyntheticScenes(40, 32), batch_size=8, log_every=1,
        loss=still, optim=OptimOptions(lr=5e-3, warmup=4))  # fmt: skip
    lines = [json.loads(line) for line in _lines(tmp_path)]
    # the cross-entropy cannot fall below the teacher's entropy: the gap between them can
    gaps = [line["global_loss"] - line["teacher_entropy"] for line in lines]
    assert sum(gaps[-5:]) < 0.75 * sum(gaps[:5])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"batch_size": 13}, "`batch_size` is 13.*12 images: lower it to at most 12"),
        ({"steps": 0}, "`steps`"),
        ({"log_every": 0}, "`log_every`"),
    ],
)
def test_settings_that_cannot_work(tmp_path, change, text):
    with pytest.raises(ConfigError, match=text):
        run(tmp_path / "new", **change)
    assert not (tmp_path / "new" / "last.ckpt").exists()


def test_a_run_is_never_overwritten_or_resumed_otherwise(tmp_path):
    first = run(tmp_path, steps=2, config={"steps": 2, "optim": {"lr": 1.0}})
    before = first.checkpoint.read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        run(tmp_path, steps=2)
    with pytest.raises(ConfigError, match=r"optim\.lr: 1\.0 in the checkpoint, 2\.0 now"):
        run(tmp_path, steps=2, resume=True, config={"steps": 2, "optim": {"lr": 2.0}})
    assert first.checkpoint.read_bytes() == before


def test_mixed_precision_keeps_state_and_geometry_in_float32(tmp_path):
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    result = run(tmp_path, steps=2, fabric=fabric)
    state = load_checkpoint(result.checkpoint)
    for part in ("network", "teacher", "criterion"):
        kinds = {value.dtype for value in state[part].values()}
        assert kinds <= {torch.float32, torch.int64}
    lines = [json.loads(line) for line in _lines(tmp_path)]
    plain = run(tmp_path / "plain", steps=2)
    assert plain.step == 2
    exact = [json.loads(line) for line in _lines(tmp_path / "plain")]
    # the matches come from geometry alone: what is learned may differ, they may not
    assert lines[0]["coverage"] == exact[0]["coverage"]
    assert lines[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.1)
