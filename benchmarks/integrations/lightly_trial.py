"""Lightly's own DINO examples with our lines in them: an epoch of each on the built-in scenes.

    git clone https://github.com/lightly-ai/lightly
    python -m benchmarks.integrations.lightly_trial lightly trial

On CPU: plain torch and Lightning, in one process and in two, and once without our lines. `OURS` are
the lines of docs/integrations/lightly.md and lightning.md. What a machine without GPU and without
the example's data needs besides (`SHIMS`, `run_script`) stands apart, and is not counted.
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
import torch.distributed as dist

from benchmarks.integrations.trial import Change, apply_changes, copy_of, fall, run_named

__all__ = ["OURS"]

SCENES, SCENE_SIZE = 640, 128  # a process
# DINO's center starts at 0, and its loss rises until it is that of the teacher's logits: so many
# steps, with and without our lines.
SETTLING = 20
CENTER = "local_loss.targets.center"
PLAIN, LIGHTNING = "pytorch/dino.py", "pytorch_lightning/dino.py"
TWO_LIGHTNING = "pytorch_lightning_distributed/dino.py"
RUNS = {
    "without": (PLAIN, 1),
    "plain": (PLAIN, 1),
    "plain-2": (PLAIN, 2),
    "lightning": (LIGHTNING, 1),
    "lightning-2": (TWO_LIGHTNING, 2),
}


_START = (
    ("from lightly.utils.scheduler", "after", ("import local_distill as ld",)),
    ("transform = DINOTransform()", "instead", ("transform = ld.upgrade(DINOTransform())",)),
)
_LOCAL_LOSS = "self.local_loss = ld.LocalDistillationLoss(ld.Centering(2048))"
_GRID = 'grid = ld.TimmBackbone("resnet18").token_grid'
_MATCH = "matches = ld.match_views(ld.NearestMatcher(), student, teacher)"
_PLAIN = (
    *_START,
    ("deactivate_requires_grad(self.teacher_head)", "after", (_LOCAL_LOSS,)),
    (
        "model = DINO(",
        "after",
        (
            _GRID,
            'taps = [ld.TokenTap(part, "7", grid=grid) for part in (backbone, '
            "model.teacher_backbone)]",
        ),
    ),
    (
        "views = batch[0]",
        "instead",
        ("views, geometries = batch[0]",),
    ),
    (
        "loss = criterion(",
        "after",
        (
            "student, teacher = taps[0].take(geometries), taps[1].take(geometries[:2])",
            _MATCH,
            "student_out = [model.student_head(view.features) for view in student]",
            "teacher_out = [model.teacher_head(view.features) for view in teacher]",
            "loss = loss + model.local_loss(student_out, teacher_out, matches, teacher_temp=0.04)",
        ),
    ),
)
_LIGHTNING = (
    *_START,
    (
        "deactivate_requires_grad(self.teacher_head)",
        "after",
        (
            _LOCAL_LOSS,
            _GRID,
            'self.student_tap = ld.TokenTap(self.student_backbone, "7", grid=grid)',
            'self.teacher_tap = ld.TokenTap(self.teacher_backbone, "7", grid=grid)',
        ),
    ),
    ("views = batch[0]", "instead", ("views, geometries = batch[0]",)),
    (
        "loss = self.criterion(",
        "after",
        (
            "student, teacher = self.student_tap.take(geometries), "
            "self.teacher_tap.take(geometries[:2])",
            _MATCH,
            "student_out = [self.student_head(view.features) for view in student]",
            "teacher_out = [self.teacher_head(view.features) for view in teacher]",
            "loss = loss + self.local_loss(student_out, teacher_out, matches, teacher_temp=0.04)",
        ),
    ),
)
OURS = {
    PLAIN: tuple(Change(PLAIN, *change) for change in _PLAIN),
    LIGHTNING: tuple(Change(LIGHTNING, *change) for change in _LIGHTNING),
    TWO_LIGHTNING: tuple(Change(TWO_LIGHTNING, *change) for change in _LIGHTNING),
}

# (old, new), no lines of ours: an epoch of small views on a CPU. The example's data set is replaced
# by the scenes in `run_script`.
_SMALL = (
    ("DINOTransform()", "DINOTransform(96, local_crop_size=64, n_local_views=2)"),
    ("batch_size=64", "batch_size=8"),
    ("num_workers=8", "num_workers=0"),
)
SHIMS = {
    PLAIN: (*_SMALL, ("range(epochs)", "range(1)")),
    LIGHTNING: (*_SMALL, ("max_epochs=10", "max_epochs=1")),
    TWO_LIGHTNING: (
        *_SMALL,
        ("max_epochs=10", "max_epochs=1"),
        ('devices="auto"', "devices=2"),
        ('accelerator="gpu"', 'accelerator="cpu"'),
        ("sync_batchnorm=True", "sync_batchnorm=False"),  # torch has it for GPUs alone
    ),
}
# In two processes the plain example, which has no form for them, gets every process's own scenes,
# and gradients that are averaged before each step.


def adapt(text: str, shims: tuple[tuple[str, str], ...]) -> str:
    """The script for a CPU."""
    for old, new in shims:
        if old not in text:
            raise SystemExit(f"there is no {old!r} to replace")
        text = text.replace(old, new)
    return text


def run_script(script: Path, out: Path) -> None:
    """In a process of its own: the script, on scenes, with both losses written down."""
    import torchvision
    from lightly.loss import DINOLoss
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    from torch.utils.data import Subset

    from local_distill import LocalDistillationLoss
    from local_distill.training.scenes import SyntheticScenes

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    plain = script.parent.name == "pytorch"
    terms: dict[str, list[float]] = {"global": [], "local": []}

    def write_down(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, DINOLoss):
            terms["global"].append(output.item())
        if isinstance(module, LocalDistillationLoss):
            terms["local"].append(output.item())

    def average(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= world

    def scenes(root: str, download: bool, transform: Any, target_transform: Any) -> Any:
        everything = SyntheticScenes(SCENES * world, SCENE_SIZE, transform=transform)
        return Subset(everything, range(rank, len(everything), world)) if plain else everything

    torch.manual_seed(0)
    torch.nn.modules.module.register_module_forward_hook(write_down)
    torchvision.datasets.VOCDetection = scenes
    if plain and world > 1:
        dist.init_process_group("gloo")
        register_optimizer_step_pre_hook(average)
    model = runpy.run_path(str(script), run_name="__main__")["model"]
    if plain:  # the plain example saves nothing
        torch.save({"state_dict": model.state_dict()}, out / f"rank{rank}.ckpt")
    state = {name: value.double().sum().item() for name, value in model.state_dict().items()}
    (out / f"rank{rank}.json").write_text(json.dumps({"terms": terms, "state": state}))
    if dist.is_initialized():
        dist.destroy_process_group()


def try_run(name: str, clone: Path, out: Path) -> dict[str, Any]:
    """One run, checked: its figures."""
    example, processes = RUNS[name]
    if (out / name).exists():
        raise SystemExit(f"{out / name} is there already: give a new folder")
    examples = copy_of(clone / "examples", out / name / "examples")
    count = apply_changes(examples, () if name == "without" else OURS[example])
    script = examples / example
    script.write_text(adapt(script.read_text("utf-8"), SHIMS[example]), "utf-8")
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(launch if processes > 1 else [])]
    command += ["benchmarks.integrations.lightly_trial", "--script", str(script.resolve())]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    begin = time.perf_counter()
    with (out / name / "log.txt").open("w") as log:
        subprocess.run(command, cwd=out / name, env=environment, stdout=log, stderr=log, check=True)
    seconds = round(time.perf_counter() - begin)
    ranks = [json.loads((out / name / f"rank{n}.json").read_text()) for n in range(processes)]
    for rank in ranks[1:]:
        check_alike(ranks[0]["state"], rank["state"])
    figures = {"example": example, "processes": processes, "seconds": seconds, **count._asdict()}
    if count.added:
        figures["in the checkpoint"] = saved_parts(out / name)
    for term, values in ranks[0]["terms"].items():
        if values or count.added:
            figures[term] = fall(values, after=SETTLING)
            if not figures[term].falling:
                raise SystemExit(f"{name}: the {term} loss does not fall: {values}")
    return figures


def saved_parts(folder: Path) -> list[str]:
    """What of ours the checkpoint below the folder holds, and that its center was updated."""
    (checkpoint, *_) = sorted(folder.rglob("*.ckpt"))
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    if not saved[CENTER].abs().sum() > 0:
        raise SystemExit(f"{checkpoint}: `{CENTER}` was never updated")
    return [key for key in saved if key.startswith("local_loss.")]


def check_alike(first: dict[str, float], other: dict[str, float]) -> None:
    """Processes hold the same parameters and centers; BatchNorm's statistics are each one's own."""
    for name, value in first.items():
        own = any(part in name for part in ("running_", "num_batches"))
        if not own and not math.isclose(value, other[name], rel_tol=1e-4, abs_tol=1e-4):
            raise SystemExit(f"`{name}` differs between processes: {value} and {other[name]}")


def main() -> None:
    description = __doc__.splitlines()[0]
    run_named("Lightly", "lightly-ai/lightly", description, list(RUNS), try_run, run_script)


if __name__ == "__main__":
    main()
