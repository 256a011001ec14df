"""DINOv2's own ``train.py`` with our lines in it: an epoch on the built-in scenes.

    git clone https://github.com/facebookresearch/dinov2
    pip install fvcore omegaconf
    python -m benchmarks.integrations.dinov2_trial dinov2 trial

In one process and in two. `OURS` are the lines of docs/integrations/dinov2.md. What stands in for
GPUs, xformers, FSDP and ImageNet is in `dinov2_on_cpu`.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from benchmarks.integrations.trial import Change, Started, fall, run_on_cpu, started

__all__ = ["OURS"]

_TRAIN = "dinov2/train/train.py"
_COLLATE = "dinov2/data/collate.py"
_STEP = "dinov2/train/ssl_meta_arch.py"

OURS = (
    Change(
        _TRAIN,
        "from dinov2.train.ssl_meta_arch import",
        "after",
        ("from local_distill import upgrade",),
    ),
    Change(
        _TRAIN, "collate_fn = partial(", "before", ("data_transform = upgrade(data_transform)",)
    ),
    Change(_COLLATE, "import random", "after", ("from torch.utils.data import default_collate",)),
    Change(
        _COLLATE,
        "n_global_crops = len(",
        "before",
        (
            "geometries = default_collate([geometries for (_, geometries), _ in samples_list])",
            'samples_list = [({"global_crops": views[:2], "local_crops": views[2:]}, label)'
            " for (views, _), label in samples_list]",
        ),
    ),
    Change(_COLLATE, '"collated_masks": collated_masks', "after", ('"geometries": geometries,',)),
    Change(
        _STEP,
        "from dinov2.models.vision_transformer import BlockChunk",
        "after",
        (
            "from local_distill import (Centering, LocalDistillationLoss, NearestMatcher, TokenTap,"
            " match_views)",
            "",
            "",
            "def local_logits(head, tokens):",
            "    # one call for all views: FSDP gathers the head's parameters for each",
            "    scores = head(torch.cat([view.features.flatten(0, 1) for view in tokens]))",
            "    shapes = [view.features.shape[:2] for view in tokens]",
            "    parts = scores.split([shape.numel() for shape in shapes])",
            "    return [part.unflatten(0, shape) for part, shape in zip(parts, shapes)]",
        ),
    ),
    Change(
        _STEP,
        "self.student = nn.ModuleDict(student_model_dict)",
        "before",
        (
            'student_model_dict["local_head"], teacher_model_dict["local_head"] ='
            " dino_head(), dino_head()",
            'self.student_tap = TokenTap(student_backbone, "norm")',
            'self.teacher_tap = TokenTap(teacher_backbone, "norm", in_eval=True)',
            "self.local_loss = LocalDistillationLoss(Centering(self.dino_out_dim))",
            "for part in (cfg.compute_precision.student, cfg.compute_precision.teacher):",
            "    part.local_head = part.dino_head",
        ),
    ),
    Change(
        _STEP,
        "reshard_fsdp_model(self.teacher)",
        "before",
        (
            'teacher_tokens = self.teacher_tap.take(images["geometries"][:2])',
            "teacher_logits = local_logits(self.teacher.local_head, teacher_tokens)",
        ),
    ),
    Change(
        _STEP,
        "self.backprop_loss(loss_accumulator)",
        "before",
        (
            'student_tokens = self.student_tap.take(images["geometries"])',
            "student_logits = local_logits(self.student.local_head, student_tokens)",
            "matches = match_views(NearestMatcher(), student_tokens, teacher_tokens)",
            'loss_dict["local_loss"] = self.local_loss('
            "student_logits, teacher_logits, matches, teacher_temp=teacher_temp)",
            'loss_accumulator += loss_dict["local_loss"]',
        ),
    ),
)

# Half precision is FSDP's there, and written into the code for its inputs.
SHIMS = (Change(_TRAIN, "inputs_dtype = torch.half", "instead", ("inputs_dtype = torch.float32",)),)

SETTINGS = """
compute_precision: {grad_scaler: false}
dino: {head_n_prototypes: 128, head_hidden_dim: 256, head_bottleneck_dim: 64}
ibot: {head_n_prototypes: 128}
train: {num_workers: 0, OFFICIAL_EPOCH_LENGTH: 160}
student: {arch: vit_nano, patch_size: 8, drop_path_rate: 0.0, layerscale: 1.0}
teacher: {momentum_teacher: 0.9995, teacher_temp: 0.01, warmup_teacher_temp_epochs: 0}
optim: {epochs: 1, warmup_epochs: 0, base_lr: 0.02, freeze_last_layer_epochs: 0, min_lr: 0.0001}
crops: {global_crops_size: 48, local_crops_size: 24, local_crops_number: 2}
evaluation: {eval_period_iterations: 0}
"""

# Of the checkpoint, what must be there for a run to go on.
STATE = (
    "student.local_head.last_layer.weight_v",
    "teacher.local_head.last_layer.weight_v",
    "local_loss.targets.center",
)
IMAGES, BATCH = 1280, 8


def main() -> None:
    """Print the figures of docs/integrations/dinov2.md, and fail where one is not as it should."""
    trial = started(__doc__.splitlines()[0], OURS, SHIMS, IMAGES, 64)
    (trial.work / "trial.yaml").write_text(SETTINGS)
    for processes in trial.processes:
        print(json.dumps(_train(trial, processes)), flush=True)


def _train(trial: Started, processes: int) -> dict[str, Any]:
    out = trial.work / f"run{processes}"
    arguments = ["--config-file", str(trial.work / "trial.yaml"), "--no-resume", "--output-dir"]
    arguments += [str(out), f"train.batch_size_per_gpu={BATCH // processes}"]
    run = run_on_cpu(
        trial.code / _TRAIN,
        arguments,
        record=trial.work / f"record{processes}",
        options=[str(trial.data)],
        processes=processes,
        runner="dinov2_on_cpu",
        paths=[trial.code],
    )
    terms = {name: fall(values) for name, values in run["ranks"][0]["losses"].items()}
    saved = torch.load(out / "model_final.rank_0.pth", map_location="cpu", weights_only=False)
    state = STATE if trial.with_ours else ()
    missing = [name for name in state if name not in saved["model"]]
    assert not missing, missing
    figures = {
        "processes": processes,
        "seconds": run["seconds"],
        "terms": {name: term._asdict() for name, term in terms.items()},
        "in the checkpoint": list(state),
        "ranks agree": [rank["ranks_agree"] for rank in run["ranks"]],
    }
    # Theirs are finite. Whether they fall is theirs to settle: the page tells where they did not.
    assert all(math.isfinite(term.last) for term in terms.values()), figures
    assert not trial.with_ours or terms["local_loss"].falling, figures
    assert all(figures["ranks agree"]), figures
    return figures


if __name__ == "__main__":
    main()
