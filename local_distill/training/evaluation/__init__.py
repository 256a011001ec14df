"""How good frozen features are: of images, of layers, of patch tokens, across views."""

from local_distill.training.evaluation.confusion import (
    confusion_matrix,
    mean_iou,
    pixel_accuracy,
)
from local_distill.training.evaluation.correspondence import (
    CorrespondenceErrors,
    ViewPairs,
    correspondence_errors,
    correspondence_views,
    draw_view_pairs,
    summarise_errors,
)
from local_distill.training.evaluation.dense import (
    DenseScores,
    linear_segmentation,
    majority_scores,
    token_retrieval,
)
from local_distill.training.evaluation.features import extract_features, scene_tokens
from local_distill.training.evaluation.frozen import FrozenFeatures, frozen_features
from local_distill.training.evaluation.image_sets import (
    EvaluationImages,
    StoredImages,
    draw_scenes,
)
from local_distill.training.evaluation.knn import knn_accuracies, knn_accuracy, knn_predictions
from local_distill.training.evaluation.layers import layer_accuracies
from local_distill.training.evaluation.linear_probe import (
    LinearClassifier,
    LinearProbe,
    fit_linear,
    linear_probe,
)
from local_distill.training.evaluation.tasks import (
    TASKS,
    Evaluation,
    Task,
    evaluate_backbone,
)
from local_distill.training.evaluation.token_maps import token_labels, upsample_scores

__all__ = [
    "TASKS",
    "CorrespondenceErrors",
    "DenseScores",
    "Evaluation",
    "EvaluationImages",
    "FrozenFeatures",
    "LinearClassifier",
    "LinearProbe",
    "StoredImages",
    "Task",
    "ViewPairs",
    "confusion_matrix",
    "correspondence_errors",
    "correspondence_views",
    "draw_scenes",
    "draw_view_pairs",
    "evaluate_backbone",
    "extract_features",
    "fit_linear",
    "frozen_features",
    "knn_accuracies",
    "knn_accuracy",
    "knn_predictions",
    "layer_accuracies",
    "linear_probe",
    "linear_segmentation",
    "majority_scores",
    "mean_iou",
    "pixel_accuracy",
    "scene_tokens",
    "summarise_errors",
    "token_labels",
    "token_retrieval",
    "upsample_scores",
]
