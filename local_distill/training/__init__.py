"""Data, evaluation, checkpoints, the thin reference trainer, the command line (extra ``train``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from local_distill._lazy import lazy_names

if TYPE_CHECKING:
    from local_distill.training.backbone_loading import load_backbone
    from local_distill.training.checkpoints import CheckpointStore, load_checkpoint
    from local_distill.training.data.image_files import ImageFiles
    from local_distill.training.data.open_images import open_images
    from local_distill.training.evaluation import (
        evaluate_backbone,
        extract_features,
        knn_accuracy,
    )
    from local_distill.training.export import export_backbone
    from local_distill.training.methods.method import Method
    from local_distill.training.network import DistillationNetwork
    from local_distill.training.scenes import Scene, SyntheticScenes
    from local_distill.training.trainer import TrainResult, train
    from local_distill.training.views import DemoCrop

__all__ = [
    "CheckpointStore",
    "DemoCrop",
    "DistillationNetwork",
    "ImageFiles",
    "Method",
    "Scene",
    "SyntheticScenes",
    "TrainResult",
    "evaluate_backbone",
    "export_backbone",
    "extract_features",
    "knn_accuracy",
    "load_backbone",
    "load_checkpoint",
    "open_images",
    "train",
]

_LAZY = {
    "CheckpointStore": "local_distill.training.checkpoints",
    "DemoCrop": "local_distill.training.views",
    "DistillationNetwork": "local_distill.training.network",
    "ImageFiles": "local_distill.training.data.image_files",
    "Method": "local_distill.training.methods.method",
    "Scene": "local_distill.training.scenes",
    "SyntheticScenes": "local_distill.training.scenes",
    "TrainResult": "local_distill.training.trainer",
    "evaluate_backbone": "local_distill.training.evaluation",
    "export_backbone": "local_distill.training.export",
    "extract_features": "local_distill.training.evaluation",
    "knn_accuracy": "local_distill.training.evaluation",
    "load_backbone": "local_distill.training.backbone_loading",
    "load_checkpoint": "local_distill.training.checkpoints",
    "open_images": "local_distill.training.data.open_images",
    "train": "local_distill.training.trainer",
}

if not TYPE_CHECKING:  # a type checker would take any name for one that is there
    __getattr__ = lazy_names(__name__, _LAZY)
