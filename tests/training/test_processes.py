"""The command on two processes, over gloo on the loopback."""

import json
import os
import socket
import subprocess
import sys

import torch

from local_distill.training.checkpoints import load_checkpoint

TINY = [
    *("--steps", "3", "--workers", "0", "--scenes.count", "12", "--scenes.size", "32"),
    *("--views", "local_distill.MultiCrop", "--views.local_count", "1"),
    *("--views.global_size", "16", "--views.local_size", "8"),
    *("--head.num_prototypes", "16", "--head.hidden_dim", "24", "--log_every", "1"),
    *("--backbone.kwargs", '{"img_size": 16, "width": 24, "depth": 1}', "--accelerator", "cpu"),
]


def train(output, devices, batch_size):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "local_distill.training.cli", "train", "--output", str(output)]
    settings = ["--devices", str(devices), "--batch_size", str(batch_size), *TINY]
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, *settings], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_checkpoint(output / "last.ckpt")


def test_two_processes_train_as_one(tmp_path):
    one = train(tmp_path / "one", 1, 4)
    two = train(tmp_path / "two", 2, 2)
    for part in ("network", "teacher", "criterion"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            # A key's bias shifts all scores of a query alike: its gradient is rounding noise, which
            # Adam blows up to the size of a step.
            if not name.endswith("qkv.bias"):
                torch.testing.assert_close(two[part][name], value, rtol=1e-3, atol=1e-5)
    lines = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    ]
    for a, b in zip(*lines, strict=True):
        for name in ("loss", "global_loss", "local_loss", "gradient_norm"):
            assert abs(a[name] - b[name]) < 1e-4, name
