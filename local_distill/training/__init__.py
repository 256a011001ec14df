"""Data, evaluation, checkpoints, the thin reference trainer, the command line (extra ``train``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from local_distill._lazy import lazy_names

if TYPE_CHECKING:
    from local_distill.training.evaluation import extract_features, knn_accuracy
    from local_distill.training.images import ImageFiles
    from local_distill.training.network import DistillationNetwork
    from local_distill.training.scenes import Scene, SyntheticScenes
    from local_distill.training.trainer import TrainResult, train
    from local_distill.training.views import DemoCrop

__all__ = [
    "DemoCrop",
    "DistillationNetwork",
    "ImageFiles",
    "Scene",
    "SyntheticScenes",
    "TrainResult",
    "extract_features",
    "knn_accuracy",
    "train",
]

__getattr__ = lazy_names(
    __name__,
    {
        "DemoCrop": "local_distill.training.views",
        "DistillationNetwork": "local_distill.training.network",
        "ImageFiles": "local_distill.training.images",
        "Scene": "local_distill.training.scenes",
        "SyntheticScenes": "local_distill.training.scenes",
        "TrainResult": "local_distill.training.trainer",
        "extract_features": "local_distill.training.evaluation",
        "knn_accuracy": "local_distill.training.evaluation",
        "train": "local_distill.training.trainer",
    },
)
