"""An epoch of the page "Add it to transformers" on more scenes, in one process and in two.

Runs the first code block of docs/integrations/transformers.md as it stands, then trains its model
with transformers' `Trainer` on CPU. Checks that both terms of the loss are finite and fall, that
the checkpoint holds our state, that the processes agree, and that a new process which resumes from
the checkpoint has that state back.

    python -m benchmarks.integrations.transformers_trial trial
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.integrations.trial import fall

__all__ = ["page_code"]

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "integrations" / "transformers.md"
SCENES, BATCH_SIZE = 2560, 16  # a process
LAST = f"checkpoint-{SCENES // BATCH_SIZE}"
# DINO's center starts at 0, and its loss rises until it is that of the teacher's logits: so many
# steps.
SETTLING = 40
CENTERS = "global_loss.targets.center", "local_loss.targets.center"


def page_code() -> str:
    """The page's first block: everything but the training run."""
    spec = importlib.util.spec_from_file_location("run_page", ROOT / "docs" / "run_page.py")
    assert spec is not None
    assert spec.loader is not None
    run_page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run_page)
    block: str = run_page.code_blocks(PAGE)[0]
    return block


def train(out: Path, resume: bool) -> None:
    """In a process of its own: an epoch, with both losses written down."""
    from transformers import TrainingArguments, ViTConfig, set_seed

    import local_distill as ld
    from local_distill.training.scenes import SyntheticScenes

    page: Any = types.ModuleType("page")
    sys.modules["page"] = page
    exec(compile(page_code(), str(PAGE), "exec"), page.__dict__)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    terms: dict[str, list[float]] = {"global": [], "local": []}

    def write_down(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, ld.GlobalDistillationLoss):
            terms["global"].append(output.item())
        if isinstance(module, ld.LocalDistillationLoss):
            terms["local"].append(output.item())

    torch.nn.modules.module.register_module_forward_hook(write_down)
    set_seed(0)
    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=192,
        image_size=48,
        patch_size=8,
    )
    trainer = page.SelfDistillationTrainer(
        page.SelfDistillation(config),
        TrainingArguments(
            str(out / "run"),
            per_device_train_batch_size=BATCH_SIZE,
            num_train_epochs=1,
            learning_rate=1e-3,
            warmup_steps=10,
            remove_unused_columns=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="epoch",
        ),
        data_collator=page.collate,
        train_dataset=SyntheticScenes(SCENES * world, transform=page.transform),
        callbacks=[page.MoveTeacher()],
    )
    # Resumed at the end of its only epoch it has nothing left to train, and holds what it loaded.
    trainer.train(resume_from_checkpoint=str(out / "run" / LAST) if resume else None)
    held = trainer.model.state_dict()
    state = {name: value.double().sum().item() for name, value in held.items()}
    name = f"resumed{rank}.json" if resume else f"rank{rank}.json"
    (out / name).write_text(json.dumps({"terms": terms, "state": state}))
    if dist.is_initialized():
        dist.destroy_process_group()


def try_run(processes: int, out: Path) -> dict[str, Any]:
    """One run, checked: its figures."""
    from safetensors.torch import load_file

    folder = out / f"processes-{processes}"
    folder.mkdir(parents=True)  # an old one would hold an old checkpoint
    begin = time.perf_counter()
    launch(processes, folder)
    seconds = time.perf_counter() - begin
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
    launch(processes, folder, "--resume")
    resumed = json.loads((folder / "resumed0.json").read_text())
    for other in (*ranks[1:], resumed):
        check_alike(ranks[0]["state"], other["state"])
    saved = load_file(folder / "run" / LAST / "model.safetensors")
    for center in CENTERS:
        if not saved[center].abs().sum() > 0:
            raise SystemExit(f"{folder}: `{center}` was never updated")
    figures: dict[str, Any] = {"processes": processes, "seconds": round(seconds)}
    figures["in the checkpoint"] = [key for key in saved if key.startswith("local_loss.")]
    for term, values in ranks[0]["terms"].items():
        figures[term] = fall(values, after=SETTLING)
        if not figures[term].falling:
            raise SystemExit(f"{folder}: the {term} loss does not fall: {values}")
    return figures


def launch(processes: int, folder: Path, *more: str) -> None:
    """This file again, in so many processes."""
    run = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(run if processes > 1 else [])]
    command += ["benchmarks.integrations.transformers_trial", "--train", *more, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (folder / f"log{''.join(more)}.txt").open("w") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)


def check_alike(first: dict[str, float], other: dict[str, float]) -> None:
    """The same parameters and centers."""
    for name, value in first.items():
        if not math.isclose(value, other[name], rel_tol=1e-6, abs_tol=1e-6):
            raise SystemExit(f"`{name}` differs: {value} and {other[name]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a new folder for the runs")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train(args.out, args.resume)
        return
    lines = sum(line.endswith("# +") for line in page_code().splitlines())
    print("lines of ours on the page:", lines)
    for processes in args.processes:
        print(json.dumps(try_run(processes, args.out.resolve())), flush=True)


if __name__ == "__main__":
    main()
