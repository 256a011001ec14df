"""DINO's own ``main_dino.py`` with our lines in it: an epoch on the built-in scenes.

    git clone https://github.com/facebookresearch/dino
    python -m benchmarks.integrations.dino_trial dino trial

In one process and in two; then it is resumed from its checkpoint. `OURS` are the lines of
docs/integrations/dino.md. `SIZES` are theirs, smaller: the crops' sizes stand in the code.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from benchmarks.integrations.trial import (
    Change,
    Started,
    fall,
    run_on_cpu,
    started,
    write_scene_folders,
)

__all__ = ["OURS"]

_MAIN = "main_dino.py"

OURS = (
    Change(
        _MAIN,
        "from vision_transformer import DINOHead",
        "after",
        (
            "from local_distill import (Centering, LocalDistillationLoss, NearestMatcher, TokenTap,"
            " match_views, upgrade)",
        ),
    ),
    Change(_MAIN, "dataset = datasets.ImageFolder", "before", ("transform = upgrade(transform)",)),
    Change(
        _MAIN,
        "# move networks to gpu",
        "before",
        (
            "student.local_head, teacher.local_head ="
            " DINOHead(embed_dim, args.out_dim), DINOHead(embed_dim, args.out_dim)",
            "student.tap, teacher.tap ="
            ' TokenTap(student.backbone, "norm"), TokenTap(teacher.backbone, "norm")',
        ),
    ),
    Change(
        _MAIN,
        "# ============ preparing optimizer",
        "before",
        ("dino_loss.local = LocalDistillationLoss(Centering(args.out_dim)).cuda()",),
    ),
    Change(
        _MAIN,
        "for it, (images, _) in enumerate",
        "instead",
        (
            "for it, ((images, geometries), _) in"
            " enumerate(metric_logger.log_every(data_loader, 10, header)):",
        ),
    ),
    Change(
        _MAIN,
        "loss = dino_loss(student_output",
        "after",
        (
            "tokens = student.module.tap.take(geometries),"
            " teacher_without_ddp.tap.take(geometries[:2])",
            "heads = student.module.local_head, teacher_without_ddp.local_head",
            "logits = [[head(view.features) for view in views]"
            " for head, views in zip(heads, tokens)]",
            "loss = (loss + dino_loss.local(*logits, match_views(NearestMatcher(), *tokens),"
            " teacher_temp=dino_loss.teacher_temp_schedule[epoch])) / 2",
        ),
    ),
)

SIZES = (
    Change(
        "vision_transformer.py",
        "nlayers=3, hidden_dim=2048, bottleneck_dim=256",
        "instead",
        (
            "def __init__(self, in_dim, out_dim, use_bn=False, norm_last_layer=True, nlayers=3,"
            " hidden_dim=256, bottleneck_dim=64):",
        ),
    ),
    Change(
        "vision_transformer.py",
        "patch_size=patch_size, embed_dim=192, depth=12",
        "instead",
        ("patch_size=patch_size, embed_dim=192, depth=4, num_heads=3, mlp_ratio=4,",),
    ),
    Change(
        _MAIN,
        "class DataAugmentationDINO",
        "before",
        (
            "_cropped = transforms.RandomResizedCrop",
            "transforms.RandomResizedCrop ="
            " lambda size, **kwargs: _cropped({224: 64, 96: 32}[size], **kwargs)",
        ),
    ),
)

# Of the checkpoint, what must be there for a run to go on.
STATE = {
    "student": "module.local_head.last_layer.weight_v",
    "teacher": "local_head.last_layer.weight_v",
    "dino_loss": "local.targets.center",
}
TERMS = ("DINOLoss", "LocalDistillationLoss")
IMAGES, FEW, BATCH, OUT_DIM = 1280, 120, 8, 128


def main() -> None:
    """Print the figures of docs/integrations/dino.md, and fail where one is not as it should be."""
    trial = started(__doc__.splitlines()[0], OURS, SIZES, IMAGES, 96)
    for processes in trial.processes:
        print(json.dumps(_train(trial, processes)), flush=True)
    if 1 in trial.processes and trial.with_ours:
        few = trial.work / "few-scenes"
        if not few.exists():
            write_scene_folders(few, FEW, 96)
        print(json.dumps(_resume(trial._replace(data=few))))


def _train(trial: Started, processes: int) -> dict[str, Any]:
    out = trial.work / f"run{processes}"
    (out / "checkpoint.pth").unlink(missing_ok=True)
    run = _run(trial, processes, epochs=1)
    names, state = (TERMS, STATE) if trial.with_ours else (TERMS[:1], {})
    terms = {name: fall(run["ranks"][0]["losses"][name]) for name in names}
    saved = torch.load(out / "checkpoint.pth", map_location="cpu", weights_only=False)
    missing = [name for part, name in state.items() if name not in saved[part]]
    ok = all(term.falling for term in terms.values()) and not missing
    ok = ok and all(rank["ranks_agree"] for rank in run["ranks"])
    assert ok, (terms, missing, [rank["ranks_agree"] for rank in run["ranks"]])
    return {
        "processes": processes,
        "seconds": run["seconds"],
        "terms": {name: term._asdict() for name, term in terms.items()},
        "in the checkpoint": list(state.values()),
        "ranks agree": run["ranks"][0]["ranks_agree"],
    }


def _resume(trial: Started) -> dict[str, Any]:
    """A short epoch more from the checkpoint: the local loss goes on where it was."""
    work, out = trial.work, trial.work / "run1"
    before = torch.load(out / "checkpoint.pth", map_location="cpu", weights_only=False)
    first = json.loads((work / "record1-epochs1" / "rank0.json").read_text())["losses"]
    run = _run(trial, 1, epochs=2)
    after = torch.load(out / "checkpoint.pth", map_location="cpu", weights_only=False)
    log = (work / "record1-epochs2" / "log.txt").read_text()
    name = "LocalDistillationLoss"
    losses = {
        "at the start": first[name][0],
        "before": sum(first[name][-5:]) / 5,
        "resumed": sum(run["ranks"][0]["losses"][name][:5]) / 5,
    }
    loaded = log.count("<All keys matched successfully>")
    assert (before["epoch"], after["epoch"]) == (1, 2)
    assert loaded == 3, "student, teacher and dino_loss must load without a key missing"
    closer = abs(losses["resumed"] - losses["before"]) < abs(
        losses["resumed"] - losses["at the start"]
    )
    assert closer, losses
    return {"resumed": losses, "loaded whole": loaded}


def _run(trial: Started, processes: int, *, epochs: int) -> dict[str, Any]:
    out = trial.work / f"run{processes}"
    out.mkdir(parents=True, exist_ok=True)
    terms = TERMS if trial.with_ours else TERMS[:1]
    arguments = f"""
        --arch vit_tiny --patch_size 16 --out_dim {OUT_DIM} --local_crops_number 2 --use_fp16 false
        --epochs {epochs} --batch_size_per_gpu {BATCH // processes} --warmup_epochs 0 --lr 0.032
        --freeze_last_layer 0 --drop_path_rate 0 --num_workers 0 --momentum_teacher 0.9995
        --warmup_teacher_temp 0.01 --teacher_temp 0.01
    """.split()
    arguments += ["--data_path", str(trial.data), "--output_dir", str(out)]
    record = trial.work / f"record{processes}-epochs{epochs}"
    return run_on_cpu(
        trial.code / _MAIN, arguments, record=record, options=[",".join(terms)], processes=processes
    )


if __name__ == "__main__":
    main()
