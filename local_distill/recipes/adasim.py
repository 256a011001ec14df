"""AdaSim: DINO between an image and, where features can be trusted, a neighbour of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from local_distill._check import check_sequence
from local_distill._logits import Logits
from local_distill.errors import ShapeError
from local_distill.losses.global_distillation import GlobalDistillationLoss
from local_distill.neighbour_sampler import NeighbourSampler
from local_distill.structures import ViewOutput
from local_distill.targets.centering import Centering

__all__ = ["Adasim", "AdasimTerms", "adasim"]


class AdasimTerms(NamedTuple):
    """What a step's loss is made of.

    Attributes:
        loss: call ``backward`` on it.
        global_loss: the same: whole views are all there is.
    """

    loss: Tensor
    global_loss: Tensor


class Adasim(nn.Module):
    """A step of AdaSim: DINO's loss, and the sampler that watches. Made by `adasim`.

    Args:
        global_loss: with its targets.
        sampler: who says which images are shown together.
    """

    def __init__(self, global_loss: GlobalDistillationLoss, sampler: NeighbourSampler) -> None:
        super().__init__()
        self.global_loss = global_loss
        self.sampler = sampler

    def forward(
        self,
        student: Sequence[ViewOutput],
        teacher: Sequence[ViewOutput],
        *,
        teacher_temp: float,
        index: Tensor,
        features: Tensor,
    ) -> AdasimTerms:
        """The loss of a step; in training with grad enabled the sampler observes it.

        Args:
            student: per view `ViewOutput`, of which ``global_logits`` (b, c) are read. View 0 is of
                the image itself, view 1 of the image that the sampler drew.
            teacher: the same, the teacher's.
            teacher_temp: τ_t, above 0.
            index: (b,) int64, which images view 0 shows.
            features: (b, d), the teacher's backbone features of view 0.

        Returns:
            `AdasimTerms`.

        Raises:
            ShapeError: axes that differ, views without ``global_logits``, bad indices.
            ConfigError: a temperature not above 0.
        """
        loss = self.global_loss(
            _logits("student", student), _logits("teacher", teacher), teacher_temp=teacher_temp
        )
        if self.training and torch.is_grad_enabled():
            self.sampler.observe(index, features)
        return AdasimTerms(loss, loss)


def adasim(
    num_images: int,
    feature_dim: int,
    num_prototypes: int = 65_536,
    *,
    top_k: int = 10,
    votes: int = 50,
    neighbour_temp: float = 0.001,
    student_temp: float = 0.1,
    center_momentum: float = 0.9,
    process_group: dist.ProcessGroup | None = None,
) -> Adasim:
    r"""AdaSim: an image agrees with itself or with a neighbour that it found again and again.

    .. math:: L = \tfrac12 mean_b [H(P(t_{j^*}), s_i) + H(P(t_i), s_{j^*})], \quad
        j^* \sim p(j | i)

    with H the cross-entropy, and p of `NeighbourSampler`: an image that its own features lead back
    to is shown beside one of its voted neighbours, any other beside itself.

    Convention: two views. In a loop: ``partner = recipe.sampler.draw(index)``; view 0 is cut from
    image ``index``, view 1 from image ``partner``; then the step; after each epoch
    ``recipe.sampler.end_epoch()``.

    Args:
        num_images: N, the size of the data set.
        feature_dim: d of the backbone's features.
        num_prototypes: c.
        top_k: k, ``topk``.
        votes: V, ``vote_nn_nb``; so many epochs pass before the first neighbour is shown.
        neighbour_temp: temperature of the choice, ``sampling_softmax_temp``.
        student_temp: τ.
        center_momentum: of the center.
        process_group: the processes over which gradients are averaged; None: all.

    Returns:
        `Adasim`.

    Raises:
        ConfigError: a setting out of its range.

    Example:
        >>> recipe = adasim(num_images=6, feature_dim=4, num_prototypes=8, top_k=3, votes=2)
        >>> index = torch.tensor([4, 1])
        >>> partner = recipe.sampler.draw(index)  # which images to cut view 1 from
        >>> views = [ViewOutput(torch.randn(2, 8)) for _ in range(2)]
        >>> step = recipe(views, views, teacher_temp=0.04, index=index, features=torch.randn(2, 4))
        >>> step.loss.shape
        torch.Size([])
        >>> recipe.sampler.end_epoch()

    Source: "Adaptive Similarity Bootstrapping for Self-Distillation based Representation Learning"
    (AdaSim, ICCV 2023, arXiv 2303.13606). Published: the arguments' defaults; two global views and
    no small ones, teacher temperature 0.04, features of the first view.

    Deviations from the authors' code: none in the loss. Better here: any number of views, where
    theirs takes the first two of however many it is given; the batch size is not a setting; see
    `NeighbourSampler` for its part.
    """
    return Adasim(
        GlobalDistillationLoss(
            Centering(num_prototypes, center_momentum, process_group=process_group),
            student_temp=student_temp,
            process_group=process_group,
        ),
        NeighbourSampler(
            num_images,
            feature_dim=feature_dim,
            top_k=top_k,
            votes=votes,
            temp=neighbour_temp,
            process_group=process_group,
        ),
    )


def _logits(name: str, views: Sequence[ViewOutput]) -> list[Logits]:
    check_sequence(name, views, "a ViewOutput")
    logits = []
    for v, view in enumerate(views):
        if view.global_logits is None:
            raise ShapeError(f"`{name}[{v}]` has no `global_logits`, which this recipe needs")
        logits.append(view.global_logits)
    return logits
