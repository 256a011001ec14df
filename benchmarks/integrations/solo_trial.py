"""solo-learn's own pretraining with our subclass in it: an epoch on the built-in scenes, on CPU.

    git clone https://github.com/vturrisi/solo-learn
    python -m benchmarks.integrations.solo_trial solo-learn trial

In one process and in two. `SUBCLASS` and `OURS` are the lines of docs/integrations/solo-learn.md.
What a machine without GPU needs besides (`settings`, `run_script`)
stands apart, and is not counted.
"""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.integrations.trial import (
    Change,
    apply_changes,
    copy_of,
    fall,
    lines_of_code,
    run_named,
    write_scene_folders,
)

__all__ = ["OURS", "SUBCLASS"]

RUNS = {"one": 1, "two": 2}
SCENES, SCENE_SIZE, BATCH = 640, 96, 4
# The center of DINO's loss starts at 0, and the loss rises until the center is that of the
# teacher's logits: so many steps.
SETTLING = 20
CENTER = "local_loss.targets.center"

SUBCLASS = """\
import copy

import local_distill as ld
import torch

from solo.methods.dino import DINO


class LocalDINO(DINO):
    def __init__(self, cfg):
        super().__init__(cfg)
        prototypes = cfg.method_kwargs.num_prototypes
        self.local_head = ld.ProjectionHead(self.features_dim, prototypes)
        self.momentum_local_head = copy.deepcopy(self.local_head).requires_grad_(False)
        self.local_loss = ld.LocalDistillationLoss(ld.Centering(prototypes))
        self.student_tap = ld.TokenTap(self.backbone)
        self.teacher_tap = ld.TokenTap(self.momentum_backbone)

    @property
    def learnable_params(self):
        ours = {"name": "local_head", "params": self.local_head.parameters()}
        return [*super().learnable_params, ours]

    @property
    def momentum_pairs(self):
        return [*super().momentum_pairs, (self.local_head, self.momentum_local_head)]

    def training_step(self, batch, batch_idx):
        index, (views, geometries), labels = batch
        loss = super().training_step([index, views, labels], batch_idx)
        student = self.student_tap.take(geometries)
        teacher = self.teacher_tap.take(geometries[: self.num_large_crops])
        matches = ld.match_views(ld.NearestMatcher(), student, teacher)
        student_out = [self.local_head(view.features) for view in student]
        with torch.no_grad():
            teacher_out = [self.momentum_local_head(view.features) for view in teacher]
        temp = self.dino_loss_func.teacher_temp_schedule[self.current_epoch]
        local = self.local_loss(student_out, teacher_out, matches, teacher_temp=temp)
        self.log("local_loss", local, on_epoch=True, sync_dist=True)
        return loss + local
"""
SUBCLASS_FILE = "solo/methods/local_dino.py"
_METHODS, _MAIN = "solo/methods/__init__.py", "main_pretrain.py"
OURS = (
    Change(
        _METHODS,
        "from solo.methods.linear import",
        "before",
        ("from solo.methods.local_dino import LocalDINO",),
    ),
    Change(_METHODS, '"dino": DINO,', "after", ('"local_dino": LocalDINO,',)),
    Change(
        _MAIN, "from omegaconf import DictConfig", "before", ("from local_distill import upgrade",)
    ),
    Change(_MAIN, "if cfg.debug_augmentations:", "before", ("transform = upgrade(transform)",)),
)


