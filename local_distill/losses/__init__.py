"""Losses of self-distillation, global and local."""

from local_distill.losses.global_distillation import GlobalDistillationLoss
from local_distill.losses.global_local import DistillationTerms, GlobalLocalDistillationLoss
from local_distill.losses.local_distillation import LocalDistillationLoss, local_distillation_loss

__all__ = [
    "DistillationTerms",
    "GlobalDistillationLoss",
    "GlobalLocalDistillationLoss",
    "LocalDistillationLoss",
    "local_distillation_loss",
]