def settings(scenes: Path, processes: int) -> dict[str, Any]:
    """What their YAML file says, for an epoch of small views on a CPU; no lines of ours."""

    def views(size: int, count: int, smallest: float) -> dict[str, Any]:
        jitter = {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
        return {
            "rrc": {"enabled": True, "crop_min_scale": smallest, "crop_max_scale": 1.0},
            "color_jitter": jitter,
            "grayscale": {"prob": 0.2},
            "gaussian_blur": {"prob": 0.5},
            "solarization": {"prob": 0.1},
            "equalization": {"prob": 0.0},
            "horizontal_flip": {"prob": 0.5},
            "crop_size": size,
            "num_crops": count,
        }

    quiet = [{f"override hydra/{part}_logging": "disabled"} for part in ("hydra", "job")]
    return {
        "defaults": ["_self_", *quiet],
        "hydra": {"output_subdir": None, "run": {"dir": "."}},
        "name": "scenes",
        "method": "local_dino",
        "backbone": {
            "name": "vit_tiny",
            "kwargs": {"patch_size": 12, "img_size": 48, "dynamic_img_size": True},
        },
        "method_kwargs": {
            "proj_hidden_dim": 256,
            "proj_output_dim": 64,
            "num_prototypes": 256,
            "freeze_last_layer": 0,
            "warmup_teacher_temperature": 0.01,
            "teacher_temperature": 0.01,
            "warmup_teacher_temperature_epochs": 1,
        },
        "momentum": {"base_tau": 0.9995, "final_tau": 1.0},
        "data": {
            "dataset": "custom",
            "train_path": str(scenes),
            "format": "image_folder",
            "num_workers": 0,
        },
        "augmentations": [views(48, 2, 0.3), views(24, 2, 0.1)],
        "optimizer": {
            "name": "adamw",
            "batch_size": BATCH,
            "lr": 3e-4 * 256 / BATCH,  # they scale it by the batch size over 256
            "classifier_lr": 3e-3,
            "weight_decay": 1e-4,
        },
        "scheduler": {"name": "none"},
        "checkpoint": {"enabled": True, "dir": "trained_models", "frequency": 1},
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": str(processes),  # on a CPU Lightning wants a number; theirs asks for its length
        "strategy": "ddp" if processes > 1 else "auto",
        "enable_progress_bar": False,
    }


def run_script(script: Path, out: Path) -> None:
    """In a process of its own: their script, with both losses written down."""
    from solo.losses.dino import DINOLoss

    from local_distill import LocalDistillationLoss

    terms: dict[str, list[float]] = {"global": [], "local": []}
    losses: dict[str, Any] = {}

    def write_down(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, DINOLoss):
            terms["global"].append(output.item())
        if isinstance(module, LocalDistillationLoss):
            terms["local"].append(output.item())
            losses["local"] = module

    torch.manual_seed(0)
    torch.nn.modules.module.register_module_forward_hook(write_down)
    sys.argv = [str(script), "--config-path", str(out.resolve()), "--config-name", "settings"]
    runpy.run_path(str(script), run_name="__main__")
    state = {
        key: value.double().sum().item() for key, value in losses["local"].state_dict().items()
    }
    rank = os.environ.get("RANK", "0")
    (out / f"rank{rank}.json").write_text(json.dumps({"terms": terms, "state": state}))


def try_run(name: str, clone: Path, out: Path) -> dict[str, Any]:
    """One run, checked: its figures."""
    processes, folder = RUNS[name], out / name
    if folder.exists():
        raise SystemExit(f"{folder} is there already: give a new folder")
    code = copy_of(clone, folder / "code")
    (code / SUBCLASS_FILE).write_text(SUBCLASS, "utf-8")
    count = apply_changes(code, OURS)
    scenes = write_scene_folders(folder / "scenes", SCENES * processes, SCENE_SIZE)
    (folder / "settings.yaml").write_text(json.dumps(settings(scenes, processes)), "utf-8")
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(launch if processes > 1 else [])]
    command += ["benchmarks.integrations.solo_trial", "--script", str(code / _MAIN)]
    paths = os.pathsep.join((str(code), str(Path(__file__).parents[2])))
    begin = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, check=True)
    seconds = round(time.perf_counter() - begin)
    ranks = [json.loads((folder / f"rank{n}.json").read_text()) for n in range(processes)]
    for rank in ranks[1:]:
        if not math.isclose(rank["state"]["targets.center"], ranks[0]["state"]["targets.center"]):
            raise SystemExit("the center differs between the processes")
    figures: dict[str, Any] = {"processes": processes, "seconds": seconds}
    figures["subclass"] = lines_of_code(SUBCLASS[SUBCLASS.index("class ") :].splitlines())
    figures["its imports"] = lines_of_code(SUBCLASS.splitlines()) - figures["subclass"]
    figures["elsewhere"] = count._asdict()
    figures["in the checkpoint"] = saved_parts(folder)
    for term, values in ranks[0]["terms"].items():
        figures[term] = fall(values[SETTLING:])
        if not figures[term].falling:
            raise SystemExit(f"{name}: the {term} loss does not fall: {values}")
    return figures


def saved_parts(folder: Path) -> list[str]:
    """What of ours the checkpoint below the folder holds, and that its center was updated."""
    (checkpoint,) = (folder / "trained_models").rglob("*.ckpt")
    # Theirs, written a moment ago by this run; it holds more than tensors.
    saved = torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]
    if not saved[CENTER].abs().sum() > 0:
        raise SystemExit(f"{checkpoint}: `{CENTER}` was never updated")
    return [key for key in saved if key.startswith(("local_", "momentum_local_"))]


def main() -> None:
    description = __doc__.splitlines()[0]
    run_named("solo-learn", "vturrisi/solo-learn", description, list(RUNS), try_run, run_script)


if __name__ == "__main__":
    main()
